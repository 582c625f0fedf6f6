"""An `lm` student's streams: held back to the commit point, then sent on or left to the teacher, never mixed."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routers.confidence import Confidence
from routers.meter import TokenMeter
from routers.router import Router
from serving.agreement import JsonComparison
from serving.lm import LmStudent
from serving.lm_plan import LmPlan
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.stand_in import create_stand_in
from serving.stand_in_call import StandInHttp

Start = Callable[..., Any]
Json = dict[str, Any]

SURE = (
    "Your parcel left the depot at noon and will be there tomorrow before nine in the morning."  # 23 tokens
)
UNSURE = "Your refund was sent back to the card it came from, which takes three to five days."  # 21 tokens
TEACHER = {
    "where": "It is on its way, and tomorrow it will be there.",
    "refund": "A refund takes a week, and we write to you.",
}
TEACHERS = "The teacher says this, and nothing else, to whatever it is asked."


def logprobs(text: str, first: float, then: float, after: int) -> list[Json]:
    """Token entries of `text`: so sure of the first ones, so sure of those after."""
    tokens = [text[at : at + 4] for at in range(0, len(text), 4)]
    return [
        {"token": token, "logprob": first if place < after else then, "top_logprobs": []}
        for place, token in enumerate(tokens)
    ]


ROWS = (
    Recorded("where", SURE, confidence=0.99),
    Recorded("refund", UNSURE, confidence=0.3),
    Recorded("fades", SURE, logprobs=logprobs(SURE, -0.01, -6.0, 8)),
    Recorded("short", "late", confidence=0.99),
    Recorded("short and unsure", "late", confidence=0.3),
)
TEACHER |= {"fades": "As long as it takes.", "short": "lost", "short and unsure": "lost"}
ROUTER = Router(Confidence.of_score(1.0, 0.0), rank_threshold=1.0)
USAGE = {"stream_options": {"include_usage": True}}


def body(text: str, **more: Any) -> Json:
    return {"model": "intents", "messages": [{"role": "user", "content": text}], **more}


class Live:
    """A gateway with a live `lm` release, its teacher, and its student's server."""

    def __init__(self, running: Any, teacher: Any, student: str) -> None:
        self.running = running
        self.teacher = teacher
        self.student = student

    def stream(self, text: str, **more: Any) -> tuple[str, Any, float]:
        """Stream with the official client: the text, the headers, and when the first token came."""
        with self.running.client() as client:
            return self.stream_with(client, text, **more)

    @staticmethod
    def stream_with(client: Any, text: str, **more: Any) -> tuple[str, Any, float]:
        began = time.perf_counter()
        raw = client.chat.completions.with_raw_response.create(**body(text, stream=True, **more))
        said, first_s = "", None
        for chunk in raw.parse():
            if chunk.choices and chunk.choices[0].delta.content:
                first_s = first_s or time.perf_counter() - began
                said += chunk.choices[0].delta.content
        return said, raw.headers, first_s or 0.0

    def student_stats(self) -> dict[str, int]:
        stats: dict[str, int] = httpx.get(f"{self.student}/stats", verify=False).json()
        return stats

    def fail_student(self, *rules: Json) -> None:
        script = "\n".join(json.dumps(rule) for rule in rules)
        httpx.post(f"{self.student}/failures", content=script, verify=False).raise_for_status()


@pytest.fixture
def live(serve: Start, stand_in: Start, gateway: Start, tmp_path: Path) -> Start:
    def start(
        *,
        student: dict[str, Any] | None = None,
        teacher: dict[str, Any] | None = None,
        url: str | None = None,
        router: Router = ROUTER,
        task: dict[str, Any] | None = None,
        **plan: Any,
    ) -> Live:
        app = create_stand_in(Recording(Path("student.csv"), ROWS), model="small", **(student or {}))
        small = url or serve(app, http=StandInHttp)
        given = LmPlan(
            **{
                "base_url": f"{small}/v1",
                "model": "small",
                "checkpoints": (4,),
                "commit_tokens": 8,
                "hold_back_s": 10.0,
                "timeout_s": 20.0,
                **plan,
            }
        )
        store = ReleaseStore(tmp_path / "state")
        files = {**LmStudent.of(given, TokenMeter).files(), "router.json": router.dump()}
        store.set_live("intents", store.write("intents", files, {"student": "lm"}))
        big = stand_in(TEACHER, model="big", default=TEACHERS, **(teacher or {}))
        settings = {"name": "intents", "match": {"model": "intents"}, "audit_rate": 1e-9, **(task or {})}
        return Live(gateway(big.url, task=[settings]), big, small)

    return start


