"""Whole answers over real connections: in one piece where that can be, the long way where it can't."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gateway.client import Client
from gateway.edge import Door, Edge
from gateway.reply import Headers, Reply

Connect = Callable[[], http.client.HTTPConnection]
_GET = b"GET /%b HTTP/1.%d\r\nhost: here\r\n\r\n"


@pytest.fixture
def said() -> Headers:
    """Hold the fields that the server of `connect` answers with."""
    return [("content-type", "text/plain"), ("x-said", "something")]


@pytest.fixture
def address(said: Headers) -> Iterator[tuple[str, int]]:
    """Run a server on our own connections that answers each request whole: with its target."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(scope, receive, send)
        await client.read(1000)
        await client.answer(Reply(200, said, client.target.encode()))

    config = uvicorn.Config(
        app, interface="asgi3", lifespan="off", http=Edge, ws="none", log_config=None, server_header=False
    )
    server = uvicorn.Server(config)
    server.server_state = Door(receive_timeout_s=30)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    yield listening.getsockname()
    server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.fixture
def connect(address: tuple[str, int]) -> Iterator[Connect]:
    """Give what opens connections to the server."""
    opened: list[http.client.HTTPConnection] = []

    def open_one() -> http.client.HTTPConnection:
        opened.append(http.client.HTTPConnection(*address, timeout=30))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()


def test_an_answer_is_what_http_wants(connect: Connect) -> None:
    connection = connect()
    for target in ("/first", "/second"):  # the same connection: it is kept
        connection.request("POST", target, body=b"x" * 100)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, target.encode())
        told = dict(answer.getheaders())
        assert told.pop("x-request-id").startswith("req_")
        assert "GMT" in told.pop("date")
        assert told == {
            "content-type": "text/plain",
            "x-said": "something",
            "content-length": str(len(target)),
        }


def test_what_is_asked_in_a_row_is_answered_in_that_row(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(_GET % (b"one", 1) + _GET % (b"two", 1) + _GET % (b"three", 0))
        received = b""
        while piece := connection.recv(65536):  # the last one has it closed
            received += piece
    assert received.index(b"/one") < received.index(b"/two") < received.index(b"/three")
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert received.count(b"connection: close\r\n") == 1


def test_a_head_alone_has_no_body(connect: Connect) -> None:
    connection = connect()
    connection.request("HEAD", "/first")
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("content-length"), answer.read()) == (200, "6", b"")
    connection.request("GET", "/second")
    assert connection.getresponse().read() == b"/second"


@pytest.mark.parametrize("value", ["a\r\nx-made-up: 1", "a\nb", "a\x00b", "a\x7fb", "a€b"])
def test_no_field_can_end_its_line(address: tuple[str, int], said: Headers, value: str) -> None:
    said.append(("x-told", value))
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(_GET % (b"one", 0))
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert b" 200 " not in received
    assert b"x-told" not in received


def test_answers_that_pile_up_all_arrive(address: tuple[str, int], said: Headers) -> None:
    target = b"z" * 60_000
    with socket.create_connection(address, timeout=30) as connection:
        asked = 100
        sender = threading.Thread(
            target=connection.sendall, args=(_GET % (target, 1) * (asked - 1) + _GET % (target, 0),)
        )
        sender.start()
        received = 0
        while piece := connection.recv(65536):
            received += piece.count(b"z")
        sender.join(timeout=20)
    assert received == asked * len(target)
