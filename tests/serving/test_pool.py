"""Several servers of one student: which is asked, what becomes of those that fail, and when they are asked again."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.metrics import Metrics
from routers.meter import TokenMeter
from serving.engines import Engines
from serving.errors import ConfigError, UpstreamBroken, UpstreamRefused, UpstreamTimeout
from serving.guarded_student import StudentUnavailable
from serving.lm import LmStudent
from serving.lm_plan import LmPlan
from serving.pool import Pool, served_at
from serving.pool_member import Address, Member, least_busy
from serving.student_settings import VllmSettings
from serving.vllm_place import VllmPlace, lock_file, write_place

Serve = Callable[..., str]
CHAT = "/chat/completions"
BREAKS_OFF, NEVER = 0, -1


class Server:
    """Answers with its name; how, the test says."""

    def __init__(self, serve: Serve, name: str) -> None:
        self.name = name
        self.healthy = True
        self.waits: asyncio.Event | None = None
        self.stalls = self.hangs = False
        self.status = 200
        self.asked = 0
        self.keys: list[str] = []
        self.url = serve(self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["path"] == "/health":
            if self.hangs:
                await receive()  # the end of the request
                await receive()  # until whoever looks has had enough
                return
            status, body = (200 if self.healthy else 503), b""
        else:
            self.asked += 1
            self.keys.append(headers.get("authorization", ""))
            while (await receive()).get("more_body"):
                pass
            if self.status == NEVER:
                await receive()  # until the client has had enough
                return
            if self.status == BREAKS_OFF:
                raise ConnectionError  # uvicorn closes without a word
            status, body = self.status, self.name.encode() + headers.get("authorization", "").encode()
        await send({"type": "http.response.start", "status": status, "headers": []})
        if self.stalls and scope["path"] != "/health":
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if (self.stalls or self.waits is not None) and scope["path"] != "/health":
            await receive()  # until the client has had enough
        await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def pool_of(tmp_path: Path, *urls: str, **options: Any) -> AsyncIterator[Pool]:
    """A pool that has looked at all of them once."""
    pool = Pool(tmp_path, VllmSettings(urls=list(urls), **options), look_every_s=0.05)
    try:
        with suppress(StudentUnavailable):
            await pool.members()
        yield pool
    finally:
        await pool.aclose()


async def ask(pool: Pool) -> str:
    response = await pool.served(below="/v1", timeout_s=10.0).post(CHAT, {"model": "m"})
    async with response:
        return (await response.read()).decode()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - what a process does elsewhere
            await asyncio.sleep(0.01)


def nobody() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_ties_go_round_and_the_least_busy_is_asked(serve: Serve, tmp_path: Path) -> None:
    servers = [Server(serve, name) for name in "abc"]

    async def play() -> None:
        async with pool_of(tmp_path, *(f"{server.url}/v1" for server in servers)) as pool:
            assert sorted([await ask(pool) for _ in range(3)]) == ["a", "b", "c"]
            held = [await pool.served(below="/v1", timeout_s=10.0).post(CHAT, {}) for _ in range(2)]
            said = [(await response.read()).decode() for response in held]
            free = ({"a", "b", "c"} - set(said)).pop()
            assert [await ask(pool) for _ in range(3)] == [free] * 3, "the others have an answer open"
            for response in held:
                await response.aclose()
            assert sorted([await ask(pool) for _ in range(3)]) == ["a", "b", "c"]

    asyncio.run(play())


def test_one_that_isnt_there_is_passed_over_until_it_is(serve: Serve, tmp_path: Path) -> None:
    one, two = Server(serve, "one"), Server(serve, "two")

    async def play() -> None:
        async with pool_of(tmp_path, f"{one.url}/v1", nobody(), two.url) as pool:
            assert {await ask(pool) for _ in range(6)} == {"one", "two"}
            assert sorted(pool.states().values()) == [False, True, True]
            assert pool.summary() == "2 of 3 servers are up"
            one.healthy = False
            await until(lambda: sum(pool.states().values()) == 1)
            assert {await ask(pool) for _ in range(4)} == {"two"}
            one.healthy = True
            await until(lambda: sum(pool.states().values()) == 2)
            assert {await ask(pool) for _ in range(4)} == {"one", "two"}

    asyncio.run(play())


def test_what_may_have_been_read_isnt_asked_elsewhere(serve: Serve, tmp_path: Path) -> None:
    servers = [Server(serve, name) for name in "ab"]
    servers[0].status = servers[1].status = BREAKS_OFF

    async def play() -> None:
        async with pool_of(tmp_path, *(server.url for server in servers)) as pool:
            with pytest.raises((UpstreamBroken, UpstreamRefused)):
                await ask(pool)
            assert sum(server.asked for server in servers) == 1

    asyncio.run(play())


def test_none_is_an_answer_at_once(tmp_path: Path) -> None:
    async def play() -> None:
        async with pool_of(tmp_path, nobody()) as pool:
            with pytest.raises(StudentUnavailable, match="0 of 1 servers are up"):
                await ask(pool)
            began = time.monotonic()
            with pytest.raises(StudentUnavailable):
                await ask(pool)
            assert time.monotonic() - began < 0.5
            pool.adopt(None)
            with pytest.raises(StudentUnavailable, match="there is no such section"):
                await ask(pool)

    asyncio.run(play())


def test_one_that_says_nothing_is_left_alone_for_a_while(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mute, well = Server(serve, "mute"), Server(serve, "well")
    mute.waits = asyncio.Event()

    async def impatient(pool: Pool) -> None:
        response = await pool.served(below="/v1", timeout_s=10.0).post(CHAT, {})
        async with response:
            try:
                async with asyncio.timeout(0.6):
                    await response.read()
            except TimeoutError:
                return

    async def play() -> None:
        async with pool_of(tmp_path, mute.url, well.url) as pool:
            await asyncio.gather(*(impatient(pool) for _ in range(6)))
            assert mute.asked == 3
            assert {await ask(pool) for _ in range(5)} == {"well"}
            assert pool.states() == {mute.url[7:]: True, well.url[7:]: True}, "its /health is fine"

    with caplog.at_level(logging.WARNING, "understudy"):
        asyncio.run(play())
    assert "without a word" in caplog.text


def test_a_burst_that_hears_nothing_is_one_reason_to_leave_it_alone(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mute = Server(serve, "mute")
    mute.waits = asyncio.Event()

    async def play() -> None:
        async with pool_of(tmp_path, mute.url) as pool:
            student = pool.served(below="/v1", timeout_s=10.0)
            responses = await asyncio.gather(*(student.post(CHAT, {}) for _ in range(8)))
            await asyncio.sleep(0.6)  # for longer than a client that goes away at once
            for response in responses:
                await response.aclose()

    with caplog.at_level(logging.WARNING, "understudy"):
        asyncio.run(play())
    (said,) = [record.getMessage() for record in caplog.records if "without a word" in record.getMessage()]
    assert said.endswith("is left alone for 5 s")


def test_an_answer_that_stalls_in_its_middle_ends(serve: Serve, tmp_path: Path) -> None:
    server = Server(serve, "begun")
    server.stalls = True

    async def play() -> None:
        async with pool_of(tmp_path, server.url) as pool:
            response = await pool.served(below="/v1", timeout_s=0.3).post(CHAT, {})
            async with asyncio.timeout(20), response:
                assert await response.read_chunk() == b"begun"
                with pytest.raises(UpstreamTimeout, match="fell silent in the middle of its answer"):
                    await response.read_chunk()

    asyncio.run(play())


def test_nobody_waits_for_the_first_look_at_another(serve: Serve, tmp_path: Path) -> None:
    stalled, well = Server(serve, "stalled"), Server(serve, "well")
    stalled.hangs = True

    async def play() -> None:
        pool = Pool(tmp_path, VllmSettings(urls=[stalled.url, well.url]))
        try:
            async with asyncio.timeout(4):  # a look is given up after five
                assert await ask(pool) == "well"
        finally:
            await pool.aclose()

    asyncio.run(play())


def test_a_server_that_is_no_longer_to_be_there_isnt_counted(serve: Serve, tmp_path: Path) -> None:
    gone, stays = Server(serve, "gone"), Server(serve, "stays")
    gone.healthy = False
    metrics = Metrics()

    def servers() -> dict[str, str]:
        said = re.findall(
            r'^understudy_student_server_up{server="(.*)"} (.*)$', metrics.exposition().decode(), re.M
        )
        return dict(said)

    async def play() -> None:
        urls = [gone.url, stays.url]
        pool = Pool(tmp_path, VllmSettings(urls=urls), on_look=metrics.record_servers, look_every_s=0.05)
        try:
            await pool.members()
            assert servers() == {gone.url[7:]: "0.0", stays.url[7:]: "1.0"}
            pool.adopt(VllmSettings(urls=[stays.url]))
            await until(lambda: servers() == {stays.url[7:]: "1.0"})
            pool.adopt(None)
            await until(lambda: servers() == {})
        finally:
            await pool.aclose()

    asyncio.run(play())


def test_nobody_waits_for_a_pool_that_was_closed(serve: Serve, tmp_path: Path) -> None:
    hanging = Server(serve, "hanging")
    hanging.hangs = True

    async def play() -> None:
        pool = Pool(tmp_path, VllmSettings(urls=[hanging.url]))
        asking = asyncio.create_task(ask(pool))
        await asyncio.sleep(0.1)  # for the first look, whose end it waits for
        await pool.aclose()
        async with asyncio.timeout(4):
            with pytest.raises(StudentUnavailable):
                await asking

    asyncio.run(play())


def test_a_late_answer_is_a_timeout(serve: Serve, tmp_path: Path) -> None:
    server = Server(serve, "never")
    server.status = NEVER

    async def play() -> None:
        async with pool_of(tmp_path, server.url) as pool:
            with pytest.raises(UpstreamTimeout, match=r"didn't answer within 0\.1 s"):
                await pool.served(below="/v1", timeout_s=0.1).post(CHAT, {})

    asyncio.run(play())


def test_refusals_are_told_without_the_key(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVERS_KEY", "sk-servers")
    server = Server(serve, "refuses with ")
    server.status = 400

    async def play() -> None:
        async with pool_of(tmp_path, server.url, api_key_env="SERVERS_KEY") as pool:
            with pytest.raises(UpstreamRefused) as refused:
                await ask(pool)
            assert server.keys == ["Bearer sk-servers"]
            said = str(pool.refusal(refused.value))
            assert said == "the student at student.vllm answered with status 400: refuses with Bearer …"

    asyncio.run(play())


def test_a_key_that_cant_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERS_KEY", "schlüssel")
    with pytest.raises(ConfigError, match="SERVERS_KEY has characters that can't be sent"):
        Pool(tmp_path, VllmSettings(urls=["http://x"], api_key_env="SERVERS_KEY"))


def test_the_one_run_here_is_found_anew_after_each_start(serve: Serve, tmp_path: Path) -> None:
    first, second = Server(serve, "first "), Server(serve, "second ")

    async def play() -> None:
        pool = Pool(tmp_path, VllmSettings(model="small"), look_every_s=0.05)
        try:
            with pytest.raises(StudentUnavailable, match="not running: `understudy serve --vllm` runs it"):
                await ask(pool)
            lock = lock_file(tmp_path)
            assert lock is not None
            with lock:
                write_place(tmp_path, VllmPlace("starting", first.url, "k1", "small"))
                await until(lambda: pool.summary() == "starting")
                assert pool.states() == {"vllm": False}
                write_place(tmp_path, VllmPlace("ready", first.url, "k1", "small"))
                await until(lambda: pool.states()["vllm"])
                assert await ask(pool) == "first Bearer k1"
                write_place(tmp_path, VllmPlace("waiting", first.url, "k1", "small", 1, "ended"))
                await until(lambda: not pool.states()["vllm"])
                with pytest.raises(StudentUnavailable, match="to be started again, since it ended"):
                    await ask(pool)
                write_place(tmp_path, VllmPlace("ready", second.url, "k2", "small", 1))
                await until(lambda: pool.states()["vllm"])
                assert await ask(pool) == "second Bearer k2"
                assert pool.restarts() == 1
        finally:
            await pool.aclose()

    asyncio.run(play())


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.booleans()), max_size=9))
def test_nobody_who_is_there_is_less_busy(drawn: list[tuple[bool, int, bool]]) -> None:
    members = []
    for number, (up, outstanding, rests) in enumerate(drawn):
        member = Member.at(Address(str(number), "http://x", None))
        member.up, member.outstanding, member.turn = up, outstanding, len(drawn) - number
        member.rests_until = 20.0 if rests else 0.0
        members.append(member)
    there = [member for member in members if member.up and not member.rests_until]
    chosen = least_busy(members, 10.0)
    assert (chosen is None) == (not there)
    if chosen is not None:
        assert chosen in there
        assert all(chosen.outstanding <= other.outstanding for other in there)
        assert all(chosen.turn <= other.turn for other in there if other.outstanding == chosen.outstanding)


def test_a_student_without_a_server_of_its_own_needs_a_pool() -> None:
    with pytest.raises(ConfigError, match=r"\[student.vllm\]"):
        served_at(None, below="/v1", timeout_s=1.0, api_key_env=None, engines=Engines())
    plan = LmPlan(None, "small")
    assert LmPlan.load(plan.files()) == plan
    with pytest.raises(ConfigError, match=r"\[student.vllm\]"):
        LmStudent.of(plan, TokenMeter)
