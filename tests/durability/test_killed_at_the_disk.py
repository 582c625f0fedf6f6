"""SIGKILL before every single file operation of what changes the log's files: it stays readable, and goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import orjson

from serving.audit_index import AuditIndex
from serving.events import answered, encode
from serving.exchange import Exchange
from serving.forgetting import Whose, forget
from serving.log import LogReader, seal_abandoned
from serving.releases import ReleaseStore
from serving.retention import remove_expired

DAY = 86_400.0
NOW = 100 * DAY

DYING = """
import os, signal, sys
from pathlib import Path
from serving.disk import Disk
from serving.forgetting import Whose, forget
from serving.log import seal_abandoned
from serving.retention import remove_expired
from serving.segments import SegmentWriter

class DyingDisk(Disk):
    def __init__(self, operations):
        self.left = operations

def dying(name):
    def operation(self, *arguments):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return getattr(Disk, name)(self, *arguments)
    return operation

for name in ("create", "write", "sync", "rename", "remove", "sync_directory"):
    setattr(DyingDisk, name, dying(name))

def write(state_dir, disk):
    # Three lines in two segments; each is told to the parent once it is safe.
    writer = SegmentWriter(state_dir, segment_bytes=4096, durable=True, disk=disk)
    for number, line in enumerate((Path(sys.argv[3])).read_bytes().splitlines(keepends=True)):
        writer.append("t", line)
        os.write(1, b"%d\\n" % number)
    writer.close()

work = {
    "write": write,
    "seal": lambda state_dir, disk: seal_abandoned(state_dir, disk=disk),
    "forget": lambda state_dir, disk: forget(
        state_dir, Whose(user="mine"), noticed_within_s=0.0, disk=disk
    ),
    "remove": lambda state_dir, disk: remove_expired(state_dir, 30, now=100 * 86400.0, disk=disk),
}[sys.argv[1]]
# A process for every operation it may die before; the last one doesn't die.
for operations in range(200):
    state_dir = Path(sys.argv[2]) / str(operations)
    told = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(told[1], 1)
        try:
            work(state_dir, DyingDisk(operations))
        finally:
            os._exit(0)
    os.close(told[1])
    said = os.fdopen(told[0]).read().split()
    died = os.waitpid(child, 0)[1] == signal.SIGKILL
    print(operations, int(died), *said, flush=True)
    if not died:
        break
"""


def exchange(id: str, days: float, text: str = "hello") -> Exchange:
    request = {"model": "m", "messages": [{"role": "user", "content": text}]}
    made = Exchange(id, id, NOW - days * DAY, "t", "h", request, "student", "confident", release="r0001")
    return replace(made, audit="pending")


def deaths(work: str, tmp_path: Path, *more: str) -> Iterator[tuple[Path, list[str]]]:
    """What each death left behind, and what was told before; it has to have died at least three times."""
    done = subprocess.run(
        [sys.executable, "-c", DYING, work, str(tmp_path), *more],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1] for line in lines] == ["1"] * (len(lines) - 1) + ["0"]
    assert len(lines) > 3
    for operations, _, *told in lines:
        yield tmp_path / operations, told


def place(state_dir: Path, name: str, *exchanges: Exchange, torn: bytes = b"") -> None:
    path = state_dir / "tasks" / "t" / "events" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(encode(answered(exchange)) for exchange in exchanges) + torn)


def ids(state_dir: Path) -> list[str]:
    return [exchange.id for exchange in LogReader(state_dir).exchanges("t").exchanges]


def test_while_writing_and_sealing(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    made = [exchange(f"{i}", 0, "x" * 2500) for i in range(3)]
    lines.write_bytes(b"".join(encode(answered(each)) for each in made))
    for state_dir, told in deaths("write", tmp_path, str(lines)):
        found = ids(state_dir)
        assert set(told) <= set(found) <= {"0", "1", "2"}
        seal_abandoned(state_dir)
        assert ids(state_dir) == found
        assert LogReader(state_dir).exchanges("t").damaged == 0
        assert not list(state_dir.rglob("*.open"))


def test_while_sealing_what_others_left(tmp_path: Path) -> None:
    for operations in range(20):
        state_dir = tmp_path / str(operations)
        place(state_dir, "00000000-999999999-1.jsonl.open", exchange("a", 0), torn=b'{"crc":"')
        place(state_dir, "00000000-999999999-2.jsonl.open", exchange("b", 0))
    for state_dir, _ in deaths("seal", tmp_path):
        assert ids(state_dir) == ["a", "b"]
        seal_abandoned(state_dir)
        assert ids(state_dir) == ["a", "b"]
        assert LogReader(state_dir).exchanges("t").damaged == 0


def test_while_removing_what_is_too_old(tmp_path: Path) -> None:
    for operations in range(30):
        state_dir = tmp_path / str(operations)
        place(state_dir, "00000000-1-1.jsonl", exchange("old", 40), exchange("older", 50))
        place(state_dir, "00000000-1-2.jsonl", exchange("other", 45))
        place(state_dir, "00000000-1-3.jsonl", exchange("new", 20))
    for state_dir, _ in deaths("remove", tmp_path):
        found = LogReader(state_dir).exchanges("t")
        assert (found.exchanges[-1].id, found.damaged) == ("new", 0)
        assert AuditIndex(state_dir).accepted("t", "r0001") == 4, (
            "nothing counts twice, and nothing is forgotten"
        )
        remove_expired(state_dir, 30, now=NOW)
        assert ids(state_dir) == ["new"]
        assert AuditIndex(state_dir).accepted("t", "r0001") == 4


def test_while_forgetting(tmp_path: Path) -> None:
    def whose(id: str, user: str) -> Exchange:
        made = exchange(id, 1)
        return replace(made, request={**made.request, "user": user})

    for operations in range(60):
        state_dir = tmp_path / str(operations)
        place(state_dir, "00000000-1-1.jsonl", whose("mine-1", "mine"), whose("other-1", "other"))
        place(state_dir, "00000000-1-2.jsonl", whose("mine-2", "mine"))
        place(state_dir, "00000000-1-3.jsonl", whose("other-2", "other"))
        held_out = {id: [1.0, "lost"] for id in ("mine-1", "mine-2", "other-1")}
        ReleaseStore(state_dir).write("t", {"held_out.json": orjson.dumps(held_out)}, {"created": NOW})
    for state_dir, _ in deaths("forget", tmp_path):
        found = LogReader(state_dir).exchanges("t")
        assert {"other-1", "other-2"} <= {exchange.id for exchange in found.exchanges}
        assert found.damaged == 0
        release = ReleaseStore(state_dir).read("t", "r0001")
        assert "other-1" in orjson.loads(release.files["held_out.json"])
        assert ReleaseStore(state_dir).names("t") == ("r0001",)
        # The next run does the rest, and what the one that died had begun is gone.
        assert forget(state_dir, Whose(user="mine"), noticed_within_s=0.0).left == []
        assert ids(state_dir) == ["other-1", "other-2"]
        assert not list(state_dir.rglob("*.rewriting"))
        left = ReleaseStore(state_dir).read("t", "r0001").files["held_out.json"]
        assert list(orjson.loads(left)) == ["other-1"]
