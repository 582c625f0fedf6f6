"""`[[task]]` and `[task_defaults]`: which requests are a task's, and how it is learned and served."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from serving.layout import is_task_name
from serving.section import Section
from serving.student_choice import StudentChoice

RESERVED_TASKS = frozenset({"other"})
"""`other` takes the requests of every prompt that is no task (yet, or beyond `server.max_tasks`); nothing is learned
from it."""


def _check_name(name: str) -> str:
    if not is_task_name(name):
        raise ValueError("should be 1 to 64 of a-z 0-9 . _ - and begin with a letter or a digit")
    return name


Name = Annotated[str, AfterValidator(_check_name)]


class AgreementChoice(Section):
    """How two answers of a task are compared."""

    kind: Literal["exact", "json", "numeric"] = "exact"
    tolerance: float = Field(
        0.0, ge=0, description="of `numeric`: the largest relative difference that still agrees"
    )


class Match(Section):
    """Which requests belong to a task; every given condition must hold."""

    header: str | None = Field(
        None, description="value of x-understudy-task (the task's own name always matches)"
    )
    model: str | None = Field(None, description="the client's model, or an alias of yours")
    metadata: dict[str, str] = Field(default={}, description="entries of the request's `metadata`")
    system: str | None = Field(None, description="a regular expression searched for in the system prompt")

    @field_validator("system")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"should be a regular expression: {error}") from None
        return value


class TaskPolicy(Section):
    """How one task is learned and served; `[task_defaults]` sets it for all, discovered ones included."""

    student: StudentChoice = StudentChoice()
    agreement: AgreementChoice = AgreementChoice()
    max_disagreement: float = Field(0.05, gt=0, lt=1)
    certainty: float = Field(0.9, gt=0, lt=1)
    admission: Literal["looks", "e-process"] = Field(
        "looks",
        description="how the promise is tested: now and then by all labels, or by those to come, at any time",
    )
    audit_rate: float | None = Field(None, gt=0, le=1, description="absent: 5 %, then 2 % (STATISTICS.md §2)")
    noise_rate: float = Field(
        0.005,
        ge=0,
        le=1,
        description="share of requests that the teacher is asked twice, while no release is live, to see whether it "
        "agrees with itself (STATISTICS.md §5); 0: none",
    )
    always_escalate: list[str] = Field(
        default=[], description="student answers that always go to the teacher"
    )
    prove: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        default={},
        description="answers that are served only once they have kept a bound of their own: the most that may disagree",
    )
    on_teacher_failure: Literal["error", "student"] = "error"
    cache: bool | None = Field(
        None,
        description="which answers may be cached: absent, those at temperature 0; true, all; false, none",
    )


class TaskSettings(TaskPolicy):
    """One task with settings of its own; what it leaves out comes from `[task_defaults]`."""

    name: Name
    match: Match | None = None


def check_policy(policy: TaskPolicy, where: str = "") -> None:
    """Raise ValueError for keys that contradict each other.

    A named answer may not disagree more than all may: it would loosen what is promised of them.
    """
    if policy.admission == "e-process" and policy.student.kind != "linear":
        raise ValueError(f'{where}admission = "e-process" tests students of kind "linear" only, so far')
    for answer, bound in policy.prove.items():
        if bound > policy.max_disagreement:
            raise ValueError(
                f"{where}prove lets {bound:g} of the answers {answer!r} disagree, but max_disagreement is "
                f"{policy.max_disagreement:g}: name an answer there to hold it to that or less"
            )
