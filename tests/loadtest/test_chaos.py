"""The campaign sees what it is there to see: a wrong answer, a lost one, a quiet end, a slow recovery."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.chaos.campaign import main, written
from loadtest.chaos.evidence import Finding, added, errors, logged, lost, recovery
from loadtest.chaos.link import Fault, linked
from loadtest.chaos.stage import configuration
from loadtest.chaos.traffic import PATIENCE_S, Message, Receipt, Traffic, recorded
from serving.configuration import load_settings
from serving.redis_url import RedisUrl

ANSWERED = Receipt(
    "req_0", "a", stream=False, began=10.0, ended=10.5, status=200, route="teacher", content="a"
)


@pytest.mark.parametrize(
    ("changed", "wrong", "failed"),
    [
        ({}, False, False),
        ({"content": "b"}, True, False),
        ({"content": None, "quiet": True}, True, True),
        ({"content": None, "error": "status 502"}, False, True),
        ({"content": None, "hung_up": True}, False, False),
    ],
)
def test_a_receipt_tells_wrong_from_failed(changed: dict[str, Any], wrong: bool, failed: bool) -> None:
    receipt = replace(ANSWERED, **changed)
    assert (receipt.wrong, receipt.failed) == (wrong, failed)


def test_an_answer_that_is_missing_double_or_different_in_the_log_is_lost(
    write_log: Callable[..., Path], exchanges: Callable[..., Any]
) -> None:
    whole, missing, other = (replace(ANSWERED, request_id=f"req_{number}") for number in (0, 7, 1))
    state_dir = write_log(exchanges([("x", "a"), ("y", "b")]))
    assert lost([whole], logged(state_dir)) == 0
    assert lost([whole, missing, other], logged(state_dir)) == 2

    twice = {key: found * 2 for key, found in logged(state_dir).items()}
    assert lost([whole], twice) == 1
    assert lost([replace(missing, route="student"), replace(missing, content=None)], twice) == 0


def test_latency_and_recovery() -> None:
    calm = [replace(ANSWERED, began=float(at), ended=at + 0.1) for at in range(100)]
    bad = [replace(ANSWERED, began=float(at), ended=at + 0.3) for at in range(100)]
    p50, p99 = added(calm, bad)
    assert p50 == pytest.approx(0.2)
    assert p99 == pytest.approx(0.2)
    assert added([], bad) == (None, None)

    failed = replace(ANSWERED, content=None, error="status 503")
    assert recovery([ANSWERED, failed], ended=7.5) == 2.5
    assert recovery([ANSWERED], ended=7.5) == 0.0
    assert errors([failed, failed, ANSWERED]) == "2 × status 503"


def test_the_table_says_never() -> None:
    finding = Finding("Redis dead", 1_000, 2, 0, 0, 0.001, None, None)
    assert written([finding]).splitlines()[-1] == "| Redis dead | 1,000 | 2 | 0 | 0 | +1.0 ms | – | never |"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [(None, b"pong"), ("slow", b"pong"), ("silent", None), ("refused", b""), ("cut", b"po")],
)
def test_a_link_breaks_as_it_is_told(fault: Fault | None, expected: bytes | None) -> None:
    async def talk() -> tuple[bytes | None, float]:
        answering: set[asyncio.Task[None] | None] = set()

        async def pong(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            answering.add(asyncio.current_task())
            with contextlib.suppress(ConnectionError):
                if await reader.read(4):
                    writer.write(b"pong")
                await reader.read()
            await _closed(writer)

        behind = await asyncio.start_server(pong, "127.0.0.1", 0)
        async with linked("127.0.0.1", behind.sockets[0].getsockname()[1]) as link:
            link.fault, link.delay_s, link.cut_after = fault, 0.2, 2
            loop = asyncio.get_running_loop()
            began = loop.time()
            heard: bytes | None = b""
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", link.listening)
                writer.write(b"ping")
                async with asyncio.timeout(0.5):
                    heard = await reader.read(4)
            except TimeoutError:
                heard = None
            except ConnectionError:
                pass
            took = loop.time() - began
            await _closed(writer)
        behind.close()
        await asyncio.gather(*(task for task in answering if task is not None))
        return heard, took

    async def _closed(writer: asyncio.StreamWriter) -> None:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    heard, took = asyncio.run(talk())
    assert heard == expected
    assert (took >= 0.2) == (fault in ("slow", "silent"))


def test_a_link_that_ends_leaves_no_connection_open() -> None:
    """Not even those just accepted, or whose bytes nobody reads: one that is collected open is a warning."""

    async def end_early() -> None:
        beyond: list[asyncio.StreamWriter] = []
        behind = await asyncio.start_server(lambda _, writer: beyond.append(writer), "127.0.0.1", 0)
        async with behind, linked("127.0.0.1", behind.sockets[0].getsockname()[1]) as link:
            near = [await asyncio.open_connection("127.0.0.1", link.listening) for _ in range(20)]
            for _, writer in near:
                writer.write(bytes(1_000_000))
        for writer in [*beyond, *(writer for _, writer in near)]:
            writer.transport.abort()
        await asyncio.sleep(0.05)

    asyncio.run(end_early())
    gc.collect()


def test_the_gateway_reaches_teacher_and_redis_over_the_links_alone(tmp_path: Path) -> None:
    async def links() -> tuple[int, int, str]:
        async with linked("127.0.0.1", 9) as to_teacher, linked("127.0.0.1", 9) as to_redis:
            return to_teacher.listening, to_redis.listening, configuration(tmp_path, 0, to_teacher, to_redis)

    teacher, redis, toml = asyncio.run(links())
    config = tmp_path / "understudy.toml"
    config.write_text(toml)
    settings = load_settings(config)
    assert settings.teacher.base_url == f"http://127.0.0.1:{teacher}/v1"
    assert settings.cache.url is not None
    assert RedisUrl.parse(settings.cache.url.get_secret_value()).nodes == (("127.0.0.1", redis),)
    assert settings.cache.max_bytes == 0, "hits have to come from Redis"


def test_clients_notice_what_is_wrong(stand_in: Callable[..., Any], gateway: Callable[..., Any]) -> None:
    """A teacher that answers something else, and messages it doesn't know."""
    running = gateway(stand_in({"right": "yes", "wrong": "no"}).url)

    async def ask() -> list[Receipt]:
        messages = itertools.cycle([Message("right", "yes"), Message("wrong", "yes"), Message("x", "yes")])
        traffic = Traffic(f"{running.url}/v1", messages)
        await traffic.flow(200, 0.15)
        await traffic.aclose()
        return traffic.receipts

    receipts = asyncio.run(ask())
    assert len(receipts) == 30
    assert sum(receipt.wrong for receipt in receipts) == 10
    assert sum(receipt.failed for receipt in receipts) == 10
    assert {receipt.stream for receipt in receipts} == {True, False}
    assert all(0 < receipt.seconds < PATIENCE_S for receipt in receipts)


def test_recorded_messages_differ() -> None:
    messages = recorded(500)
    assert len({message.text for message in messages}) == 500


def test_a_campaign_from_end_to_end(
    require: Callable[[str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    require("redis-server")
    assert main(["--only", "cut off", "--rate", "30", "--markdown", "--keep", str(tmp_path)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| teacher's"))
    _, fault, requests, failed, wrong, lost_answers, *_ = (cell.strip() for cell in row.split("|"))
    assert fault == "teacher's answers cut off"
    assert int(requests) >= 200
    assert int(failed) > 0
    assert (wrong, lost_answers) == ("0", "0")


def test_an_unknown_fault_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "volcano"]) == 2
    assert capsys.readouterr().err == "no fault's name holds 'volcano'\n"
