"""Learning when to trust a language model: from a log and a real server to a release, asked once, judged as served."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from distillation.as_served import Known, as_served
from distillation.dataset import Row
from distillation.economics import summarise
from distillation.journal import LookJournal
from distillation.learning import Lesson, learn
from distillation.served_release import Answered, ServedRelease, read_served_release
from routers.confidence import Confidence
from routers.router import Router
from serving.errors import DamagedRelease
from serving.exchange import Exchange, StudentAnswer
from serving.lm_plan import LmPlan
from serving.log_settings import LogSettings
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.stand_in import StandIn, create_stand_in
from serving.stand_in_call import StandInHttp
from serving.student_choice import StudentChoice
from serving.task_settings import AgreementChoice, TaskSettings

Make = Callable[..., Any]
ANSWERS = ("card", "parcel", "refund")
ESSAY = (
    "The {0} left the depot at noon, and as far as anybody knows it will be there tomorrow before nine. " * 2
)


@dataclasses.dataclass(frozen=True)
class Said:
    """A message, what teacher and student answer, and how sure the student is."""

    text: str
    teacher: str
    student: str
    confidence: float


def said(count: int, *, wrong: float = 0.3, long: bool = False, seed: int = 1) -> list[Said]:
    """The student is wrong on a share of them, and less sure there, as students are."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        right = chance.choice(ANSWERS)
        fails = chance.random() < wrong
        given = chance.choice([each for each in ANSWERS if each != right]) if fails else right
        confidence = chance.uniform(0.3, 0.75) if fails else chance.uniform(0.6, 0.995)
        teacher, student = (ESSAY.format(each) if long else each for each in (right, given))
        made.append(Said(f"message {seed}-{number}", teacher, student, confidence))
    return made


@dataclasses.dataclass
class Server:
    """A stand-in that plays the student."""

    url: str
    app: StandIn

    @property
    def asked(self) -> int:
        asked: int = httpx.get(f"{self.url.removesuffix('/v1')}/stats", verify=False).json()["chat"]
        return asked


@pytest.fixture
def student(serve: Make) -> Make:
    def start(lines: list[Said], *, logprobs: bool = True, **options: Any) -> Server:
        rows = tuple(
            Recorded(one.text, one.student, confidence=one.confidence if logprobs else None) for one in lines
        )
        app = create_stand_in(Recording(Path("student.csv"), rows), model="small", **options)
        return Server(f"{serve(app, http=StandInHttp)}/v1", app)

    return start


def settings(state_dir: Path, url: str, *, redact: Sequence[str] = (), **more: Any) -> Settings:
    choice = StudentChoice(
        **{
            "kind": "lm",
            "base_url": url,
            "model": "small",
            "checkpoints": [4, 8, 16],
            "commit_tokens": 16,
            **more,
        }
    )
    task = TaskSettings(name="intents", max_disagreement=0.1, certainty=0.9, student=choice)
    return Settings(state_dir=state_dir, task=[task], log=LogSettings(redact=list(redact)))


def lesson(configured: Settings) -> Lesson:
    (found,) = learn(configured, "intents")
    return found


def pairs(lines: list[Said]) -> list[tuple[str, str]]:
    return [(one.text, one.teacher) for one in lines]


def test_from_a_log_and_a_model_to_a_release(write_log: Make, exchanges: Make, student: Make) -> None:
    lines = said(300)
    server = student(lines)
    state = write_log(exchanges(pairs(lines)))
    found = lesson(settings(state, server.url))
    assert (found.outcome, found.release) == ("released", "r0001"), found.message
    assert found.look is not None
    assert 0.3 < found.look["coverage"] < 0.8
    assert (found.look["student"], found.look["model"], found.look["refused"]) == ("lm", "small", 0)
    assert server.asked == 300
    release = ReleaseStore(state).read("intents", "r0001")
    assert set(release.files) == {"student.json", "router.json", "held_out.json"}
    plan = LmPlan.load(release.files)
    assert (plan.base_url, plan.model, plan.checkpoints) == (server.url, "small", (4, 8, 16))


