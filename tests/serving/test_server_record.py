"""What a server was seen to give and to refuse: asked over HTTP, with the words that servers refuse in."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from gateway.doctor_server import server_limits
from routers.meter import TokenMeter
from serving.errors import UpstreamRefused
from serving.exchange import StudentAnswer
from serving.lm import LmStudent
from serving.lm_plan import LmPlan
from serving.server_record import Asking, Seen, ServerRecord
from serving.student_server import StudentRefused

Start = Callable[..., Any]
Json = dict[str, Any]
ASKED: Json = {"model": "m", "messages": [{"role": "user", "content": "Where is my parcel?"}]}
TOOLS = [{"type": "function", "function": {"name": "track", "parameters": {"type": "object"}}}]
NO_PARSER = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
NO_NAMED = 'tool_choice=function "track" requires --tool-call-parser to be set'
TOO_MANY = (
    "Requested sample logprobs of 5, which is greater than max allowed: 0 (parameter=logprobs, value=5)"
)
TOO_LONG = "This model's maximum context length is 1024 tokens. Please reduce the length of the input prompt."


class Picky:
    """A server that refuses requests with one of these, each in its own words; else it says `yes`, token by token."""

    def __init__(
        self,
        refuses: Callable[[Json], str | None],
        *,
        logprob: Any = -0.1,
        alternatives: int = 5,
        **more: Any,
    ) -> None:
        self.asked: list[Json] = []
        self._refuses = refuses
        self._logprob = logprob
        self._alternatives = alternatives
        self._usage = more.get("usage", True)
        self._model = more.get("model", "small")
        self._status = more.get("status", 400)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        asked = json.loads(raw)
        self.asked.append(asked)
        refusal = self._refuses(asked)
        kind = b"text/event-stream" if refusal is None else b"application/json"
        status = 200 if refusal is None else self._status
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        body = (
            self._events(asked) if refusal is None else json.dumps({"error": {"message": refusal}}).encode()
        )
        await send({"type": "http.response.body", "body": body})

    def _events(self, asked: Json) -> bytes:
        said = '{"yes":' if asked.get("response_format") else "yes"
        choice: Json = {"index": 0, "delta": {"content": said}, "finish_reason": "stop"}
        if asked.get("logprobs") and self._logprob != "absent":
            top = [{"token": str(number), "logprob": -1.0} for number in range(self._alternatives)]
            entry = {"token": said, "logprob": self._logprob, "top_logprobs": top}
            choice["logprobs"] = {"content": [entry]}
        chunks: list[Json] = [{"id": "1", "model": self._model, "choices": [choice]}]
        if asked.get("stream_options") and self._usage:
            chunks.append({"id": "1", "model": self._model, "choices": [], "usage": {"completion_tokens": 1}})
        return (
            b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in chunks) + b"data: [DONE]\n\n"
        )


@pytest.fixture
def student(serve: Start) -> Callable[..., tuple[LmStudent, Picky]]:
    def make(
        refuses: Callable[[Json], str | None] = lambda _: None, **options: Any
    ) -> tuple[LmStudent, Picky]:
        server = Picky(refuses, **options)
        plan = LmPlan(base_url=f"{serve(server)}/v1", model="small", checkpoints=(), commit_tokens=8)
        return LmStudent.of(plan, TokenMeter), server

    return make


def answers(student: LmStudent, *requests: Json) -> list[StudentAnswer]:
    found = outcomes(student, *requests)
    assert not any(isinstance(each, StudentRefused) for each in found)
    return [each for each in found if not isinstance(each, StudentRefused)]


def outcomes(student: LmStudent, *requests: Json) -> list[StudentAnswer | StudentRefused]:
    async def ask() -> list[StudentAnswer | StudentRefused]:
        found: list[StudentAnswer | StudentRefused] = []
        for request in requests:
            try:
                found.append(await student.answer(request))
            except StudentRefused as error:
                found.append(error)
        await student.aclose()
        return found

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("field", "words", "left"),
    [
        ("stream_options", "Extra inputs are not permitted: stream_options", Asking(usage=False)),
        (
            "max_tokens",
            "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
            Asking(limit="max_completion_tokens"),
        ),
        ("top_logprobs", TOO_MANY, Asking(alternatives=False)),
    ],
)
def test_what_is_optional_is_left_out_from_the_first_refusal_on(
    student: Start, field: str, words: str, left: Asking
) -> None:
    asked, server = student(lambda body: words if field in body else None)
    first, second = answers(asked, ASKED, ASKED)
    assert math.isfinite(first.score) and math.isfinite(second.score), (
        "log-probabilities are there all the same"
    )
    assert asked.record.asking == left
    assert [field in body for body in server.asked] == [True, False, False]
    assert all(("max_tokens" in body) != ("max_completion_tokens" in body) for body in server.asked)


def test_a_server_that_refuses_all_of_it_is_asked_for_the_rest(student: Start) -> None:
    def refuses(body: Json) -> str | None:
        found = [name for name in ("stream_options", "top_logprobs", "logprobs") if name in body]
        return f"{found[0]} is not supported" if found else None

    asked, server = student(refuses)
    (answer,) = answers(asked, ASKED)
    assert answer.score == -math.inf
    assert asked.record.asking == Asking(logprobs=False, alternatives=False, usage=False)
    assert len(server.asked) == 4


def test_a_refusal_that_isnt_cured_by_leaving_something_out_changes_nothing(student: Start) -> None:
    asked, server = student(lambda _: "logprobs or whatever else")
    (refused,) = outcomes(asked, ASKED)
    assert isinstance(refused, StudentRefused)
    assert asked.record.asking == Asking()
    assert len(server.asked) == 2


def test_a_feature_that_is_refused_by_name_is_the_teachers_for_a_while(student: Start) -> None:
    asked, server = student(lambda body: NO_PARSER if "tools" in body else None)
    with_tools = {**ASKED, "tools": TOOLS}
    assert asked.unsupported(with_tools) is None, "nothing is assumed"
    refused, answered = outcomes(asked, with_tools, ASKED)
    assert isinstance(refused, StudentRefused)
    assert not isinstance(answered, Exception)
    assert asked.unsupported(with_tools) == "refused"
    assert asked.unsupported(ASKED) is None
    named = {**with_tools, "tool_choice": {"type": "function", "function": {"name": "track"}}}
    assert asked.unsupported(named) is None, "another choice may be served"
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("request_", "words", "again"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, NO_NAMED, True),
        (
            {"tools": TOOLS, "tool_choice": "required"},
            'tool_choice="required" requires --tool-call-parser',
            True,
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.type: json_schema isn't supported",
            True,
        ),
        ({"frequency_penalty": 1.0}, "frequency_penalty is not supported", True),
        ({"seed": 1}, "This model does not support seed", True),
        ({}, TOO_LONG, False),
        ({"tools": TOOLS}, TOO_LONG, False),
        ({"response_format": {"type": "json_schema"}}, "Grammar error: Invalid type: nonsense", False),
    ],
)
def test_only_what_a_refusal_names_is_remembered(request_: Json, words: str, again: bool) -> None:
    now = [1000.0]
    record = ServerRecord(clock=lambda: now[0])
    record.refuse({**ASKED, **request_}, UpstreamRefused(400, {}, words.encode()))
    assert record.refuses({**ASKED, **request_}) is again
    assert not record.refuses(ASKED)
    now[0] += 301
    assert not record.refuses({**ASKED, **request_}), "it may have been started anew since"


def test_whatever_clients_ask_for_the_record_stays_small() -> None:
    record = ServerRecord()
    for number in range(1000):
        request = {
            **ASKED,
            "tools": TOOLS,
            "tool_choice": f"made up {number}",
            "response_format": {"type": str(number)},
        }
        record.refuse(request, UpstreamRefused(400, {}, b"tool response_format"))
    assert len(record.refused) == 2


def test_a_refusal_that_comes_as_the_first_event_of_a_stream_is_one(serve: Start) -> None:
    said = {"error": {"message": "response_format: Grammar error", "type": "BadRequestError", "code": 400}}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            kind = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": kind})
            await send(
                {
                    "type": "http.response.body",
                    "body": b"data: " + json.dumps(said).encode() + b"\n\ndata: [DONE]\n\n",
                }
            )

    asked = LmStudent.of(LmPlan(base_url=f"{serve(app)}/v1", model="small"), TokenMeter)
    in_form = {**ASKED, "response_format": {"type": "json_schema"}}
    (refused,) = outcomes(asked, in_form)
    assert isinstance(refused, StudentRefused)
    assert "status 400" in str(refused)
    assert asked.unsupported(in_form) == "refused"


def test_a_server_in_trouble_has_refused_nothing() -> None:
    record = ServerRecord()
    record.refuse({**ASKED, "tools": TOOLS}, UpstreamRefused(503, {}, NO_PARSER.encode()))
    assert not record.refuses({**ASKED, "tools": TOOLS})
    assert Asking().instead(UpstreamRefused(500, {}, b"logprobs")) is None


@pytest.mark.parametrize("logprob", ["absent", None, 9999, "high", True])
def test_log_probabilities_that_are_none_are_never_trusted(student: Start, logprob: Any) -> None:
    asked, _ = student(logprob=logprob)
    (answer,) = answers(asked, ASKED)
    assert answer.score == -math.inf
    assert asked.record.seen.logprobs is False


def test_a_token_that_the_server_calls_impossible_is_as_unsure_as_can_be(student: Start) -> None:
    sure, impossible = (
        student(logprob=-0.1)[0],
        student(logprob=-9999.0)[0],
    )  # vLLM's way to say minus infinity
    (likely,), (unlikely,) = answers(sure, ASKED), answers(impossible, ASKED)
    assert unlikely.score < -1000 < likely.score


def test_it_tells_what_came(student: Start) -> None:
    asked, _ = student(alternatives=2, usage=False, model="Small-v2")
    (answer,) = answers(asked, ASKED)
    assert asked.record.seen == Seen(True, 2, False, "Small-v2", True)
    assert (answer.usage or {})["completion_tokens"] == 1, "counted, where the server says nothing"


def test_the_doctor_says_what_a_server_gives_and_what_not(student: Start) -> None:
    def said(refuses: Callable[[Json], str | None], **options: Any) -> str:
        asked, _ = student(refuses, **options)

        async def ask() -> str:
            await asked.answer(ASKED)
            told = await server_limits(asked)
            await asked.aclose()
            return told

        return asyncio.run(ask())

    assert said(lambda _: None) == (
        "with log-probabilities (5 alternatives a token), usage, streams, JSON schemas, tools, a tool that is named"
    )
    limited = said(lambda body: NO_PARSER if "tools" in body else None, usage=False, model="other")
    assert limited.startswith(
        "with log-probabilities (5 alternatives a token), streams, JSON schemas, as 'other'"
    )
    assert "; without usage; tools (it says status 400: " in limited
    assert "auto" in limited
