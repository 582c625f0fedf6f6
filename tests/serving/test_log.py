import asyncio
import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from serving.disk import Disk
from serving.errors import UnknownTask
from serving.events import answered, audited, decode, encode
from serving.exchange import Exchange, Json
from serving.layout import is_task_name
from serving.log import EventLog, LogReader, seal_abandoned
from serving.log_settings import LogSettings
from serving.segments import SegmentWriter, boot_token
from serving.task_settings import Name

Start = Callable[..., Any]


def event(id: str, created: float = 1.0, text: str = "hello") -> Json:
    request = {"model": "gpt-4o", "messages": [{"role": "user", "content": text}]}
    return answered(Exchange(id, id, created, "t", "tenant", request, "teacher", "no_release"))


def events_of(state_dir: Path, task: str = "t") -> Path:
    return state_dir / "tasks" / task / "events"


def names(state_dir: Path, task: str = "t") -> list[str]:
    return sorted(path.name for path in events_of(state_dir, task).iterdir())


def ids(state_dir: Path, task: str = "t") -> list[str]:
    return [exchange.id for exchange in LogReader(state_dir).exchanges(task).exchanges]


def place(state_dir: Path, name: str, content: bytes, task: str = "t") -> Path:
    path = events_of(state_dir, task) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("segment_bytes", [4096, 1 << 20])
def test_what_was_appended_survives_a_loss_of_power_at_that_very_moment(
    tmp_path: Path, segment_bytes: int, forgetful_disk: Start
) -> None:
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    disk = forgetful_disk(sync_s=0.002)

    async def run() -> None:
        log = EventLog(state_dir, LogSettings(segment_bytes=segment_bytes), disk=disk)

        async def client(number: int) -> None:
            for turn in range(8):
                id = f"{number}-{turn}"
                await log.append(f"task{number % 2}", event(id, text="x" * 300))
                left = disk.without_power(state_dir, tmp_path / "left" / id)
                assert id in ids(left, f"task{number % 2}")

        await asyncio.gather(*(client(number) for number in range(6)))
        await log.aclose()

    asyncio.run(run())
    assert len(ids(state_dir, "task0") + ids(state_dir, "task1")) == 48
    left = disk.without_power(state_dir, tmp_path / "left" / "sealed")
    assert all(path.suffix == ".jsonl" for path in left.rglob("*-*-*"))


def test_one_sync_serves_everyone_who_waits(tmp_path: Path, forgetful_disk: Start) -> None:
    disk = forgetful_disk(sync_s=0.02)

    async def run() -> None:
        log = EventLog(tmp_path, LogSettings(), disk=disk)
        first = asyncio.create_task(log.append("t", event("first")))
        await asyncio.sleep(0.01)  # the first sync is running: the others gather behind it
        await asyncio.gather(*(log.append("t", event(f"{i}")) for i in range(100)))
        assert first.done()
        assert disk.syncs == 2
        await log.aclose()

    asyncio.run(run())
    assert len(ids(tmp_path)) == 101


def test_what_waits_for_a_slow_disk_is_bounded(tmp_path: Path, forgetful_disk: Start) -> None:
    async def run() -> None:
        log = EventLog(tmp_path, LogSettings(max_waiting_bytes=5000), disk=forgetful_disk(sync_s=0.05))
        huge = asyncio.create_task(log.append("t", event("huge", text="x" * 9000)))
        await asyncio.sleep(0)
        with pytest.raises(OSError, match=r"the disk is too slow: 9\d{3} bytes wait for it already"):
            await log.append("t", event("refused"))
        await huge
        waiting = [asyncio.create_task(log.append("t", event(f"{i}", text="x" * 1000))) for i in range(9)]
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [outcome is None for outcome in outcomes] == [True] * 3 + [False] * 6
        await log.append("t", event("after"))
        await log.aclose()

    asyncio.run(run())
    assert sorted(ids(tmp_path)) == ["0", "1", "2", "after", "huge"]


def test_folders_left_behind_by_a_process_that_died_are_made_durable_too(
    tmp_path: Path, forgetful_disk: Start
) -> None:
    state_dir = tmp_path / "state"
    events_of(state_dir).mkdir(parents=True)  # and never synced
    disk = forgetful_disk()

    async def run() -> None:
        log = EventLog(state_dir, LogSettings(), disk=disk)
        await log.append("t", event("a"))
        assert ids(disk.without_power(state_dir, tmp_path / "left")) == ["a"]
        await log.aclose()

    asyncio.run(run())