def test_nobody_is_asked_twice(write_log: Make, exchanges: Make, student: Make) -> None:
    lines = said(140, wrong=1.0)
    server = student(lines)
    state = write_log(exchanges(pairs(lines[:80])))
    assert lesson(settings(state, server.url)).outcome == "held"
    assert server.asked == 80
    write_log(exchanges(pairs(lines[80:]), start=2_000_000.0))
    found = lesson(settings(state, server.url))
    assert (found.outcome, found.labels) == ("held", 140)
    assert server.asked == 140, "only the new ones"
    (kept,) = (state / "tasks" / "intents" / "student").glob("*.jsonl")
    (state / "tasks" / "intents" / "looks.jsonl").unlink()
    lesson(settings(state, server.url, max_tokens=500))
    assert server.asked == 280
    assert len(list(kept.parent.glob("*.jsonl"))) == 2, "asked otherwise, it is another student"


def test_a_torn_file_costs_the_torn_answers(write_log: Make, exchanges: Make, student: Make) -> None:
    lines = said(90)
    server = student(lines)
    state = write_log(exchanges(pairs(lines)))
    lesson(settings(state, server.url))
    (kept,) = (state / "tasks" / "intents" / "student").glob("*.jsonl")
    data = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(data[:50]) + data[50][:30])
    (state / "tasks" / "intents" / "looks.jsonl").unlink()
    lesson(settings(state, server.url))
    assert server.asked == 90 + 40


def test_conversations_and_tools_are_labels_too(write_log: Make, exchanges: Make, student: Make) -> None:
    lines = said(80)
    server = student(lines)
    earlier = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "how can I help?"}]
    tool = {"type": "function", "function": {"name": "track", "parameters": {"type": "object"}}}
    talks = [
        dataclasses.replace(
            e, request={**e.request, "tools": [tool], "messages": [*earlier, *e.request["messages"]]}
        )
        for e in exchanges(pairs(lines))
    ]
    configured = settings(write_log(talks), server.url)
    (summary,) = summarise(configured)
    assert (summary.labels, summary.outlook, summary.sees) == (80, "yes: a look is due", "request")
    assert lesson(configured).labels == server.asked == 80


class TestFailures:
    """A look at what a faulty server happened to answer would judge another population."""

    def test_a_server_that_fails_holds_the_look(
        self, write_log: Make, exchanges: Make, student: Make
    ) -> None:
        lines = said(80)
        server = student(lines)
        state = write_log(exchanges(pairs(lines)))
        rule = {"status": 500, "text": lines[70].text}
        url = server.url.removesuffix("/v1")
        httpx.post(f"{url}/failures", content=orjson.dumps(rule), verify=False).raise_for_status()
        found = lesson(settings(state, server.url))
        assert found.outcome == "held"
        assert found.message.startswith("no look was taken: the student at 127.0.0.1:")
        assert "status 500" in found.message
        assert "4 attempts" in found.message
        assert LookJournal(state, "intents").past() == [], "nothing was spent"
        httpx.post(f"{url}/failures", content=b"", verify=False).raise_for_status()
        before = server.asked
        assert lesson(settings(state, server.url)).outcome in ("released", "held")
        assert server.asked - before < 40, "what had come is kept"
        assert len(LookJournal(state, "intents").past()) == 1

    def test_a_server_that_isnt_there(self, write_log: Make, exchanges: Make) -> None:
        state = write_log(exchanges(pairs(said(80))))
        found = lesson(settings(state, "http://127.0.0.1:9/v1"))
        assert (found.outcome, found.release) == ("held", None)
        assert "the student at 127.0.0.1:9 can't be reached" in found.message

    def test_without_log_probabilities_nothing_is_known(
        self, write_log: Make, exchanges: Make, student: Make
    ) -> None:
        lines = said(80)
        server = student(lines, logprobs=False)
        found = lesson(settings(write_log(exchanges(pairs(lines))), server.url))
        assert found.outcome == "held"
        assert "gives no log-probabilities" in found.message

    @pytest.mark.parametrize(("share", "outcome"), [(2, "released"), (10, "held")])
    def test_requests_that_it_refuses_are_the_teachers(
        self, write_log: Make, exchanges: Make, student: Make, share: int, outcome: str
    ) -> None:
        lines = said(200, wrong=0.0)
        server = student(lines)
        refused = [{"status": 400, "text": one.text} for one in lines[: 2 * share]]
        script = b"\n".join(orjson.dumps(rule) for rule in refused)
        httpx.post(
            f"{server.url.removesuffix('/v1')}/failures", content=script, verify=False
        ).raise_for_status()
        state = write_log(exchanges(pairs(lines)))
        found = lesson(settings(state, server.url))
        assert found.outcome == outcome, found.message
        if outcome == "released":
            assert found.look is not None
            assert found.look["refused"] == 4
            assert found.look["coverage"] <= 0.98
        else:
            assert "status 400" in found.message
            assert "student.model" in found.message


