"""The student `lm` against a real server: what it asks, what it makes of the answers, and how it fails."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from routers.meter import TokenMeter
from serving.agreement import ExactComparison
from serving.errors import ConfigError, DamagedRelease, UpstreamBroken, UpstreamTimeout
from serving.exchange import StudentAnswer
from serving.lm import LmStudent
from serving.lm_plan import PLAN_FILE, LmPlan
from serving.recording import Recorded, Recording
from serving.stand_in import create_stand_in
from serving.stand_in_call import StandInHttp

Start = Callable[..., Any]
Json = dict[str, Any]
LONG = "The parcel left the depot at noon and will be there tomorrow before nine."  # 19 tokens
CALL = {"function": {"name": "track", "arguments": {"parcel": "7"}}}
ROWS = (
    Recorded("sure", LONG, confidence=0.99),
    Recorded("unsure", LONG, confidence=0.5),
    Recorded("short", "late", confidence=0.9),
    Recorded("silent", LONG),
    Recorded("call", None, tool_calls=[CALL], confidence=0.9),
)


def asking(text: str, **more: Any) -> Json:
    return {"model": "intents", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture
def url(serve: Start) -> str:
    return f"{serve(create_stand_in(Recording(Path('student.csv'), ROWS)), http=StandInHttp)}/v1"


def plan(url: str, **changes: Any) -> LmPlan:
    return LmPlan(base_url=url, model="small", **{"checkpoints": (4, 8), "commit_tokens": 8, **changes})


def ask(student: LmStudent, request: Json) -> StudentAnswer:
    async def asked() -> StudentAnswer:
        try:
            return await student.answer(request)
        finally:
            await student.aclose()

    return asyncio.run(asked())


def test_an_answer_comes_with_signals_and_checkpoints(url: str) -> None:
    sure = ask(LmStudent.of(plan(url), TokenMeter), asking("sure"))
    unsure = ask(LmStudent.of(plan(url), TokenMeter), asking("unsure", stream=True))
    assert sure.complete
    assert ExactComparison().key(sure.choices) == LONG
    assert sure.choices[0]["finish_reason"] == "stop"
    assert sure.choices[0].get("logprobs") is None
    assert [checkpoint["tokens"] for checkpoint in sure.checkpoints] == [4, 8]
    assert sure.score == pytest.approx(math.log(0.99 / 0.01))
    assert unsure.score == pytest.approx(0.0, abs=1e-9)
    assert sure.signals["tokens"] == math.log1p(19)
    assert sure.signals["q50"] > unsure.signals["q50"]
    assert (sure.signals["valid"], sure.signals["truncated"], sure.signals["refusal"]) == (1.0, 0.0, 0.0)
    assert sure.checkpoints[0]["signals"].keys() == sure.signals.keys()
    assert sure.usage == {"prompt_tokens": 1, "completion_tokens": 19, "total_tokens": 20}
    assert sure.latency_s > 0


def test_a_tool_call_is_scored_by_its_tokens(url: str) -> None:
    answer = ask(LmStudent.of(plan(url), TokenMeter), asking("call", tools=[{"type": "function"}]))
    assert answer.choices[0]["message"]["tool_calls"][0]["function"]["name"] == "track"
    assert math.isfinite(answer.score)


def test_a_server_without_log_probabilities_answers_but_isnt_trusted(url: str) -> None:
    answer = ask(LmStudent.of(plan(url), TokenMeter), asking("silent"))
    assert answer.complete
    assert answer.score == -math.inf
    assert answer.signals == {}
    assert [checkpoint["score"] for checkpoint in answer.checkpoints] == [-math.inf, -math.inf]


@pytest.fixture
def moody(serve: Start) -> str:
    """A student's server that answers `split` with this and that in turn, and gives no log-probabilities."""
    rows = [Recorded("split", text) for text in ("late", "lost", "late", "late", "lost", "late")]
    recording = Recording(Path("student.csv"), (*rows, Recorded("sure", "late")))
    return f"{serve(create_stand_in(recording), http=StandInHttp)}/v1"


def test_without_log_probabilities_answers_drawn_at_random_tell_how_sure_it_is(moody: str) -> None:
    sure = ask(LmStudent.of(plan(moody, samples=5), TokenMeter), asking("sure", stream=True))
    split = ask(LmStudent.of(plan(moody, samples=5), TokenMeter), asking("split"))
    assert (sure.complete, sure.checkpoints) == (True, [])
    assert sure.score == pytest.approx(math.log(5.5 / 0.5))
    assert (sure.signals["sample_share"], sure.signals["sample_entropy"]) == (1.0, 0.0)
    assert (sure.signals["valid"], sure.signals["request_letters"]) == (1.0, 1.0)
    # Whichever of the six was the answer itself: four say one thing, two the other.
    assert ExactComparison().key(split.choices) in ("late", "lost")
    agreeing = 3 if ExactComparison().key(split.choices) == "late" else 1
    assert split.score == pytest.approx(math.log((agreeing + 0.5) / (5.5 - agreeing)))
    assert split.signals["sample_share"] < 1.0


