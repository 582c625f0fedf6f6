"""What `understudy doctor` checks of students that are fine-tuned here: the base, what serves and what trains them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from gateway.finding import Finding
from serving.encoder_base import UnfitBase, check_base
from serving.settings import Settings

_SERVES = ("onnxruntime", "tokenizers")
_TRAINS = ("torch", "transformers", "onnx", "onnxruntime", "tokenizers")
_LISTING = (
    "import importlib.util as u, json, sys\n"
    "print(json.dumps([name for name in sys.argv[1:] if u.find_spec(name) is None]))"
)
_TIMEOUT_S = 30.0


def check_training(settings: Settings) -> list[Finding]:
    """Look at each base of the configuration, and, if there is one, at the two environments it takes."""
    choices = [
        settings.task_defaults.student,
        *(settings.for_task(task.name).student for task in settings.task),
    ]
    bases = dict.fromkeys(choice.base for choice in choices if choice.base is not None)
    if not bases:
        return []
    return [*(_base(base) for base in bases), _serves(), _trains(settings.learning.python)]


def _base(base: Path) -> Finding:
    try:
        check_base(base)
    except UnfitBase as error:
        return Finding("student", "problem", str(error), "the teacher answers meanwhile")
    return Finding("student", "ok", f"{base} can be fine-tuned")


def _serves() -> Finding:
    missing = [name for name in _SERVES if find_spec(name) is None]
    if missing:
        said = f"an encoder can't be served: {' and '.join(missing)} isn't installed"
        return Finding("student", "problem", said, "pip install 'understudy[encoder]'")
    return Finding("student", "ok", "what serves encoders is installed")


def _trains(python: Path | None) -> Finding:
    """Ask the Python that trains for what it lacks, without importing any of it: torch alone takes seconds."""
    command = [sys.executable if python is None else str(python), "-P", "-c", _LISTING, *_TRAINS]
    try:
        asked = subprocess.run(  # noqa: S603 - a line of our own, under the Python that the operator names
            command, capture_output=True, timeout=_TIMEOUT_S, check=True
        )
        missing = [str(name) for name in json.loads(asked.stdout)]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = f"{command[0]}, which is to train encoders, can't be asked: {error}"
        return Finding("training", "problem", said, "set learning.python to a Python that runs")
    if missing:
        return Finding(
            "training",
            "problem",
            f"{command[0]} can't train encoders: it has no {', '.join(missing)}",
            "run `pip install 'understudy[train]'` there, or set learning.python to a Python that has them",
        )
    return Finding("training", "ok", f"{command[0]} has what trains encoders")