def test_what_it_was_trained_on_is_left_out(write_log: Make, exchanges: Make, student: Make) -> None:
    lines = said(200)
    server = student(lines)
    state = write_log(exchanges(pairs(lines), start=1_000_000.0))
    until = datetime.fromtimestamp(1_000_000.0 + 119, UTC)
    found = lesson(settings(state, server.url, trained_until=until))
    assert found.labels == 80
    assert found.look is not None
    assert found.look["left_out"] == {"the student was trained on it": 120}
    assert found.look["trained_until"] == until.isoformat()
    assert server.asked == 80


def test_the_model_isnt_shown_what_the_log_must_not_hold(
    write_log: Make, exchanges: Make, student: Make
) -> None:
    """And of its answers nothing is kept that log.redact names."""
    lines = [dataclasses.replace(one, student=f"ask {one.student}@example.com") for one in said(80)]
    server = student(lines)
    state = write_log(exchanges(pairs(lines)))
    assert lesson(settings(state, server.url, redact=["email"])).outcome == "held"
    (kept,) = (state / "tasks" / "intents" / "student").glob("*.jsonl")
    assert kept.read_bytes().count(b'"ask [email]"') == 80
    assert b"@example.com" not in kept.read_bytes()


def test_numbers_need_no_normal_form(write_log: Make, exchanges: Make, student: Make) -> None:
    lines = [
        dataclasses.replace(
            one, teacher=f"{n + 100}.0 kg", student=f"{n + 100 if one.teacher == one.student else 0} kg"
        )
        for n, one in enumerate(said(200, wrong=0.2))
    ]
    server = student(lines)
    configured = settings(write_log(exchanges(pairs(lines))), server.url)
    task = configured.task[0].model_copy(update={"agreement": AgreementChoice(kind="numeric")})
    found = lesson(configured.model_copy(update={"task": [task]}))
    assert found.outcome == "released", found.message
    assert found.look is not None
    assert found.look["agreement"] == pytest.approx(0.8, abs=0.08)
    assert found.look["missing"] == 0


