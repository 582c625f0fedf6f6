"""What ONNX Runtime can run a model on: the package that each of its execution providers is in, and how it is started.

A provider's name is ONNX Runtime's own (https://onnxruntime.ai/docs/execution-providers/). Its own kernels, on the CPU,
are the reference: they say what a model lacks, and every other provider leaves to them what it can't do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

from serving.errors import ConfigError

CPU = "CPUExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"

_PACKAGES = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
    OPENVINO: "onnxruntime-openvino",
}
_SUFFIX = "executionprovider"


def check_there(providers: Sequence[str], *, there: Collection[str], known: Collection[str]) -> None:
    """See that the ONNX Runtime that is installed has all of these.

    `there` are those that it has, `known` all that any build of it could have. Raises ConfigError, which says what to
    install.
    """
    lacking = [name for name in providers if name not in there]
    if not lacking:
        return
    unknown = [name for name in lacking if name not in known and name not in _PACKAGES]
    if unknown:
        meant = _meant(unknown[0], known)
        raise ConfigError(
            f"ONNX Runtime knows no {unknown[0]}{f' ({meant}?)' if meant else ''}, and this build has "
            f"{', '.join(there)}: change student.onnx.providers"
        )
    raise ConfigError(
        f"this build of ONNX Runtime has no {' and no '.join(lacking)}, only {', '.join(there)}: "
        f"{_install(providers)}, or change student.onnx.providers"
    )


def _install(providers: Sequence[str]) -> str:
    """What gives a Python these providers."""
    packages = {_PACKAGES.get(name) for name in providers if name != CPU}
    (package,) = packages if len(packages) == 1 else (None,)
    if package is None:
        return "install a build of it that has all of them"
    # All builds are the module `onnxruntime`: two in one environment overwrite each other's files.
    builds = dict.fromkeys(("onnxruntime", *_PACKAGES.values()))
    return f"pip uninstall -y {' '.join(builds)} && pip install {package}"


def _meant(unknown: str, known: Collection[str]) -> str | None:
    """The provider that a name that is none comes closest to, if it does."""
    short = {name.casefold().removesuffix(_SUFFIX): name for name in known}
    near = get_close_matches(unknown.casefold().removesuffix(_SUFFIX), short, n=1)
    return short[near[0]] if near else None


def only_on_cpu(providers: Sequence[str]) -> bool:
    """Whether nothing but ONNX Runtime's own kernels is asked for."""
    return set(providers) == {CPU}


def options_of(provider: str, threads: int) -> dict[str, str]:
    """What a provider is told besides what the session is told, by the names of its own options.

    OpenVINO has threads of its own, as many as there are cores unless it is told. And where a processor has numbers of
    16 bits it may compute with those, and a model of 32 bits would answer otherwise than elsewhere: it is told not to.
    """
    if provider == OPENVINO:
        return {"device_type": "CPU", "precision": "FP32", "num_of_threads": str(threads)}
    return {}
