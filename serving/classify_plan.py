"""What a release of an `encoder` keeps whose model is served elsewhere: which model it is, and how it is asked."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import orjson

from serving.errors import DamagedRelease
from serving.sight import SIGHTS, Sees
from serving.student_choice import StudentChoice

KIND = "classify"
SCHEMA = 1
PLAN_FILE = "student.json"


@dataclass(frozen=True, slots=True)
class ClassifyPlan:
    """How a classifier behind a vLLM's `/classify` is asked.

    `base_url` is that of the server's OpenAI-compatible part, `/v1` or not: `/classify` lies beside it; None: one of
    `student.vllm` is asked. `api_key_env` names the environment variable with its key, `timeout_s` bounds an answer,
    `sees` is what of a request the classifier gets to see (`serving.sight`). An answer is whole at once: there are no
    checkpoints on the way. `classes` is how many classes the model told apart when it was tested, and `labels` what
    those that it answered with are called, by number; None and none: that isn't known. A model that answers otherwise
    is another.
    """

    base_url: str | None
    model: str
    api_key_env: str | None = None
    timeout_s: float = 30.0
    sees: Sees = "message"
    classes: int | None = None
    labels: tuple[tuple[int, str], ...] = ()

    marks: ClassVar[tuple[int, ...]] = ()
    commit_tokens: ClassVar[int] = 1
    stop_below: ClassVar[float | None] = None

    @classmethod
    def of(cls, choice: StudentChoice) -> ClassifyPlan:
        """The plan that a configuration asks for. Raises ValueError for one that asks for another kind of student."""
        if choice.kind != "encoder" or choice.model is None:
            raise ValueError(f"a student of kind {choice.kind!r} isn't asked by /classify")
        return cls(choice.base_url, choice.model, choice.api_key_env, choice.timeout_s, choice.sees)

    def asked(self) -> dict[str, object]:
        """All that an answer depends on."""
        return {"classify": self.base_url, "model": self.model, "sees": self.sees}

    def files(self) -> dict[str, bytes]:
        """The plan as a file of a release; `load` reads it back."""
        return {PLAN_FILE: orjson.dumps({"kind": KIND, "schema": SCHEMA, **dataclasses.asdict(self)})}

    @classmethod
    def load(cls, files: Mapping[str, bytes]) -> ClassifyPlan:
        """Read what `files` wrote. Raises DamagedRelease for another schema, and for values that ask for nothing."""
        try:
            read = orjson.loads(files[PLAN_FILE])
            if (read["kind"], read["schema"]) != (KIND, SCHEMA):
                raise DamagedRelease(
                    f"{PLAN_FILE} has schema {read['schema']!r} of the kind {read['kind']!r}, this version reads "
                    f"{SCHEMA} of the kind {KIND}"
                )
            read = {"classes": None, "labels": [], **read}  # plans written before don't say
            labels = tuple((index, label) for index, label in read["labels"])
            known = {field.name: read[field.name] for field in dataclasses.fields(cls)}
            plan = cls(**{**known, "labels": labels})
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedRelease(
                f"the served encoder can't be read: {type(error).__name__}: {error} in {PLAN_FILE}"
            ) from error
        wrong = plan._wrong()
        if wrong is not None:
            raise DamagedRelease(f"{PLAN_FILE} has a {wrong} with which no student can be asked")
        return plan

    def _wrong(self) -> str | None:
        """The name of the first field that can't be."""
        timeout = self.timeout_s
        sound = {
            "base_url": self.base_url is None
            or (isinstance(self.base_url, str) and re.match(r"https?://[^/?#]", self.base_url) is not None),
            "model": isinstance(self.model, str) and bool(self.model),
            "api_key_env": self.api_key_env is None or isinstance(self.api_key_env, str),
            "timeout_s": type(timeout) in (int, float) and math.isfinite(timeout) and timeout > 0,
            "sees": self.sees in SIGHTS,
            "classes": self.classes is None or (type(self.classes) is int and self.classes >= 2),
            "labels": self._labels_fit(),
        }
        return next((name for name, fits in sound.items() if not fits), None)

    def _labels_fit(self) -> bool:
        """Whether each is of one class there is, and no two are the same."""
        if not all(
            type(index) is int and 0 <= index < (self.classes or 0) and isinstance(label, str)
            for index, label in self.labels
        ):
            return False
        return all(len({*column}) == len(self.labels) for column in zip(*self.labels, strict=True))