class TestAsServed:
    """Of a stream nothing more is known when it is judged than what had come by the commit point."""

    def test_streams_are_judged_at_the_commit_point(
        self, write_log: Make, exchanges: Make, student: Make
    ) -> None:
        lines = said(200, long=True)
        server = student(lines)
        made = exchanges(pairs(lines))
        half = [
            dataclasses.replace(e, request={**e.request, "stream": n % 2 == 0}) for n, e in enumerate(made)
        ]
        state = write_log(half)
        found = lesson(settings(state, server.url))
        assert found.outcome == "released", found.message
        held_out = orjson.loads(ReleaseStore(state).read("intents", "r0001").files["held_out.json"])
        keys = [held_out[exchange.id][1] for exchange in half]
        assert all(key is None for key in keys[::2]), "not yet known"
        assert all(key.startswith("The ") for key in keys[1::2])

    def test_what_begins_like_an_answer_that_always_escalates_is_never_tested_as_accepted(
        self, write_log: Make, exchanges: Make, student: Make
    ) -> None:
        """The essays differ in their second word."""
        lines = said(250, long=True)
        server = student(lines)
        made = [
            dataclasses.replace(e, request={**e.request, "stream": True}) for e in exchanges(pairs(lines))
        ]
        configured = settings(write_log(made), server.url)
        never = ESSAY.format("parcel").strip()[:-1] + "; or so."  # as any of them begins, to the commit point
        task = configured.task[0].model_copy(update={"always_escalate": [never]})
        found = lesson(configured.model_copy(update={"task": [task]}))
        assert found.outcome == "released", found.message
        held_out = orjson.loads(
            ReleaseStore(configured.state_dir).read("intents", "r0001").files["held_out.json"]
        )
        for one, exchange in zip(lines, made, strict=True):
            rank, key = held_out[exchange.id]
            assert (rank is None) is ("parcel" in one.student)
            assert key is None

    def test_a_past_release_held_beginnings_to_its_rules(self) -> None:
        plan = LmPlan("http://x", "small", checkpoints=(), commit_tokens=2)
        router = Router(Confidence.of_score(1.0, 0.0), 1.0, vetoed=frozenset({"The card is lost."}))

        def redone(text: str, checkpoint: dict[str, Any]) -> str:
            choices = [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]
            answer = StudentAnswer("small", choices, None, 0.1, 9.0, signals={}, checkpoints=[checkpoint])
            past = ServedRelease(plan, router, {}, {"a": Answered(answer, text, True)})
            row = Row("a", "text", text, [], None, None, "big", None, {"messages": [], "stream": True})
            found = past.redo(row)
            assert found is not None
            return found.decision.reason

        checkpoint = {"tokens": 2, "bytes": len("The card"), "score": 9.0, "signals": {}}
        assert redone("The card is here.", checkpoint) == "vetoed_answer"
        assert redone("The parcel is here.", checkpoint) == "confident"
        del checkpoint["bytes"]
        assert redone("The card is here.", checkpoint) == "confident", "a log of before doesn't tell"

    def test_a_prefix_may_rank_otherwise_than_the_whole(self, student: Make) -> None:
        answer = StudentAnswer(
            "small",
            [],
            {"completion_tokens": 40},
            0.1,
            0.5,
            signals={"q0": -3.0},
            checkpoints=[
                {"tokens": 4, "score": 3.0, "signals": {"q0": -0.1}},
                {"tokens": 16, "score": 2.0, "signals": {"q0": -0.2}},
                {"tokens": 32, "score": 1.0, "signals": {"q0": -0.3}},
            ],
        )
        plan = LmPlan("http://x", "small", checkpoints=(4, 32), commit_tokens=16)
        streamed, whole = (as_served(answer, plan, streamed=each) for each in (True, False))
        assert (streamed.judged, streamed.ended) == (Known(16, 2.0, {"q0": -0.2}), False)
        assert (whole.judged, whole.ended) == (Known(40, 0.5, {"q0": -3.0}), True)
        assert streamed.early == whole.early == (Known(4, 3.0, {"q0": -0.1}),)
        short = dataclasses.replace(answer, checkpoints=answer.checkpoints[:1])
        assert as_served(short, plan, streamed=True).ended


class TestGivingUp:
    def test_hopeless_generations_are_given_up_and_never_accepted(
        self, write_log: Make, exchanges: Make, student: Make
    ) -> None:
        """700 long answers; the student's doubts show from the first tokens on."""
        lines = said(700, long=True)
        server = student(lines)
        state = write_log(exchanges(pairs(lines)))
        configured = settings(state, server.url)
        found = lesson(configured)
        assert found.outcome == "released", found.message
        assert found.look is not None
        gives_up = found.look["gives_up"]
        assert gives_up["share"] > 0.05
        assert gives_up["wrongly"] <= 0.01
        assert gives_up["tokens_saved"] > 0.5 * gives_up["share"], "most of such an answer is saved"
        release = ReleaseStore(state).read("intents", "r0001")
        assert LmPlan.load(release.files).stop_below == gives_up["below"]
        held_out = orjson.loads(release.files["held_out.json"])
        assert sum(rank is None for rank, _ in held_out.values()) == round(700 * gives_up["share"])