def test_relaxed_appends_are_written_but_not_synced(tmp_path: Path, forgetful_disk: Start) -> None:
    disk = forgetful_disk()

    async def run() -> None:
        log = EventLog(tmp_path, LogSettings(durability="relaxed"), disk=disk)
        for i in range(5):
            await log.append("t", event(f"{i}"))
        assert disk.syncs == 0
        assert len(ids(tmp_path)) == 5
        await log.aclose()

    asyncio.run(run())
    assert disk.syncs == 1  # sealing syncs once


WRITER = """
import asyncio, os, sys
from pathlib import Path
from serving.events import answered
from serving.exchange import Exchange
from serving.log import EventLog
from serving.log_settings import LogSettings

async def client(log, run, number):
    for turn in range(10**9):
        id = f"{run}-{number}-{turn}"
        task = f"task{(number + turn) % 3}"
        request = {"model": "m", "messages": [{"role": "user", "content": "x" * (turn * 37 % 900)}]}
        await log.append(task, answered(Exchange(id, id, 1.0, task, "h", request, "teacher", "no_release")))
        os.write(1, f"{task} {id}{os.linesep}".encode())

async def main():
    log = EventLog(Path(sys.argv[1]), LogSettings(segment_bytes=16384))
    await asyncio.gather(*(client(log, sys.argv[2], number) for number in range(8)))

asyncio.run(main())
"""


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    ledger: list[tuple[str, str]] = []
    for run in range(4):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(run)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
            assert child.stdout is not None
            printed = child.stdout.readline()  # it is at work
            killer = threading.Timer(random.uniform(0.02, 0.3), child.kill)
            killer.start()
            printed += child.stdout.read()
        assert child.returncode == -signal.SIGKILL
        lines = printed.decode().splitlines()
        ledger += [(task, id) for task, _, id in (line.partition(" ") for line in lines)]
    assert len(ledger) > 100

    def check() -> None:
        for task in ("task0", "task1", "task2"):
            read = ids(tmp_path, task)
            assert {id for of, id in ledger if of == task} <= set(read)
            lines = [
                line
                for path in events_of(tmp_path, task).iterdir()
                for line in path.read_bytes().splitlines(True)
            ]
            logged = [found["id"] for line in lines if (found := decode(line))]
            assert len(logged) == len(set(logged)) == len(read)

    check()
    left_open = list(tmp_path.rglob("*.open"))
    assert left_open
    with left_open[0].open("ab") as file:
        file.write(encode(event("torn"))[:50])
    assert seal_abandoned(tmp_path) == len(left_open)
    assert not list(tmp_path.rglob("*.open"))
    check()
    assert sum(LogReader(tmp_path).exchanges(f"task{i}").damaged for i in range(3)) == 0
    assert seal_abandoned(tmp_path) == 0


def test_a_full_disk_fails_everyone_who_waits_and_the_next_append_succeeds(tmp_path: Path) -> None:
    async def run() -> None:
        log = EventLog(tmp_path, LogSettings())
        await log.append("t", event("before"))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # any write past it stops in the middle
        try:
            waiting = [log.append("t", event(id, text="x" * 1000)) for id in ("a", "b", "c", "d")]
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [type(outcome) for outcome in outcomes] == [OSError] * 4
        assert "File too large" in str(outcomes[0])
        await log.append("t", event("after"))
        await log.aclose()

    asyncio.run(run())
    result = LogReader(tmp_path).exchanges("t")
    assert [exchange.id for exchange in result.exchanges] == ["after", "before"]
    assert (result.damaged, result.segments) == (0, 2)


def test_one_that_cant_take_note_of_its_end_keeps_nobody_else_from_theirs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        log = EventLog(tmp_path, LogSettings())

        def fails(_: OSError | None) -> None:
            raise RuntimeError("no room for a number")

        log.add("t", event("a"), fails)
        async with asyncio.timeout(20):
            await log.append("t", event("b"))  # the same batch
            await log.append("t", event("c"))
        await log.aclose()

    asyncio.run(run())
    assert sorted(ids(tmp_path)) == ["a", "b", "c"]
    assert "no room for a number" in caplog.text


def test_a_directory_that_can_not_be_made_is_an_oserror_until_it_can(tmp_path: Path) -> None:
    async def run() -> None:
        log = EventLog(tmp_path, LogSettings())
        (tmp_path / "tasks").write_text("in the way")
        with pytest.raises(FileExistsError, match="/tasks'"):
            await log.append("t", event("a"))
        (tmp_path / "tasks").unlink()
        await log.append("t", event("b"))
        await log.aclose()

    asyncio.run(run())
    assert ids(tmp_path) == ["b"]


