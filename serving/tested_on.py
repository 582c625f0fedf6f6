"""What a model in process was tested on: ONNX Runtime's execution providers, as its release keeps them.

What a model of 8 bits makes of a text is another thing on each: its kernels round differently, and what was promised
was tested on one of them. One of 32 bits differs by the last bits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import orjson

from serving.closed_answers import ANSWERS_FILE
from serving.errors import DamagedRelease

log = logging.getLogger("understudy.students")

_PROVIDERS = "providers"
_BEFORE = ["CPUExecutionProvider"]
"""What releases of before it was kept were tested on."""


def tested_on(providers: Sequence[str]) -> dict[str, list[str]]:
    """What `student.json` says of it."""
    return {_PROVIDERS: list(providers)}


def check_tested_on(files: Mapping[str, bytes], providers: Sequence[str], *, exact: bool) -> None:
    """See that a student that was tested on other providers than these doesn't run on them, or warn if it is `exact`.

    Files without a student were tested on nothing yet. Raises DamagedRelease.
    """
    if ANSWERS_FILE not in files:
        return
    tested = _read(files[ANSWERS_FILE])
    if tested == list(providers):
        return
    said = f"tested on {', '.join(tested)}, and student.onnx.providers is {', '.join(providers)}"
    if not exact:
        raise DamagedRelease(
            f"a student of 8 bits was {said}: what it answers there wasn't tested; set them back, or learn anew"
        )
    log.warning("a student was %s: its confidence may differ by the last bits", said)


def _read(data: bytes) -> list[str]:
    try:
        providers = orjson.loads(data).get(_PROVIDERS, _BEFORE)
    except (AttributeError, ValueError) as error:
        raise DamagedRelease(f"{ANSWERS_FILE} can't be read: {type(error).__name__}: {error}") from error
    if not isinstance(providers, list) or not providers or not all(isinstance(one, str) for one in providers):
        raise DamagedRelease(f"{ANSWERS_FILE} names no providers it was tested on: {str(providers)[:40]}")
    return providers