class TestLater:
    """A release was live: of its own traffic the log knows the decisions, on the rest they are redone."""

    @staticmethod
    def served(
        release: str, state: Path, made: list[Exchange], lines: list[Said], audited: int
    ) -> list[Exchange]:
        """What the gateway would have logged: every `audited`th accepted one was audited."""
        past = read_served_release(ReleaseStore(state).read("intents", release), {})
        logged = []
        for number, (exchange, one) in enumerate(zip(made, lines, strict=True)):
            score = math.log(one.confidence / (1 - one.confidence))
            choices = [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": one.student},
                    "finish_reason": "stop",
                }
            ]
            answer = StudentAnswer("small", choices, None, 0.1, score, signals={"tokens": 1.0})
            accepted = past.router.decide(score, {}, one.student).accepted
            coin = accepted and number % audited == 0
            logged.append(
                dataclasses.replace(
                    exchange,
                    release=release,
                    student=answer,
                    route="student" if accepted else "teacher",
                    reason="confident" if accepted else "low_confidence",
                    teacher=exchange.teacher if coin or not accepted else None,
                    coin=coin,
                    audit="answered" if coin else "none",
                    propensity=1 / audited if accepted else 1.0,
                    audit_rate=1 / audited,
                )
            )
        return logged

    def test_the_next_look_asks_for_nothing_that_is_logged(
        self, write_log: Make, exchanges: Make, student: Make
    ) -> None:
        first, later = said(300), said(900, seed=2)
        server = student(first + later)
        state = write_log(exchanges(pairs(first)))
        configured = settings(state, server.url)
        assert lesson(configured).release == "r0001"
        assert server.asked == 300
        made = exchanges(pairs(later), start=2_000_000.0)
        logged = self.served("r0001", state, made, later, audited=5)
        write_log(logged)
        found = lesson(configured)
        assert found.labels == 300 + sum(one.teacher is not None for one in logged)
        assert server.asked == 300, "the gateway had asked it already"
        assert found.look is not None
        assert found.look["agreement"] == pytest.approx(0.7, abs=0.07), "audits weigh what they stand for"

    def test_another_model_starts_with_what_was_never_answered_by_the_first(
        self, write_log: Make, exchanges: Make, student: Make
    ) -> None:
        first, later = said(300), said(300, seed=2)
        server = student(first + later)
        state = write_log(exchanges(pairs(first)))
        assert lesson(settings(state, server.url)).release == "r0001"
        write_log(self.served("r0001", state, exchanges(pairs(later), start=2_000_000.0), later, audited=5))
        told: list[str] = []
        (found,) = learn(settings(state, server.url, model="other"), "intents", progress=told.append)
        assert any(
            "leaving out the traffic of release r0001: its student is another model" in line for line in told
        )
        assert found.outcome == "not_due", found.message
        assert found.labels == 300

    def test_decisions_are_the_logs_or_redone(self, write_log: Make, exchanges: Make, student: Make) -> None:
        lines = said(200)
        server = student(lines)
        state = write_log(exchanges(pairs(lines)))
        lesson(settings(state, server.url))
        release = ReleaseStore(state).read("intents", "r0001")
        sure = Answered(StudentAnswer("small", [], None, 0.1, 9.0, signals={}), "card", True)
        past = read_served_release(release, {"new": sure, "own": sure})
        row = Row("new", "text", "card", [], None, None, "big", None, {"messages": []})
        assert past.accepts_row(row)
        assert not past.accepts_row(dataclasses.replace(row, id="refused"))
        own = dataclasses.replace(row, id="own", release="r0001")
        assert [past.accepts_row(dataclasses.replace(own, accepted=each)) for each in (True, False)] == [
            True,
            False,
        ]
        redone = past.redo(row)
        assert redone is not None
        assert (redone.key, redone.agreed, redone.decision.accepted) == ("card", True, True)

    def test_held_out_ranks_that_cant_be_read(self, write_log: Make, exchanges: Make, student: Make) -> None:
        lines = said(200)
        server = student(lines)
        state = write_log(exchanges(pairs(lines)))
        lesson(settings(state, server.url))
        ReleaseStore(state).rewrite("intents", "r0001", {"held_out.json": b"[1]"})
        with pytest.raises(DamagedRelease, match=r"held_out\.json"):
            read_served_release(ReleaseStore(state).read("intents", "r0001"), {})
