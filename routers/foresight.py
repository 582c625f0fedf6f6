"""Before the student: how far up its answer will rank, foreseen from the request's text alone.

A linear model over hashed words (feature hashing: Weinberger et al., 2009), fitted by `routers.foresight_fit`. What it
foresees is the *share of the task's traffic that ranks below* the answer the student would give, a number around 0 to
1 that needs neither the student nor a threshold. Below `skip_below` the student isn't asked; a hedge starts the teacher
beside it where an escalation is more likely than not. Plain Python: a short text takes some 10 µs, the longest 0.2 ms.

In a release it is the file `foresight.json`. A release without it asks the student always and hedges nothing.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from routers.confidence import probability
from serving.errors import DamagedRelease
from serving.exchange import Json

FORESIGHT_FILE = "foresight.json"
SCHEMA = 1
BUCKETS = 1024
LENGTH = BUCKETS
"""The feature behind those of the words: how long the text is."""
WIDTH = BUCKETS + 1

MOST_CHARACTERS = 1000
"""What follows isn't read: the time is bounded whatever the client sends."""
_WORD = re.compile(r"\w+")
_LONGEST = math.log1p(MOST_CHARACTERS)
_HEDGED_FROM = 0.5

OWN_S = 2e-5
"""What foreseeing takes, in seconds, on the slow side: what it spares has to be more."""


def last_text(request: Json) -> str:
    """What is read of a request: the text of its last message, `""` where there is none. Never raises."""
    messages = request.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, dict) else None
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return "\n".join(text for text in texts if isinstance(text, str))


def features(text: str) -> dict[int, float]:
    """The features of a text that aren't 0: signed counts of hashed words, of unit length together, and the length.

    A word's sign comes from its hash as well, so that words that meet in a bucket cancel out on average.
    """
    text = text[:MOST_CHARACTERS]
    found: dict[int, float] = {}
    for word, count in Counter(_WORD.findall(text.lower())).items():
        # A lone surrogate is a character that can't be encoded; it may come in from JSON.
        hashed = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        sign = 1.0 if hashed & 0x80000000 else -1.0
        bucket = hashed % BUCKETS
        found[bucket] = found.get(bucket, 0.0) + sign * (1.0 + math.log(count))
    norm = math.sqrt(sum(value * value for value in found.values()))
    if norm > 0.0:
        found = {bucket: value / norm for bucket, value in found.items()}
    found[LENGTH] = math.log1p(len(text)) / _LONGEST
    return found


@dataclass(frozen=True, slots=True)
class Foresight:
    """What one release foresees of a request.

    `weights` has `WIDTH` numbers and `bias` is the model's constant. `slope` > 0 and `offset` turn what is foreseen
    into the probability that the router accepts (Platt, 1999). `skip_below`: with less foreseen the student isn't
    asked; None: it always is. `student_s` is what the student takes on average, in seconds: what skipping spares.
    """

    weights: tuple[float, ...]
    bias: float
    slope: float
    offset: float
    skip_below: float | None
    student_s: float

    def foreseen(self, text: str) -> float:
        """The share of the traffic that will rank below the student's answer to this text, about 0 to 1."""
        weights = self.weights
        return self.bias + sum(weights[place] * value for place, value in features(text).items())

    def escalation(self, text: str) -> float:
        """The probability that the router won't accept the student's answer to this text."""
        return probability(-(self.slope * self.foreseen(text) + self.offset))

    def skips(self, text: str) -> bool:
        """Whether to leave the student unasked."""
        return self.skip_below is not None and self.foreseen(text) < self.skip_below

    def hedges(self, text: str) -> bool:
        """Whether the teacher is worth starting beside the student: an escalation is more likely than not."""
        return self.escalation(text) > _HEDGED_FROM

    def dump(self) -> bytes:
        """The file `foresight.json` of a release."""
        return orjson.dumps(
            {
                "schema": SCHEMA,
                "weights": self.weights,
                "bias": self.bias,
                "slope": self.slope,
                "offset": self.offset,
                "skip_below": self.skip_below,
                "student_s": self.student_s,
            }
        )

    @classmethod
    def load(cls, data: bytes) -> Foresight:
        """Read what `dump` wrote. Raises DamagedRelease for another schema, or for what foresees nothing."""
        try:
            read = orjson.loads(data)
            if read["schema"] != SCHEMA:
                raise DamagedRelease(
                    f"{FORESIGHT_FILE} has schema {read['schema']!r}, this version reads {SCHEMA}"
                )
            if not isinstance(read["weights"], list):
                raise TypeError("weights is no list")
            below = read["skip_below"]
            foresight = cls(
                weights=tuple(map(_number, read["weights"])),
                bias=_number(read["bias"]),
                slope=_number(read["slope"]),
                offset=_number(read["offset"]),
                skip_below=None if below is None else _number(below),
                student_s=_number(read["student_s"]),
            )
        except DamagedRelease:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedRelease(
                f"{FORESIGHT_FILE} can't be read: {type(error).__name__}: {error}"
            ) from error
        if len(foresight.weights) != WIDTH:
            raise DamagedRelease(
                f"{FORESIGHT_FILE} has {len(foresight.weights)} weights, this version has {WIDTH} features"
            )
        if foresight.slope <= 0.0 or foresight.student_s < 0.0:
            raise DamagedRelease(
                f"{FORESIGHT_FILE} has slope {foresight.slope} and student_s {foresight.student_s}; "
                "the one must be > 0, the other not negative"
            )
        return foresight


def read_foresight(files: Mapping[str, bytes]) -> Foresight | None:
    """The foresight of a release, or None: it has none. Raises DamagedRelease."""
    data = files.get(FORESIGHT_FILE)
    return None if data is None else Foresight.load(data)


def _number(value: object) -> float:
    """A JSON number. Raises TypeError for anything else; orjson refuses NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.40} is no number")
    return float(value)