def test_a_sure_answer_streams_from_the_student(live: Start) -> None:
    made = live()
    with made.running.client() as client:
        raw = client.chat.completions.with_raw_response.create(**body("where", stream=True, **USAGE))
        chunks = list(raw.parse())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SURE
    assert len(chunks) == 1 + 23 + 1 + 1, "role, tokens, finish, usage: as they came"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 24 + ["stop"]
    assert {chunk.model for chunk in chunks} == {"intents"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.choices[0].logprobs is None for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == 23
    assert raw.headers["x-understudy-route"] == "student"
    assert raw.headers["x-understudy-reason"] == "confident"
    assert 0.9 < float(raw.headers["x-understudy-confidence"]) < 1
    assert made.teacher.stats()["chat"] == 0
    (exchange,) = made.running.exchanges()
    assert exchange.route == "student"
    assert exchange.student.complete
    assert exchange.student.choices[0]["message"]["content"] == SURE
    assert [checkpoint["tokens"] for checkpoint in exchange.student.checkpoints] == [4, 8]
    assert exchange.student.checkpoints[1]["signals"]["q0"] < 0
    assert exchange.cost_usd == exchange.student.cost_usd > 0
    rank = ROUTER.confidence.rank(exchange.student.checkpoints[1]["score"], {})
    assert exchange.confidence == ROUTER.judge(rank).confidence, (
        "judged by what was known at the commit point"
    )
    assert made.running.metric("understudy_time_to_first_token_seconds_count", route="student") == 1


def test_without_include_usage_no_usage_is_shown(live: Start) -> None:
    made = live()
    raw = made.running.post(json=body("where", stream=True))
    assert "usage" not in raw.text
    assert "top_logprobs" not in raw.text
    assert raw.text.endswith("data: [DONE]\n\n")


def test_an_escalation_is_invisible_and_stops_the_student(live: Start, eventually: Start) -> None:
    made = live(student={"latency_ms": 0, "tokens_per_s": 50})
    said, headers, _ = made.stream("refund")
    assert said == TEACHER["refund"]
    assert headers["x-understudy-route"] == "teacher"
    assert headers["x-understudy-reason"] == "low_confidence"
    eventually(lambda: made.student_stats()["disconnected"] == 1)
    (exchange,) = made.running.exchanges()
    assert exchange.eligible
    assert exchange.propensity == 1.0
    assert not exchange.student.complete
    assert exchange.agreement is None, "what it would have said isn't known"
    assert 8 <= exchange.student.usage["completion_tokens"] < 21
    assert 0 < exchange.student.cost_usd < 0.05 / 3600
    assert exchange.cost_usd == pytest.approx(exchange.teacher.cost_usd + exchange.student.cost_usd)
    assert made.running.metric("understudy_time_to_first_token_seconds_count", route="teacher") == 1


@pytest.mark.parametrize(("stop_below", "reason"), [(None, "low_confidence"), (0.0, "stopped_early")])
def test_an_audited_generation_is_never_cut_short(
    live: Start, eventually: Start, stop_below: float | None, reason: str
) -> None:
    made = live(
        student={"latency_ms": 0, "tokens_per_s": 12}, task={"audit_rate": 1.0}, stop_below=stop_below
    )
    said, headers, _ = made.stream("refund")
    assert said == TEACHER["refund"]
    assert headers["x-understudy-reason"] == reason, "the coin changes nothing that the client sees"
    assert made.student_stats()["answered"] == 0, (
        "nobody waits for the rest of it, which takes another second"
    )
    eventually(lambda: made.running.exchanges()[0].student.complete)
    (exchange,) = made.running.exchanges()
    assert exchange.student.choices[0]["message"]["content"] == UNSURE
    assert exchange.agreement is False
    assert exchange.audit == "answered"
    assert exchange.cost_usd == pytest.approx(exchange.teacher.cost_usd + exchange.student.cost_usd)
    assert made.student_stats()["disconnected"] == 0
    spent = made.running.metric("understudy_cost_usd_total", task="intents")
    assert spent == pytest.approx(exchange.cost_usd)


def test_a_hopeless_generation_is_stopped_at_an_earlier_checkpoint(live: Start, eventually: Start) -> None:
    made = live(student={"latency_ms": 0, "tokens_per_s": 50}, stop_below=0.5)
    for stream in (True, False):
        answer = made.running.post(json=body("refund", stream=stream))
        assert answer.headers["x-understudy-reason"] == "stopped_early"
        assert answer.headers["x-understudy-route"] == "teacher"
    eventually(lambda: made.student_stats()["disconnected"] == 2)
    for exchange in made.running.exchanges():
        assert exchange.eligible
        assert [checkpoint["tokens"] for checkpoint in exchange.student.checkpoints] == [4]
        assert exchange.student.usage["completion_tokens"] < 8
        assert exchange.confidence < 0.5
    assert made.stream("where")[0] == SURE


def test_a_whole_answer_is_judged_by_all_of_it(live: Start) -> None:
    made = live()
    said, headers, _ = made.stream("fades")
    assert (said, headers["x-understudy-route"]) == (SURE, "student")
    whole = made.running.post(json=body("fades"))
    assert whole.headers["x-understudy-route"] == "teacher"
    assert whole.json()["choices"][0]["message"]["content"] == TEACHER["fades"]
    streamed, asked_whole = made.running.exchanges()
    assert streamed.student.checkpoints == asked_whole.student.checkpoints
    assert streamed.student.signals == asked_whole.student.signals


def test_a_short_answer_is_judged_at_its_end(live: Start) -> None:
    made = live()
    assert made.stream("short")[0] == "late"
    assert made.stream("short and unsure")[0] == "lost"
    for exchange in made.running.exchanges():
        assert exchange.student.complete
        assert exchange.student.checkpoints == []


def test_answers_that_always_escalate_do_so_when_streamed(live: Start) -> None:
    made = live(router=Router(ROUTER.confidence, 1.0, frozenset({"late"})))
    said, headers, _ = made.stream("short")
    assert (said, headers["x-understudy-reason"]) == ("lost", "always_escalate")


def test_what_may_become_an_answer_that_always_escalates_does_so_at_the_commit_point(live: Start) -> None:
    made = live(router=Router(ROUTER.confidence, 1.0, frozenset({SURE})))
    said, headers, _ = made.stream("where")
    assert (said, headers["x-understudy-reason"]) == (TEACHER["where"], "always_escalate")
    assert made.running.post(json=body("where")).headers["x-understudy-reason"] == "always_escalate"
    assert not made.running.exchanges()[0].student.complete


ORDER = '{"place": "the depot in the north of the town", "parcel": "7", "late": "não"}'


def test_however_its_json_is_written_it_always_escalates(serve: Start, live: Start) -> None:
    key = JsonComparison().key([{"message": {"content": ORDER}}])
    said = create_stand_in(Recording(Path("student.csv"), (Recorded("where", ORDER, confidence=0.99),)))
    made = live(
        url=serve(said, http=StandInHttp),
        router=Router(ROUTER.confidence, 1.0, frozenset({key})),
        task={"agreement": {"kind": "json"}},
    )
    for stream in (True, False):
        raw = made.running.post(json=body("where", stream=stream))
        assert raw.headers["x-understudy-reason"] == "always_escalate"


def test_how_the_server_cuts_its_stream_changes_no_rule(serve: Start, live: Start) -> None:
    """The first eight tokens may become `other`, the ninth can't."""
    other = SURE[:32] + "other"
    made = live(url=serve(Cutting()), router=Router(ROUTER.confidence, 1.0, frozenset({other})))
    told = {"first": -0.01, "then": -0.01, "with_last": True, "bytes": 1000, "breaks_at": None}
    for cuts in (range(1, 23), [8], [9], []):
        raw = made.running.post(json=body(json.dumps({**told, "cuts": list(cuts)}), stream=True))
        assert raw.headers["x-understudy-reason"] == "always_escalate", cuts


@pytest.mark.parametrize(("rank", "route"), [(1e9, "teacher"), (1.5, "student")])
def test_what_may_become_an_answer_with_a_threshold_of_its_own_is_held_to_it(
    live: Start, rank: float, route: str
) -> None:
    made = live(router=Router(ROUTER.confidence, 1.0, proven={SURE: rank}))
    _, headers, _ = made.stream("where")
    assert headers["x-understudy-route"] == route
    assert made.running.post(json=body("where")).headers["x-understudy-route"] == route


def test_the_decision_doesnt_depend_on_how_fast_the_student_is(live: Start) -> None:
    decided: list[list[str]] = []
    for pace in ({}, {"latency_ms": 50}, {"latency_ms": 0, "tokens_per_s": 100}):
        made = live(student=pace)
        decided.append([])
        for text in ("where", "refund", "fades"):
            decided[-1].append(made.stream(text)[1]["x-understudy-confidence"])
        routes = [exchange.route for exchange in made.running.exchanges()[-3:]]
        assert routes == ["student", "teacher", "student"]
    assert decided[0] == decided[1] == decided[2]


@pytest.mark.parametrize(("latency_ms", "rate"), [(0, 20.0), (5000, None), (200, 100.0)])
def test_the_first_token_is_late_by_the_hold_back_at_most(
    live: Start, latency_ms: int, rate: float | None
) -> None:
    hold_back_s, teacher_ms = 0.3, 150
    made = live(
        student={"latency_ms": latency_ms, "latency_spread": 0.0, "tokens_per_s": rate},
        teacher={"latency_ms": teacher_ms, "latency_spread": 0.0},
        hold_back_s=hold_back_s,
    )
    alone, with_student = [], []
    with made.running.client() as client:
        # A machine that is busy may be late now and then; a gateway that waits too long is late always.
        for _ in range(3):
            told = {"x-understudy-route": "teacher"}
            alone.append(Live.stream_with(client, "refund", extra_headers=told)[2])
            said, headers, first_s = Live.stream_with(client, "refund")
            assert said == TEACHER["refund"]
            assert headers["x-understudy-route"] == "teacher"
            with_student.append(first_s)
    assert min(with_student) <= min(alone) + hold_back_s + 0.15, (with_student, alone)
    slow = [exchange for exchange in made.running.exchanges() if exchange.reason == "student_slow"]
    assert not any(exchange.eligible for exchange in slow), (
        "how busy a machine is must not decide what counts"
    )
    if latency_ms == 5000:
        assert len(slow) == 3
        assert (
            made.running.metric("understudy_upstream_errors_total", upstream="student", kind="timeout") == 3
        )


FAILURES = {
    "5xx": {"status": 500},
    "garbage": {"send": "garbage"},
    "empty": {"send": "empty"},
    "noise": {"send": "noise"},
    "reset": {"reset_after": 0},
    "broken before the commit point": {"break_after": 5},
    "reset before the commit point": {"reset_after": 5},
    "silent before the commit point": {"hang_after": 5},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_before_anything_was_sent_is_the_teachers(live: Start, failure: str) -> None:
    made = live(hold_back_s=0.5)
    made.fail_student(FAILURES[failure])
    said, headers, _ = made.stream("where")
    assert said == TEACHER["where"]
    assert headers["x-understudy-reason"] in ("student_error", "student_slow")
    (exchange,) = made.running.exchanges()
    assert not exchange.eligible
    made.fail_student()
    assert made.stream("where")[0] == SURE


@pytest.mark.parametrize("failure", [{"break_after": 15}, {"reset_after": 15}, {"hang_after": 15}])
def test_a_failure_after_the_commit_point_is_an_error_and_never_an_end(live: Start, failure: Json) -> None:
    made = live(timeout_s=0.5)
    made.fail_student(failure)
    raw = made.running.post(json=body("where", stream=True, temperature=0.5))
    assert raw.status_code == 200
    events = [line.removeprefix("data: ") for line in raw.text.splitlines() if line]
    error = json.loads(events.pop())["error"]
    assert error["type"] in ("upstream_error", "timeout_error")
    assert "student" in error["message"]
    said = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)
    assert said
    assert SURE.startswith(said)
    assert all(json.loads(event)["choices"][0]["finish_reason"] is None for event in events)
    with made.running.client() as client, pytest.raises(openai.APIError):
        for _ in client.chat.completions.create(**body("where", stream=True)):
            pass
    assert made.running.exchanges() == [], "what broke off is no answer"
    assert made.running.metric("understudy_cost_usd_total", route="student") > 0
    assert made.running.metric("understudy_requests_total", route="student", code="502") == 2


@pytest.mark.parametrize("stream", [True, False])
def test_what_the_students_server_refuses_is_unsupported_and_counts(live: Start, stream: bool) -> None:
    made = live()
    made.fail_student({"status": 413})
    for _ in range(12):
        raw = made.running.post(json=body("where", stream=stream))
        assert raw.headers["x-understudy-reason"] == "unsupported:refused"
    assert made.student_stats()["chat"] == 12, "its server is well: it isn't left alone"
    exchanges = made.running.exchanges()
    assert all(exchange.eligible and exchange.propensity == 1.0 for exchange in exchanges)
    forced = made.running.post(json=body("where", stream=stream), headers={"x-understudy-route": "student"})
    assert forced.status_code == 400


def test_a_sampled_answer_is_judged_whole_also_where_it_is_streamed(live: Start) -> None:
    made = live(samples=4)
    assert made.stream("where")[0] == SURE
    (exchange,) = made.running.exchanges()
    assert exchange.student.complete
    assert exchange.student.checkpoints == []
    assert exchange.student.signals["sample_share"] == 1.0
    assert made.student_stats()["chat"] == 5


def test_a_student_that_keeps_failing_is_left_alone(live: Start) -> None:
    made = live()
    made.fail_student({"status": 500})
    for _ in range(15):
        assert made.stream("where")[0] == TEACHER["where"]
    assert made.student_stats()["chat"] < 15


@pytest.mark.parametrize("stream", [True, False])
def test_a_rejected_answer_is_finished_where_it_may_have_to_step_in(live: Start, stream: bool) -> None:
    made = live(task={"on_teacher_failure": "student"}, student={"latency_ms": 0, "tokens_per_s": 200})
    made.teacher.fail({"status": 503})
    if stream:
        said, headers, _ = made.stream("refund")
    else:
        whole = made.running.post(json=body("refund"))
        said, headers = whole.json()["choices"][0]["message"]["content"], whole.headers
    assert (said, headers["x-understudy-reason"]) == (UNSURE, "teacher_unavailable")
    (exchange,) = made.running.exchanges()
    assert exchange.student.complete
    assert exchange.student.choices[0]["message"]["content"] == UNSURE
    assert not exchange.eligible


def test_the_student_can_be_forced(live: Start) -> None:
    made = live(stop_below=0.5)
    said, headers, _ = made.stream("refund", extra_headers={"x-understudy-route": "student"})
    assert (said, headers["x-understudy-reason"]) == (UNSURE, "forced")


def test_a_committed_stream_is_cached_and_shared(live: Start) -> None:
    made = live(student={"latency_ms": 0, "tokens_per_s": 60})
    got: list[tuple[str, str]] = []

    def ask() -> None:
        said, headers, _ = made.stream("where", temperature=0)
        got.append((said, headers["x-understudy-reason"]))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert {said for said, _ in got} == {SURE}
    assert made.student_stats()["chat"] == 1
    assert sorted(reason.partition(":")[0] for _, reason in got) == [
        "confident",
        "joined",
        "joined",
        "joined",
    ]
    assert made.stream("where", temperature=0)[1]["x-understudy-reason"] == "hit:student"
    exchanges = made.running.exchanges()
    assert {exchange.student.choices[0]["message"]["content"] for exchange in exchanges} == {SURE}
    assert all(exchange.by_student and exchange.student.complete for exchange in exchanges)


def test_what_passed_as_a_stream_isnt_given_to_who_wants_it_whole(live: Start) -> None:
    made = live()
    assert made.stream("fades", temperature=0)[0] == SURE
    whole = made.running.post(json=body("fades", temperature=0))
    assert whole.headers["x-understudy-route"] == "teacher"
    assert (
        made.running.post(json=body("fades", temperature=0)).headers["x-understudy-reason"] == "hit:teacher"
    )


@pytest.mark.parametrize("text", ["where", "refund"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_client_that_leaves_stops_the_student_within_100_ms(
    live: Start, eventually: Start, text: str, shared: bool
) -> None:
    """`where`: in the middle of its committed stream; `refund`: before the commit point."""
    made = live(student={"latency_ms": 0, "tokens_per_s": 10 if text == "where" else 3}, hold_back_s=30.0)
    asked = orjson.dumps(body(text, stream=True, temperature=0 if shared else 1))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(asked)}\r\n\r\n".encode()
    took: list[float] = []
    while len(took) < 10 and min(took, default=1.0) >= 0.1:
        gone, asked_before = made.student_stats()["disconnected"], made.student_stats()["chat"]
        with socket.create_connection(("127.0.0.1", int(made.running.url.rpartition(":")[2]))) as client:
            client.sendall(head + asked)
            eventually(lambda before=asked_before: made.student_stats()["chat"] > before)
            if text == "where":
                assert client.recv(65536)
            else:
                time.sleep(0.4)
        left = time.monotonic()
        eventually(lambda before=gone: made.student_stats()["disconnected"] > before)
        took.append(time.monotonic() - left)
    assert min(took) < 0.1, took
    eventually(lambda: made.running.metric("understudy_requests_total", code="499") == len(took))
    assert made.teacher.stats()["chat"] == 0
    assert made.running.metric("understudy_cost_usd_total", task="intents") > 0


def test_a_client_that_leaves_ends_what_goes_on_unheard(live: Start, eventually: Start) -> None:
    made = live(
        student={"latency_ms": 0, "tokens_per_s": 20},
        teacher={"latency_ms": 5000},
        task={"audit_rate": 1.0},
        hold_back_s=30.0,
    )
    with made.running.client() as client, pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.7).chat.completions.create(**body("refund", stream=True))
    eventually(lambda: made.student_stats()["disconnected"] == 1)
    assert made.student_stats()["answered"] == 0


def test_a_stream_keeps_the_release_it_began_with(live: Start, publish: Start, eventually: Start) -> None:
    made = live(student={"latency_ms": 0, "tokens_per_s": 15})
    with made.running.client() as client:
        raw = client.chat.completions.with_raw_response.create(**body("where", stream=True))
        publish(made.running.state_dir, "intents", {"other thing": "x"})
        eventually(lambda: made.running.metric("understudy_release_info", release="r0002") == 1)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse() if chunk.choices)
    assert (said, raw.headers["x-understudy-release"]) == (SURE, "r0001")


