from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import orjson
import pytest
from openai.types.chat import ChatCompletionMessageParam

from serving.errors import RecordingError
from serving.failures import Failures, parse_failure, parse_script, read_script
from serving.recording import Recorded, Recording
from serving.stand_in import Latency, StandIn, create_stand_in
from serving.stand_in_call import StandInHttp

ROOT = Path(__file__).parents[2]
LOGPROBS = [
    {"token": "wh", "logprob": -0.1, "top_logprobs": []},
    {"token": "ere", "logprob": -0.2, "top_logprobs": []},
]
ROWS = Recording(
    Path("rows.csv"),
    (
        Recorded("Where is my parcel?", "where_is_my_parcel"),
        Recorded("twice", "first"),
        Recorded("twice", "second"),
        Recorded("sure", "where", logprobs=LOGPROBS),
        Recorded("call", None, tool_calls=[{"function": {"name": "track", "arguments": {"parcel": "ä7"}}}]),
        Recorded("old", "x", model="big-2024", latency_s=0.2),
    ),
)

Serve = Callable[[StandIn], str]


@pytest.fixture
def serve(serve: Callable[..., str]) -> Serve:
    return lambda app: f"{serve(app, http=StandInHttp)}/v1"


def client(base_url: str, api_key: str = "k") -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)


def asks(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "system", "content": "Label."}, {"role": "user", "content": text}]


def chat(base_url: str, text: str, headers: dict[str, str] | None = None, **body: object) -> httpx.Response:
    return httpx.post(
        f"{base_url}/chat/completions", json={"model": "m", "messages": asks(text), **body}, headers=headers
    )


def test_a_whole_answer_and_a_stream_say_the_same(serve: Serve) -> None:
    with client(serve(create_stand_in(ROWS))) as api:
        whole = api.chat.completions.create(model="m", messages=asks("Where is my parcel?"))
        chunks = list(
            api.chat.completions.create(
                model="m",
                messages=asks("Where is my parcel?"),
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == text == "where_is_my_parcel"
    assert whole.model == "big-2024"
    assert whole.usage is not None
    # "Label." is 6 bytes, the question 19: ⌈25/4⌉; the answer 18: ⌈18/4⌉.
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 5)
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"


def test_a_text_recorded_twice_gets_its_answers_in_turn(serve: Serve) -> None:
    url = serve(create_stand_in(ROWS))
    got = [chat(url, "twice").json()["choices"][0]["message"]["content"] for _ in range(3)]
    assert got == ["first", "second", "first"]


def test_the_last_user_message_counts_and_parts_are_joined(serve: Serve) -> None:
    url = serve(create_stand_in(ROWS))
    messages = [
        {"role": "user", "content": "twice"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "my parcel?"}],
        },
        {"role": "assistant", "content": "?"},
    ]
    reply = httpx.post(f"{url}/chat/completions", json={"messages": messages, "n": 2}).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["where_is_my_parcel"] * 2
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]


def test_an_unknown_text_is_an_error_or_the_default(serve: Serve) -> None:
    with client(serve(create_stand_in(ROWS))) as api:
        with pytest.raises(openai.NotFoundError) as raised:
            api.chat.completions.create(model="m", messages=asks("nobody asked this"))
        assert (raised.value.code, raised.value.param) == ("not_in_recording", "messages")
        assert "nobody asked this" in raised.value.message
    url = serve(create_stand_in(ROWS, default="other"))
    assert chat(url, "nobody asked this").json()["choices"][0]["message"]["content"] == "other"


def test_logprobs_only_where_asked_and_recorded(serve: Serve) -> None:
    url = serve(create_stand_in(ROWS))
    recorded = chat(url, "sure", logprobs=True).json()
    assert recorded["choices"][0]["logprobs"]["content"] == LOGPROBS
    assert recorded["usage"]["completion_tokens"] == 2
    assert chat(url, "sure").json()["choices"][0]["logprobs"] is None
    assert chat(url, "twice", logprobs=True).json()["choices"][0]["logprobs"] is None
    with client(url) as api:
        chunks = list(
            api.chat.completions.create(model="m", messages=asks("sure"), stream=True, logprobs=True)
        )
    streamed = [chunk.choices[0] for chunk in chunks if chunk.choices[0].delta.content]
    assert [choice.delta.content for choice in streamed] == ["wh", "ere"]
    assert [
        choice.logprobs.content[0].logprob
        for choice in streamed
        if choice.logprobs and choice.logprobs.content
    ] == [
        -0.1,
        -0.2,
    ]


