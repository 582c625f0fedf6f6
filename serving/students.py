"""Every kind of student: from a release on disk to one that answers."""

from __future__ import annotations

from serving.embedded import embedded_student, is_embedded
from serving.encoder import KIND as ENCODER
from serving.encoder import EncoderStudent
from serving.engines import Engines
from serving.errors import DamagedRelease
from serving.linear import LinearStudent
from serving.releases import Release
from serving.served import is_served, load_served
from serving.student import Student
from serving.tally import Metering


def load_student(release: Release, metering: Metering, engines: Engines) -> Student:
    """The student of a release, ready to answer.

    `metering` makes the signals of a language model's answers; `engines` is what the students of a process share.
    Raises DamagedRelease if its files can't be read, and ConfigError where what it runs on isn't there.
    """
    kind = release.card.get("student")
    if kind == "linear":
        if is_embedded(release.files):
            return embedded_student(release.files, engines)
        return LinearStudent.load(release.files)
    if is_served(release):
        return load_served(release.files, metering, engines)
    if kind == ENCODER:
        return EncoderStudent.load(release.files, engines)
    raise DamagedRelease(
        f"release {release.name} of task {release.task} holds a student of kind {kind!r}, "
        "which this version can't serve"
    )