def test_what_can_not_be_logged_is_an_oserror_and_disturbs_nobody(tmp_path: Path) -> None:
    async def run() -> None:
        log = EventLog(tmp_path, LogSettings())
        good = asyncio.create_task(log.append("t", event("good")))
        with pytest.raises(OSError, match="can't be the name of a task"):
            await log.append("../t", event("a"))
        with pytest.raises(OSError, match="can't be written as JSON"):
            await log.append("t", {"event": "answered", "id": "x", "what": object()})
        hasty = asyncio.create_task(log.append("t", event("hasty")))
        await asyncio.sleep(0)
        hasty.cancel()
        await good
        await log.append("t", event("later"))
        await log.aclose()
        await log.aclose()
        with pytest.raises(OSError, match="closed"):
            await log.append("t", event("late"))

    asyncio.run(run())
    assert {"good", "later"} <= set(ids(tmp_path)) <= {"good", "later", "hasty"}


def test_closing_writes_what_waits_and_seals(tmp_path: Path) -> None:
    async def run() -> None:
        log = EventLog(tmp_path, LogSettings())
        waiting = [asyncio.create_task(log.append(f"t{i}", event("a"))) for i in range(5)]
        await asyncio.sleep(0)
        await log.aclose()
        assert [task.result() for task in waiting] == [None] * 5

    asyncio.run(run())
    assert LogReader(tmp_path).tasks() == [f"t{i}" for i in range(5)]
    for i in range(5):
        assert ids(tmp_path, f"t{i}") == ["a"]
        assert [name.endswith(".jsonl") for name in names(tmp_path, f"t{i}")] == [True]


def test_nobody_waits_forever_when_the_flush_is_cancelled_with_its_loop(
    tmp_path: Path, forgetful_disk: Start
) -> None:
    async def run() -> None:
        log = EventLog(tmp_path, LogSettings(), disk=forgetful_disk(sync_s=0.05))
        waiting = [asyncio.create_task(log.append("t", event("a")))]
        await asyncio.sleep(0.01)
        waiting.append(asyncio.create_task(log.append("t", event("b"))))
        await asyncio.sleep(0)
        (flush,) = [task for task in asyncio.all_tasks() if task.get_name() == "event-log flush"]
        flush.cancel()
        outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
        assert [type(outcome) for outcome in outcomes] == [OSError, OSError]
        await log.append("t", event("c"))
        await log.aclose()

    asyncio.run(run())
    assert "c" in ids(tmp_path)


def test_segments_are_sealed_at_their_size_and_never_share_a_name(tmp_path: Path) -> None:
    async def run() -> None:
        log = EventLog(tmp_path, LogSettings(segment_bytes=4096))
        for i in range(20):
            await log.append("t", event(f"{i:02}", text="x" * 700))
        await log.aclose()

    asyncio.run(run())
    asyncio.run(run())  # the same process, so the same names if they were only counted
    prefix = f"{boot_token()}-{os.getpid()}-"
    sizes = [path.stat().st_size for path in events_of(tmp_path).iterdir()]
    assert len(sizes) == 10
    assert max(sizes) < 4096 + 1100
    assert all(name.startswith(prefix) and name.endswith(".jsonl") for name in names(tmp_path))
    assert ids(tmp_path) == [f"{i:02}" for i in range(20)]


def test_open_files_are_bounded(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, segment_bytes=1 << 20, durable=True, disk=Disk(), max_open=3)
    for turn in range(2):
        for task in range(10):
            writer.append(f"t{task}", encode(event(f"{turn}")))
            assert len(list(tmp_path.rglob("*.open"))) <= 3
            assert any(name.endswith(".open") for name in names(tmp_path, f"t{task}"))
    writer.close()
    assert not list(tmp_path.rglob("*.open"))
    assert all(ids(tmp_path, f"t{task}") == ["0", "1"] for task in range(10))


