"""Raw sockets against a running gateway: what a hostile or a slow client may do to it."""

from __future__ import annotations

import gc
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.app import create_app
from gateway.client import Client
from gateway.delivery import Delivery
from gateway.departure import Departure
from gateway.edge import HEAD_BYTES, MOST_HEADERS, SLOWEST_BYTES_S
from gateway.turn import Turn
from gateway.worker import Beat, Worker
from serving.learning_settings import LearningSettings
from serving.server_settings import ServerSettings
from serving.settings import Settings
from serving.teacher_settings import TeacherSettings

Start = Callable[..., Any]
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]}).encode()
STREAMED = BODY[:-1] + b', "stream": true}'
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\n"


@pytest.fixture
def workers() -> list[Worker]:
    """Hold the workers that `listen` runs."""
    return []


@pytest.fixture
def listen(
    stand_in: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: list[Worker]
) -> Iterator[Start]:
    """Run a gateway as `understudy serve` does, in a thread; gives what opens connections to it."""
    monkeypatch.setenv("TEACHER_KEY", "teacher-key")
    opened: list[socket.socket] = []
    running: list[tuple[Worker, threading.Thread]] = []

    def start(
        *, latency_ms: float = 0, answer: str = "greeting", **server: Any
    ) -> Callable[[], socket.socket]:
        settings = Settings(
            state_dir=tmp_path / "state",
            server=ServerSettings(**server),
            teacher=TeacherSettings(
                base_url=stand_in({"hello": answer}, latency_ms=latency_ms, latency_spread=0).url + "/v1",
                api_key_env="TEACHER_KEY",
            ),
            learning=LearningSettings(interval_s=0),
        )
        worker = Worker(create_app(settings), settings, lambda _: None, Beat())
        listening = socket.create_server(("127.0.0.1", 0))
        address = listening.getsockname()
        thread = threading.Thread(target=worker.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        running.append((worker, thread))
        workers.append(worker)
        deadline = time.monotonic() + 20
        while not worker.started:
            assert time.monotonic() < deadline
            time.sleep(0.005)

        def connect() -> socket.socket:
            opened.append(socket.create_connection(address, timeout=40))
            return opened[-1]

        return connect

    yield start
    for connection in opened:
        connection.close()
    for worker, thread in running:
        worker.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture
def connect(listen: Start) -> Callable[[], socket.socket]:
    """Open connections to a gateway that waits half a second for what should come."""
    opener: Callable[[], socket.socket] = listen(receive_timeout_s=0.5, max_body_bytes=100_000)
    return opener


def everything(connection: socket.socket) -> bytes:
    """Read to the end; a reset fails the test."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def answers(raw: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Split what a connection carried into its answers."""
    found = []
    while raw:
        head, _, rest = raw.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        size = int(headers["content-length"])
        found.append((int(lines[0].split()[1]), headers, rest[:size]))
        raw = rest[size:]
    return found


def refusal(raw: bytes) -> tuple[int, str]:
    ((status, headers, body),) = answers(raw)
    assert headers["connection"] == "close"
    assert headers["x-request-id"].startswith("req_")
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    return status, error["code"]


def test_what_is_sound_is_answered_and_the_connection_kept(connect: Start) -> None:
    connection = connect()
    chunked = b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    plain = b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY)
    connection.sendall(CHAT + plain + CHAT + chunked + CHAT + b"connection: close\r\n" + plain)
    assert [status for status, _, _ in answers(everything(connection))] == [200, 200, 200]


@pytest.mark.parametrize(
    "request_",
    [
        CHAT + b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY),
        CHAT + b"content-length: %d\r\n\r\n%s" % (len(STREAMED), STREAMED),
        CHAT + b"content-length: 2\r\n\r\n[]",
        b"GET /v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n",
    ],
    ids=["whole", "streamed", "refused", "passed on"],
)
def test_what_a_request_leaves_behind_goes_without_the_garbage_collector(
    connect: Start, request_: bytes, eventually: Start
) -> None:
    connection = connect()
    gc.collect()
    gc.disable()  # a circle would stay
    try:
        connection.sendall(9 * request_)
        connection.sendall(request_.replace(b"host: gateway", b"host: gateway\r\nconnection: close"))
        assert everything(connection).count(b"HTTP/1.1 ") == 10
        eventually(lambda: left_of_requests() == [])
    finally:
        gc.enable()


def left_of_requests() -> list[str]:
    kinds = (Client, Delivery, Departure, Turn)
    return [
        type(one).__name__ for one in gc.get_objects() if type(one) in kinds
    ]  # some proxies answer for others


