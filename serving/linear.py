"""The student `linear`: logistic regression over TF-IDF features, served as NumPy arrays in the request's own thread.

What it holds is fitted by `distillation.linear_training` and lies in two files of a release:

- `student.npz`: `vocabulary` (uint8, the terms in UTF-8, one a line, words before characters), `words` (how many of
  them are word terms), `idf` (float32[F]), `weights` (float32[F, K]) and `intercept` (float32[K])
- `student.json`: the K answers it can give, and what else such students know (`serving.closed_answers`)

F features, K answers. No pickle: a file from elsewhere can't run code.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping

import numpy as np

from serving.closed_answers import ANSWERS_FILE, AnswerSpace, KnownAnswer, Prediction, TokenEstimate
from serving.errors import DamagedRelease
from serving.exchange import Json, StudentAnswer
from serving.regression import Floats, Regression, check_floats
from serving.sight import Sees, seen_text, unsupported
from serving.student import Failed, unheard
from serving.term_columns import TermColumns
from serving.text_terms import MAX_CHARACTERS

ARRAYS_FILE = "student.npz"
MODEL = "linear"
"""The name under which its answers are logged."""

_DAMPED: Floats = np.log(np.arange(20 * MAX_CHARACTERS, dtype=np.float32).clip(1.0)) + np.float32(1.0)
"""1 + ln(n) of how often a term occurs. Unicode's normal form makes up to 18 characters of one (U+FDFA)."""


class LinearStudent:
    """A fitted linear student. Deterministic: the same text always gives the same bytes."""

    patience_s = math.inf
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
        self._space = AnswerSpace(answers, tokens, sees)
        self.answers = answers
        self.sees: Sees = sees
        self._columns = TermColumns(vocabulary, words)
        self._vocabulary = vocabulary
        self._words = words
        self._idf = idf
        self._regression = Regression(weights, intercept)

    def predict(self, text: str) -> Prediction:
        """The most probable answer to `text`, and how sure the student is of it."""
        return self._space.prediction(self._logits(text))

    def _logits(self, text: str) -> Floats:
        index, count, words = self._columns.count(text)
        values: Floats = _DAMPED.take(count)
        values *= self._idf.take(index)
        # Two blocks of unit length each, then the whole: 1/√2.
        for block in (values[:words], values[words:]):
            if len(block):
                block *= 1.0 / math.sqrt(2.0 * float(block @ block))
        logits: Floats = values @ self._regression.weights.take(index, axis=0)
        logits += self._regression.intercept
        return logits

    async def prepare(self) -> None:
        """Nothing else is needed."""

    def unsupported(self, request: Json) -> str | None:
        """The feature of `request` this student can't serve, or None."""
        return unsupported(request, self.sees)

    async def answer(self, request: Json, *, failed: Failed = unheard) -> StudentAnswer:
        """Answer a supported request, inline: it takes about a tenth of a millisecond."""
        started = time.perf_counter()
        prediction = self.predict(seen_text(request, self.sees))
        latency_s = time.perf_counter() - started
        # Inline: the core does nothing else meanwhile.
        return self._space.answer(request, prediction, model=MODEL, latency_s=latency_s, device_s=latency_s)

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
            weights=self._regression.weights,
            intercept=self._regression.intercept,
        )
        return {ARRAYS_FILE: arrays.getvalue(), ANSWERS_FILE: self._space.dump("linear")}

    @classmethod
    def load(cls, files: Mapping[str, bytes]) -> LinearStudent:
        """Read the files of a release. Raises DamagedRelease for anything that doesn't fit together."""
        try:
            student = cls._read(AnswerSpace.load(files[ANSWERS_FILE]), files[ARRAYS_FILE])
        except DamagedRelease:
            raise
        except Exception as error:  # a damaged archive makes its parsers raise whatever they like
            raise DamagedRelease(
                f"the linear student can't be read: {type(error).__name__}: {error}"
            ) from error
        student._check()
        return student

    @classmethod
    def _read(cls, space: AnswerSpace, data: bytes) -> LinearStudent:
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
                answers=space.answers,
                tokens=space.tokens,
                sees=space.sees,
            )

    def _check(self) -> None:
        features, answers = len(self._vocabulary), len(self.answers)
        if self._idf.shape != (features,) or not 0 <= self._words <= features:
            raise DamagedRelease(
                f"the linear student's arrays don't fit together: {features} terms, {self._words} of them words, "
                f"idf {self._idf.shape}"
            )
        check_floats(self._idf)
        self._regression.check(features, answers, "terms")
