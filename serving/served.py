"""Students that are given, and served elsewhere: a release keeps a plan of how they are asked, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from serving.classify import ClassifyStudent
from serving.classify_plan import KIND, ClassifyPlan
from serving.closed_answers import kind_of
from serving.engines import Engines
from serving.lm import LmStudent
from serving.lm_plan import LmPlan
from serving.releases import Release
from serving.student_choice import StudentChoice
from serving.tally import Metering

ServedPlan = LmPlan | ClassifyPlan


def plan_of(choice: StudentChoice, adapter: str | None = None) -> ServedPlan:
    """The plan that a configuration asks for; `adapter` is the name of the one it chooses.

    Raises ValueError for a student that isn't served elsewhere.
    """
    return LmPlan.of(choice, adapter) if choice.kind == "lm" else ClassifyPlan.of(choice)


def is_served(release: Release) -> bool:
    """Whether a release's student is served elsewhere."""
    kind = release.card.get("student")
    return kind == "lm" or (kind == "encoder" and kind_of(release.files) == KIND)


def read_plan(files: Mapping[str, bytes]) -> ServedPlan:
    """The plan that a release of such a student holds. Raises DamagedRelease."""
    return ClassifyPlan.load(files) if kind_of(files) == KIND else LmPlan.load(files)


def served_student(
    plan: ServedPlan, metering: Metering, engines: Engines | None = None
) -> LmStudent | ClassifyStudent:
    """The student of a plan. Raises ConfigError for a key that can't be sent.

    `engines` is what it shares with other students of the process; None: there are none.
    """
    if isinstance(plan, LmPlan):
        return LmStudent.of(plan, metering, engines)
    return ClassifyStudent.of(plan, engines)


def load_served(
    files: Mapping[str, bytes], metering: Metering, engines: Engines
) -> LmStudent | ClassifyStudent:
    """The student that a release holds. Raises DamagedRelease, and what `served_student` and `LmStudent.load` raise."""
    if kind_of(files) == KIND:
        return ClassifyStudent.of(ClassifyPlan.load(files), engines)
    return LmStudent.load(files, metering, engines)
