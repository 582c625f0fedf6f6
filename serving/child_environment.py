"""The environment of a child that runs what isn't ours: a vLLM, or a script that trains with torch.

Such a child imports libraries by the dozen, in an environment that others fill. It gets what the system says, and none
of our keys and settings, which may hold more of them.
"""

from __future__ import annotations

import os

from serving.settings import ENV_PREFIX, Settings

_NOT_PASSED_ON = ("PROMETHEUS_MULTIPROC_DIR", "OPENAI_API_KEY", "VLLM_API_KEY")
"""What would mix its metrics with ours, and keys that are none of its business."""
_OF_OUR_PYTHON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


def child_environment(settings: Settings, *, own_python: bool) -> dict[str, str]:
    """Our environment without our keys and settings, for a Python that is ours, or another one.

    Nothing leads from another Python to our modules.
    """
    hidden = {*_NOT_PASSED_ON, *_key_variables(settings)}
    if not own_python:
        hidden.update(_OF_OUR_PYTHON)
    return {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and not name.upper().startswith(ENV_PREFIX)
    }


def _key_variables(settings: Settings) -> set[str]:
    """The environment variables that hold keys, as far as the configuration names them."""
    students = [settings.task_defaults.student, *(task.student for task in settings.task)]
    named = [settings.teacher.api_key_env, *(student.api_key_env for student in students)]
    if settings.student.vllm is not None:
        named.append(settings.student.vllm.api_key_env)
    return {name for name in named if name}
