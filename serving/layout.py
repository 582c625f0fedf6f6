"""Where things lie under `state_dir`, and which names may become part of a path.

- `tasks/<task>/events/`: segments of the event log (serving.segments)
- `tasks/<task>/releases/`: one directory per release (serving.releases)
- `tasks/<task>/live`: the release that answers
"""

from __future__ import annotations

import re
from pathlib import Path

from serving.errors import UnknownTask

_TASK_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def is_task_name(name: str) -> bool:
    """Whether `name` may name a task: the rule of `serving.task_settings.Name`, so it is always safe in a path."""
    return _TASK_NAME.fullmatch(name) is not None


def task_directory(state_dir: Path, task: str) -> Path:
    """The directory of one task, whether it exists or not.

    Raises UnknownTask for what can't be a task's name.
    """
    if not is_task_name(task):
        raise UnknownTask(
            f"{task!r} can't be the name of a task: use 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return state_dir / "tasks" / task


def training_directory(state_dir: Path, task: str) -> Path:
    """Where fine-tuning keeps what it needs in between, texts of the log among it. Raises UnknownTask."""
    return task_directory(state_dir, task) / "training"


def task_names(state_dir: Path) -> list[str]:
    """The names of all tasks that have a directory, sorted. What isn't named like a task is ignored."""
    try:
        return sorted(p.name for p in (state_dir / "tasks").iterdir() if is_task_name(p.name) and p.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
