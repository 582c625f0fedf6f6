"""The student `linear`: logistic regression over TF-IDF features, served as NumPy arrays in the request's own thread.

What it holds is fitted by `distillation.linear_training` and lies in two files of a release:

- `student.npz`: `vocabulary` (uint8, the terms in UTF-8, one a line, words before characters), `words` (how many of
  them are word terms), `idf` (float32[F]), `weights` (float32[F, K]) and `intercept` (float32[K])
- `student.json`: the K answers it can give, each in the teacher's own form, how to estimate the teacher's tokens, and
  what of a request it sees (`serving.sight`)

F features, K answers. No pickle: a file from elsewhere can't run code.
"""

from __future__ import annotations

import io
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import orjson
from numpy.typing import NDArray

from serving.errors import DamagedRelease
from serving.exchange import Json, StudentAnswer
from serving.sight import SIGHTS, Sees, seen_text, spoken_characters, unsupported
from serving.text_terms import terms

Floats = NDArray[np.float32]

SCHEMA = 1
SCHEMA_WITH_SIGHT = 2
"""For students that see anything but `message`: a version that doesn't know of that mustn't serve them."""
ARRAYS_FILE = "student.npz"
ANSWERS_FILE = "student.json"


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
    """What the student makes of one text.

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


class LinearStudent:
    """A fitted linear student. Deterministic: the same text always gives the same bytes."""

    patience_s = 5.0
    streams = False
    busy = False

    def __init__(
        self,
        *,
        vocabulary: list[str],
        words: int,
        idf: Floats,
        weights: Floats,
        intercept: Floats,
        answers: list[KnownAnswer],
        tokens: TokenEstimate,
        sees: Sees = "message",
    ) -> None:
        self.answers = answers
        self.sees: Sees = sees
        self._word_columns = {term: column for column, term in enumerate(vocabulary[:words])}
        self._character_columns = {term: words + column for column, term in enumerate(vocabulary[words:])}
        self._vocabulary = vocabulary
        self._words = words
        self._idf = idf
        self._weights = weights
        self._intercept = intercept
        self._tokens = tokens

    def predict(self, text: str) -> Prediction:
        """The most probable answer to `text`, and how sure the student is of it."""
        logits = self._logits(text)
        best = int(logits.argmax())
        if len(logits) == 1:
            return Prediction(index=0, score=0.0, probability=1.0, entropy=0.0, seen=self.answers[0].seen)
        behind: Floats = logits - logits[best]  # log-odds against the best answer: at most 0
        odds = np.exp(behind)
        total = float(odds.sum())
        entropy = math.log(total) - float(odds @ behind) / total
        behind[best] = -math.inf
        return Prediction(
            index=best,
            score=-float(behind.max()),
            probability=1.0 / total,
            entropy=entropy,
            seen=self.answers[best].seen,
        )

    def _logits(self, text: str) -> Floats:
        word_terms, character_terms = terms(text)
        words = Counter(map(self._word_columns.get, word_terms))
        characters = Counter(map(self._character_columns.get, character_terms))
        for counts in (words, characters):
            counts.pop(None, None)  # terms the student has never seen
        size = len(words) + len(characters)
        index = np.fromiter(chain(words, characters), dtype=np.intp, count=size)
        count = np.fromiter(chain(words.values(), characters.values()), dtype=np.float32, count=size)
        values: Floats = np.log(count)
        values += 1.0
        values *= self._idf[index]
        # Two blocks of unit length each, then the whole: 1/√2.
        for block in (values[: len(words)], values[len(words) :]):
            if len(block):
                block *= 1.0 / math.sqrt(2.0 * float(block @ block))
        logits: Floats = values @ self._weights[index] + self._intercept
        return logits

    def unsupported(self, request: Json) -> str | None:
        """The feature of `request` this student can't serve, or None."""
        return unsupported(request, self.sees)

    async def answer(self, request: Json) -> StudentAnswer:
        """Answer a supported request, inline: it takes about a tenth of a millisecond."""
        started = time.perf_counter()
        prediction = self.predict(seen_text(request, self.sees))
        known = self.answers[prediction.index]
        prompt_tokens = self._tokens.prompt_tokens(spoken_characters(request))
        return StudentAnswer(
            model="linear",
            choices=known.choices,
            usage={
                "prompt_tokens": prompt_tokens,
                "completion_tokens": known.completion_tokens,
                "total_tokens": prompt_tokens + known.completion_tokens,
            },
            latency_s=time.perf_counter() - started,
            score=prediction.score,
            signals=prediction.signals,
        )

    def stream(self, request: Json) -> None:
        """None: an answer is whole at once."""

    async def aclose(self) -> None:
        """Nothing to give back."""

    def files(self) -> dict[str, bytes]:
        """The student as files of a release; `load` reads them back."""
        arrays = io.BytesIO()
        np.savez_compressed(
            arrays,
            vocabulary=np.frombuffer("\n".join(self._vocabulary).encode(), dtype=np.uint8),
            words=np.int64(self._words),
            idf=self._idf,
            weights=self._weights,
            intercept=self._intercept,
        )
        sight = {} if self.sees == "message" else {"sees": self.sees}
        answers = {
            "schema": SCHEMA_WITH_SIGHT if sight else SCHEMA,
            "kind": "linear",
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
            "tokens": {"fixed": self._tokens.fixed, "per_character": self._tokens.per_character},
        }
        return {ARRAYS_FILE: arrays.getvalue(), ANSWERS_FILE: orjson.dumps(answers)}

    @classmethod
    def load(cls, files: Mapping[str, bytes]) -> LinearStudent:
        """Read the files of a release. Raises DamagedRelease for anything that doesn't fit together."""
        try:
            student = cls._read(orjson.loads(files[ANSWERS_FILE]), files[ARRAYS_FILE])
        except DamagedRelease:
            raise
        except Exception as error:  # a damaged archive makes its parsers raise whatever they like
            raise DamagedRelease(
                f"the linear student can't be read: {type(error).__name__}: {error}"
            ) from error
        student._check()
        return student

    @classmethod
    def _read(cls, described: Json, data: bytes) -> LinearStudent:
        if described["schema"] not in (SCHEMA, SCHEMA_WITH_SIGHT):
            raise DamagedRelease(
                f"{ANSWERS_FILE} has schema {described['schema']!r}, this version reads up to {SCHEMA_WITH_SIGHT}"
            )
        sees = "message" if described["schema"] == SCHEMA else described["sees"]
        if sees not in SIGHTS:
            raise DamagedRelease(f"{ANSWERS_FILE} sees {sees!r}, this version knows {', '.join(SIGHTS)}")
        tokens = described["tokens"]
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(
                vocabulary=arrays["vocabulary"]
                .astype(np.uint8, casting="equiv")
                .tobytes()
                .decode()
                .split("\n"),
                words=int(arrays["words"]),
                idf=arrays["idf"],
                weights=arrays["weights"],
                intercept=arrays["intercept"],
                answers=[
                    # Releases of before it counted have no confidence that asks for it.
                    KnownAnswer(a["key"], a["choices"], int(a["completion_tokens"]), int(a.get("seen", 0)))
                    for a in described["answers"]
                ],
                tokens=TokenEstimate(float(tokens["fixed"]), float(tokens["per_character"])),
                sees=sees,
            )

    def _check(self) -> None:
        features, answers = len(self._vocabulary), len(self.answers)
        arrays = (self._idf, self._weights, self._intercept)
        if (
            answers == 0
            or self._idf.shape != (features,)
            or self._weights.shape != (features, answers)
            or self._intercept.shape != (answers,)
            or not 0 <= self._words <= features
        ):
            raise DamagedRelease(
                f"the linear student's arrays don't fit together: {features} terms, {answers} answers, "
                f"weights {self._weights.shape}, intercept {self._intercept.shape}"
            )
        if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays):
            raise DamagedRelease("the linear student's arrays should hold finite 32-bit floats only")
        if not (math.isfinite(self._tokens.fixed) and math.isfinite(self._tokens.per_character)):
            raise DamagedRelease(f"{ANSWERS_FILE} estimates tokens by {self._tokens}")
        for answer in self.answers:
            if not (isinstance(answer.key, str) and _are_choices(answer.choices) and answer.seen >= 0):
                raise DamagedRelease(f"{ANSWERS_FILE} holds something that isn't an answer: {answer}")


def _are_choices(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(choice, dict) for choice in value)