AMBIGUOUS = {
    "both lengths": b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "both lengths, the other way round": b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": b"content-length: 4\r\ncontent-length: 5\r\n\r\nabcde",
    "the same length twice": b"content-length: 4\r\ncontent-length: 4\r\n\r\nabcd",
    "a list of lengths": b"content-length: 4, 4\r\n\r\nabcd",
    "a signed length": b"content-length: +4\r\n\r\nabcd",
    "a hexadecimal length": b"content-length: 0x4\r\n\r\nabcd",
    "a length that overflows": b"content-length: 18446744073709551620\r\n\r\nabcd",
    "an empty length": b"content-length: \r\n\r\nabcd",
    "a space before the colon": b"content-length : 4\r\n\r\nabcd",
    "a space before the colon of the coding": b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded line": b"x-a: b\r\n content-length: 4\r\n\r\nabcd",
    "a folded coding": b"transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "line feeds alone": b"x-a: b\nx-c: d\r\n\r\n",
    "a line feed at the end of the head": b"content-length: 4\r\n\nabcd",
    "a carriage return within a value": b"x-a: b\rcontent-length: 4\r\n\r\nabcd",
    "a zero byte within a value": b"x-a: b\0c\r\n\r\n",
    "a name with a zero byte": b"x-\0a: b\r\n\r\n",
    "a line without a name": b": b\r\n\r\n",
    "a coding that isn't known": b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a coding after chunked": b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked twice": b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "identity": b"transfer-encoding: identity\r\n\r\nabcd",
    "a chunk size with a sign": b"transfer-encoding: chunked\r\n\r\n+4\r\nabcd\r\n0\r\n\r\n",
    "a chunk size as 0x": b"transfer-encoding: chunked\r\n\r\n0x4\r\nabcd\r\n0\r\n\r\n",
    "a chunk size with a space": b"transfer-encoding: chunked\r\n\r\n4 \r\nabcd\r\n0\r\n\r\n",
    "a chunk size that overflows": b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nabcd\r\n0\r\n\r\n",
    "a chunk that is longer than its size": b"transfer-encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
    "a chunk ended by a line feed": b"transfer-encoding: chunked\r\n\r\n4\nabcd\r\n0\r\n\r\n",
    "a last chunk ended by a line feed": b"transfer-encoding: chunked\r\n\r\n4\r\nabcd\n0\r\n\r\n",
    "a chunk extension with a line feed": b"transfer-encoding: chunked\r\n\r\n4;a=\nb\r\nabcd\r\n0\r\n\r\n",
}


def test_what_could_be_read_in_two_ways_is_refused_and_nothing_after_it_served(connect: Start) -> None:
    hidden = b"GET /healthz HTTP/1.1\r\nhost: gateway\r\n\r\n"
    answered = {}
    for name, rest in AMBIGUOUS.items():
        connection = connect()
        connection.sendall(CHAT + rest + hidden)
        answered[name] = refusal(everything(connection))
    assert answered == dict.fromkeys(AMBIGUOUS, (400, "invalid_http_request"))


def test_old_http_knows_no_chunks(connect: Start) -> None:
    connection = connect()
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        b"GET /healthz HTTP/1.1\r\nhost: gateway\r\n\r\n"
    )
    assert refusal(everything(connection))[0] == 400


def test_a_head_is_bounded_in_bytes_and_fields(connect: Start) -> None:
    for many in (
        b"x-a: " + b"a" * (HEAD_BYTES + 1) + b"\r\n\r\n",
        b"".join(b"x-%d: %s\r\n" % (number, b"a" * 1000) for number in range(70)) + b"\r\n",
        b"".join(b"x-%d: a\r\n" % number for number in range(MOST_HEADERS + 1)) + b"\r\n",
    ):
        connection = connect()
        connection.sendall(CHAT + many)
        assert refusal(everything(connection)) == (431, "headers_too_large")
    connection = connect()
    connection.sendall(b"GET /" + b"a" * (HEAD_BYTES + 1) + b" HTTP/1.1\r\nhost: a\r\n\r\n")
    assert refusal(everything(connection)) == (431, "headers_too_large")


def test_a_head_that_never_ends_is_not_gathered(connect: Start) -> None:
    connection = connect()
    connection.sendall(CHAT + b"x-a: ")
    for _ in range(1000):
        if select.select([connection], [], [], 0)[0]:
            break
        connection.sendall(b"a" * 65536)
    assert refusal(everything(connection)) == (431, "headers_too_large")


def test_trailers_are_dropped_and_bounded(connect: Start) -> None:
    body = b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    connection = connect()
    connection.sendall(CHAT + b"connection: close\r\n" + body + b"x-understudy-route: nobody\r\n\r\n")
    ((status, _, _),) = answers(everything(connection))
    assert status == 200, "a route of that name would be refused"
    connection = connect()
    connection.sendall(CHAT + body + b"x-a: b\r\n" * 60_000)
    assert refusal(everything(connection)) == (431, "headers_too_large")


