"""What a release of an `lm` student keeps: which model it is, how it is asked, and where its answers are judged.

A release was tested with these, so that they are part of it: what the configuration says today acts with the next one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from serving.adapter import NAME
from serving.errors import DamagedRelease
from serving.exchange import Json
from serving.student_choice import StudentChoice

SCHEMA = 1
_WITH_ADAPTER = 2
"""The schema of a plan with an adapter: a version that doesn't know of adapters must not ask the base model instead."""
PLAN_FILE = "student.json"

_SINCE: Json = {"adapter": None}
"""Fields that older plans don't have."""
_MOST_SAMPLES = 20
_MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class LmPlan:
    """How a model behind an OpenAI-compatible `base_url` is asked and judged; None: at the servers of `student.vllm`.

    `api_key_env` names the environment variable with its key. At `checkpoints` and at `commit_tokens`, all counted
    in the model's own tokens, signals are taken; a streamed answer is judged at `commit_tokens`, or at its end if that
    comes first. `stop_below` is the rank below which a generation is given up at a checkpoint before that (None:
    never). A streamed request waits `hold_back_s` seconds at most for the judgement; `timeout_s` bounds a whole
    answer, and every silence. `max_tokens` bounds an answer; `top_logprobs` alternatives of each token are asked for.
    With `samples`, for servers that give no log-probabilities, so many more answers are drawn to tell how sure it is
    (`serving.sampled_stream`), and there are no checkpoints. `adapter` names the LoRA adapter (`serving.adapter`) that
    makes `model` this student; its files are beside the plan.
    """

    base_url: str | None
    model: str
    api_key_env: str | None = None
    checkpoints: tuple[int, ...] = (8, 24, 64)
    commit_tokens: int = 64
    stop_below: float | None = None
    hold_back_s: float = 1.0
    timeout_s: float = 30.0
    max_tokens: int = 1024
    top_logprobs: int = 5
    samples: int = 0
    adapter: str | None = None

    @classmethod
    def of(cls, choice: StudentChoice, adapter: str | None = None) -> LmPlan:
        """The plan that a configuration asks for, before anything was learned about it.

        `adapter` is the name of the one that `choice` says where to find. Raises ValueError for a choice that asks for
        another kind of student, or where there is an adapter in one of the two only.
        """
        if (choice.adapter is None) != (adapter is None):
            raise ValueError("an adapter is chosen and named, or there is none")
        if choice.kind != "lm" or choice.model is None:
            raise ValueError(f"a student of kind {choice.kind!r} isn't asked over HTTP")
        return cls(
            base_url=choice.base_url,
            model=choice.model,
            api_key_env=choice.api_key_env,
            checkpoints=tuple(sorted(set(choice.checkpoints))),
            commit_tokens=choice.commit_tokens,
            hold_back_s=choice.hold_back_s,
            timeout_s=choice.timeout_s,
            max_tokens=choice.max_tokens,
            top_logprobs=choice.top_logprobs,
            samples=choice.samples,
            adapter=adapter,
        )

    @property
    def served_as(self) -> str:
        """The model's name at its server."""
        return self.model if self.adapter is None else self.adapter

    @property
    def marks(self) -> tuple[int, ...]:
        """The numbers of tokens at which signals are taken, increasing."""
        return tuple(sorted({*self.checkpoints, self.commit_tokens}))

    def asked(self) -> dict[str, object]:
        """All that an answer, and what is known of it on the way, depends on; not where it is judged."""
        return {
            "base_url": self.base_url,
            "model": self.model,
            "marks": self.marks,
            "max_tokens": self.max_tokens,
            "top_logprobs": self.top_logprobs,
            "samples": self.samples,
            **({} if self.adapter is None else {"adapter": self.adapter}),
        }

    def files(self) -> dict[str, bytes]:
        """The plan as a file of a release; `load` reads it back."""
        written = {"kind": "lm", "schema": self._schema(), **dataclasses.asdict(self)}
        return {PLAN_FILE: orjson.dumps(written)}

    def _schema(self) -> int:
        return SCHEMA if self.adapter is None else _WITH_ADAPTER

    @classmethod
    def load(cls, files: Mapping[str, bytes]) -> LmPlan:
        """Read what `files` wrote. Raises DamagedRelease for another schema, and for values that ask for nothing."""
        try:
            read = orjson.loads(files[PLAN_FILE])
            if read["kind"] != "lm":
                raise DamagedRelease(f"{PLAN_FILE} holds a student of kind {read['kind']!r}, not 'lm'")
            if read["schema"] not in (SCHEMA, _WITH_ADAPTER):
                raise DamagedRelease(
                    f"{PLAN_FILE} has schema {read['schema']!r}, this version reads {SCHEMA} and {_WITH_ADAPTER} "
                    "of the kind lm"
                )
            read = {**_SINCE, **read}
            fields = {field.name: read[field.name] for field in dataclasses.fields(cls)}
            plan = cls(**{**fields, "checkpoints": tuple(fields["checkpoints"])})
        except DamagedRelease:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedRelease(
                f"the lm student can't be read: {type(error).__name__}: {error} in {PLAN_FILE}"
            ) from error
        wrong = plan._wrong() or ("adapter" if read["schema"] != plan._schema() else None)
        if wrong is not None:
            raise DamagedRelease(
                f"{PLAN_FILE} has {wrong}={_shown(plan, wrong)}, with which no student can be asked"
            )
        return plan

    def _wrong(self) -> str | None:
        """The name of the first field that can't be."""
        sound: Mapping[str, bool] = {
            "base_url": self.base_url is None
            or (isinstance(self.base_url, str) and re.match(r"https?://[^/?#]", self.base_url) is not None),
            "model": isinstance(self.model, str) and bool(self.model),
            "api_key_env": self.api_key_env is None or isinstance(self.api_key_env, str),
            "checkpoints": all(_count(tokens) for tokens in self.checkpoints),
            "commit_tokens": _count(self.commit_tokens),
            "stop_below": self.stop_below is None or _number(self.stop_below),
            "hold_back_s": _number(self.hold_back_s) and self.hold_back_s > 0,
            "timeout_s": _number(self.timeout_s) and self.timeout_s > 0,
            "max_tokens": _count(self.max_tokens),
            "samples": type(self.samples) is int and 0 <= self.samples <= _MOST_SAMPLES,
            "adapter": self.adapter is None
            or (isinstance(self.adapter, str) and NAME.fullmatch(self.adapter) is not None),
            "top_logprobs": type(self.top_logprobs) is int and 0 <= self.top_logprobs <= _MOST_TOP_LOGPROBS,
        }
        return next((name for name, fits in sound.items() if not fits), None)


def _shown(plan: LmPlan, name: str) -> str:
    shown: Json = dataclasses.asdict(plan)
    return repr(shown[name])[:80]


def _count(value: object) -> bool:
    return type(value) is int and value >= 1


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
