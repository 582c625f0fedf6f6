"""Exports of sentence encoders on disk: one goes when its folder holds another model, and nothing breaks by that."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from distillation.embedder import read_embedder
from distillation.embedder_exports import EmbedderExports
from distillation.learning import learn
from serving.closed_students import load_closed_student
from serving.disk import Disk
from serving.encoder_folder import UnfitEncoder
from serving.engines import Engines
from serving.file_lock import locked
from serving.releases import ReleaseStore
from serving.settings import Settings

Make = Callable[..., Any]
WORDS = {"card": [1.0, 0.0], "parcel": [0.0, 1.0], "my": [0.1, 0.1]}
EXPORTS = """
import json, shutil, sys
from pathlib import Path
job = json.load(open(sys.argv[-1]))
out = Path(job["out"])
out.mkdir()
for name in ("model.onnx", "tokenizer.json"):
    shutil.copy(Path({files!r}) / name, out / name)
{then}
print(json.dumps({{"done": {{}}}}))
"""


@pytest.fixture
def exporting(tmp_path: Path, text_files: Make) -> Callable[..., Settings]:
    """Settings whose Python doesn't need torch to export: it gives one model, whatever the folder holds."""
    files = tmp_path / "files"
    files.mkdir()
    for name, data in text_files(WORDS, longest=24).items():
        (files / name).write_bytes(data)

    def make(*folders: Path, state: Path = tmp_path / "state", then: str = "") -> Settings:
        script, python = tmp_path / "exports.py", tmp_path / "python"
        script.write_text(EXPORTS.format(files=str(files), then=then))
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
        python.chmod(0o755)
        tasks = [
            {
                "name": folder.name,
                "max_disagreement": 0.1,
                "student": {"kind": "linear", "features": "embedding", "embedder": folder},
            }
            for folder in folders
        ]
        return Settings.model_validate({"state_dir": state, "task": tasks, "learning": {"python": python}})

    return make


def source(folder: Path, model: str = "first") -> Path:
    """A folder with something to export, by its looks."""
    folder.mkdir(exist_ok=True)
    for name, content in (("config.json", f'{{"model": "{model}"}}'), ("tokenizer.json", "{}")):
        (folder / name).write_text(content)
    (folder / "pytorch_model.bin").write_bytes(b"")
    return folder


def there(settings: Settings) -> set[str]:
    """The exports, whole or not."""
    place = settings.state_dir / "embedders"
    return {path.name for path in place.iterdir() if path.is_dir()}


def read(folder: Path, settings: Settings) -> None:
    assert read_embedder(folder, settings, Engines()).model.width == 2


def test_it_goes_when_its_folder_holds_another_model_and_its_releases_stay(
    write_log: Make, exchanges: Make, tmp_path: Path, exporting: Make
) -> None:
    pairs = [(f"{'my ' * (number % 20)}{word}", word) for number in range(150) for word in ("card", "parcel")]
    state = write_log(exchanges(pairs))
    configured = exporting(source(tmp_path / "intents"), state=state)
    (first,) = learn(configured, "intents")
    assert first.release == "r0001", first.message
    (before,) = there(configured)
    source(tmp_path / "intents", "second")
    write_log(exchanges(pairs, start=2_000_000.0))
    (second,) = learn(configured, "intents")
    assert second.release == "r0002", second.message
    (after,) = there(configured)
    assert after != before
    for release in ("r0001", "r0002"):
        student = load_closed_student(ReleaseStore(state).read("intents", release).files, Engines())
        assert student.answers[student.predict("my card").index].key == "card"


def test_what_another_folder_is_stays_as_long_as_that_is_so(tmp_path: Path, exporting: Make) -> None:
    one, two = source(tmp_path / "one"), source(tmp_path / "two")
    configured = exporting(one, two)
    read(one, configured)
    read(two, configured)
    (shared,) = there(configured)
    source(one, "second")
    read(one, configured)
    assert len(there(configured)) == 2
    assert shared in there(configured)
    source(two, "third")
    read(two, configured)
    assert len(there(configured)) == 2
    assert shared not in there(configured)


def test_what_was_exported_before_that_was_kept_is_known_once_it_is_used(
    tmp_path: Path, exporting: Make
) -> None:
    folder = source(tmp_path / "one")
    configured = exporting(folder)
    read(folder, configured)
    sources = configured.state_dir / "embedders" / "sources.json"
    for known in (None, b"damaged", b"[]", orjson.dumps({str(folder): "../../../tasks"})):
        sources.unlink() if known is None else sources.write_bytes(known)
        read(folder, configured)
        assert orjson.loads(sources.read_bytes()) == {str(folder): next(iter(there(configured)))}
    source(folder, "second")
    read(folder, configured)
    assert len(there(configured)) == 1


def test_an_export_that_fails_replaces_nothing(tmp_path: Path, exporting: Make) -> None:
    folder = source(tmp_path / "one")
    read(folder, exporting(folder))
    before = there(exporting(folder))
    source(folder, "second")
    with pytest.raises(UnfitEncoder, match="ended with code 1"):
        read_embedder(folder, exporting(folder, then="raise ValueError"), Engines())
    assert there(exporting(folder)) == before


def test_nobody_takes_away_what_is_being_read(tmp_path: Path, exporting: Make) -> None:
    folder = source(tmp_path / "one")
    configured = exporting(folder)
    read(folder, configured)
    (before,) = there(configured)
    place = configured.state_dir / "embedders"
    with locked(place / ".reading"):
        source(folder, "second")
        # What follows an export waits for who is reading.
        using = threading.Thread(
            target=EmbedderExports(configured.state_dir, Disk()).used, args=(folder, "0123456789abcdef")
        )
        using.start()
        using.join(timeout=0.3)
        assert using.is_alive()
        assert (place / before / "model.onnx").is_file()
    using.join(timeout=60)
    assert before not in there(configured)


def test_whoever_reads_meanwhile_gets_all_of_one(tmp_path: Path, exporting: Make) -> None:
    """Learners read while their folder changes again and again: each gets a whole model, whichever it is."""
    folder = source(tmp_path / "one")
    configured = exporting(folder)
    read(folder, configured)
    failed: list[str] = []
    over = threading.Event()

    def reads() -> None:
        while not over.is_set():
            try:
                read(folder, configured)
            except UnfitEncoder as error:
                if "has changed while it was exported" not in str(error):
                    failed.append(str(error))
            except Exception as error:
                failed.append(repr(error))

    readers = [threading.Thread(target=reads) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(10):
        (tmp_path / "next").write_text(f'{{"model": "{number}"}}')
        (tmp_path / "next").replace(folder / "config.json")
        time.sleep(0.1)  # as it comes: whatever they are at then
    over.set()
    for reader in readers:
        reader.join(timeout=60)
    assert not any(reader.is_alive() for reader in readers)
    assert failed == []
    read(folder, configured)
    assert len(there(configured)) == 1


def test_a_folder_that_changes_while_it_is_exported(tmp_path: Path, exporting: Make) -> None:
    folder = source(tmp_path / "one")
    changes = f"Path({str(folder)!r}, 'config.json').write_text('{{\"model\": 1}}')"
    with pytest.raises(UnfitEncoder, match="has changed while it was exported; it is exported anew the next"):
        read_embedder(folder, exporting(folder, then=changes), Engines())
    configured = exporting(folder)
    assert there(configured) == set(), "what was made is neither"
    read(folder, configured)
