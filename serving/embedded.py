"""The student `linear` over embeddings: logistic regression on what a frozen sentence encoder makes of a text.

What it holds is fitted by `distillation.embedding_training` and lies in four files of a release:

- `model.onnx` and `tokenizer.json`: the sentence encoder, as it was given (`serving.text_model`)
- `student.npz`: `weights` (float32[F, K]) and `intercept` (float32[K])
- `student.json`: the K answers it can give, and what else such students know (`serving.closed_answers`), with
  `features`: `embedding`

F numbers of an embedding, brought to length 1; K answers.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import orjson

from serving.closed_answers import ANSWERS_FILE, AnswerSpace, KnownAnswer, Prediction
from serving.encoder import EncoderStudent
from serving.engines import MODEL_FILE, TOKENIZER_FILE, Engines
from serving.errors import DamagedRelease
from serving.linear import ARRAYS_FILE
from serving.regression import Floats, Regression
from serving.sight import Sees
from serving.tested_on import tested_on

FEATURES = "embedding"
MODEL = "linear-embedding"
"""The name under which its answers are logged: they take as long as an encoder's."""


class Embedder(Protocol):
    """Makes embeddings of texts: a `serving.text_model.TextModel`, or one that remembers."""

    @property
    def width(self) -> int:
        """How many numbers an embedding has."""
        ...

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers it runs on."""
        ...

    @property
    def runtime(self) -> str:
        """The version of ONNX Runtime."""
        ...

    def numbers(self, text: str) -> Floats:
        """The embedding of one text, float32[F]. Raises TextTooLong."""
        ...


@dataclass(frozen=True, slots=True)
class EmbeddedLinear:
    """A fitted student, as learning needs it. `encoder` are the files of the encoder that `embedder` was made of."""

    space: AnswerSpace
    regression: Regression
    embedder: Embedder
    encoder: Mapping[str, bytes]

    @property
    def answers(self) -> list[KnownAnswer]:
        """The answers it knows."""
        return self.space.answers

    @property
    def sees(self) -> Sees:
        """What of a request it sees."""
        return self.space.sees

    def predict(self, text: str) -> Prediction:
        """The most probable answer to `text`. Raises TextTooLong."""
        return self.space.prediction(embedding_logits(self.regression, self.embedder.numbers(text)))

    def files(self) -> dict[str, bytes]:
        """The student as files of a release."""
        arrays = io.BytesIO()
        tested = tested_on(self.embedder.providers, self.embedder.runtime)
        np.savez_compressed(arrays, weights=self.regression.weights, intercept=self.regression.intercept)
        return {
            **{name: self.encoder[name] for name in (MODEL_FILE, TOKENIZER_FILE)},
            ARRAYS_FILE: arrays.getvalue(),
            ANSWERS_FILE: self.space.dump("linear", features=FEATURES, **tested),
        }


def unit(embedding: Floats) -> Floats:
    """An embedding at length 1, whatever the encoder gives; nothing stays nothing."""
    length = float(np.sqrt(embedding @ embedding))
    made: Floats = embedding * np.float32(1.0 / length if length > 0.0 else 0.0)
    return made


def embedding_logits(regression: Regression, embedding: Floats) -> Floats:
    """The logits, float32[K], of an encoder's embedding, float32[F]."""
    return regression.logits(unit(embedding))


def is_embedded(files: Mapping[str, bytes]) -> bool:
    """Whether a release's `linear` student is one over embeddings. Raises DamagedRelease."""
    try:
        features = orjson.loads(files[ANSWERS_FILE]).get("features", "tfidf")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedRelease(f"{ANSWERS_FILE} can't be read: {type(error).__name__}: {error}") from error
    if features not in ("tfidf", FEATURES):
        raise DamagedRelease(f"{ANSWERS_FILE} has features {features!r}, which this version doesn't know")
    return bool(features == FEATURES)


def embedded_linear(files: Mapping[str, bytes], engines: Engines) -> EmbeddedLinear:
    """The student of a release, with the encoder that it shares. Raises DamagedRelease and ConfigError."""
    model = engines.text_model(files)
    space, regression = read_embedded(files, model.width)
    return EmbeddedLinear(
        space, regression, model, {name: files[name] for name in (MODEL_FILE, TOKENIZER_FILE)}
    )


def embedded_student(files: Mapping[str, bytes], engines: Engines) -> EncoderStudent:
    """The student of a release as it is served: its encoder's embeddings come from a thread of its own.

    Raises DamagedRelease and ConfigError.
    """
    model = engines.text_model(files)
    space, regression = read_embedded(files, model.width)
    return EncoderStudent(space, model, logits=partial(embedding_logits, regression), name=MODEL)


def read_embedded(files: Mapping[str, bytes], width: int) -> tuple[AnswerSpace, Regression]:
    """What a release knows beside its encoder, whose embeddings have `width` numbers. Raises DamagedRelease."""
    try:
        space = AnswerSpace.load(files[ANSWERS_FILE])
        with np.load(io.BytesIO(files[ARRAYS_FILE]), allow_pickle=False) as arrays:
            regression = Regression(arrays["weights"], arrays["intercept"])
        regression.check(width, len(space.answers), "numbers of an embedding")
    except DamagedRelease:
        raise
    except Exception as error:  # a damaged archive makes its parsers raise whatever they like
        raise DamagedRelease(f"the linear student can't be read: {type(error).__name__}: {error}") from error
    return space, regression
