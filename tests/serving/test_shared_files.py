"""A large file that several releases hold lies on the disk once, and every release is as whole as if it had its own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.disk import Disk
from serving.errors import DamagedRelease
from serving.releases import ReleaseStore
from serving.shared_files import WORTH_SHARING

MODEL = os.urandom(1024) * (WORTH_SHARING // 1024)
FILES = {"model.onnx": MODEL, "student.npz": b"small"}


def inode(state: Path, task: str, release: str, name: str = "model.onnx") -> int:
    return (state / "tasks" / task / "releases" / release / name).stat().st_ino


def test_it_is_there_once(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    names = [store.write(task, FILES, {}) for task in ("a", "a", "b")]
    assert names == ["r0001", "r0002", "r0001"]
    places = [("a", "r0001"), ("a", "r0002"), ("b", "r0001")]
    assert len({inode(tmp_path, *place) for place in places}) == 1
    assert len({inode(tmp_path, *place, "student.npz") for place in places}) == 3, "not worth looking for"
    assert all(store.read(*place).files == FILES for place in places)
    other = store.write("a", {"model.onnx": MODEL[::-1]}, {})
    assert inode(tmp_path, "a", other) != inode(tmp_path, "a", "r0001")


def test_rewriting_a_release_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    for _ in range(2):
        store.write("a", FILES, {})
    store.rewrite("a", "r0001", {"student.npz": b"other"})
    assert store.read("a", "r0001").files == {**FILES, "student.npz": b"other"}
    assert inode(tmp_path, "a", "r0001") == inode(tmp_path, "a", "r0002")
    store.rewrite("a", "r0001", {"model.onnx": MODEL[::-1]})
    assert store.read("a", "r0002").files == FILES


def test_what_is_damaged_isnt_built_on(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    store.write("a", FILES, {})
    path = tmp_path / "tasks/a/releases/r0001/model.onnx"
    path.chmod(0o640)
    path.write_bytes(MODEL[:-1] + b"?")
    store.write("a", FILES, {})
    assert store.read("a", "r0002").files == FILES
    with pytest.raises(DamagedRelease, match=r"model\.onnx doesn't match"):
        store.read("a", "r0001")
    (tmp_path / "tasks/a/releases/r0002/card.json").write_bytes(b'{"files": 7}')
    assert store.read("a", store.write("a", FILES, {})).files == FILES


class FarDisk(Disk):
    """Every second name would be on another file system."""

    def link(self, source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


class RacingDisk(Disk):
    """Whatever gets a second name is another file by then: its release was just rewritten."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir

    def link(self, source: Path, target: Path) -> None:
        ReleaseStore(self.state_dir).rewrite("a", "r0001", {"model.onnx": MODEL[::-1]})
        super().link(source, target)


def test_a_release_that_is_rewritten_at_that_moment_isnt_built_on(tmp_path: Path) -> None:
    ReleaseStore(tmp_path).write("a", FILES, {})
    store = ReleaseStore(tmp_path, disk=RacingDisk(tmp_path))
    assert store.read("b", store.write("b", FILES, {})).files == FILES


def test_where_a_file_can_have_one_name_only_it_is_copied(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path, disk=FarDisk())
    for _ in range(2):
        store.write("a", FILES, {})
    assert inode(tmp_path, "a", "r0001") != inode(tmp_path, "a", "r0002")
    assert store.read("a", "r0002").files == FILES


def test_a_second_name_survives_a_loss_of_power(tmp_path: Path, forgetful_disk: Callable[..., Any]) -> None:
    disk = forgetful_disk()
    state = tmp_path / "state"
    store = ReleaseStore(state, disk=disk)
    disk.make_directory(state)
    for _ in range(2):
        store.write("a", FILES, {})
    left = ReleaseStore(disk.without_power(state, tmp_path / "left"))
    assert left.read("a", "r0001").files == left.read("a", "r0002").files == FILES
