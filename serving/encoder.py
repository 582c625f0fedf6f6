"""The student `encoder` in process: a transformer encoder with a classification head, on ONNX Runtime.

What it holds are three files of a release: `model.onnx` and `tokenizer.json` (`serving.text_model`), which make a
logit of each answer, and `student.json`, the answers (`serving.closed_answers`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from serving.closed_answers import ANSWERS_FILE, AnswerSpace, Floats, KnownAnswer, Prediction
from serving.engines import MODEL_FILE, TOKENIZER_FILE, Engines
from serving.errors import DamagedRelease
from serving.exchange import Json, StudentAnswer
from serving.sight import Sees, seen_text, unsupported
from serving.student import Failed, unheard
from serving.tested_on import tested_on
from serving.text_thread import LIMIT, TextThread

if TYPE_CHECKING:
    from serving.text_model import TextModel

KIND = "encoder"


class Encoder:
    """The student as learning sees it: predicts in the caller's thread, one text at a time, and can be kept."""

    def __init__(self, space: AnswerSpace, model: TextModel, files: Mapping[str, bytes]) -> None:
        self._space = space
        self._model = model
        self._files = {name: files[name] for name in (MODEL_FILE, TOKENIZER_FILE)}

    @classmethod
    def of(cls, space: AnswerSpace, files: Mapping[str, bytes], engines: Engines) -> Encoder:
        """The student of a model in files, which gives a logit of each answer of `space`. Raises DamagedRelease."""
        return cls(space, _model(space, files, engines), files)

    @property
    def answers(self) -> list[KnownAnswer]:
        """The answers it knows."""
        return self._space.answers

    @property
    def sees(self) -> Sees:
        """What of a request it sees."""
        return self._space.sees

    def predict(self, text: str) -> Prediction:
        """The most probable answer to `text`, and how sure the student is of it. Raises TextTooLong."""
        return self._space.prediction(self._model.numbers(text))

    def files(self) -> dict[str, bytes]:
        """The student as files of a release; `load` reads them back."""
        tested = tested_on(self._model.providers, self._model.runtime)
        return {**self._files, ANSWERS_FILE: self._space.dump(KIND, **tested)}

    @classmethod
    def load(cls, files: Mapping[str, bytes], engines: Engines) -> Encoder:
        """Read the files of a release. Raises DamagedRelease for anything that doesn't fit together."""
        return cls.of(_space(files), files, engines)


class EncoderStudent:
    """The same as it is served: in a thread of its own, with a line before it that has an end.

    Deterministic but for the last bits of what is read together, which only a model of 32 bits does. `logits` makes a
    logit of each answer of what the model gives, where that isn't one; its answers are logged under `name`.
    """

    patience_s = 5.0
    streams = False

    def __init__(
        self,
        space: AnswerSpace,
        model: TextModel,
        *,
        logits: Callable[[Floats], Floats] = lambda numbers: numbers,
        name: str = KIND,
        limit: int = LIMIT,
    ) -> None:
        self._space = space
        self._logits = logits
        self._name = name
        self._texts = TextThread(model, limit=limit)

    @property
    def busy(self) -> bool:
        """Whether an answer is being made."""
        return self._texts.busy

    async def prepare(self) -> None:
        """Nothing else is needed."""

    def unsupported(self, request: Json) -> str | None:
        """The feature of `request` this student can't serve, or None. How long it is turns out when it is read."""
        return unsupported(request, self._space.sees)

    async def answer(self, request: Json, *, failed: Failed = unheard) -> StudentAnswer:
        """Answer a supported request. Raises StudentBusy, TextTooLong, UnreadableText, and what the model raises."""
        began = time.perf_counter()
        read = await self._texts.read(seen_text(request, self._space.sees))
        return self._space.answer(
            request,
            self._space.prediction(self._logits(read.numbers)),
            model=self._name,
            latency_s=time.perf_counter() - began,
            device_s=read.device_s,
        )

    def stream(self, request: Json) -> None:
        """None: an answer is whole at once."""

    async def aclose(self) -> None:
        """End its thread."""
        await self._texts.aclose()

    @classmethod
    def load(cls, files: Mapping[str, bytes], engines: Engines) -> EncoderStudent:
        """Read the files of a release. Raises DamagedRelease for anything that doesn't fit together."""
        space = _space(files)
        return cls(space, _model(space, files, engines))


def _space(files: Mapping[str, bytes]) -> AnswerSpace:
    if ANSWERS_FILE not in files:
        raise DamagedRelease(f"the release holds no {ANSWERS_FILE}")
    return AnswerSpace.load(files[ANSWERS_FILE])


def _model(space: AnswerSpace, files: Mapping[str, bytes], engines: Engines) -> TextModel:
    model = engines.text_model(files)
    if model.width != len(space.answers):
        raise DamagedRelease(
            f"{MODEL_FILE} tells {model.width} answers from each other, and {ANSWERS_FILE} has {len(space.answers)}: "
            "one of them is another model's"
        )
    return model
