"""The page of an evaluation as a file; what it takes may not be installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from distillation.evaluation import Evaluation
from serving.errors import UnderstudyError


def page_writer(path: Path) -> Callable[[Evaluation], None]:
    """What writes an evaluation's page to `path`, whole or not at all.

    Raises UnderstudyError where matplotlib isn't installed, where there is no such folder or `path` is one, and the
    writer OSError as the disk does.
    """
    if path.is_dir():
        raise UnderstudyError(f"{path} is a folder: name a file in it, such as {path / 'page.html'}")
    if not path.parent.is_dir():
        raise UnderstudyError(f"there is no folder {path.parent} to write {path.name} into")
    try:
        from distillation.evaluation_page import evaluation_page
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UnderstudyError(
            "the page's plots need matplotlib, which isn't installed: pip install 'understudy[report]'; "
            "tables and --json need nothing"
        ) from error

    def write(evaluation: Evaluation) -> None:
        page = evaluation_page(evaluation)
        temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
        try:
            temporary.write_text(page, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    return write
