"""Whatever a client sends: an answer in time, the client's faults as 4xx in OpenAI's envelope, and what is
passed on is what was judged. Then the gateway is alive, and its log can be read."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from serving.log import LogReader

Start = Callable[..., Any]
CHAT = "/v1/chat/completions"
PATIENCE_S = 5.0
BOUNDED = settings(
    max_examples=150,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Teacher:
    """Answers everything with 200 and keeps what reached it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        self.seen.append((scope["method"], scope["raw_path"].decode("latin-1"), raw))
        kind, body = b"application/json", json.dumps(self._whole()).encode()
        if b'"stream":true' in raw:
            chunk = {**self._whole(), "object": "chat.completion.chunk", "usage": None}
            chunk["choices"] = [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]
            kind, body = b"text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()
        head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        await send(head)
        await send({"type": "http.response.body", "body": body})

    @staticmethod
    def _whole() -> dict[str, Any]:
        message = {"role": "assistant", "content": "x"}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
        }


class Sender:
    """Sends requests as they are given, over one connection, and holds every answer against the rules."""

    def __init__(self, url: str, teacher: Teacher) -> None:
        self.teacher = teacher
        self.statuses: Counter[int] = Counter()
        self._place = urlsplit(url).netloc
        self._connection = http.client.HTTPConnection(self._place, timeout=PATIENCE_S)

    def send(
        self,
        body: bytes,
        headers: list[tuple[str, bytes]] | None = None,
        *,
        method: str = "POST",
        target: str = CHAT,
        chunked: bool = False,
    ) -> tuple[int, bytes, dict[str, str]]:
        began = time.monotonic()
        connection = self._connection
        connection.putrequest(method, target, skip_accept_encoding=True)
        given = headers or []
        if not any(name == "content-type" for name, _ in given):
            connection.putheader("content-type", "application/json")
        for name, value in given:
            connection.putheader(name, value)
        if chunked:
            connection.putheader("transfer-encoding", "chunked")
            connection.endheaders([body[:7], body[7:]], encode_chunked=True)
        else:
            connection.putheader("content-length", str(len(body)))
            connection.endheaders(body)
        response = connection.getresponse()
        answer = response.read()
        told = {name.lower(): value for name, value in response.getheaders()}
        assert time.monotonic() - began < PATIENCE_S
        self.statuses[response.status] += 1
        assert 200 <= response.status < 500, answer
        assert told["x-request-id"]
        if response.status >= 400 and method != "HEAD":
            error = json.loads(answer)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert isinstance(error["message"], str) and error["message"]
            assert isinstance(error["type"], str)
        return response.status, answer, told

    def close(self) -> None:
        self._connection.close()

    def chat(
        self, body: bytes, headers: list[tuple[str, bytes]] | None = None, *, chunked: bool = False
    ) -> int:
        """Send a chat request; the teacher, if it was asked, was asked exactly this."""
        before = len(self.teacher.seen)
        status, _, told = self.send(body, headers, chunked=chunked)
        asked = self.teacher.seen[before:]
        assert len(asked) == (status == 200 and told["x-understudy-route"] == "teacher")
        for method, path, raw in asked:
            assert (method, path) == ("POST", CHAT)
            # What was judged is what a reader of the last of several equal keys sees; it goes out without them.
            assert _without_stream(json.loads(raw, object_pairs_hook=_no_key_twice)) == _without_stream(
                json.loads(body)
            )
        return status


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def _without_stream(request: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key not in ("stream", "stream_options")}


@pytest.fixture
def caching() -> bool:
    return False


@pytest.fixture
def sender(serve: Start, gateway: Start, publish: Start, tmp_path: Any, caching: bool) -> Any:
    """A gateway with rules and a live release, before a teacher that keeps what it sees."""
    teacher = Teacher()
    tasks = [
        {"name": "intents", "match": {"model": "intents"}},
        {"name": "tagged", "match": {"metadata": {"job": "tag"}}},
        {"name": "prompted", "match": {"system": "(?i)^label .*message"}},
    ]
    publish(tmp_path / "state", "intents", {"parcel lost": "lost"})
    running = gateway(
        serve(teacher),
        log={"durability": "relaxed"},
        task=tasks,
        task_defaults={"cache": caching},
        server={"max_body_bytes": 3_000_000},
    )
    sender = Sender(running.url, teacher)
    yield sender
    ordinary_request = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    assert sender.chat(json.dumps(ordinary_request).encode()) == 200, "it is alive"
    sender.close()
    reader = LogReader(running.state_dir)
    logs = [reader.exchanges(task) for task in reader.tasks()]
    assert [log.damaged for log in logs] == [0] * len(logs)
    assert sum(len(log.exchanges) for log in logs) > 0
    assert running.metric("understudy_exchanges_lost_total") == 0
    assert running.metric("understudy_upstream_errors_total", upstream="student") == 0


# Bodies, as text: no JSON library writes what is sent here.


T = TypeVar("T")


