"""Fine-tuning the base of a task's `encoder`, and what comes of it as the student that would be served.

Two scripts do it in a process of their own (distillation/training_process.py): one trains, one writes what was trained
as a file for ONNX Runtime. What is judged then is that file, read by the code that serves it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distillation.kind import Progress, StudentSilent
from distillation.setback import Setback
from distillation.training_process import NothingTrains, TrainingFailed, run_script, training_folder
from serving.closed_answers import ANSWERS_FILE, AnswerSpace, ClosedStudent
from serving.closed_students import load_closed_student
from serving.encoder_folder import UnfitEncoder, check_base
from serving.engines import MODEL_FILE, TOKENIZER_FILE, Engines
from serving.errors import ConfigError, DamagedRelease
from serving.exchange import Json
from serving.settings import Settings
from serving.task_settings import TaskSettings
from serving.tested_on import tested_on

EPOCHS = 4
BATCH = 16
LEARNING_RATE = 5e-5
HEAD_LEARNING_RATE = 2e-4
LONGEST = 512
"""Tokens of a text that is learned from and answered; what is longer goes to the teacher."""

SEED = 0

_TUNED = "tuned"
_HERE = Path(__file__).parent
_TRAINING = _HERE / "encoder_training.py"
_EXPORT = _HERE / "onnx_export.py"


class FineTuning:
    """`distillation.encoder_kind.Tuning` by torch, for one task.

    `unattended`: nobody is waiting for it, so that what failed isn't tried again soon (distillation/setback.py).
    """

    def __init__(
        self, settings: Settings, policy: TaskSettings, engines: Engines, *, unattended: bool = False
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._engines = engines
        self._setback = Setback.of_fine_tuning(settings, policy)
        self._unattended = unattended

    def __call__(
        self, texts: Sequence[str], answers: NDArray[np.int64], space: AnswerSpace, *, progress: Progress
    ) -> ClosedStudent:
        """Fine-tune, and read what came of it. Raises StudentSilent where nothing did."""
        waits_s = self._setback.waits_s(len(texts), now=time.time()) if self._unattended else 0.0
        if waits_s > 0.0:
            raise StudentSilent(
                f"fine-tuning failed on as good as these {len(texts):,} texts; it is tried again in "
                f"{math.ceil(waits_s / 60)} minutes, or now by `understudy learn --task {self._policy.name}`"
            )
        try:
            student = self._made(texts, answers, space, progress)
        except (NothingTrains, UnfitEncoder) as error:  # that was seen before it began
            raise StudentSilent(str(error)) from error
        except (ConfigError, DamagedRelease, TrainingFailed) as error:
            self._setback.failed(len(texts))
            raise StudentSilent(str(error)) from error
        except OSError as error:
            self._setback.failed(len(texts))
            raise StudentSilent(f"it can't be fine-tuned: {error.strerror} ({error.filename})") from error
        self._setback.over()
        return student

    def _made(
        self, texts: Sequence[str], answers: NDArray[np.int64], space: AnswerSpace, progress: Progress
    ) -> ClosedStudent:
        seen = np.bincount(answers, minlength=len(space.answers))
        space = replace(
            space,
            answers=[
                replace(known, seen=int(count)) for known, count in zip(space.answers, seen, strict=True)
            ],
        )
        base = self._base()
        self._check_engines()
        with training_folder(self._settings.state_dir, self._policy.name) as folder:
            self._train(base, texts, answers, space, folder, progress)
            progress("writing it for ONNX Runtime")
            files = self._exported(folder)
        runs_on = tested_on(self._settings.student.onnx.providers)
        files[ANSWERS_FILE] = space.dump("encoder", **runs_on)
        return load_closed_student(files, self._engines)

    def _base(self) -> Path:
        base = self._policy.student.base
        if base is None:
            raise UnfitEncoder("student.base isn't set: name the folder of the encoder to fine-tune")
        check_base(base)
        return base.resolve()

    def _check_engines(self) -> None:
        """See that what is made can be run here; otherwise it would show when hours have gone into it."""
        try:
            self._engines.check_installed()
        except ConfigError as error:
            raise NothingTrains(str(error)) from error

    def _train(
        self,
        base: Path,
        texts: Sequence[str],
        answers: NDArray[np.int64],
        space: AnswerSpace,
        folder: Path,
        progress: Progress,
    ) -> None:
        job: Json = {
            "base": str(base),
            "out": str((folder / _TUNED).resolve()),
            "texts": list(texts),
            "answers": answers.tolist(),
            "labels": [known.key for known in space.answers],
            "epochs": EPOCHS,
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "head_learning_rate": HEAD_LEARNING_RATE,
            "longest": LONGEST,
            "seed": SEED,
            "threads": self._settings.learning.threads,
        }
        run_script(_TRAINING, job, self._settings, folder, lambda said: progress(_words(said)))

    def _exported(self, folder: Path) -> dict[str, bytes]:
        out = folder / "exported"
        job: Json = {
            "base": str((folder / _TUNED).resolve()),
            "out": str(out.resolve()),
            "gives": "logits",
            "precision": self._policy.student.precision,
            "longest": LONGEST,
            "threads": self._settings.learning.threads,
        }
        run_script(_EXPORT, job, self._settings, folder, lambda _: None)
        return {name: (out / name).read_bytes() for name in (MODEL_FILE, TOKENIZER_FILE)}


def _words(said: Json) -> str:
    """How far training is, for a person."""
    if "stage" in said:
        return f"fine-tuning: {said['stage']}"
    return (
        f"fine-tuning, epoch {said['epoch']} of {said['epochs']} at most: loss {said['loss']:.3f}, "
        f"{said['seconds_left']:.0f} s left"
    )