class TestSealingWhatWasAbandoned:
    def test_a_living_writer_is_left_alone(self, tmp_path: Path) -> None:
        async def run() -> None:
            log = EventLog(tmp_path, LogSettings())
            await log.append("t", event("a"))
            assert seal_abandoned(tmp_path) == 0
            assert [name.endswith(".open") for name in names(tmp_path)] == [True]
            await log.append("t", event("b"))
            await log.aclose()

        asyncio.run(run())
        assert ids(tmp_path) == ["a", "b"]

    def test_a_locked_segment_of_another_boot_is_left_alone(self, tmp_path: Path) -> None:
        path = place(tmp_path, "00000000-1-1.jsonl.open", encode(event("a")))
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert seal_abandoned(tmp_path) == 0
        assert seal_abandoned(tmp_path) == 1
        assert names(tmp_path) == ["00000000-1-1.jsonl"]

    def test_torn_tails_are_cut_off_and_empty_segments_removed(self, tmp_path: Path) -> None:
        whole = encode(event("a"))
        place(tmp_path, "00000000-1-1.jsonl.open", whole + b"damaged\n" + whole[:-1])
        place(tmp_path, "00000000-1-2.jsonl.open", whole + b"\0" * 200_000)
        place(tmp_path, "00000000-1-3.jsonl.open", b"")
        place(tmp_path, "00000000-1-4.jsonl.open", b"\0" * 200_000)
        place(tmp_path, "notes.open", b"mine")
        assert seal_abandoned(tmp_path) == 4
        assert names(tmp_path) == ["00000000-1-1.jsonl", "00000000-1-2.jsonl", "notes.open"]
        assert (events_of(tmp_path) / "00000000-1-1.jsonl").read_bytes() == whole + b"damaged\n"
        assert (events_of(tmp_path) / "00000000-1-2.jsonl").read_bytes() == whole

    def test_a_dead_process_that_had_our_number_loses_nothing(self, tmp_path: Path) -> None:
        # So it is in containers: after a restart, the process has the same number.
        name = f"{boot_token()}-{os.getpid()}-1.jsonl"
        place(tmp_path, name, encode(event("sealed")))
        place(tmp_path, name.replace("-1.", "-2.") + ".open", encode(event("open")))

        async def run() -> None:
            log = EventLog(tmp_path, LogSettings())
            await log.append("t", event("new"))
            assert seal_abandoned(tmp_path) == 1
            await log.aclose()

        asyncio.run(run())
        assert ids(tmp_path) == ["new", "open", "sealed"]
        assert [path.rpartition("-")[2] for path in names(tmp_path)] == ["1.jsonl", "2.jsonl", "3.jsonl"]

    def test_nothing_there_is_nothing_to_do(self, tmp_path: Path) -> None:
        (tmp_path / "tasks" / "t").mkdir(parents=True)
        assert seal_abandoned(tmp_path) == seal_abandoned(tmp_path / "nowhere") == 0


