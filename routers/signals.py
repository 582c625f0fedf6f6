"""Signals: what the numbers beside an answer, its form and its request say about how far it can be trusted.

Pure. A signal that can't be computed isn't made up: it is left out, and a confidence that needs it escalates
(`no_signals`).
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import orjson

from routers.schema_fit import fits
from serving.exchange import Json

FLOOR = -30.0
"""The least log-probability: OpenAI writes −9999 for "not among the top ones", which isn't a measured value."""

QUANTILES: tuple[tuple[str, float], ...] = (("q0", 0.0), ("q10", 0.1), ("q25", 0.25), ("q50", 0.5))

_ROUNDING = 1e-3
_SORRY = re.compile(
    r"\W*(i(['’]?m| am) (sorry|unable|not able)|sorry\b(?=,)|i can(not|['’]?t)|as an ai)\b",
    re.IGNORECASE,
)


class TokenSignals:
    """The log-probabilities of one answer's tokens, taken in one at a time, as signals.

    - `q0`, `q10`, `q25`, `q50`: quantiles of the tokens' log-probabilities, interpolated linearly. Sum and mean are
      left out: they say how long an answer is as much as how sure (Gupta et al., arXiv 2404.10136).
    - `first`, `first_margin`: the first token's log-probability, and by how much it exceeds the best alternative's.
    - `mean_entropy`, `max_entropy`: of the top-k alternatives, renormalised, in nats.
    - `tokens`: ln(1 + how many there are).

    The numbers are the same whether an answer comes whole or in pieces. Those that need alternatives are left out as
    soon as one token has none. A log-probability that is missing, positive, NaN, −∞ (then it can't have been chosen) or
    of a wrong type makes the answer untrusted: it has no signals at all from then on.
    """

    def __init__(self, checkpoints: Iterable[int] = ()) -> None:
        self.checkpoints: list[Json] = []
        """What was known at each checkpoint that was reached: {"tokens": n, "signals": {…}}."""
        self._due = sorted(set(checkpoints), reverse=True)
        self._sorted: list[float] = []
        self._first = 0.0
        self._first_margin: float | None = None
        self._entropies = 0.0
        self._most = 0.0
        self._alternatives = True
        self._broken = False

    @property
    def tokens(self) -> int:
        """How many tokens were taken in, those with unusable numbers included."""
        return len(self._sorted)

    def add(self, token: object, logprob: object, top_logprobs: object) -> None:
        """Take in one entry of OpenAI's `logprobs.content`. Never raises; costs a few microseconds."""
        value = _chosen(logprob)
        if value is None:
            self._broken, value = True, FLOOR
        spread = _spread(token, value, top_logprobs)
        if not self._sorted:
            self._first = value
            self._first_margin = None if spread is None else spread[0]
        insort(self._sorted, value)
        if spread is None:
            self._alternatives = False
        else:
            self._entropies += spread[1]
            self._most = max(self._most, spread[1])
        if self._due and len(self._sorted) == self._due[-1]:
            self.checkpoints.append({"tokens": self._due.pop(), "signals": self.signals()})

    def extend(self, content: object) -> None:
        """Take in a list of such entries. Anything else makes the answer untrusted."""
        for entry in content if isinstance(content, list) else [None]:
            match entry:
                case {"token": token, "logprob": logprob, **rest}:
                    self.add(token, logprob, rest.get("top_logprobs"))
                case _:
                    self.add(None, None, None)

    def signals(self, tokens: int | None = None) -> dict[str, float]:
        """The signals of what was taken in; none if it isn't to be trusted, or empty.

        `tokens` is how many the server says there are, where it does: one more may be the end's own; any other number
        means that some are missing.
        """
        count = len(self._sorted)
        if self._broken or count == 0 or (tokens is not None and not 0 <= tokens - count <= 1):
            return {}
        found = {name: _quantile(self._sorted, share) for name, share in QUANTILES}
        found |= {"first": self._first, "tokens": math.log1p(count)}
        if self._alternatives:
            found |= {"mean_entropy": self._entropies / count, "max_entropy": self._most}
            if self._first_margin is not None:
                found["first_margin"] = self._first_margin
        return found