def test_recorded_tool_calls(serve: Serve) -> None:
    with client(serve(create_stand_in(ROWS))) as api:
        choice = api.chat.completions.create(model="m", messages=asks("call")).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls
        call = choice.message.tool_calls[0]
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("track", {"parcel": "ä7"})
        with api.chat.completions.stream(model="m", messages=asks("call")) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert streamed.finish_reason == "tool_calls"
        assert streamed.message.tool_calls
        assert streamed.message.tool_calls[0].function.arguments == call.function.arguments


def test_models(serve: Serve) -> None:
    with client(serve(create_stand_in(ROWS))) as api:
        assert [model.id for model in api.models.list()] == ["big-2024"]
        assert api.models.retrieve("big-2024").owned_by == "stand-in"
        with pytest.raises(openai.NotFoundError, match="big-2024"):
            api.models.retrieve("small")
    with client(serve(create_stand_in(ROWS, model="named"))) as api:
        assert api.chat.completions.create(model="m", messages=asks("twice")).model == "named"
        assert api.chat.completions.create(model="m", messages=asks("old")).model == "big-2024"


def test_the_key_is_required_when_there_is_one(serve: Serve) -> None:
    url = serve(create_stand_in(ROWS, api_key="secret"))
    with client(url) as api, pytest.raises(openai.AuthenticationError) as raised:
        api.models.list()
    assert raised.value.code == "invalid_api_key"
    with client(url, api_key="secret") as api:
        assert len(list(api.models.list())) == 1


def test_other_paths_can_be_seen_through(serve: Serve) -> None:
    url = serve(create_stand_in(ROWS))
    binary = bytes(range(256)) * 1000
    seen = httpx.put(
        f"{url}/files/7?limit=2", content=binary, headers={"x-a": "b", "authorization": "Bearer s"}
    ).json()
    assert (seen["method"], seen["path"], seen["query"]) == ("PUT", "/v1/files/7", "limit=2")
    assert (seen["length"], seen["headers"]["x-a"]) == (256_000, "b")
    assert seen["headers"]["authorization"].startswith("sha256:")
    echoed = httpx.post(f"{url}/echo", content=binary, headers={"content-type": "audio/mpeg"})
    assert (echoed.content, echoed.headers["content-type"]) == (binary, "audio/mpeg")
    assert httpx.post(f"{url}/echo/sse", content=b"a\nb").text == "data: a\n\ndata: b\n\ndata: [DONE]\n\n"
    outside = httpx.get(f"{url.removesuffix('/v1')}/elsewhere", headers={"x-request-id": "mine"})
    assert (outside.status_code, outside.headers["x-request-id"]) == (404, "mine")
    assert outside.json()["error"]["code"] == "not_found"
    assert httpx.get(f"{url}/chat/completions").status_code == 405


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"{}", "messages"),
        (b'{"messages": [1]}', "messages"),
        (b'{"messages":[{}]}', "messages"),
    ],
)
def test_bad_bodies_get_the_envelope(serve: Serve, body: bytes, param: str | None) -> None:
    reply = httpx.post(f"{serve(create_stand_in(ROWS))}/chat/completions", content=body)
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.json()["error"]["param"] == param


def test_failures_asked_for_by_a_request(serve: Serve) -> None:
    url = serve(create_stand_in(ROWS))
    limited = chat(url, "sure", {"x-stand-in": "status=429;retry-after=7"})
    assert (limited.status_code, limited.headers["retry-after"]) == (429, "7")
    assert limited.json()["error"]["type"] == "rate_limit_error"
    assert [chat(url, "sure", metadata={"stand_in": "status=503;times=2"}).status_code for _ in range(3)] == [
        503,
        503,
        200,
    ]
    started = time.monotonic()
    assert chat(url, "sure", {"x-stand-in": "stall=0.3"}).status_code == 200
    assert time.monotonic() - started >= 0.3
    with pytest.raises(httpx.RemoteProtocolError):
        chat(url, "sure", {"x-stand-in": "break-after=0"})
    with client(url) as api:
        stream = api.chat.completions.create(
            model="m", messages=asks("sure"), stream=True, extra_headers={"x-stand-in": "break-after=2"}
        )
        assert next(stream).choices[0].delta.role == "assistant"
        assert next(stream).choices[0].delta.content == "wh"
        with pytest.raises(openai.APIConnectionError):
            next(stream)
    bad = chat(url, "sure", {"x-stand-in": "explode=1"})
    assert bad.status_code == 400
    assert "explode" in bad.json()["error"]["message"]
    assert httpx.get(f"{url.removesuffix('/v1')}/stats").json() == {
        "chat": 8,
        "answered": 1,
        "failed": 6,
        "disconnected": 0,
    }


