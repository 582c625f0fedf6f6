"""What a model in process was tested on: ONNX Runtime's execution providers and its version, as its release keeps them.

What a model of 8 bits makes of a text is another thing on each provider: its kernels round differently, and what was
promised was tested on one of them. One of 32 bits differs by the last bits. Another version may have other kernels, and
mostly has the same: it is told of and no more, where that is more than the last bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson

from serving.closed_answers import ANSWERS_FILE
from serving.errors import DamagedRelease

_PROVIDERS = "providers"
_RUNTIME = "onnxruntime"
_LONGEST_VERSION = 100
_BEFORE = ["CPUExecutionProvider"]
"""What releases of before it was kept were tested on."""


def tested_on(providers: Sequence[str], runtime: str | None = None) -> dict[str, object]:
    """What `student.json` says of it. `runtime` is the version of ONNX Runtime; None: it wasn't run yet."""
    return {_PROVIDERS: list(providers), **({} if runtime is None else {_RUNTIME: runtime})}


def check_tested_on(
    files: Mapping[str, bytes], providers: Sequence[str], runtime: str, *, exact: bool
) -> str | None:
    """See that a student that was tested on other providers than these doesn't run on them, unless it is `exact`.

    Gives what is to be said of one that runs on something else all the same; None: nothing. Files without a student
    were tested on nothing yet. Raises DamagedRelease.
    """
    if ANSWERS_FILE not in files:
        return None
    tested, tested_runtime = _read(files[ANSWERS_FILE])
    if tested != list(providers):
        said = f"tested on {', '.join(tested)}, and student.onnx.providers is {', '.join(providers)}"
        if exact:
            return f"a student was {said}: its confidence may differ by the last bits"
        raise DamagedRelease(
            f"a student of 8 bits was {said}: what it answers there wasn't tested; set them back, or learn anew"
        )
    if exact or tested_runtime in (None, runtime):
        return None
    # Not refused: an upgrade would take every student of 8 bits away, most of them for nothing. If its answers have
    # changed for the worse, its audits show it, and the watch withdraws it.
    return (
        f"a student of 8 bits was tested on ONNX Runtime {tested_runtime}, and runs on {runtime}: it may answer some "
        "requests differently, which its audits would show; learn anew to have it tested here"
    )


def _read(data: bytes) -> tuple[list[str], str | None]:
    """The providers, and the version of ONNX Runtime if it is known."""
    try:
        kept = orjson.loads(data)
        providers, runtime = kept.get(_PROVIDERS, _BEFORE), kept.get(_RUNTIME)
    except (AttributeError, ValueError) as error:
        raise DamagedRelease(f"{ANSWERS_FILE} can't be read: {type(error).__name__}: {error}") from error
    if runtime is not None and (not isinstance(runtime, str) or len(runtime) > _LONGEST_VERSION):
        raise DamagedRelease(f"{ANSWERS_FILE} names no version of ONNX Runtime: {str(runtime)[:40]}")
    if not isinstance(providers, list) or not providers or not all(isinstance(one, str) for one in providers):
        raise DamagedRelease(f"{ANSWERS_FILE} names no providers it was tested on: {str(providers)[:40]}")
    return providers, runtime
