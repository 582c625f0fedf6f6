"""Closed answer spaces: students that choose among answers they know, whatever computes the choice.

Such a student makes K numbers of a text, the logits, one for each answer it knows. What follows from them is the same
for all of these students, and so is the file of a release that says what they know, `student.json`: the answers, each
in the teacher's own form, how to estimate the teacher's tokens, and what of a request the student sees
(`serving.sight`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from serving.errors import DamagedRelease, UnderstudyError
from serving.exchange import Json, StudentAnswer
from serving.sight import SIGHTS, Sees, spoken_characters

Floats = NDArray[np.float32]

SCHEMA = 1
SCHEMA_WITH_SIGHT = 2
"""For students that see anything but `message`: a version that doesn't know of that mustn't serve them."""
ANSWERS_FILE = "student.json"


class TextTooLong(UnderstudyError):
    """A text has more than the student can read. Such a request is none that it supports (`length`)."""


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """One of the answers a closed answer space has.

    `key` is its normal form under the task's agreement, `choices` what the teacher most often wrote for it and
    `completion_tokens` how many tokens that cost there. `seen`: how many texts with this answer the student was fitted
    to.
    """

    key: str
    choices: list[Json]
    completion_tokens: int
    seen: int = 0


@dataclass(frozen=True, slots=True)
class TokenEstimate:
    """The teacher's prompt tokens for a request: `fixed + per_character × characters`, fitted on the log's usage.

    The characters are those of all turns (`serving.sight.spoken_characters`), whatever the student sees of them.
    """

    fixed: float
    per_character: float

    def prompt_tokens(self, characters: int) -> int:
        """The estimate for one request, in tokens."""
        return max(0, round(self.fixed + self.per_character * characters))


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a student makes of one text.

    `index` is the answer's place among the known ones. `score` ranks how sure the student is: the margin between the
    two largest log-odds, which doesn't saturate as probabilities do, so it doesn't tie.
    """

    index: int
    score: float
    probability: float
    entropy: float
    seen: int = 0

    @property
    def signals(self) -> dict[str, float]:
        """What the student says of itself beside its score: ln(1 + seen) is how near its answer is to its training."""
        return {"probability": self.probability, "entropy": self.entropy, "seen": math.log1p(self.seen)}


class ClosedStudent(Protocol):
    """A student with a closed answer space, as learning needs it: what it says to a text, and how to keep it."""

    @property
    def answers(self) -> list[KnownAnswer]:
        """The answers it knows."""
        ...

    @property
    def sees(self) -> Sees:
        """What of a request it sees."""
        ...

    def predict(self, text: str) -> Prediction:
        """The most probable answer to what it sees of a request: the same as would be served, byte for byte.

        Raises TextTooLong where a request wouldn't be supported for its length.
        """
        ...

    def files(self) -> dict[str, bytes]:
        """The student as files of a release."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerSpace:
    """What a student of this kind knows beside its model: K answers, the teacher's tokens, and what it sees."""

    answers: list[KnownAnswer]
    tokens: TokenEstimate
    sees: Sees = "message"

    def prediction(self, logits: Floats) -> Prediction:
        """What finite logits, float32[K], say of a text."""
        best = int(logits.argmax())
        if len(logits) == 1:
            return Prediction(index=0, score=0.0, probability=1.0, entropy=0.0, seen=self.answers[0].seen)
        behind: Floats = logits - logits[best]  # log-odds against the best answer: at most 0
        odds = np.exp(behind)
        total = float(np.add.reduce(odds))
        entropy = math.log(total) - float(odds @ behind) / total
        behind[best] = -math.inf
        return Prediction(
            index=best,
            score=-float(np.maximum.reduce(behind)),
            probability=1.0 / total,
            entropy=entropy,
            seen=self.answers[best].seen,
        )

    def answer(
        self, request: Json, prediction: Prediction, *, model: str, latency_s: float, device_s: float
    ) -> StudentAnswer:
        """The predicted answer to a request, by the student that `model` names.

        It took `latency_s`, and `device_s` of what it runs on: its share, where several are answered together.
        """
        known = self.answers[prediction.index]
        prompt_tokens = self.tokens.prompt_tokens(spoken_characters(request))
        return StudentAnswer(
            model=model,
            choices=known.choices,
            usage={
                "prompt_tokens": prompt_tokens,
                "completion_tokens": known.completion_tokens,
                "total_tokens": prompt_tokens + known.completion_tokens,
            },
            latency_s=latency_s,
            score=prediction.score,
            signals=prediction.signals,
            device_s=device_s,
        )

    def dump(self, kind: str, **more: object) -> bytes:
        """Write it all as the file `student.json` of a student of this kind, which may want to keep `more`."""
        sight = {} if self.sees == "message" else {"sees": self.sees}
        return orjson.dumps(
            {
                "schema": SCHEMA_WITH_SIGHT if sight else SCHEMA,
                "kind": kind,
                **sight,
                "answers": [
                    {
                        "key": a.key,
                        "choices": a.choices,
                        "completion_tokens": a.completion_tokens,
                        "seen": a.seen,
                    }
                    for a in self.answers
                ],
                "tokens": {"fixed": self.tokens.fixed, "per_character": self.tokens.per_character},
                **more,
            }
        )

    @classmethod
    def load(cls, data: bytes) -> AnswerSpace:
        """Read what `dump` wrote. Raises DamagedRelease for anything that isn't."""
        try:
            space = cls._read(orjson.loads(data))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise DamagedRelease(f"{ANSWERS_FILE} can't be read: {type(error).__name__}: {error}") from error
        space._check()
        return space

    @classmethod
    def _read(cls, described: Json) -> AnswerSpace:
        if described["schema"] not in (SCHEMA, SCHEMA_WITH_SIGHT):
            raise DamagedRelease(
                f"{ANSWERS_FILE} has schema {described['schema']!r}, this version reads up to {SCHEMA_WITH_SIGHT}"
            )
        sees = "message" if described["schema"] == SCHEMA else described["sees"]
        if sees not in SIGHTS:
            raise DamagedRelease(f"{ANSWERS_FILE} sees {sees!r}, this version knows {', '.join(SIGHTS)}")
        tokens = described["tokens"]
        return cls(
            answers=[
                # Releases of before it counted have no confidence that asks for it.
                KnownAnswer(a["key"], a["choices"], int(a["completion_tokens"]), int(a.get("seen", 0)))
                for a in described["answers"]
            ],
            tokens=TokenEstimate(float(tokens["fixed"]), float(tokens["per_character"])),
            sees=sees,
        )

    def _check(self) -> None:
        if not self.answers:
            raise DamagedRelease(f"{ANSWERS_FILE} holds no answers")
        if not (math.isfinite(self.tokens.fixed) and math.isfinite(self.tokens.per_character)):
            raise DamagedRelease(f"{ANSWERS_FILE} estimates tokens by {self.tokens}")
        for answer in self.answers:
            if not (isinstance(answer.key, str) and _are_choices(answer.choices) and answer.seen >= 0):
                raise DamagedRelease(f"{ANSWERS_FILE} holds something that isn't an answer: {answer}")


def kind_of(files: Mapping[str, bytes]) -> str:
    """The kind of student that a release's files say they hold. Raises DamagedRelease."""
    try:
        return str(orjson.loads(files[ANSWERS_FILE])["kind"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedRelease(f"{ANSWERS_FILE} doesn't say what kind of student it is: {error}") from error


def _are_choices(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(choice, dict) for choice in value)