def mostly(usual: st.SearchStrategy[T], other: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    return st.integers(0, 9).flatmap(lambda drawn: other if drawn == 7 else usual)


NUMBERS = re.findall(
    r"\S+",
    """0 -0 1 -1 2 0.5 -0.0 1.5e3 1E5 1e-400 9007199254740993 9223372036854775807 18446744073709551615 1e22 1e308
    0.1000000000000000055511151231 -9223372036854775808""",
)
NO_NUMBERS = re.findall(
    r"\S+",
    """1e400 -1e400 NaN Infinity -Infinity 01 1. .5 +1 0x10 18446744073709551616 -9223372036854775809 1.8e308
    123456789012345678901234567890""",
)
texts = st.one_of(
    st.sampled_from(
        ["", "hello", "parcel lost", "text", "user", "x" * 5000, "\x00", "\ufeff", "\u2028", "ß" * 300]
    ),
    st.text(max_size=20),
)
written = st.one_of(texts.map(json.dumps), texts.map(lambda text: json.dumps(text, ensure_ascii=False)))
odd = st.one_of(
    st.sampled_from(
        [r'"\ud800"', r'"\udc00\ud800"', r'"\u0000"', '"\x01"', r'"\x41"', '"', '"\t"', r'"\ud83d\ude00"']
    ),
    st.text(st.characters(categories=["Cs", "Cc", "L"]), max_size=5).map(json.dumps),
)
strings = mostly(written, odd)
plain = st.sampled_from([*NUMBERS, "null", "true", "false"])
leaves = st.one_of(strings, mostly(plain, st.sampled_from(NO_NUMBERS)))


def listed(items: st.SearchStrategy[str], least: int = 0) -> st.SearchStrategy[str]:
    return st.lists(items, min_size=least, max_size=3).map(lambda parts: f"[{','.join(parts)}]")


def members(keys: st.SearchStrategy[str], values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(keys, values).map(lambda pair: f"{pair[0]}:{pair[1]}")
    return st.lists(pairs, max_size=5).map(lambda parts: f"{{{','.join(parts)}}}")


values = st.recursive(
    leaves,
    lambda inner: st.one_of(listed(inner), members(st.one_of(strings, st.just('"a"')), inner)),
    max_leaves=8,
)
NAMES = re.findall(r"\S+", '"type" "text" "role" "content" "name" "tool_calls" "image_url" "refusal"')
parts = st.one_of(
    strings.map(lambda text: f'{{"type":"text","text":{text}}}'),
    members(st.sampled_from(NAMES), values),
    values,
)
contents = st.one_of(strings, listed(parts), values)
roles = st.sampled_from([f'"{role}"' for role in ("user", "system", "developer", "assistant", "tool", "odd")])
ordinary = st.tuples(roles, contents).map(lambda both: f'{{"role":{both[0]},"content":{both[1]}}}')
messages = mostly(ordinary, st.one_of(members(st.sampled_from(NAMES), values), values))
FIELDS = re.findall(
    r"\S+",
    """tools functions n logprobs top_logprobs audio modalities logit_bias web_search_options response_format metadata
    store stream stream_options temperature max_tokens seed stop user tool_choice model messages made_up""",
)
fields = st.tuples(st.sampled_from(FIELDS), values).map(lambda pair: f'"{pair[0]}":{pair[1]}')
names = st.sampled_from(['"m"', '"intents"', '"' + "y" * 3000 + '"'])
models = mostly(names, values)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    talk = listed(messages, least=1)
    asked = [f'"messages":{draw(mostly(talk, values))}']
    asked += [f'"model":{draw(models)}', *draw(st.lists(fields, max_size=3))]
    text = f"{{{','.join(draw(st.permutations(asked)))}}}"
    return text.encode("utf-8", draw(st.sampled_from(["surrogatepass", "replace"])))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    raw = draw(requests())
    at = draw(st.integers(0, len(raw)))
    piece = draw(
        st.one_of(st.binary(max_size=4), st.sampled_from([b"\xef\xbb\xbf", b"\x00", b"\xff", b"]" * 9]))
    )
    return draw(st.sampled_from([raw[:at], raw[:at] + piece + raw[at:], piece + raw, raw + piece]))


@pytest.mark.parametrize("caching", [False, True])
def test_any_body(sender: Sender, caching: bool) -> None:
    @BOUNDED
    @given(st.one_of(requests(), mostly(requests(), st.one_of(damaged(), st.binary(max_size=60)))))
    def holds(body: bytes) -> None:
        sender.chat(body)

    holds()
    assert sender.statuses[200] > 5, "some of them are requests like any other"
    assert sender.statuses[400] > 5


def test_any_field_of_an_ordinary_request(sender: Sender) -> None:
    @BOUNDED
    @given(models, st.lists(messages, max_size=2), st.lists(fields, max_size=2))
    def holds(model: str, before: list[str], more: list[str]) -> None:
        asked = ",".join([*before, '{"role":"user","content":"parcel lost"}'])
        sender.chat(
            f'{{"model":{model},"messages":[{asked}]{"".join("," + f for f in more)}}}'.encode(
                "utf-8", "replace"
            )
        )

    holds()
    assert sender.statuses[200] > 5


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"\xef\xbb\xbf{}", 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
        (b'{"model":"m","messages":[{"role":"user","content":' + b"[" * 251 + b"]" * 251 + b"}]}", 200),
        (b'{"model":"m","messages":[{"role":"user","content":' + b"[" * 300 + b"]" * 300 + b"}]}", 400),
        (b'{"model":"m","messages":[' + b"{}," * 200_000 + b"{}]}", 400),
        (b'{"model":"m","messages":[{"role":"user","content":"' + b"a" * 2_900_000 + b'"}]}', 200),
        (b'{"model":"intents","messages":[{"role":"user","content":"' + b"a b" * 900_000 + b'"}]}', 200),
        (b'{"model":"m","messages":[{"role":"system","content":"' + b"3-day-" * 480_000 + b'"}]}', 200),
        (b'{"model":"m","messages":[{"role":"system","content":"' + b"Mon, " * 580_000 + b'1"}]}', 200),
        (b'{"model":"m","messages":[{"role":"system","content":"' + b"label " * 480_000 + b'"}]}', 200),
        (
            b'{"model":"m","messages":['
            + b'{"role":"system","content":"a"},' * 30_000
            + b'{"role":"user"}]}',
            200,
        ),
        (b'{"model":"m","messages":[{"role":"user"}],"x":[' + b"[]," * 900_000 + b"[]]}", 400),
        (b'{"model":"m","messages":[{"role":"user"}],"seed":' + b"9" * 2_000_000 + b"}", 400),
        (b'{"model":"m","messages":[{"role":"user"}],"seed":' + b"0." + b"9" * 2_000_000 + b"}", 200),
    ],
    ids=lambda value: (
        str(value) if isinstance(value, int) else re.sub(r"[^\w{\[]+", "", value[:70].decode("latin-1"))
    ),
)
def test_bodies_that_are_too_much(sender: Sender, body: bytes, status: int) -> None:
    assert sender.chat(body) == status


