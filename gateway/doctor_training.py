"""What `understudy doctor` checks of students on ONNX Runtime: their folders, what serves them and what makes them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from gateway.finding import Finding, Verdict
from gateway.other_python import PythonSilent, missing_modules
from serving.child_environment import child_environment
from serving.encoder_folder import EmbedderFolder, UnfitEncoder, check_base
from serving.engines import MODEL_FILE
from serving.errors import ConfigError, DamagedRelease, UnknownRelease
from serving.layout import task_names
from serving.releases import ReleaseStore
from serving.settings import Settings

_SERVES = ("onnxruntime", "tokenizers")
_TRAINS = ("torch", "transformers", "onnx", "onnxruntime", "tokenizers")


def check_training(settings: Settings) -> list[Finding]:
    """Look at each encoder of the configuration, and, if one is there or live, at the environments it takes."""
    choices = [
        settings.task_defaults.student,
        *(settings.for_task(task.name).student for task in settings.task),
    ]
    bases = dict.fromkeys(choice.base for choice in choices if choice.base is not None)
    embedders = dict.fromkeys(choice.embedder for choice in choices if choice.embedder is not None)
    if not bases and not embedders and not _is_live(settings.state_dir):
        return []
    found = [_base(base) for base in bases]
    to_export = False
    for embedder in embedders:
        said, is_export = _embedder(embedder)
        found.append(said)
        to_export |= not is_export
    found.append(_serves(settings.student.onnx.providers))
    if bases:
        found.append(_trains(settings, "fine-tune encoders", "problem"))
    elif to_export:
        # What was exported before is kept, and needs nothing more.
        found.append(_trains(settings, "export sentence encoders", "warning"))
    return found


def _is_live(state_dir: Path) -> bool:
    """Whether a release that is live holds a model for ONNX Runtime, whatever the configuration says by now."""
    store = ReleaseStore(state_dir)
    for task in task_names(state_dir):
        try:
            live = store.live(task)
            if live is None or live.release is None:
                continue
            if MODEL_FILE in store.card(task, live.release)["files"]:
                return True
        except (DamagedRelease, UnknownRelease, OSError):
            continue  # `understudy tasks` says it
    return False


def _base(base: Path) -> Finding:
    try:
        check_base(base)
    except UnfitEncoder as error:
        return Finding("student", "problem", str(error), "the teacher answers meanwhile")
    return Finding("student", "ok", f"{base} can be fine-tuned")


def _embedder(folder: Path) -> tuple[Finding, bool]:
    """What is to be said of a sentence encoder's folder, and whether there is nothing to export."""
    try:
        found = EmbedderFolder.look_into(folder)
    except UnfitEncoder as error:
        advice = "nothing is learned for its tasks until then"
        return Finding("student", "problem", str(error), advice), True
    return Finding("student", "ok", f"the sentence encoder in {folder} is there"), found.export is not None


def _serves(providers: Sequence[str]) -> Finding:
    missing = [name for name in _SERVES if find_spec(name) is None]
    if missing:
        said = f"an encoder can't be served: this Python has no {' and no '.join(missing)}"
        return Finding("student", "problem", said, "pip install 'understudy[encoder]'")
    try:
        # Only now: it takes a moment, and may fail where a build doesn't fit the machine.
        from serving.text_model import check_installed

        check_installed(providers)
    except (ConfigError, ImportError) as error:
        said = f"an encoder can't be served: {error}"
        return Finding("student", "problem", said, "the teacher answers meanwhile")
    return Finding("student", "ok", "what serves encoders is installed")


def _trains(settings: Settings, what: str, verdict: Verdict) -> Finding:
    python = settings.learning.python
    runs = sys.executable if python is None else str(python)
    try:
        missing = missing_modules(runs, _TRAINS, child_environment(settings, own_python=False))
    except PythonSilent as error:
        said = f"{runs}, which is to {what}, can't be asked: {error}"
        return Finding("training", verdict, said, "set learning.python to a Python that runs")
    if missing:
        return Finding(
            "training",
            verdict,
            f"{runs} can't {what}: it has no {', '.join(missing)}",
            "run `pip install 'understudy[train]'` there (in a checkout: '.[train]'), or set learning.python to a "
            "Python that has them",
        )
    return Finding("training", "ok", f"{runs} can {what}")