def test_drawn_answers_are_asked_for_at_temperature_1_and_the_answer_at_0(serve: Start) -> None:
    server = Server(WHOLE)
    ask(LmStudent.of(plan(f"{serve(server)}/v1", samples=3), TokenMeter), asking("a", seed=7))
    assert sorted((asked["temperature"], asked.get("seed")) for asked in server.asked if "seed" in asked) == [
        (0, 7)
    ]
    assert [asked["temperature"] for asked in server.asked if "seed" not in asked] == [1, 1, 1]
    assert not any("logprobs" in asked for asked in server.asked)


def test_one_that_cant_be_drawn_spoils_the_answer(serve: Start) -> None:
    class Refusing(Server):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and len(self.asked) == 2:
                self._status = 503
            await super().__call__(scope, receive, send)

    server = Refusing(WHOLE)
    with pytest.raises(UpstreamBroken, match="status 503"):
        ask(LmStudent.of(plan(f"{serve(server)}/v1", samples=3), TokenMeter), asking("a"))


def test_a_sampled_answer_that_is_closed_early_stops_all_of_them(serve: Start) -> None:
    server = Server(chunk("la", -0.1), hangs=True)
    student = LmStudent.of(plan(f"{serve(server)}/v1", samples=3), TokenMeter)

    async def begun() -> StudentAnswer:
        stream = student.stream(asking("a"))
        async for _ in stream:
            break
        while len(server.asked) < 4:  # noqa: ASYNC110 - another thread's server tells by a list
            await asyncio.sleep(0.01)
        await stream.aclose()
        assert not student.busy
        await student.aclose()
        return stream.answer()

    answer = asyncio.run(begun())
    assert not answer.complete
    assert (answer.score, answer.signals) == (-math.inf, {})


