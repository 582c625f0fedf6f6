from __future__ import annotations

import asyncio
import gzip
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtest.disconnects import hang_up, loopback
from serving.errors import RequestError, UpstreamBroken, UpstreamTimeout
from serving.upstream import NothingSent, StaleConnection, Upstream, UpstreamResponse

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """A raw server: `answer` gets each connection; heads, bodies and hang-ups are noted."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}/v1"
        self.connections = 0
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.asked = asyncio.Event()
        self.hung_up = asyncio.Event()

    async def request(self, reader: asyncio.StreamReader) -> str:
        """Read one request."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.heads.append(head)
        body = b""
        if "transfer-encoding: chunked" in head.lower():
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readline()
            await reader.readline()
        elif "content-length: " in head.lower():
            body = await reader.readexactly(int(head.lower().split("content-length: ")[1].split("\r")[0]))
        self.bodies.append(body)
        self.asked.set()
        return head

    async def until_hung_up(self, reader: asyncio.StreamReader) -> None:
        """Wait for the other side to close."""
        while await reader.read(1000):
            pass
        self.hung_up.set()


@asynccontextmanager
async def serving(
    answer: Callable[[Server, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], **tls: Any
) -> AsyncIterator[Server]:
    tasks: set[asyncio.Task[None]] = set()
    server: Server

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        try:
            await answer(server, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            server.hung_up.set()
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(connected(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listening = await asyncio.start_server(accept, "127.0.0.1", 0, **tls)
    server = Server(listening.sockets[0].getsockname()[1])
    try:
        yield server
    finally:
        listening.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def upstream_of(server: Server, **settings: Any) -> AsyncIterator[Upstream]:
    upstream = Upstream(server.url, **{"timeout_s": 5, **settings})
    try:
        yield upstream
    finally:
        await upstream.aclose()


def whole(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


async def ok(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await server.request(reader)
        writer.write(whole(b"ok"))


async def stalls(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await server.request(reader)
    await server.until_hung_up(reader)


async def stalls_in_the_middle(
    server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await server.request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
    await server.until_hung_up(reader)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def test_bytes_pass_as_they_are() -> None:
    packed = gzip.compress(b"hello")

    async def answer(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(
            whole(packed, "Content-Encoding: gzip", "Set-Cookie: a=1", "SET-COOKIE: b=2", "X-Odd: \xe9")
        )
        await writer.drain()

    async def scenario() -> None:
        async with serving(answer) as server, upstream_of(server) as upstream:
            target = "/files/a%2Fb%20c?x=%41+b&y=[]"
            async with await upstream.request("GET", target, headers=[("x-own", "1")], body=b"") as response:
                assert response.status == 200
                assert await response.read() == packed
            names = [name for name, _ in response.headers]
            assert names == ["content-encoding", "set-cookie", "set-cookie", "x-odd", "content-length"]
            assert ("set-cookie", "a=1") in response.headers and ("set-cookie", "b=2") in response.headers
            head = server.heads[0]
            assert head.startswith(f"GET /v1{target} HTTP/1.1\r\n")
            assert "x-own: 1\r\n" in head
            assert "accept-encoding" not in head.lower()
            assert "cookie" not in head.lower()

    run(scenario())


def test_redirects_and_errors_are_answers() -> None:
    async def answer(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(whole(b"", "Location: /elsewhere", status="307 Temporary Redirect"))
        await server.request(reader)
        writer.write(whole(b"no", status="503 Service Unavailable"))

    async def scenario() -> None:
        async with serving(answer) as server, upstream_of(server) as upstream:
            for status in (307, 503):
                async with await upstream.request("POST", "/x", headers=[], body=b"{}") as response:
                    assert response.status == status
                    await response.read()
            assert len(server.heads) == 2

    run(scenario())


@pytest.mark.parametrize("headers", [[], [("content-length", "100000")]])
def test_a_body_is_streamed_through(headers: list[tuple[str, str]]) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            await asyncio.sleep(0)
            yield b"0123456789" * 1000

    async def scenario() -> None:
        async with serving(ok) as server, upstream_of(server) as upstream:
            async with await upstream.request("POST", "/files", headers=headers, body=pieces()) as response:
                assert await response.read() == b"ok"
            assert server.bodies == [b"0123456789" * 10_000]
            assert ("transfer-encoding: chunked" in server.heads[0].lower()) is (not headers)

    run(scenario())


def test_an_empty_post_says_so() -> None:
    async def scenario() -> None:
        async with serving(ok) as server, upstream_of(server) as upstream:
            async with await upstream.request("POST", "/x", headers=[], body=b"") as response:
                await response.read()
            assert "content-length: 0\r\n" in server.heads[0].lower()

    run(scenario())


def test_a_connection_is_kept_after_a_whole_answer() -> None:
    async def scenario() -> None:
        async with serving(ok) as server, upstream_of(server) as upstream:
            for _ in range(5):
                async with await upstream.request("POST", "/x", headers=[], body=b"{}") as response:
                    await response.read()
            assert (server.connections, len(server.heads)) == (1, 5)

    run(scenario())


def test_hanging_up_in_the_middle_is_seen_at_once() -> None:
    async def scenario() -> None:
        async with serving(stalls_in_the_middle) as server, upstream_of(server) as upstream:
            response = await upstream.request("POST", "/x", headers=[], body=b"{}")
            assert await response.read_chunk() == b"first"
            began = time.monotonic()
            await response.aclose()
            await response.aclose()
            await asyncio.wait_for(server.hung_up.wait(), 5)
            assert time.monotonic() - began < 0.5

    run(scenario())


@pytest.mark.parametrize("answer", [stalls, stalls_in_the_middle])
def test_cancelling_is_seen_at_once(answer: Any) -> None:
    async def ask(upstream: Upstream) -> None:
        async with await upstream.request("POST", "/x", headers=[], body=b"{}") as response:
            async for _ in response.chunks():
                pass

    async def scenario() -> None:
        async with serving(answer) as server, upstream_of(server) as upstream:
            task = asyncio.create_task(ask(upstream))
            await asyncio.wait_for(server.asked.wait(), 5)
            await asyncio.sleep(0.05)
            began = time.monotonic()
            task.cancel()
            await asyncio.wait_for(server.hung_up.wait(), 5)
            assert time.monotonic() - began < 0.5
            assert task.cancelled()

    run(scenario())


def test_cancelled_requests_leave_nothing_behind() -> None:
    async def scenario() -> None:
        async with loopback() as base_url:
            traces = await hang_up(base_url, 500)
        assert (traces.fds, traces.tasks, traces.threads, traces.upstream_open) == (0, 0, 0, 0)
        assert traces.usable
        assert traces.noticed > 250
        assert traces.noticed_p50_s < 0.1
        assert traces.rss_mib < 8

    run(scenario())


def test_nobody_there() -> None:
    async def scenario() -> None:
        async with serving(ok) as server:
            pass
        async with upstream_of(server) as upstream:
            with pytest.raises(
                NothingSent, match=rf"127\.0\.0\.1:{server.port} can't be reached: connection refused"
            ):
                await upstream.request("POST", "/x", headers=[], body=b"{}")

    run(scenario())


def test_no_head_in_time() -> None:
    async def scenario() -> None:
        async with serving(stalls) as server, upstream_of(server) as upstream:
            with pytest.raises(UpstreamTimeout, match=r"didn't answer within 0\.1 s"):
                await upstream.request("POST", "/x", headers=[], body=b"{}", timeout_s=0.1)
            await asyncio.wait_for(server.hung_up.wait(), 5)
        async with serving(stalls) as server, upstream_of(server, timeout_s=0.1) as upstream:
            with pytest.raises(UpstreamTimeout, match=r"didn't answer within 0\.1 s"):
                await upstream.request("POST", "/x", headers=[], body=b"{}")

    run(scenario())


@pytest.mark.parametrize("read", [UpstreamResponse.read, UpstreamResponse.read_chunk])
def test_silence_in_the_middle(read: Callable[[UpstreamResponse], Awaitable[bytes | None]]) -> None:
    async def scenario() -> None:
        async with serving(stalls_in_the_middle) as server, upstream_of(server, timeout_s=0.2) as upstream:
            response = await upstream.request("POST", "/x", headers=[], body=b"{}")
            with pytest.raises(UpstreamTimeout, match="fell silent in the middle"):
                while await read(response):
                    pass
            await response.aclose()

    run(scenario())


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nfirst\r\n",
    ],
)
def test_a_body_that_ends_early(sent: bytes) -> None:
    async def answer(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(sent)

    async def scenario() -> None:
        async with serving(answer) as server, upstream_of(server) as upstream:
            with pytest.raises(UpstreamBroken):
                async with await upstream.request("POST", "/x", headers=[], body=b"{}") as response:
                    await response.read()

    run(scenario())


@pytest.mark.parametrize(
    "sent", [b"", b"HTTP/1.1 200 OK\r\nConte", b"220 mail.example ESMTP\r\n", b"\x15\x03\x01"]
)
def test_no_head_at_all(sent: bytes) -> None:
    async def answer(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(sent)

    async def scenario() -> None:
        async with serving(answer) as server, upstream_of(server) as upstream:
            with pytest.raises(UpstreamBroken, match="ended before it answered") as caught:
                await upstream.request("POST", "/x", headers=[], body=b"{}")
            assert not isinstance(caught.value, NothingSent | StaleConnection)

    run(scenario())


def test_a_kept_connection_that_had_ended() -> None:
    async def answer(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(whole(b"ok"))
        await server.request(reader)

    async def scenario() -> None:
        async with serving(answer) as server, upstream_of(server) as upstream:
            async with await upstream.request("POST", "/x", headers=[], body=b"{}") as response:
                await response.read()
            with pytest.raises(StaleConnection):
                await upstream.request("POST", "/x", headers=[], body=b"{}")

    run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("POST", "/x", [("authorization", "Bearer sk-secret\r\nx: y")]),
        ("POST", "/x", [("bad\nname", "sk-secret")]),
        ("PO ST", "/x", []),
    ],
)
def test_what_cannot_be_written_as_http(method: str, path: str, headers: list[tuple[str, str]]) -> None:
    async def scenario() -> None:
        async with serving(ok) as server, upstream_of(server) as upstream:
            with pytest.raises(RequestError, match="characters HTTP doesn't allow") as caught:
                await upstream.request(method, path, headers=headers, body=b"{}")
            assert "secret" not in str(caught.value)
            assert server.heads == []

    run(scenario())


@pytest.mark.parametrize(
    ("base", "path", "url"),
    [
        ("https://api.example/v1", "/chat/completions", "https://api.example/v1/chat/completions"),
        ("https://api.example/v1/", "/models?limit=2", "https://api.example/v1/models?limit=2"),
        ("https://api.example", "/models", "https://api.example/models"),
        (
            "https://x.example/openai/deployments/d?api-version=2024-10-21",
            "/chat/completions",
            "https://x.example/openai/deployments/d/chat/completions?api-version=2024-10-21",
        ),
        ("http://x.example/v1?a=1", "/files?b=%20", "http://x.example/v1/files?a=1&b=%20"),
    ],
)
def test_paths_are_appended_to_the_base_url(base: str, path: str, url: str) -> None:
    assert Upstream(base, timeout_s=1).url(path) == url


def test_the_place_in_messages_has_no_credentials() -> None:
    assert Upstream("https://user:secret@api.example:8443/v1", timeout_s=1).place == "api.example:8443"


def test_the_environments_proxy_is_used_but_never_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving(ok) as proxy, serving(ok) as teacher:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
            monkeypatch.delenv("no_proxy", raising=False)
            for base in ("http://teacher.example/v1", teacher.url):
                upstream = Upstream(base, timeout_s=5)
                async with await upstream.request("POST", "/x", headers=[], body=b"{}") as response:
                    assert await response.read() == b"ok"
                await upstream.aclose()
            assert [head.split("\r")[0] for head in proxy.heads] == [
                "POST http://teacher.example/v1/x HTTP/1.1"
            ]
            assert len(teacher.heads) == 1
            monkeypatch.setenv("no_proxy", "*")
            direct = Upstream("http://does-not-exist.invalid/v1", timeout_s=5)
            with pytest.raises(NothingSent):
                await direct.request("POST", "/x", headers=[], body=b"{}")
            await direct.aclose()
            assert len(proxy.heads) == 1

    run(scenario())


def test_an_untrusted_certificate_is_refused(require: Callable[[str], None], tmp_path: Path) -> None:
    require("openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def scenario() -> None:
        async with serving(ok, ssl=context) as server:
            upstream = Upstream(f"https://127.0.0.1:{server.port}/v1", timeout_s=5)
            with pytest.raises(NothingSent, match="certificate isn't trusted"):
                await upstream.request("POST", "/x", headers=[], body=b"{}")
            await upstream.aclose()
            assert server.heads == []

    run(scenario())
