"""What a model in process was tested on: ONNX Runtime's execution providers and its version, as its release keeps them.

What a model of 8 bits makes of a text is another thing on each provider: its kernels round differently, and what was
promised was tested on one of them. One of 32 bits differs by the last bits. Another version of ONNX Runtime may have
other kernels too, though most stay as they were: a student runs there all the same, with a warning unless it is known
to be of 32 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson

from serving.closed_answers import ANSWERS_FILE
from serving.errors import DamagedRelease
from serving.execution_providers import CPU

_PROVIDERS = "providers"
_RUNTIME = "onnxruntime"
_LONGEST_VERSION = 100
_BEFORE = [CPU]
"""What releases of before it was kept were tested on."""

_INEXACT = "a student that isn't known to be of 32 bits"


def tested_on(providers: Sequence[str], runtime: str | None = None) -> dict[str, object]:
    """What `student.json` says of it. `runtime` is the version of ONNX Runtime; None: it wasn't run yet."""
    return {_PROVIDERS: list(providers), **({} if runtime is None else {_RUNTIME: runtime})}


def check_tested_on(
    files: Mapping[str, bytes], providers: Sequence[str], runtime: str, *, exact: bool
) -> str | None:
    """See that a student that was tested on other providers than these doesn't run on them, unless it is `exact`.

    That is one whose model says that it is of 32 bits; one that doesn't say, as an embedder's own export may not, isn't
    taken for one. Gives what is to be said of a student that runs on something else all the same; None: nothing. Files
    without a student were tested on nothing yet. Raises DamagedRelease.
    """
    if ANSWERS_FILE not in files:
        return None
    tested, tested_runtime = _read(files[ANSWERS_FILE])
    if tested != list(providers):
        said = f"tested on {', '.join(tested)}, and student.onnx.providers is {', '.join(providers)}"
        if exact:
            return f"a student was {said}: its confidence may differ by the last bits"
        raise DamagedRelease(
            f"{_INEXACT} was {said}: what it answers there wasn't tested; set them back, or learn anew"
        )
    if exact or tested_runtime in (None, runtime):
        return None
    # Not refused: an upgrade would take every such student away, most of them for nothing. If its answers have
    # changed for the worse, its audits show it, and the watch withdraws it.
    return (
        f"{_INEXACT} was tested on ONNX Runtime {tested_runtime}, and runs on {runtime}: it may answer some requests "
        "differently, which its audits would show; learn anew to have it tested here"
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
