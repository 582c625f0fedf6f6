"""Students with a closed answer space: from the files of a release to one that predicts, without what only serves."""

from __future__ import annotations

from collections.abc import Mapping

from serving.closed_answers import ClosedStudent, kind_of
from serving.embedded import embedded_linear, is_embedded
from serving.encoder import KIND as ENCODER
from serving.encoder import Encoder
from serving.engines import Engines
from serving.errors import DamagedRelease
from serving.linear import LinearStudent


def load_closed_student(files: Mapping[str, bytes], engines: Engines) -> ClosedStudent:
    """The student that predicts, of the files of a release whose student has a closed answer space.

    Raises DamagedRelease if they can't be read or hold another kind of student, and ConfigError where what it runs on
    isn't there.
    """
    kind = kind_of(files)
    if kind == "linear":
        return embedded_linear(files, engines) if is_embedded(files) else LinearStudent.load(files)
    if kind == ENCODER:
        return Encoder.load(files, engines)
    raise DamagedRelease(f"a student of kind {kind!r} doesn't predict in this version")