def test_failures_by_script(serve: Serve, tmp_path: Path) -> None:
    script = tmp_path / "script.jsonl"
    script.write_text(
        '{"text": "twice", "status": 500}\n\n'
        '{"from": 2, "to": 3, "status": 503}\n{"every": 5, "status": 429}\n'
    )
    url = serve(create_stand_in(ROWS, failures=Failures(read_script(script))))
    assert [chat(url, "sure").status_code for _ in range(6)] == [200, 503, 503, 200, 429, 200]
    assert chat(url, "twice").status_code == 500


def raw(url: str, failure: str, *, stream: bool = False, wait_s: float = 0.3) -> bytes:
    """Send one chat request by hand; give what comes until the end, or until `wait_s` of silence."""
    body = orjson.dumps({"model": "m", "messages": asks("sure"), "stream": stream})
    address = urlsplit(url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-stand-in: {failure}\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        connection.settimeout(wait_s)
        got = b""
        with contextlib.suppress(TimeoutError):
            while piece := connection.recv(65536):
                got += piece
            return got + b"<end>"
        return got


@pytest.mark.parametrize("stream", [False, True])
def test_failures_below_http(serve: Serve, stream: bool) -> None:
    url = serve(create_stand_in(ROWS))
    assert raw(url, "hang-after=0", stream=stream) == b""
    half = raw(url, "hang-after=2", stream=stream)
    assert half.startswith(b"HTTP/1.1 200 OK")
    assert b"wh" in half or not stream
    assert not half.endswith((b"<end>", b"[DONE]\n\n"))
    for failure in ("reset-after=0", "reset-after=1"):
        with pytest.raises(ConnectionResetError):
            raw(url, failure, stream=stream, wait_s=10)
    noise = raw(url, "send=noise", stream=stream, wait_s=10)
    assert noise.endswith(b"<end>")
    assert not noise.startswith(b"HTTP/")
    head, _, body = raw(url, "send=short-length", stream=stream, wait_s=10).partition(b"\r\n\r\n")
    assert 2 * int(head.rpartition(b": ")[2]) < len(body)
    head, _, body = raw(url, "send=truncated", stream=stream).partition(b"\r\n\r\n")
    assert str(len(body)).encode() in head
    assert b"finish_reason" not in body[-80:]
    assert raw(url, "send=empty", stream=stream).endswith(b"\r\n\r\n")
    assert raw(url, "send=garbage", stream=stream).endswith(b"</html>")
    slow = raw(url, "drip=0.0005", stream=stream, wait_s=0.5)
    assert slow.endswith((b"0\r\n\r\n", b"}"))


def test_a_drip_comes_byte_by_byte(serve: Serve) -> None:
    url = serve(create_stand_in(ROWS))
    with httpx.stream(
        "POST",
        f"{url}/chat/completions",
        json={"messages": asks("sure")},
        headers={"x-stand-in": "drip=0.02"},
    ) as answer:
        pieces = answer.iter_raw()
        assert [len(next(pieces)) for _ in range(5)] == [1] * 5


def test_failures_are_switched_while_it_runs(serve: Serve) -> None:
    url = serve(create_stand_in(ROWS, failures=Failures(rate=1.0)))
    control = f"{url.removesuffix('/v1')}/failures"
    assert chat(url, "sure").status_code == 500
    assert httpx.post(control, content=b'{"status": 503}\n{"status": 429}').json() == {"rules": 2}
    assert chat(url, "sure").status_code == 503
    wrong = httpx.post(control, content=b'{"status": 503}\n{"sttaus": 429}')
    assert wrong.status_code == 400
    assert "line 2" in wrong.json()["error"]["message"]
    assert httpx.get(control).status_code == 405
    assert chat(url, "sure").status_code == 503, "what can't be read changes nothing"
    assert httpx.post(control).json() == {"rules": 0}
    assert chat(url, "sure").status_code == 200


def test_a_share_of_the_requests_and_those_beyond_a_rate() -> None:
    now = [100.2]
    rules = parse_script(b'{"beyond_per_s": 3, "status": 429}\n{"share": 0.2, "status": 500}')
    failures = Failures(rules, clock=lambda: now[0])

    def statuses(count: int) -> list[int | None]:
        drawn = [failures.draw(number, "t", None) for number in range(count)]
        return [failure.status if failure else None for failure in drawn]

    assert statuses(9)[3:] == [429] * 6
    now[0] = 101.0
    assert 429 not in statuses(3)
    seen = []
    for _ in range(300):
        now[0] += 1
        seen += statuses(3)
    assert 429 not in seen
    assert 120 < seen.count(500) < 240


def test_failures_by_rate_repeat() -> None:
    draws = [
        [failures.draw(number, "t", None) is not None for number in range(1000)]
        for failures in (Failures(rate=0.1), Failures(rate=0.1))
    ]
    assert draws[0] == draws[1]
    assert 60 < sum(draws[0]) < 140


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1"),
        ("[1]", "expected a JSON object"),
        ('{"status": 200}', "at least 400, got 200"),
        ('{"status": 700}', "400 to 599"),
        ('{"every": 0, "status": 500}', "`every` must be a whole number"),
        ('{"text": 1, "status": 500}', "`text` must be a string"),
        ('{"every": 2}', "no failure named"),
        ('{"send": "nothing"}', "`send` must be one of truncated"),
        ('{"share": 2, "status": 500}', "`share` must be a number, 0 to 1"),
        ('{"stall": "long"}', "`stall` must be seconds"),
        ('{"sttaus": 500}', "unknown failure 'sttaus'; known: status"),
    ],
)
def test_bad_scripts_are_refused(tmp_path: Path, line: str, says: str) -> None:
    script = tmp_path / "script.jsonl"
    script.write_text(line)
    with pytest.raises(RecordingError, match=re.escape(says)):
        read_script(script)