class Cutting:
    """A student's server that cuts its answer into chunks as the request's text says, and may break it off."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        told = json.loads(json.loads(raw)["messages"][-1]["content"])
        entries = logprobs(SURE, told["first"], told["then"], 8)
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        stream = b""
        cuts = [0, *sorted(told["cuts"]), len(entries)]
        for start, end in itertools.pairwise(cuts):
            part = entries[start:end]
            delta = {"content": "".join(entry["token"] for entry in part)}
            last = end == len(entries) and told["with_last"]
            choice = {"index": 0, "delta": delta, "logprobs": {"content": part}}
            choice["finish_reason"] = "stop" if last else None
            stream += b"data: " + orjson.dumps({"id": "x", "choices": [choice]}) + b"\n\n"
        if not told["with_last"]:
            end_of_it = {"index": 0, "delta": {}, "finish_reason": "stop"}
            stream += b"data: " + orjson.dumps({"id": "x", "choices": [end_of_it]}) + b"\n\n"
        stream += b"data: [DONE]\n\n"
        if told["breaks_at"] is not None:
            stream = stream[: told["breaks_at"] * len(stream) // 100]
        for at in range(0, len(stream), told["bytes"]):
            await send(
                {"type": "http.response.body", "body": stream[at : at + told["bytes"]], "more_body": True}
            )
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.mark.parametrize("breaks", [False, True])
def test_for_any_chunking_a_client_gets_one_answer_whole_or_an_error(
    live: Start, serve: Start, breaks: bool
) -> None:
    made = live(url=serve(Cutting()))
    unsure, sure = -2.0, -0.01

    @settings(max_examples=40, deadline=None)
    @given(
        st.fixed_dictionaries(
            {
                "cuts": st.lists(st.integers(min_value=0, max_value=23), max_size=6),
                "first": st.sampled_from([sure, unsure]),
                "then": st.sampled_from([sure, unsure]),
                "with_last": st.booleans(),
                "bytes": st.sampled_from([1000, 37, 100_000]),
                "breaks_at": st.integers(min_value=0, max_value=99) if breaks else st.none(),
            }
        )
    )
    def check(told: Json) -> None:
        raw = made.running.post(json=body(json.dumps(told), stream=True))
        events = [line.removeprefix("data: ") for line in raw.text.splitlines() if line]
        read = [json.loads(event) for event in events if event != "[DONE]"]
        said = "".join(
            chunk["choices"][0]["delta"].get("content") or "" for chunk in read if "choices" in chunk
        )
        route = raw.headers["x-understudy-route"]
        if events[-1] == "[DONE]":
            assert said == (SURE if route == "student" else TEACHERS)
        else:
            assert route == "student"
            assert "error" in read[-1]
            assert SURE.startswith(said)
        if not breaks:
            assert events[-1] == "[DONE]"
            assert route == ("student" if told["first"] == sure else "teacher"), "by the first eight tokens"

    check()