class Server:
    """Answers with `status`, `kind` and `body`; keeps what it was asked. Refuses log-probabilities if told to."""

    def __init__(
        self,
        body: bytes = b"",
        *,
        status: int = 200,
        kind: bytes = b"text/event-stream",
        refuses: bytes | None = None,
        hangs: bool = False,
    ) -> None:
        self.asked: list[Json] = []
        self.headers: list[dict[bytes, bytes]] = []
        self._body = body
        self._status = status
        self._kind = kind
        self._refuses = refuses
        self._hangs = hangs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        self.asked.append(json.loads(raw))
        self.headers.append(dict(scope["headers"]))
        status, body = self._status, self._body
        if self._refuses is not None and "logprobs" in self.asked[-1]:
            status, body = 400, self._refuses
        headers = [(b"content-type", self._kind)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": self._hangs})
        while self._hangs and (await receive())["type"] != "http.disconnect":
            pass


def chunk(text: str, *logprobs: float, finish: str | None = None) -> bytes:
    entries = [{"token": text, "logprob": logprob, "top_logprobs": []} for logprob in logprobs]
    choice = {
        "index": 0,
        "delta": {"content": text},
        "logprobs": {"content": entries},
        "finish_reason": finish,
    }
    return b"data: " + orjson.dumps({"id": "1", "choices": [choice]}) + b"\n\n"


WHOLE = chunk("la", -0.1) + chunk("te", -0.2, finish="stop") + b"data: [DONE]\n\n"


def test_it_is_asked_at_temperature_0_for_a_stream_with_log_probabilities(
    serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDENT_KEY", " s3cret \n")
    server = Server(WHOLE)
    student = LmStudent.of(plan(f"{serve(server)}/v1", api_key_env="STUDENT_KEY", max_tokens=50), TokenMeter)
    tools, format = [{"type": "function", "function": {"name": "f"}}], {"type": "json_object"}
    request = asking("a", tools=tools, response_format=format, max_completion_tokens=900)
    ask(student, {**request, "temperature": 0.7, "user": "me", "metadata": {"a": "b"}, "store": True})
    assert server.asked == [
        {
            "messages": request["messages"],
            "tools": tools,
            "response_format": format,
            "model": "small",
            "temperature": 0,
            "max_tokens": 50,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 5,
        }
    ]
    assert server.headers[0][b"authorization"] == b"Bearer s3cret"


def test_a_key_that_cant_be_sent_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDENT_KEY", "s3crét")
    with pytest.raises(ConfigError, match="STUDENT_KEY") as raised:
        LmStudent.of(plan("http://127.0.0.1:1/v1", api_key_env="STUDENT_KEY"), TokenMeter)
    assert "s3cr" not in str(raised.value)


def test_a_server_that_refuses_log_probabilities_is_asked_without_from_then_on(serve: Start) -> None:
    server = Server(WHOLE.replace(b"logprobs", b"nothing"), refuses=b'{"error": "logprobs unsupported"}')
    student = LmStudent.of(plan(f"{serve(server)}/v1"), TokenMeter)

    async def twice() -> list[StudentAnswer]:
        try:
            return [await student.answer(asking("a")), await student.answer(asking("a"))]
        finally:
            await student.aclose()

    answers = asyncio.run(twice())
    assert ["logprobs" in asked for asked in server.asked] == [True, False, False]
    assert [answer.score for answer in answers] == [-math.inf, -math.inf]
    assert ExactComparison().key(answers[0].choices) == "late"


def test_an_answer_that_comes_whole_is_read_all_the_same(serve: Start) -> None:
    entries = [{"token": "la", "logprob": -0.1}, {"token": "te", "logprob": -0.2}]
    message = {"role": "assistant", "content": "late"}
    choice = {"index": 0, "message": message, "logprobs": {"content": entries}, "finish_reason": "stop"}
    server = Server(orjson.dumps({"id": "1", "model": "m", "choices": [choice]}), kind=b"application/json")
    answer = ask(LmStudent.of(plan(f"{serve(server)}/v1", checkpoints=(1,)), TokenMeter), asking("a"))
    assert answer.complete
    assert ExactComparison().key(answer.choices) == "late"
    assert [checkpoint["tokens"] for checkpoint in answer.checkpoints] == [1]
    assert math.isfinite(answer.score)


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (Server(b'{"error": "no"}', status=500), "status 500"),
        (Server(b"not found", status=404), "status 404: not found"),
        (Server(b"<html>It works!</html>", kind=b"text/html"), "ended in its middle"),
        (Server(b""), "ended in its middle"),
        (Server(b"data: [DONE]\n\n"), "without an answer"),
        (Server(chunk("la", -0.1)), "ended in its middle"),
        (Server(b"data: no json\n\n"), "isn't JSON"),
        (Server(b"data: [1]\n\n"), "isn't a JSON object"),
        (Server(chunk("la", -0.1) + b'data: {"error": {"message": "out of memory"}}\n\n'), "an error"),
        (Server(b"{}", kind=b"application/json"), "no completion"),
        (Server(b'{"error": "overloaded"}', kind=b"application/json"), "no completion"),
    ],
)
def test_what_is_no_answer_is_an_error(serve: Start, server: Server, said: str) -> None:
    student = LmStudent.of(plan(f"{serve(server)}/v1"), TokenMeter)
    with pytest.raises(UpstreamBroken, match=said) as raised:
        ask(student, asking("a"))
    assert "teacher" not in str(raised.value)


def test_a_server_that_isnt_there_or_falls_silent_is_an_error(serve: Start) -> None:
    with pytest.raises(UpstreamBroken, match=r"the student at .* can't be reached") as raised:
        ask(LmStudent.of(plan("http://127.0.0.1:9/v1"), TokenMeter), asking("a"))
    assert "teacher" not in str(raised.value)
    server = Server(chunk("la", -0.1), hangs=True)
    with pytest.raises(UpstreamTimeout, match=r"the student fell silent|the student's answer wasn't whole"):
        ask(LmStudent.of(plan(f"{serve(server)}/v1", timeout_s=0.2), TokenMeter), asking("a"))


def test_a_stream_that_is_closed_early_has_what_had_come(url: str) -> None:
    student = LmStudent.of(plan(url), TokenMeter)

    async def begun() -> StudentAnswer:
        stream = student.stream(asking("sure"))
        assert not student.busy
        async for piece in stream:
            if piece.checkpoints:
                break
        assert student.busy
        await stream.aclose()
        await stream.aclose()
        assert not student.busy
        await student.aclose()
        return stream.answer()

    answer = asyncio.run(begun())
    assert not answer.complete
    assert LONG.startswith(answer.choices[0]["message"]["content"])
    assert answer.choices[0]["finish_reason"] is None
    assert [checkpoint["tokens"] for checkpoint in answer.checkpoints] == [4]
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("more", "feature"),
    [
        ({}, None),
        ({"tools": [{"type": "function"}], "response_format": {"type": "json_object"}}, None),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"functions": [{}]}, "tools"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"modalities": ["audio"]}, "audio"),
        ({"web_search_options": {}}, "web_search"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "prefill"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "content": "b"},
                ]
            },
            None,
        ),
    ],
)
def test_what_is_left_to_it(more: Json, feature: str | None) -> None:
    student = LmStudent.of(plan("http://127.0.0.1:9/v1"), TokenMeter)
    assert student.unsupported({**asking("a"), **more}) == feature


