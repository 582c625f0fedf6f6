import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from serving.errors import DamagedRelease, UnknownRelease, UnknownTask
from serving.live import Live
from serving.releases import ReleaseStore

FILES = {
    "student.npz": b"\x00\x01weights" * 100,
    "router.json": b'{"threshold":0.9}',
    "tokenizer/vocab.txt": b"a\nb\n",
}


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_release_is_read_as_it_was_written(store: ReleaseStore, tmp_path: Path) -> None:
    assert store.write("intents", FILES, {"student": {"kind": "linear"}}) == "r0001"
    assert store.write("intents", {}, {}) == "r0002"
    assert store.write("other", FILES, {}) == "r0001"
    release = store.read("intents", "r0001")
    assert release.files == FILES
    assert (release.task, release.name) == ("intents", "r0001")
    assert release.card["student"] == {"kind": "linear"}
    assert release.card["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    assert [card["release"] for card in store.list("intents")] == ["r0001", "r0002"]
    assert (tmp_path / "tasks/intents/releases/r0001/tokenizer/vocab.txt").read_bytes() == b"a\nb\n"


@pytest.mark.parametrize(
    "name", ["card.json", "../x", "/etc/passwd", "", "a//b", ".hidden", "a/../b", "a\n", "x/"]
)
def test_a_file_that_could_leave_the_release_is_refused(store: ReleaseStore, name: str) -> None:
    with pytest.raises(ValueError, match="can't be a file of a release"):
        store.write("t", {name: b""}, {})
    assert store.list("t") == []


@pytest.mark.parametrize("task", ["../t", "", "A", "a/b", ".", "a\n"])
def test_what_is_no_name_of_a_task_is_refused(store: ReleaseStore, task: str) -> None:
    with pytest.raises(UnknownTask, match="can't be the name of a task"):
        store.live(task)


def test_any_flipped_bit_is_found(store: ReleaseStore, tmp_path: Path) -> None:
    release = tmp_path / "tasks/t/releases" / store.write("t", FILES, {"threshold": 0.875})
    for name in FILES:
        flip(release / name, 3)
        with pytest.raises(DamagedRelease, match=f"{name} doesn't match its checksum.*understudy rollback t"):
            store.read("t", "r0001")
        flip(release / name, 3)
    card = (release / "card.json").read_bytes()
    for wanted in (b"0.875", b"threshold", b"checksum", b"router.json", b'"r0001"'):
        flip(release / "card.json", card.index(wanted) + 1)
        with pytest.raises(DamagedRelease, match=r"card\.json"):
            store.read("t", "r0001")
        assert store.list("t") == []
        flip(release / "card.json", card.index(wanted) + 1)
    assert store.read("t", "r0001").files == FILES


def test_missing_files_and_foreign_cards_are_damage(store: ReleaseStore, tmp_path: Path) -> None:
    release = tmp_path / "tasks/t/releases" / store.write("t", FILES, {})
    store.write("t", {"student.npz": b"other"}, {})
    own = (release / "card.json").read_bytes()
    for content in (b"", b"[]", b"{}", b"\xff", (release.parent / "r0002/card.json").read_bytes()):
        (release / "card.json").write_bytes(content)
        with pytest.raises(DamagedRelease):
            store.read("t", "r0001")
    (release / "card.json").write_bytes(own)
    (release / "router.json").unlink()
    with pytest.raises(DamagedRelease, match=r"router\.json can't be read"):
        store.read("t", "r0001")


@pytest.mark.parametrize("release", ["r0002", "", "../r0001", "r1", "latest"])
def test_an_unknown_release_names_the_known_ones(store: ReleaseStore, release: str) -> None:
    store.write("t", {}, {})
    with pytest.raises(UnknownRelease, match="it has: r0001"):
        store.read("t", release)


def test_promote_withdraw_and_roll_back(store: ReleaseStore) -> None:
    for _ in range(3):
        store.write("t", FILES, {})
    assert store.live("t") is None
    assert store.set_live("t", "r0001") == Live("r0001", 1, [])
    assert store.set_live("t", "r0002") == Live("r0002", 2, ["r0001"])
    assert store.set_live("t", "r0002") == Live("r0002", 3, ["r0001"])
    assert store.set_live("t", "r0003") == Live("r0003", 4, ["r0002", "r0001"])
    assert store.rollback("t") == Live("r0002", 5, ["r0001"])
    assert store.set_live("t", None) == Live(None, 6, ["r0001"])
    assert store.rollback("t") == Live("r0001", 7, [])
    assert store.rollback("t") == Live(None, 8, [])
    with pytest.raises(UnknownRelease, match="nothing to go back from"):
        store.rollback("t")
    assert store.live("t") == Live(None, 8, [])


def test_the_way_back_is_twenty_releases_long(store: ReleaseStore) -> None:
    for _ in range(25):
        store.set_live("t", store.write("t", {}, {}))
    live = store.live("t")
    assert live is not None
    assert live.previous == [f"r{n:04}" for n in range(24, 4, -1)]


def test_an_unknown_or_damaged_release_does_not_go_live(store: ReleaseStore, tmp_path: Path) -> None:
    for _ in range(2):
        store.set_live("t", store.write("t", FILES, {}))
    before = store.live("t")
    with pytest.raises(UnknownRelease):
        store.set_live("t", "r0009")
    store.write("t", FILES, {})
    flip(tmp_path / "tasks/t/releases/r0003/student.npz", 5)
    with pytest.raises(DamagedRelease):
        store.set_live("t", "r0003")
    assert store.live("t") == before


def test_rollback_passes_over_damaged_releases(store: ReleaseStore, tmp_path: Path) -> None:
    for _ in range(3):
        store.set_live("t", store.write("t", FILES, {}))
    flip(tmp_path / "tasks/t/releases/r0002/student.npz", 5)
    assert store.rollback("t") == Live("r0001", 4, [])


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 40, b"[]", b'{"release":"r0001"}', b'{"release":"../x","generation":1,"previous":[]}',
     b'{"release":null,"generation":"1","previous":[]}', b'{"release":null,"generation":1,"previous":[1]}',
     b'{"release":null,"generation":true,"previous":[]}'],
)  # fmt: skip
def test_a_damaged_live_file_says_what_to_do_and_promoting_repairs_it(
    store: ReleaseStore, tmp_path: Path, content: bytes
) -> None:
    store.set_live("t", store.write("t", FILES, {}))
    (tmp_path / "tasks/t/live").write_bytes(content)
    with pytest.raises(DamagedRelease, match="understudy promote t <release>"):
        store.live("t")
    with pytest.raises(DamagedRelease):
        store.rollback("t")
    repaired = store.set_live("t", "r0001")
    assert repaired.release == "r0001"
    assert repaired.generation > 1_000_000  # never one that a cache key could already contain
    assert store.live("t") == repaired


