"""The seam behind which every student stands, and the way from a release on disk to one that answers."""

from __future__ import annotations

from typing import Protocol

from serving.errors import DamagedRelease
from serving.exchange import Json, StudentAnswer
from serving.linear import LinearStudent
from serving.releases import Release


class Student(Protocol):
    """A model that imitates the teacher on one task."""

    def unsupported(self, request: Json) -> str | None:
        """The feature of `request` this student was not made for (`tools`, `turns`, `content`, `n`, …), or None."""
        ...

    async def answer(self, request: Json) -> StudentAnswer:
        """Answer a supported request. Any exception means: ask the teacher."""
        ...

    async def aclose(self) -> None:
        """Give back what the student holds."""
        ...


def load_student(release: Release) -> Student:
    """The student of a release, ready to answer. Raises DamagedRelease if its files can't be read."""
    kind = release.card.get("student")
    if kind == "linear":
        return LinearStudent.load(release.files)
    raise DamagedRelease(
        f"release {release.name} of task {release.task} holds a student of kind {kind!r}, "
        "which this version can't serve"
    )