def answer_signals(
    message: Json, finish_reason: str | None, request: Json, known: Collection[str] = ()
) -> dict[str, float]:
    """What an answer's form says: `truncated`, `valid` and `refusal`, each 0 or 1.

    `message` is OpenAI's, whole; or with `finish_reason` None its beginning, which is valid as long as it can still
    become so. Valid: it calls tools of the request with arguments that fit, or its text fits the `response_format` and
    is one of the `known` answers (normal form), where there are any.
    """
    content = message.get("content")
    text = content if isinstance(content, str) else ""
    refused = bool(message.get("refusal")) or _SORRY.match(text) is not None
    whole = finish_reason is not None
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls:
        valid = all(_is_call(call, request, whole) for call in calls)
    else:
        valid = request.get("tool_choice") != "required" or not whole
        valid = valid and _is_form(text, request, whole) and _is_known(text, known, whole)
    return {"truncated": float(finish_reason == "length"), "valid": float(valid), "refusal": float(refused)}


def sample_signals(keys: Sequence[str]) -> dict[str, float]:
    """How far k samples of an answer agree: the modal answer's share, and the entropy of all in nats.

    `keys` are the samples in the normal form the task compares (self-consistency: Wang et al., arXiv 2203.11171;
    semantic entropy: Kuhn et al., arXiv 2302.09664). No samples, no signals.
    """
    if not keys:
        return {}
    shares = [count / len(keys) for count in Counter(keys).values()]
    return {"sample_share": max(shares), "sample_entropy": -sum(share * math.log(share) for share in shares)}


def request_signals(text: str) -> dict[str, float]:
    """What the request alone says, for students that say nothing of themselves: length, lines, kinds of characters."""
    count = max(1, len(text))
    letters = sum(map(str.isalpha, text))
    return {
        "request_length": math.log1p(len(text)),
        "request_lines": math.log1p(text.count("\n")),
        "request_digits": sum(map(str.isdigit, text)) / count,
        "request_capitals": sum(map(str.isupper, text)) / count,
        "request_letters": letters / count,
        "request_foreign": sum(c.isalpha() and not c.isascii() for c in text) / max(1, letters),
    }


def _number(value: object) -> float | None:
    """A log-probability as it is meant: never above 0, never below `FLOOR`; None for what is none."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        return None
    if math.isnan(number) or number > _ROUNDING:
        return None
    return min(0.0, max(FLOOR, number))


def _chosen(value: object) -> float | None:
    return None if value == -math.inf else _number(value)


def _spread(token: object, chosen: float, listed: object) -> tuple[float, float] | None:
    """(margin to the best other alternative, entropy) of one token; None without usable alternatives."""
    if not isinstance(listed, list) or not listed:
        return None
    values: list[float] = []
    best = FLOOR
    for entry in listed:
        if not isinstance(entry, dict):
            return None
        value = _number(entry.get("logprob"))
        if value is None:
            return None
        values.append(value)
        if entry.get("token") != token:
            best = max(best, value)
    odds = [math.exp(value) for value in values]
    total = sum(odds)
    return chosen - best, math.log(total) - sum(p * v for p, v in zip(odds, values, strict=True)) / total


def _quantile(ranked: Sequence[float], share: float) -> float:
    place = share * (len(ranked) - 1)
    low = int(place)
    if low + 1 == len(ranked):
        return ranked[low]
    return ranked[low] + (place - low) * (ranked[low + 1] - ranked[low])


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _is_known(text: str, known: Collection[str], whole: bool) -> bool:
    if not known:
        return True
    said = _normal(text)
    return said in known if whole else any(answer.startswith(said) for answer in known)


def _is_form(text: str, request: Json, whole: bool) -> bool:
    wanted = request.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind not in ("json_object", "json_schema"):
        return bool(text.strip()) or not whole
    if not whole:
        return text.lstrip()[:1] in ("", "{")
    match wanted:
        case {"json_schema": {"schema": schema}}:
            return _is_json(text, schema)
        case _:
            return _is_json(text, {"type": "object"})


def _is_json(text: str, schema: object) -> bool:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return fits(value, schema)


def _is_call(call: object, request: Json, whole: bool) -> bool:
    match call:
        case {"function": {"name": str(name), "arguments": str(arguments)}}:
            tools = request.get("tools")
            for tool in tools if isinstance(tools, list) else []:
                match tool:
                    case {"function": {"name": str(offered), **described}} if offered == name:
                        return not whole or _is_json(
                            arguments, described.get("parameters", {"type": "object"})
                        )
    return False