def test_the_name_of_a_deleted_release_is_not_given_again_while_it_is_remembered(
    store: ReleaseStore, tmp_path: Path
) -> None:
    for _ in range(2):
        store.set_live("t", store.write("t", {}, {}))
    for name in ("r0001", "r0002"):
        (tmp_path / "tasks/t/releases" / name / "card.json").unlink()
        (tmp_path / "tasks/t/releases" / name).rmdir()
    assert store.write("t", {}, {}) == "r0003"


CRASH_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from serving.disk import Disk
from serving.releases import ReleaseStore

class DyingDisk(Disk):
    calls = 0
    def die(self):
        DyingDisk.calls += 1
        if DyingDisk.calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    def write(self, fd, data):
        self.die()
        super().write(fd, data[: len(data) // 2])
        self.die()
        super().write(fd, data[len(data) // 2 :])
    def rename(self, source, target):
        self.die()
        super().rename(source, target)
        self.die()

ReleaseStore(Path(sys.argv[1]), disk=DyingDisk()).write("t", {"a": b"12345678", "b": b"abcdefgh"}, {"n": 1})
"""


@pytest.mark.parametrize("step", range(1, 9))
def test_a_crash_in_the_middle_of_writing_leaves_no_half_release(tmp_path: Path, step: int) -> None:
    store = ReleaseStore(tmp_path)
    store.write("t", {}, {})
    command = [sys.executable, "-c", CRASH_WHILE_WRITING, str(tmp_path), str(step)]
    child = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
    assert child.returncode == -signal.SIGKILL
    complete = step == 8  # died after the rename
    assert [card["release"] for card in store.list("t")] == ["r0001", "r0002"][: 1 + complete]
    assert store.write("t", {}, {}) == ("r0003" if complete else "r0002")
    left = {path.name for path in (tmp_path / "tasks/t/releases").iterdir()}
    assert left == {".lock", "r0001", "r0002", *(["r0003"] if complete else [])}


def test_a_directory_without_a_card_is_not_listed_and_its_name_not_used(
    store: ReleaseStore, tmp_path: Path
) -> None:
    (tmp_path / "tasks/t/releases/r0001").mkdir(parents=True)
    assert store.list("t") == []
    with pytest.raises(DamagedRelease, match=r"card\.json can't be read"):
        store.read("t", "r0001")
    assert store.write("t", {}, {}) == "r0002"


def _promote(state_dir: Path, times: int) -> None:
    store = ReleaseStore(state_dir)
    for _ in range(times):
        release = store.write("t", {"a": b"x"}, {})
        for _ in range(5):
            store.set_live("t", release)


def test_two_processes_promote_at_the_same_time(store: ReleaseStore, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_promote, args=(tmp_path, 8)) for _ in range(2)]
    for child in children:
        child.start()
    seen = [0]
    while any(child.is_alive() for child in children):
        live = store.live("t")
        seen.append(live.generation if live else 0)
        for child in children:
            child.join(0.002)
    assert [child.exitcode for child in children] == [0, 0]
    assert seen == sorted(seen)
    live = store.live("t")
    assert live is not None
    assert live.generation == 80
    assert len(store.list("t")) == 16
    assert len(live.previous) >= 15


def test_the_live_file_is_what_the_documents_say(store: ReleaseStore, tmp_path: Path) -> None:
    store.set_live("t", store.write("t", {}, {}))
    content = orjson.loads((tmp_path / "tasks/t/live").read_bytes())
    since = content.pop("since")
    assert time.time() - 60 < since <= time.time()
    assert content == {
        "release": "r0001",
        "generation": 1,
        "previous": [],
        "withdrawals": [],
        "lost_until": 0.0,
    }
