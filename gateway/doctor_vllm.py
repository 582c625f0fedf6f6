"""What `understudy doctor` checks of the vLLM that `serve --vllm` runs: whether it could start at all."""

from __future__ import annotations

import sys

from gateway.finding import Finding
from gateway.other_python import PythonSilent, missing_modules
from serving.child_environment import child_environment
from serving.settings import Settings
from serving.vllm_command import INSTALL_VLLM, not_there

_ADVICE = "the teacher answers until then"


def check_vllm_start(settings: Settings) -> list[Finding]:
    """Look for the Python, vLLM in it, and the model; starting it takes a minute."""
    vllm = settings.student.vllm
    if vllm is None or vllm.model is None:
        return []
    said = not_there(vllm)
    if said is not None:
        return [Finding("vllm", "problem", said, _ADVICE)]
    python = vllm.python or sys.executable
    try:
        missing = missing_modules(
            python, ["vllm"], child_environment(settings, own_python=vllm.python is None)
        )
    except PythonSilent as error:
        said = f"student.vllm.python: {python} can't be asked for vLLM: {error}"
        return [Finding("vllm", "problem", said, _ADVICE)]
    if missing:
        return [Finding("vllm", "problem", f"{python} has no vLLM", INSTALL_VLLM)]
    return [Finding("vllm", "ok", f"{python} has vLLM")]
