"""The student `encoder`, served elsewhere: a classifier behind vLLM's pooling runner, asked by `POST /classify`.

It answers with the name of the most probable class. A release holds its plan (`serving.classify_plan`) and nothing of
the model, which is its server's to keep.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import replace

from serving.classification import Classification
from serving.classify_plan import ClassifyPlan
from serving.engines import Engines
from serving.errors import UpstreamRefused, UpstreamTimeout
from serving.estimate import unfinished_usage
from serving.exchange import Json, StudentAnswer
from serving.pool import served_at
from serving.sight import seen_text, unsupported
from serving.student import Failed, unheard
from serving.student_server import Served, StudentBroken

_CLASSIFY = "/classify"
_CHARACTERS_A_TOKEN = 4


class ClassifyStudent:
    """A classifier, asked at `server`, which it owns.

    What its answers show of its classes, how many there are and how they are called, may not change: another model
    answers under the same name then, and what was tested is void. What the plan knows of them holds from the start.
    """

    streams = False

    def __init__(self, plan: ClassifyPlan, server: Served) -> None:
        self.plan = plan
        self.patience_s = plan.timeout_s
        self._server = server
        self._asked = 0
        self._classes = plan.classes
        self._labels = dict(plan.labels)  # at most one for each class

    @classmethod
    def of(cls, plan: ClassifyPlan, engines: Engines | None = None) -> ClassifyStudent:
        """The student of a plan, with its key from the environment. Raises ConfigError as `served_at` does.

        `engines` is what it shares with other students of the process; None: there are none.
        """
        server = served_at(
            plan.base_url and plan.base_url.rstrip("/").removesuffix("/v1"),
            below="",
            timeout_s=plan.timeout_s,
            api_key_env=plan.api_key_env,
            engines=engines or Engines(),
        )
        return cls(plan, server)

    @property
    def busy(self) -> bool:
        """Whether an answer is being made."""
        return self._asked > 0

    async def prepare(self) -> None:
        """Nothing else is needed."""

    def unsupported(self, request: Json) -> str | None:
        """The feature of `request` that a classifier can't serve, or None."""
        return unsupported(request, self.plan.sees)

    async def answer(self, request: Json, *, failed: Failed = unheard) -> StudentAnswer:
        """The answer to a supported request. Raises UpstreamBroken (StudentBroken among them) or UpstreamTimeout."""
        began = time.perf_counter()
        share = self._server.device.begin()
        self._asked += 1
        try:
            found = await self._found(seen_text(request, self.plan.sees))
        except BaseException:  # a cancellation, too: the server was at it
            share.end()
            failed(share.seconds)
            raise
        finally:
            self._asked -= 1
            share.end()
        return StudentAnswer(
            model=self.plan.model,
            choices=[
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": found.label, "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            usage=_usage(request, found.label),
            latency_s=time.perf_counter() - began,
            score=found.score,
            signals=found.signals,
            device_s=share.seconds,
        )

    def tested(self) -> ClassifyPlan:
        """The plan with what the answers have shown of the model's classes: what a release of it keeps."""
        return replace(self.plan, classes=self._classes, labels=tuple(sorted(self._labels.items())))

    def stream(self, request: Json) -> None:
        """None: an answer is whole at once."""

    async def aclose(self) -> None:
        """Close every connection."""
        await self._server.aclose()

    async def _found(self, text: str) -> Classification:
        try:
            async with asyncio.timeout(self.patience_s):
                raw = await self._classified(text)
        except TimeoutError:
            raise UpstreamTimeout(f"the student didn't answer within {self.patience_s:g} s") from None
        found = Classification.read(raw)
        self._check(found)
        return found

    async def _classified(self, text: str) -> bytes:
        try:
            response = await self._server.post(_CLASSIFY, {"model": self.plan.model, "input": text})
        except UpstreamRefused as error:
            raise self._server.refusal(error) from None
        async with response:
            return await response.read()

    def _check(self, found: Classification) -> None:
        classes = self._classes = self._classes or found.classes
        if found.classes != classes:
            raise StudentBroken(
                f"the student tells {found.classes} classes apart, and told {classes} apart before: "
                "is it another model? A new one needs a new name (student.model)"
            )
        known = self._labels.get(found.index)
        if known is None and found.label not in self._labels.values():
            self._labels[found.index] = found.label
        elif known != found.label:
            raise StudentBroken(
                f"the student's most probable class, number {found.index}, is called {found.label[:40]!r}: that isn't "
                "as before; is it another model? A new one needs a new name (student.model)"
            )

    def files(self) -> dict[str, bytes]:
        """The student as files of a release; `load` reads them back."""
        return self.plan.files()

    @classmethod
    def load(cls, files: Mapping[str, bytes]) -> ClassifyStudent:
        """Read what `files` wrote. Raises DamagedRelease, or ConfigError for a key that can't be sent."""
        return cls.of(ClassifyPlan.load(files))


def _usage(request: Json, label: str) -> Json:
    """What the teacher would have used, estimated: a classifier's own tokens are of the text alone."""
    prompt: int = unfinished_usage(request, None)["prompt_tokens"]
    completion = math.ceil(len(label) / _CHARACTERS_A_TOKEN)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