def test_a_release_keeps_the_plan() -> None:
    kept = plan("http://h/v1", stop_below=-2.5, api_key_env="K", hold_back_s=0.5, timeout_s=9.0)
    student = LmStudent.load(LmStudent.of(kept, TokenMeter).files(), TokenMeter)
    assert student.plan == kept
    assert dataclasses.replace(kept, checkpoints=(24, 4)).marks == (4, 8, 24)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"kind": "linear"},
        {"base_url": "ftp://h"},
        {"model": ""},
        {"checkpoints": [0]},
        {"checkpoints": "8"},
        {"commit_tokens": 0},
        {"commit_tokens": True},
        {"stop_below": "low"},
        {"hold_back_s": 0},
        {"timeout_s": -1},
        {"max_tokens": 1.5},
        {"top_logprobs": 21},
        {"samples": -1},
        {"api_key_env": 1},
        {"commit_tokens": None},
    ],
)
def test_a_plan_that_cant_be_is_a_damaged_release(change: Json) -> None:
    written = orjson.loads(plan("http://h/v1").files()[PLAN_FILE])
    with pytest.raises(DamagedRelease):
        LmPlan.load({PLAN_FILE: orjson.dumps({**written, **change})})
    with pytest.raises(DamagedRelease):
        LmPlan.load({PLAN_FILE: b"{"})
    with pytest.raises(DamagedRelease):
        LmPlan.load({})


class Endless:
    """Sends `piece` again and again until nobody listens any more."""

    def __init__(self, piece: bytes) -> None:
        self._piece = piece
        self.left = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body", False):
            pass
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        leaving = asyncio.ensure_future(receive())
        while not leaving.done():
            await send({"type": "http.response.body", "body": self._piece, "more_body": True})
            await asyncio.sleep(0)
        self.left = True


@pytest.mark.parametrize(
    ("piece", "said"),
    [
        (chunk("late", -0.1), "goes on after .* max_tokens is 20"),
        (b": still here\n\n" * 1000, "longer than .* max_tokens is 20"),
        (b"data: " + b"x" * 10_000, "longer than .* max_tokens is 20"),
    ],
    ids=["text", "keep-alives", "one event"],
)
def test_a_server_that_goes_on_for_ever_is_left(
    serve: Start, eventually: Start, piece: bytes, said: str
) -> None:
    server = Endless(piece)
    with pytest.raises(UpstreamBroken, match=said):
        ask(LmStudent.of(plan(f"{serve(server)}/v1", max_tokens=20), TokenMeter), asking("a"))
    eventually(lambda: server.left)


def test_a_server_that_says_its_key_back_doesnt_have_it_repeated(
    serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDENT_KEY", "s3cret-key")
    url = serve(Server(b'{"error": "no such key: s3cret-key"}', status=401))
    with pytest.raises(UpstreamBroken, match=r"status 401: .*no such key") as raised:
        ask(LmStudent.of(plan(f"{url}/v1", api_key_env="STUDENT_KEY"), TokenMeter), asking("a"))
    assert "s3cret" not in str(raised.value)


def test_a_server_that_shows_signs_of_life_and_no_answer_is_waited_for_no_longer_than_others(
    serve: Start,
) -> None:
    class Slow(Server):
        """Sends a comment every tenth of a second."""

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return
            while (await receive()).get("more_body", False):
                pass
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            leaving = asyncio.ensure_future(receive())
            while not leaving.done():
                await send({"type": "http.response.body", "body": b": wait\n\n", "more_body": True})
                await asyncio.wait([leaving], timeout=0.1)

    student = LmStudent.of(plan(f"{serve(Slow())}/v1", timeout_s=0.5), TokenMeter)
    with pytest.raises(UpstreamTimeout, match=r"wasn't whole after 0\.5 s"):
        ask(student, asking("a"))


def test_it_is_busy_while_its_server_thinks(serve: Start) -> None:
    class Thinking(Server):
        """Sends no head until it is left."""

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return
            self.asked.append({})
            while (await receive())["type"] != "http.disconnect":
                pass

    server = Thinking()
    student = LmStudent.of(plan(f"{serve(server)}/v1"), TokenMeter)

    async def left() -> None:
        asking_it = asyncio.ensure_future(student.answer(asking("a")))
        while not server.asked:  # noqa: ASYNC110 - another thread's server tells by a list
            await asyncio.sleep(0.01)
        assert student.busy
        asking_it.cancel()
        await asyncio.wait([asking_it])
        assert not student.busy
        await student.aclose()

    asyncio.run(left())
