"""The sentence encoder that `student.embedder` names, as the two files that a release holds of it.

A folder that holds such files is read as it is; of any other the training Python makes them once, and they stay
(distillation/embedder_exports.py).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distillation.embedder_exports import EmbedderExports, read_export
from distillation.setback import Setback
from distillation.training_process import NothingTrains, TrainingFailed, run_script
from serving.disk import Disk
from serving.encoder_folder import WEIGHTS, EmbedderFolder, UnfitEncoder
from serving.engines import TOKENIZER_FILE, Engines
from serving.errors import DamagedRelease
from serving.settings import Settings

if TYPE_CHECKING:
    from serving.text_model import TextModel  # an extra: imported only where a model is loaded

_SCRIPT = Path(__file__).with_name("onnx_export.py")
_OF_AN_EMBEDDING = (
    "config.json",
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "sentence_bert_config.json",
    *WEIGHTS,
    "*.safetensors.index.json",
    "pytorch_model*.json",
)
"""The files of a Hugging Face folder that an export depends on."""


@dataclass(frozen=True, slots=True)
class SentenceEncoder:
    """A sentence encoder that is loaded: `files` are what `model` was made of."""

    files: Mapping[str, bytes]
    model: TextModel


def read_embedder(
    folder: Path,
    settings: Settings,
    engines: Engines,
    progress: Callable[[str], None] = lambda _: None,
    disk: Disk | None = None,
    *,
    unattended: bool = False,
) -> SentenceEncoder:
    """The encoder in a folder; `progress` hears of what takes long.

    An export that it holds is taken if it gives one embedding a text; many give one a token, and are made anew.
    `unattended`: nobody is waiting for it, so that an export that failed isn't tried again soon. Raises
    UnfitEncoder, saying what to do, ConfigError where what runs it isn't installed, or can't run it, and
    OSError as the disk does.
    """
    found = EmbedderFolder.look_into(folder)
    if found.export is not None:
        held = read_export(*found.export)
        try:
            return SentenceEncoder(held, engines.text_model(held))
        except DamagedRelease as error:
            if not found.exportable:
                raise UnfitEncoder(f"student.embedder: the export in {folder} won't do: {error}") from error
    exports = EmbedderExports(settings.state_dir, disk or Disk())
    # It may have gone before it is read: another learner has seen by then that the folder has changed.
    while (files := exports.read(checksum := _checksum(folder))) is None:
        _make(folder, checksum, exports, settings, progress, unattended)
    exports.used(folder, checksum)
    try:
        return SentenceEncoder(files, engines.text_model(files))
    except DamagedRelease as error:
        raise UnfitEncoder(
            f"student.embedder: what was exported of {folder} is damaged: {error}; remove "
            f"{exports.path(checksum)}, and it is made anew"
        ) from error


def _make(
    folder: Path,
    checksum: str,
    exports: EmbedderExports,
    settings: Settings,
    progress: Callable[[str], None],
    unattended: bool,
) -> None:
    """Have it exported, if it isn't by now. Whoever wants the same meanwhile waits, and gets it.

    Raises UnfitEncoder and OSError.
    """
    with exports.alone():
        if exports.path(checksum).is_dir():
            return
        setback = Setback.of_export(settings, exports.setback_of(folder), checksum)
        waits_s = setback.waits_s(now=time.time()) if unattended else 0.0
        if waits_s > 0.0:
            raise UnfitEncoder(
                f"student.embedder: exporting {folder} failed, and it hasn't changed since; it is tried again in "
                f"{math.ceil(waits_s / 60)} minutes, or now by `understudy learn`"
            )
        progress(f"exporting the sentence encoder in {folder}")
        try:
            _export(folder, checksum, exports, settings)
        except NothingTrains as error:  # that was seen before it began
            raise UnfitEncoder(f"student.embedder: {error}") from error
        except TrainingFailed as error:
            setback.failed()
            raise UnfitEncoder(f"student.embedder: {error}") from error
        except OSError:
            setback.failed()
            raise
        setback.over()


def _export(folder: Path, checksum: str, exports: EmbedderExports, settings: Settings) -> None:
    """Export it. Raises TrainingFailed, UnfitEncoder and OSError."""
    with exports.workplace() as work:
        out = work / "out"
        job = {
            "base": str(folder.resolve()),
            "out": str(out.resolve()),
            "gives": "embedding",
            "precision": "fp32",
            "threads": settings.learning.threads,
        }
        run_script(_SCRIPT, job, settings, work, lambda _: None)
        if _checksum(folder) != checksum:
            raise UnfitEncoder(
                f"student.embedder: {folder} has changed while it was exported; it is exported anew the next time"
            )
        exports.put(out, folder, checksum)


def _checksum(folder: Path) -> str:
    """Of all that an export depends on, 16 hex digits."""
    whole = hashlib.sha256()
    for path in sorted({path for pattern in _OF_AN_EMBEDDING for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()[:16]
