"""What a teacher's answer cost: from its model's name and its usage, without asking anybody.

Prices come from the configuration or from the list shipped inside the package `genai-prices`, which is never
updated over the network. Its own calculation takes 40 to 170 µs, too long for every request, so what it
knows about a model is looked up once and then applied here (the tests compare the two for every model of the
list).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeGuard

from serving.exchange import Json
from serving.teacher_settings import Price

if TYPE_CHECKING:
    from genai_prices.types import ModelPrice, TieredPrices

_MTOK = 1_000_000
_REMEMBERED_MODELS = 1000
_REMEMBER_S = 600.0
_LONGEST_NAME = 256


class PriceList:
    """Prices of models in USD.

    `override` wins over the list for every model. `base_url` tells whose prices apply where several
    providers sell the same model; without it, or for a base URL the list doesn't know, the model's name
    decides.
    """

    def __init__(self, override: Price | None, *, base_url: str | None = None) -> None:
        self._override = _Rates.of_config(override) if override is not None else None
        self._version = "config" if override is not None else f"genai-prices {version('genai-prices')}"
        self._book = None if override is not None else _Book(base_url)

    def cost(
        self, model: str, usage: Json | None, *, service_tier: str | None = None
    ) -> tuple[float | None, str]:
        """USD of one answer with OpenAI's `usage`, and the version of the prices used.

        None when the model's price or the usage isn't known, or the usage makes no sense. `service_tier` is
        the one in the answer (`flex`, `priority`, …), where the list has prices of its own for it.
        """
        tokens = _Tokens.of(usage)
        if tokens is None:
            return None, self._version
        rates = self._override
        if self._book is not None:
            rates = self._book.rates(model, service_tier)
        return (None if rates is None else rates.cost(tokens)), self._version


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What is billed. Reasoning tokens are part of `output`, cached and audio tokens of their side."""

    input: int
    output: int
    cached: int
    audio_in: int
    audio_out: int

    @classmethod
    def of(cls, usage: Json | None) -> _Tokens | None:
        if usage is None:
            return None
        asked, answered = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
        if not _is_count(asked) or not _is_count(answered):
            return None
        if "prompt_tokens_details" not in usage and "completion_tokens_details" not in usage:
            return cls(asked, answered, 0, 0, 0)
        cached = min(_detail(usage, "prompt_tokens_details", "cached_tokens"), asked)
        audio_in = min(_detail(usage, "prompt_tokens_details", "audio_tokens"), asked - cached)
        audio_out = min(_detail(usage, "completion_tokens_details", "audio_tokens"), answered)
        return cls(asked, answered, cached, audio_in, audio_out)


@dataclass(frozen=True, slots=True)
class _Rate:
    """USD per token by the number of input tokens: steps are (more than, USD per token), highest first."""

    base: float
    steps: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of_list(cls, price: Decimal | TieredPrices | None) -> _Rate | None:
        if price is None:
            return None
        if isinstance(price, Decimal):
            return cls(float(price) / _MTOK)
        steps = tuple((tier.start, float(tier.price) / _MTOK) for tier in reversed(price.tiers))
        return cls(float(price.base) / _MTOK, steps)

    def at(self, input_tokens: int) -> float:
        for more_than, rate in self.steps:
            if input_tokens > more_than:
                return rate
        return self.base


_FREE = _Rate(0.0)


@dataclass(frozen=True, slots=True)
class _Rates:
    input: _Rate
    output: _Rate
    cached: _Rate
    audio_in: _Rate
    audio_out: _Rate
    request: float = 0.0

    @classmethod
    def of_config(cls, price: Price) -> _Rates:
        asked, answered = _Rate(price.input / _MTOK), _Rate(price.output / _MTOK)
        cached = asked if price.cached_input is None else _Rate(price.cached_input / _MTOK)
        return cls(asked, answered, cached, asked, answered)

    @classmethod
    def of_list(cls, price: ModelPrice) -> _Rates:
        asked = _Rate.of_list(price.input_mtok) or _FREE
        answered = _Rate.of_list(price.output_mtok) or _FREE
        per_thousand = price.requests_kcount
        return cls(
            asked,
            answered,
            _Rate.of_list(price.cache_read_mtok) or asked,
            _Rate.of_list(price.input_audio_mtok) or asked,
            _Rate.of_list(price.output_audio_mtok) or answered,
            float(per_thousand) / 1000 if isinstance(per_thousand, Decimal) else 0.0,
        )

    def cost(self, tokens: _Tokens) -> float:
        size = tokens.input
        if not (tokens.cached or tokens.audio_in or tokens.audio_out):
            return size * self.input.at(size) + tokens.output * self.output.at(size) + self.request
        return (
            (size - tokens.cached - tokens.audio_in) * self.input.at(size)
            + tokens.cached * self.cached.at(size)
            + tokens.audio_in * self.audio_in.at(size)
            + (tokens.output - tokens.audio_out) * self.output.at(size)
            + tokens.audio_out * self.audio_out.at(size)
            + self.request
        )


class _Book:
    """The shipped list, and the rates of models met so far: bounded, since clients make up model names."""

    def __init__(self, base_url: str | None) -> None:
        # Imported here: it takes 0.2 s, which a gateway with configured prices doesn't have to wait.
        from genai_prices.data import providers

        self._base_url = base_url
        self._providers = providers
        self._known: dict[tuple[str, str | None], tuple[float, _Rates | None]] = {}

    def rates(self, model: str, service_tier: str | None) -> _Rates | None:
        key = (model, service_tier)
        now = time.monotonic()
        known = self._known.get(key)
        if known is None or now > known[0]:
            if len(self._known) >= _REMEMBERED_MODELS:
                self._known.clear()
            # Some prices depend on the date or the time of the day.
            known = self._known[key] = (now + _REMEMBER_S, self._look_up(model, service_tier))
        return known[1]

    def _look_up(self, model: str, service_tier: str | None) -> _Rates | None:
        from genai_prices import Usage
        from genai_prices.data_snapshot import DataSnapshot

        if len(model) > _LONGEST_NAME:
            return None
        # A snapshot of its own, since the shared one remembers every name it was ever asked for.
        snapshot = DataSnapshot(providers=self._providers, from_auto_update=False)
        context = {"service_tier": service_tier} if service_tier else None
        prefix, slash, rest = model.partition("/")
        places: list[tuple[str, str | None, str | None]] = [(model, None, None)]
        if self._base_url is not None:
            places.insert(0, (model, None, self._base_url))
        if slash:
            places.append((rest, prefix, None))
        for name, provider, url in places:
            try:
                found = snapshot.calc(Usage(input_tokens=1), name, provider, url, None, context)
            except LookupError:
                continue
            return _Rates.of_list(found.model_price)
        return None


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _detail(usage: Json, group: str, name: str) -> int:
    details = usage.get(group)
    value = details.get(name) if isinstance(details, dict) else None
    return value if _is_count(value) else 0