# Headers

OWN = ["x-understudy-task", "x-understudy-route", "x-request-id", "x-stainless-retry-count", "authorization"]
PASSED_ON = ["user-agent", "openai-organization", "traceparent", "cache-control", "accept", "accept-encoding"]
ABOUT_THE_BODY = ["content-type", "content-encoding", "content-language", "expect-ct"]
VALUES = re.findall(
    rb"\S+",
    b"""teacher student intents other ../../etc 0 -1 99999 Bearer gzip br,gzip text/plain multipart/form-data
    %0d%0a chunked, no-store no-cache""",
)
header_values = st.one_of(
    st.sampled_from([b"", *VALUES, b"9" * 4000, b"Bearer ", b"Bearer a b"]),
    st.binary(max_size=40).map(lambda raw: bytes(byte for byte in raw if byte >= 32 and byte != 127).strip()),
    st.integers(1, 8000).map(lambda size: b"a" * size),
)
headers = st.lists(st.tuples(st.sampled_from(OWN + PASSED_ON + ABOUT_THE_BODY), header_values), max_size=5)


def test_any_headers(sender: Sender) -> None:
    body = b'{"model":"intents","messages":[{"role":"user","content":"parcel lost"}]}'

    @BOUNDED
    @given(headers, st.booleans(), st.booleans())
    def holds(given_headers: list[tuple[str, bytes]], passed_through: bool, chunked: bool) -> None:
        if passed_through:
            before = len(sender.teacher.seen)
            sender.send(body, given_headers, target="/v1/embeddings", chunked=chunked)
            assert [raw for _, _, raw in sender.teacher.seen[before:]] == [body]
        else:
            sender.chat(body, given_headers, chunked=chunked)

    holds()
    assert sender.statuses[200] > 5


# Paths

SEGMENTS = re.findall(
    r"\S+",
    """v1 V1 chat completions models .. . %2e %2e%2e %2E. ; ;a=b %2f %5c %00 %0d%0a %ff %zz % ~ @ a:b * %252e%252e
    metrics healthz %76%31""",
)
segments = st.sampled_from(["", *SEGMENTS])


@st.composite
def targets(draw: st.DrawFn) -> str:
    start = draw(
        st.sampled_from(["/", "/v1/", "/v1/", "/v1/", "//", "/v1//", "http://elsewhere.invalid/v1/"])
    )
    path = start + "/".join(draw(st.lists(segments, max_size=5)))
    return path + draw(st.sampled_from(["", "?", "?a=b", "?a=%00", "?/../..", "??", "?" + "q" * 3000]))


def test_any_path_stays_below_v1(sender: Sender) -> None:
    @BOUNDED
    @given(st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "PATCH"]), targets())
    def holds(method: str, target: str) -> None:
        before = len(sender.teacher.seen)
        sender.send(b"{}" if method in ("POST", "PUT") else b"", method=method, target=target)
        for _, path, _ in sender.teacher.seen[before:]:
            assert path.startswith("/v1/")
            assert not {"..", "."} & set(re.split(r"[/\\]", unquote(path)))

    holds()
    assert sender.statuses[200] > 5
    assert sender.statuses[404] > 5
