"""What is known of a generation at fixed numbers of its tokens, however they were cut into chunks.

By time, or by chunks, what is known at a point would depend on how busy the student's machine is (STATISTICS.md §6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from serving.exchange import Json

_ALMOST_SURE = -1e-12
"""A mean log-probability above this counts as this: log-odds have no end."""
_ROUNDED = 1e-3
"""So much above 0 a log-probability may be by rounding."""


class Meter(Protocol):
    """Makes signals of one answer's tokens (`routers.meter`)."""

    def add(self, token: object, logprob: object, top_logprobs: object) -> None:
        """Take the next token, with OpenAI's fields as the server sent them, whatever they are. Never raises."""
        ...

    def signals(self) -> dict[str, float]:
        """The signals of the tokens so far; none if they aren't to be trusted."""
        ...

    def whole(self, choices: list[Json], tokens: int | None) -> dict[str, float]:
        """The signals of the answer as it is now. `tokens` is how many the server says there are, if it does."""
        ...

    def sampled(self, choices: list[Json], drawn: list[str]) -> dict[str, float]:
        """The signals of an answer by others `drawn` to the same request, in the form they are compared in."""
        ...


Metering = Callable[[Json], Meter]
"""Makes the meter of an answer to a request."""


class Tally:
    """Counts the tokens of one answer, and takes a checkpoint at each of `marks`.

    A checkpoint is `{"tokens", "bytes", "score", "signals"}`; `bytes` is how much text its tokens spell. The
    score is the log-odds of the tokens' mean probability (their geometric mean): it doesn't fall with the answer's
    length as the sum of log-probabilities does, and hardly ever ties (arXiv 2404.10136 on the bias of both; the signals
    hold the quantiles). An answer of which any part came without log-probabilities can't be trusted: score −∞ and no
    signals. So is one with more text than its tokens spell (text may come later than its tokens, where a character is
    more than one, but never earlier).
    """

    def __init__(self, meter: Meter, marks: Sequence[int]) -> None:
        self.tokens = 0
        self.checkpoints: list[Json] = []
        self._meter = meter
        self._marks = frozenset(marks)
        self._total = 0.0
        self._ahead = 0
        self._spelled = 0
        self._sound = True

    def take(self, part: Json) -> list[Json]:
        """Take what a chunk holds of a choice; return the checkpoints that it reached."""
        reached = len(self.checkpoints)
        entries = _entries(part.get("logprobs"))
        self._ahead += _spoken(part.get("delta")) - sum(map(_spelled, entries))
        if self._ahead > 0:
            self._sound = False
        for entry in entries:
            self._spelled += _spelled(entry)
            self._meter.add(entry.get("token"), entry.get("logprob"), entry.get("top_logprobs"))
            self._count(entry.get("logprob"))
        if not entries and _says_something(part.get("delta")):
            self._count(None)
        return self.checkpoints[reached:]

    def whole(self, choices: list[Json], tokens: int | None) -> tuple[float, dict[str, float]]:
        """The score and signals of the answer as it is now. `tokens` is how many the server says there are."""
        return (self._score(), self._meter.whole(choices, tokens)) if self._sound else (-math.inf, {})

    @property
    def sound(self) -> bool:
        """Whether every token so far has come with a log-probability that can be one."""
        return self._sound

    def _count(self, logprob: object) -> None:
        self.tokens += 1
        if isinstance(logprob, int | float) and not isinstance(logprob, bool) and logprob <= _ROUNDED:
            self._total += logprob
        else:
            self._sound = False
        if self.tokens in self._marks:
            signals = self._meter.signals() if self._sound else {}
            self.checkpoints.append(
                {"tokens": self.tokens, "bytes": self._spelled, "score": self._score(), "signals": signals}
            )

    def _score(self) -> float:
        if not self._sound or self.tokens == 0:
            return -math.inf
        mean = min(self._total / self.tokens, _ALMOST_SURE)
        return mean - math.log(-math.expm1(mean))


def _entries(logprobs: object) -> list[Json]:
    """The token entries of a chunk's `logprobs`, text first; what isn't shaped so is none."""
    found: list[Json] = []
    if isinstance(logprobs, dict):
        for name in ("content", "refusal"):
            entries = logprobs.get(name)
            if isinstance(entries, list):
                found += [entry if isinstance(entry, dict) else {} for entry in entries]
    return found


def _spelled(entry: Json) -> int:
    """How many bytes of text a token spells."""
    token, written = entry.get("token"), entry.get("bytes")
    if isinstance(written, list):
        return len(written)
    return len(token.encode("utf-8", "replace")) if isinstance(token, str) else 0


def _spoken(delta: object) -> int:
    """How many bytes of text a chunk holds; calls are left out, whose markup is read out of their tokens."""
    texts = (delta.get("content"), delta.get("refusal")) if isinstance(delta, dict) else ()
    return sum(len(text.encode("utf-8", "replace")) for text in texts if isinstance(text, str))


def _says_something(delta: object) -> bool:
    return isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role")