class TestReading:
    def test_exchanges_come_in_order_from_sealed_and_open_segments(self, tmp_path: Path) -> None:
        place(tmp_path, "00000000-1-10.jsonl", encode(event("a", created=3)) + encode(event("c", created=1)))
        place(tmp_path, "00000000-2-1.jsonl.open", encode(event("b", created=1)))
        late = encode(audited("c", teacher=None, agreement=None, at=9.0))
        place(tmp_path, "00000000-1-9.jsonl", late + encode(event("a", created=3)))
        result = LogReader(tmp_path).exchanges("t")
        assert [exchange.id for exchange in result.exchanges] == ["b", "c", "a"]
        assert result.exchanges[1].audit == "missing"
        assert (result.damaged, result.unknown, result.segments) == (0, 0, 3)

    def test_what_is_not_ours_is_counted(self, tmp_path: Path) -> None:
        good, future = encode(event("a")), encode({"event": "praised", "id": "a"})
        wrong = encode({**event("b"), "created": "yesterday"})
        lines = [b"// note\n", b"\n", b"\xff\xfe\n", b'{"a":1}\n', good, wrong, future, good[:40]]
        place(tmp_path, "00000000-1-1.jsonl", b"".join(lines))
        (events_of(tmp_path) / "00000000-1-2.jsonl").mkdir()  # can't be read as a file
        place(tmp_path, "README.txt", b"not a segment")
        result = LogReader(tmp_path).exchanges("t")
        assert [exchange.id for exchange in result.exchanges] == ["a"]
        assert (result.damaged, result.unknown, result.segments) == (7, 1, 2)

    def test_tasks_are_directories_named_like_tasks_that_have_a_log(self, tmp_path: Path) -> None:
        for task in ("b.1", "a_2", "Upper", ".hidden"):
            place(tmp_path, "x.jsonl", b"", task=task)
        (tmp_path / "tasks" / "without-log").mkdir()
        (tmp_path / "tasks" / "file").write_text("")
        assert LogReader(tmp_path).tasks() == ["a_2", "b.1"]
        assert LogReader(tmp_path / "nowhere").tasks() == []

    def test_a_task_without_a_log_is_empty_and_a_bad_name_an_error(self, tmp_path: Path) -> None:
        result = LogReader(tmp_path).exchanges("t")
        assert (result.exchanges, result.damaged, result.segments) == ([], 0, 0)
        assert LogReader(tmp_path).newest("t") == 0
        with pytest.raises(UnknownTask, match="can't be the name of a task"):
            LogReader(tmp_path).exchanges("../t")

    def test_newest_grows_with_every_event_and_not_by_sealing(self, tmp_path: Path) -> None:
        reader = LogReader(tmp_path)

        async def run() -> None:
            log = EventLog(tmp_path, LogSettings())
            sizes = [reader.newest("t")]
            for i in range(3):
                await log.append("t", event(f"{i}"))
                sizes.append(reader.newest("t"))
            await log.aclose()
            assert sizes == sorted(set(sizes))
            assert reader.newest("t") == sizes[-1]

        asyncio.run(run())

    def test_a_reader_beside_a_writer_that_seals_misses_nothing(self, tmp_path: Path) -> None:
        written = [0]
        wrong: list[tuple[int, int]] = []
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                least = written[0]
                found = len(ids(tmp_path))
                if found < least:
                    wrong.append((least, found))

        async def run() -> None:
            log = EventLog(tmp_path, LogSettings(segment_bytes=4096, durability="relaxed"))
            for i in range(150):
                await log.append("t", event(f"{i}", text="x" * 1500))
                written[0] = i + 1
            await log.aclose()

        thread = threading.Thread(target=read)
        thread.start()
        asyncio.run(run())
        stop.set()
        thread.join()
        assert not wrong
        assert len(ids(tmp_path)) == 150

    def test_a_log_that_vanishes_while_it_is_read_is_no_error(self, tmp_path: Path) -> None:
        stop = threading.Event()

        def churn() -> None:
            while not stop.is_set():
                for number in range(5):
                    place(tmp_path, f"00000000-1-{number}.jsonl", encode(event(f"{number}")))
                shutil.rmtree(tmp_path / "tasks")

        thread = threading.Thread(target=churn)
        thread.start()
        reader = LogReader(tmp_path)
        try:
            for _ in range(100):
                reader.tasks()
                assert len(reader.exchanges("t").exchanges) <= 5
                reader.newest("t")
                seal_abandoned(tmp_path)
        finally:
            stop.set()
            thread.join()


damages = st.lists(
    st.tuples(
        st.sampled_from(["truncate", "flip", "insert"]),
        st.integers(0, 10_000),
        st.one_of(st.binary(max_size=30), st.sampled_from([b"\n", b"\n\n", b"{}\n", b"\xff\n", b'{"crc":"'])),
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(count=st.integers(0, 6), damage=damages, open_segment=st.booleans())
def test_exactly_the_intact_lines_are_read_whatever_happened_to_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    damage: list[tuple[str, int, bytes]],
    open_segment: bool,
) -> None:
    lines = {encode(event(f"{i}", created=i)): f"{i}" for i in range(count)}
    content = b"".join(lines)
    for kind, where, what in damage:
        position = where % (len(content) + 1)
        if kind == "truncate":
            content = content[:position]
        elif kind == "flip" and position < len(content):
            flipped = content[position] ^ (1 << where % 8)
            content = content[:position] + bytes([flipped]) + content[position + 1 :]
        elif kind == "insert":
            content = content[:position] + what + content[position:]
    found = content.split(b"\n")
    complete, tail = [line + b"\n" for line in found[:-1]], found[-1]
    intact = [lines[line] for line in complete if line in lines]

    state_dir = tmp_path_factory.mktemp("state")
    place(state_dir, "00000000-1-1.jsonl" + ".open" * open_segment, content)
    result = LogReader(state_dir).exchanges("t")
    assert [exchange.id for exchange in result.exchanges] == sorted(set(intact))
    assert result.damaged == len(complete) - len(intact) + bool(tail)
    shutil.rmtree(state_dir)


@given(st.one_of(st.text(max_size=5), st.from_regex(r"[a-z0-9._-]{1,66}"), st.just("a\n")))
def test_a_task_may_be_named_here_as_it_may_in_the_configuration(name: str) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        assert not is_task_name(name)
    else:
        assert is_task_name(name)