def test_a_failure_needs_values_that_make_sense() -> None:
    for asked in ("", "status", "stall=-1", "stall=nan", "break-after=x", "status=500;times=0"):
        with pytest.raises(ValueError, match=r"`|unknown"):
            parse_failure(asked)


def test_latency_is_drawn_around_the_median_and_repeats() -> None:
    rows = [Recorded(str(number), "a", latency_s=0.5) for number in range(400)]
    drawn = sorted(Latency(100, 0.3).of(row) for row in rows)
    assert 0.09 < drawn[200] < 0.11
    assert drawn[0] < 0.07
    assert drawn[-1] > 0.15
    assert drawn == sorted(Latency(100, 0.3).of(row) for row in rows)
    assert {Latency(0, 0.3).of(row) for row in rows} == {0.0}
    assert {Latency(None, 0.3).of(row) for row in rows} == {0.5}


def test_a_stream_is_spread_over_the_latency(serve: Serve) -> None:
    with client(serve(create_stand_in(ROWS, latency_ms=300, latency_spread=0))) as api:
        started = time.monotonic()
        at = [
            time.monotonic() - started
            for _ in api.chat.completions.create(model="m", messages=asks("sure"), stream=True)
        ]
    assert at[0] < 0.2 <= 0.28 <= at[-1]


def test_a_client_that_goes_away_is_noticed(serve: Serve) -> None:
    url = serve(create_stand_in(ROWS, latency_ms=30_000))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/chat/completions", json={"messages": asks("sure")}, timeout=0.5)
    deadline = time.monotonic() + 5
    while (stats := httpx.get(f"{url.removesuffix('/v1')}/stats").json())["disconnected"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert stats == {"chat": 1, "answered": 0, "failed": 0, "disconnected": 1}


@contextlib.contextmanager
def understudy(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "understudy", "stand-in", *arguments],
        cwd=ROOT,
        env={**os.environ, "STAND_IN_KEY": "secret"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    file.write_text("text,gold\na,x\nb,y\n")
    with understudy(
        str(file), "--port", "0", "--answers", "gold", "--api-key-env", "STAND_IN_KEY"
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"stand-in: 2 answers on (http://127\.0\.0\.1:\d+/v1)\n", line)
        assert found, line
        assert chat(found[1], "b").status_code == 401
        assert (
            chat(found[1], "b", {"authorization": "Bearer secret"}).json()["choices"][0]["message"]["content"]
            == "y"
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        with understudy(
            str(file), "--answers", "gold", "--port", found[1].split(":")[2].split("/")[0]
        ) as again:
            assert again.stdout is not None
            assert again.stdout.readline() == line
            again.send_signal(signal.SIGINT)
            assert again.wait(10) == 0


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    file.write_text("text,gold\na,x\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, says in (
            ([str(file)], "--answers gold"),
            ([str(file), "--answers", "gold", "--port", port], f"port {port}"),
            ([str(file), "--answers", "gold", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
            ([str(file), "--answers", "silver"], "silver"),
        ):
            with understudy(*arguments) as process:
                _, errors = process.communicate(timeout=20)
            assert process.returncode == 2
            assert errors.startswith("understudy: ")
            assert says in errors
            assert errors.count("\n") == 1
