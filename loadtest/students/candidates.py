"""The students that are compared: how each is configured, and what it needs to be there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from loadtest.students.split import Split
from serving.errors import UnderstudyError
from serving.exchange import Json


class Missing(UnderstudyError):
    """A student needs something that isn't there; says what."""


@dataclass(frozen=True, slots=True)
class Means:
    """What students are made with.

    `python` is that of an environment with torch and vLLM, `base` the folder of a sentence encoder in Hugging Face's
    form, `lm_model` that of a language model (None: a tiny one is trained), `models` where trained ones are kept.
    `core` is the one that a student may use.
    """

    python: Path | None
    base: Path | None
    lm_model: Path | None
    models: Path
    core: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A student that can be learned: its configuration, and the process it runs in, if that isn't the gateway's.

    `start_s` is how long that process took to its first answer, `model_bytes` what its model takes on the disk.
    """

    choice: Json
    server: int | None = None
    start_s: float = 0.0
    model_bytes: int = 0


Make = Callable[[Means, Split, Path], AbstractContextManager[Ready]]
"""Gets a student ready, given a folder to work in. Raises Missing."""


@contextlib.contextmanager
def linear(means: Means, split: Split, work: Path) -> Iterator[Ready]:
    """Logistic regression over TF-IDF features."""
    yield Ready({"kind": "linear"})


CANDIDATES: dict[str, Make] = {"linear": linear}
"""By the name that `--only` knows; the first is what the others are compared with."""
