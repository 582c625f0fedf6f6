"""The system prompts of the traffic that no rule names: what `understudy tasks` looks for templates in."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import orjson

from serving.chat import system_text
from serving.exchange import Exchange
from serving.fingerprint import mask
from serving.rules import Rules

MOST_PROMPTS = 5_000
MOST_CHARACTERS = 8_000_000
LONGEST_PROMPT = 32 * 1024


@dataclass(slots=True)
class Prompt:
    """One masked system prompt under one model, tools and response format, and the traffic it came with.

    `text` is one of the texts it was masked from, `words` are the masked ones, `setting` stands for tools and response
    format, `tasks` counts the requests by the task they were logged under.
    """

    model: str
    setting: str
    text: str
    words: tuple[str, ...]
    tasks: Counter[str] = field(default_factory=Counter)
    cost_usd: float = 0.0


class Prompts:
    """Gathers prompts: the first 5,000 different ones or 8 million characters, none longer than 32 Ki characters.

    A request that a rule of the configuration names has its task, wherever it was logged before there was the rule:
    `named` counts those by the task they were logged under.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.named: Counter[str] = Counter()
        self._known: dict[tuple[str, str, str], Prompt] = {}
        self._masked: dict[str, str] = {}
        self._characters = 0

    def add(self, task: str, exchanges: Iterable[tuple[Exchange, float]]) -> None:
        """Take in a task's exchanges, each with what it cost in USD."""
        for exchange, usd in exchanges:
            request = exchange.request
            if self._rules.task_of(request, None) is not None:
                self.named[task] += 1
                continue
            text = system_text(request)
            model = request.get("model")
            if not text or len(text) > LONGEST_PROMPT or not isinstance(model, str):
                continue
            setting = _setting(
                request.get("tools") or request.get("functions"), request.get("response_format")
            )
            masked = self._mask(text)
            prompt = self._known.get((model, setting, masked))
            if prompt is None:
                if len(self._known) >= MOST_PROMPTS or self._characters >= MOST_CHARACTERS:
                    continue
                self._characters += len(text)
                prompt = Prompt(model, setting, text, tuple(masked.split()))
                self._known[model, setting, masked] = prompt
            prompt.tasks[task] += 1
            prompt.cost_usd += usd

    def _mask(self, text: str) -> str:
        """Mask a text; most prompts come again word for word, and masking takes longer than reading the log does."""
        masked = self._masked.get(text)
        if masked is None:
            masked = mask(text)
            if len(self._masked) < MOST_PROMPTS and self._characters < MOST_CHARACTERS:
                self._masked[text] = masked
        return masked

    def all(self) -> list[Prompt]:
        """Every prompt, in the order they were seen."""
        return list(self._known.values())


def _setting(tools: object, response_format: object) -> str:
    if not tools and not response_format:
        return ""
    described = orjson.dumps([tools, response_format], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(described).hexdigest()[:12]