def test_a_request_that_stops_coming_is_ended(connect: Start) -> None:
    begun = [
        b"POST /v1/chat",
        CHAT + b"x-a: b",
        CHAT + b"content-length: 100\r\n\r\n",
        CHAT + b"expect: 100-continue\r\n",
    ]
    connections = [connect() for _ in begun]
    for connection, start in zip(connections, begun, strict=True):
        connection.sendall(start)
    for connection in connections:
        assert refusal(everything(connection)) == (408, "request_timeout")


def test_a_request_that_drips_is_ended(connect: Start) -> None:
    for begun in (CHAT + b"x-a: ", CHAT + b"content-length: 100\r\n\r\n"):
        connection = connect()
        connection.sendall(begun)
        connection.settimeout(0.05)
        deadline = time.monotonic() + 10
        said = b""
        while not said:
            assert time.monotonic() < deadline
            connection.sendall(b"a")
            try:
                said = connection.recv(65536)
            except TimeoutError:
                continue
        assert said.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_comes_steadily_is_waited_for(connect: Start) -> None:
    connection = connect()
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "hello"}], "user": "u" * 4000}
    ).encode()
    connection.sendall(CHAT + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body))
    step = int(SLOWEST_BYTES_S * 0.3)
    for start in range(0, len(body), step):
        connection.sendall(body[start : start + step])
        time.sleep(0.1)
    ((status, _, _),) = answers(everything(connection))
    assert status == 200


def test_a_body_that_is_refused_half_way_gets_its_answer(connect: Start) -> None:
    for declared in (b"content-length: 30000000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n1c9c380\r\n"):
        connection = connect()
        connection.sendall(CHAT + declared)
        connection.settimeout(20)
        rest = 30_000_000
        try:
            while rest > 0:
                rest -= connection.send(b" " * min(rest, 262_144))
        except ConnectionError:
            pass  # we may be told to stop; the answer has to be there all the same
        ((status, _, body),) = answers(everything(connection))
        assert status == 413
        assert json.loads(body)["error"]["code"] == "request_too_large"


def test_who_goes_on_sending_slowly_is_not_reset(connect: Start) -> None:
    """For longer than the silence after which a refused connection is closed."""
    connection = connect()
    connection.sendall(CHAT + b"content-length: 30000000\r\n\r\n" + b" " * 200_000)
    refused = connection.recv(65536)
    assert refused.startswith(b"HTTP/1.1 413 ")
    until = time.monotonic() + 3
    while time.monotonic() < until:
        connection.sendall(b" ")
        time.sleep(0.05)
    assert connection.recv(65536) == b""


def test_rubbish_after_a_request_doesnt_get_into_its_answer(listen: Start) -> None:
    connection = listen(latency_ms=300)()
    connection.sendall(CHAT + b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY) + b"\x16rubbish\r\n\r\n")
    ((status, headers, body),) = answers(everything(connection))
    assert status == 200
    assert headers["connection"] == "close"
    assert json.loads(body)["choices"][0]["message"]["content"] == "greeting"


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_an_offer_of_another_protocol_is_passed_over(connect: Start, protocol: bytes) -> None:
    """As Java's HttpClient makes with every request; the body and the next request are read all the same."""
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: %s\r\nhttp2-settings: AAMAAABk\r\n" % protocol
    length = b"content-length: %d\r\n\r\n" % len(BODY)
    chunked = b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    connection = connect()
    connection.sendall(CHAT + offer + length)
    connection.sendall(BODY + CHAT + offer + chunked + CHAT + b"connection: close\r\n" + length + BODY)
    assert [status for status, _, _ in answers(everything(connection))] == [200, 200, 200]


def test_it_is_no_proxy(connect: Start) -> None:
    connection = connect()
    connection.sendall(b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n")
    assert refusal(everything(connection)) == (400, "invalid_http_request")


def test_empty_lines_keep_no_connection_open_by_themselves(connect: Start) -> None:
    connection = connect()
    connection.sendall(b"\r\n\r\n")
    connection.sendall(CHAT + b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY))
    ((status, _, _),) = answers(everything(connection))
    assert status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(
    listen: Start, workers: list[Worker], eventually: Start, stream: bool
) -> None:
    """Else it holds the answer's memory, a place at the teacher and a connection for as long as it likes."""
    connect = listen(receive_timeout_s=0.5, answer="word " * (100_000 if stream else 3_000_000))
    asked = json.dumps({**json.loads(BODY), "stream": stream}).encode()
    stalled, patient = connect(), connect()
    for connection in (stalled, patient):
        connection.sendall(CHAT + b"content-length: %d\r\n\r\n%s" % (len(asked), asked))
    read = 0
    while read < 15_000_000:  # slowly, but on and on
        piece = patient.recv(200_000)
        read += len(piece)
        assert piece
        time.sleep(0.01)
    patient.close()
    eventually(lambda: not workers[0].server_state.connections)
