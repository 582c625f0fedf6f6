"""What a release is worth: by the log, by what came after it, by a recording; and what strange logs do."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from distillation.evaluate import evaluate
from distillation.evaluation import Evaluation
from distillation.evaluation_words import verdict
from distillation.learning import learn
from distillation.past import read_past
from routers.frontier import frontier
from serving.errors import DamagedRelease, UnderstudyError, UnknownRelease, UnknownTask
from serving.exchange import Exchange, StudentAnswer
from serving.recording import read_recording
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.task_settings import AgreementChoice, TaskSettings

Make = Callable[..., Any]
KINDS = {"card": "where is my card {}", "parcel": "the parcel {} please", "refund": "refund order {} now"}


def pairs(count: int, *, noise: float = 0.0, first: int = 0) -> list[tuple[str, str]]:
    chance = random.Random(count + first)
    made = []
    for number in range(first, first + count):
        kind = chance.choice(list(KINDS))
        answer = chance.choice(list(KINDS)) if chance.random() < noise else kind
        made.append((KINDS[kind].format(number), answer))
    return made


def settings(state: Path, **task: Any) -> Settings:
    own = TaskSettings(**{"name": "intents", "max_disagreement": 0.1, "certainty": 0.9, **task})
    return Settings(state_dir=state, task=[own])


def content(answer: str) -> list[dict[str, Any]]:
    return [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]


def served(exchange: Exchange, answer: str, *, rate: float, audited: bool, missing: bool = False) -> Exchange:
    """The exchange as r0001 answered it; with an audit if the coin fell."""
    student = StudentAnswer("linear", content(answer), None, 0.001, 5.0)
    known = audited and not missing
    teacher = exchange.teacher if known else None
    return dataclasses.replace(
        exchange,
        route="student",
        reason="confident",
        release="r0001",
        student=student,
        teacher=teacher,
        propensity=rate,
        audit_rate=rate,
        coin=audited,
        audit="missing" if missing else "answered" if audited else "none",
        agreement=teacher.choices == student.choices if teacher is not None else None,
        cost_usd=0.0,
    )


@pytest.fixture
def publish(publish: Make) -> Make:
    """As the fixture of that name: a release that was fitted on nothing of the log."""

    def write(state: Path, task: str, answers: dict[str, str]) -> str:
        name: str = publish(state, task, answers)
        ReleaseStore(state).rewrite(task, name, {"held_out.json": b"{}"})
        return name

    return write


@pytest.fixture
def released(write_log: Make, exchanges: Make) -> Path:
    """A log of 120 day-0 exchanges, and what was learned from it."""
    state: Path = write_log(exchanges(pairs(120)))
    (lesson,) = learn(settings(state), "intents")
    assert lesson.release == "r0001"
    return state


class TestTheLog:
    def test_what_it_was_fitted_on(self, released: Path) -> None:
        found = evaluate(settings(released), "intents")
        assert (found.release, found.live, found.student) == ("r0001", True, "linear")
        assert found.log is not None
        assert (found.log.labels, found.log.agreement.value, found.log.agreement.exact) == (120, 1.0, True)
        assert (found.log.disagreement.value, found.log.quality) == (0.0, "agreement")
        assert (found.log.aurc, found.log.ranking.apgr) == (0.0, None), "there is no gap to the teacher"
        assert (found.since, found.recording, found.audits.audits) == (None, None, 0)
        assert found.admitted.labels == 120
        assert {one.answer for one in found.answers} == set(KINDS)
        assert sum(one.labels for one in found.answers) == 120
        assert {one.standing for one in found.answers} <= {"shown", "unproven"}
        assert found.expected_broken == pytest.approx(0.1)
        assert any("120 of the 120 labels were there" in note for note in found.notes)

    def test_no_label_scores_its_own_exchange(self, write_log: Make, exchanges: Make) -> None:
        # Messages that have nothing in common, with answers by chance: only who has seen them can know.
        chance = random.Random(4)
        odd = [
            ("".join(chance.choice("bcdfgklmnprstvwxz") for _ in range(9)), chance.choice(list(KINDS)))
            for _ in range(36)
        ]
        state = write_log(exchanges([*pairs(200), *odd]))
        (lesson,) = learn(settings(state, max_disagreement=0.2), "intents")
        assert lesson.release is not None
        past = read_past(ReleaseStore(state), "intents", lesson.release)
        known = sum(past.rank(text)[1] == answer for text, answer in odd)
        assert known > 30, "the student itself has seen them"
        found = evaluate(settings(state), "intents").log
        assert found is not None
        assert found.agreement.value is not None
        assert found.agreement.value * found.labels < 200 + 24

    def test_audited_answers_weigh_what_they_stand_for(
        self, released: Path, write_log: Make, exchanges: Make
    ) -> None:
        # 400 requests, all answered by r0001, every fourth audited; of those the "refund" ones disagree.
        later = []
        for number, exchange in enumerate(exchanges(pairs(400, first=500), start=4e9)):
            answer = exchange.teacher.choices[0]["message"]["content"]
            given = "card" if answer == "refund" else answer
            later.append(
                served(exchange, given, rate=0.25, audited=number % 4 == 0, missing=number % 40 == 0)
            )
        write_log(later)
        found = evaluate(settings(released), "intents")
        assert found.audits.audits == 100
        assert found.audits.missing == 10
        assert found.audits.disagreement.exact
        wrong = sum(p.disagreements for p in found.audits.points[-1:])
        assert found.audits.disagreement.value == wrong / 100
        assert found.audits.points[-1].evidence == found.audits.evidence
        assert found.audits.alarmed, "a third disagree where a tenth was promised"
        assert re.match(
            r"broken: \d+\.\d % .* of 100 audits disagreed, evidence of more than a million", verdict(found)
        )
        assert found.since is not None
        assert found.since.labels == 100
        assert found.since.effective == pytest.approx(100)
        assert found.log is not None
        assert found.log.labels == 220
        # Day 0 and audits are pooled: 520 requests, of which r0001 accepts everything.
        expected = 1.0 / ((120 + 400 * 0.25) / 520)
        assert found.log.effective == pytest.approx(220), f"all weigh {expected:.2f}"

    def test_costs_are_the_logs(self, released: Path, write_log: Make, exchanges: Make) -> None:
        later = [
            served(
                exchange, exchange.teacher.choices[0]["message"]["content"], rate=0.5, audited=number % 2 == 0
            )
            for number, exchange in enumerate(exchanges(pairs(100, first=500), start=4e9))
        ]
        write_log(later)
        found = evaluate(settings(released), "intents").costs
        assert found.teacher_only == pytest.approx(1.0)
        assert found.with_student == pytest.approx(0.0, abs=1e-12)
        assert found.with_audits == pytest.approx(0.05)
        assert (found.audit_rate, found.requests, found.unpriced) == (0.05, 100, 0)
        assert found.measured == pytest.approx(1000 * 50 * 0.001 / 100), "half of the answers were audited"

    def test_a_named_release_and_the_ones_before(self, released: Path) -> None:
        store = ReleaseStore(released)
        card = {"student": "linear", "features": "embedding"}
        again = store.write("intents", store.read("intents", "r0001").files, card)
        found = evaluate(settings(released), "intents", again)
        assert (found.release, found.live, found.student) == ("r0002", False, "linear over embeddings")
        assert [one.name for one in found.releases] == ["r0001", "r0002"]
        assert [one.live for one in found.releases] == [False, False]
        assert (found.admitted.look, found.answers) == (None, []), "this card says nothing"
        assert found.promise.max_disagreement == 0.1

    def test_traffic_of_a_release_that_is_gone(
        self, released: Path, write_log: Make, exchanges: Make
    ) -> None:
        later = exchanges(pairs(30, first=500), start=4e9, release="r0009", reason="low_confidence")
        write_log(later)
        found = evaluate(settings(released), "intents")
        assert found.log is not None
        assert found.log.labels == 120
        assert any("r0009" in note for note in found.notes)


class TestStrangeLogs:
    def test_an_empty_one(self, publish: Make, tmp_path: Path) -> None:
        publish(tmp_path / "state", "intents", {"my card": "card", "the parcel": "parcel"})
        found = evaluate(settings(tmp_path / "state"), "intents")
        assert (found.log, found.since, found.costs.teacher_only, found.costs.measured) == (
            None,
            None,
            None,
            None,
        )
        assert orjson.loads(orjson.dumps(found.to_json()))["log"] is None

    @pytest.mark.parametrize(
        ("answers", "teacher", "agreement"),
        [
            ({"my card": "card"}, "card", 1.0),
            ({"my card": "card", "the parcel": "parcel"}, "card", 1.0),
            ({"my card": "card", "the parcel": "parcel"}, "other", 0.0),
        ],
        ids=["one class", "all agree", "all disagree"],
    )
    @pytest.mark.parametrize("count", [10, 60])
    def test_no_variety(
        self,
        publish: Make,
        write_log: Make,
        exchanges: Make,
        answers: dict[str, str],
        teacher: str,
        agreement: float,
        count: int,
    ) -> None:
        state = write_log(exchanges([("where is my card", teacher)] * count))
        publish(state, "intents", answers)
        found = evaluate(settings(state), "intents")
        assert found.log is not None
        assert (found.log.labels, found.log.agreement.value) == (count, agreement)
        assert len(found.log.reliability) == 1
        assert found.log.frontier_best[0][1] == agreement
        assert 0.0 <= found.log.ece <= 1.0
        orjson.dumps(found.to_json())

    def test_ten_audits(self, publish: Make, write_log: Make, exchanges: Make) -> None:
        made = exchanges([("where is my card", "card")] * 10)
        state = write_log(
            [served(e, "card" if n else "parcel", rate=0.05, audited=True) for n, e in enumerate(made)]
        )
        publish(state, "intents", {"my card": "card", "the parcel": "parcel"})
        found = evaluate(settings(state), "intents").audits
        assert (found.audits, found.disagreement.value, found.alarmed) == (10, 0.1, False)
        assert found.disagreement.high == pytest.approx(0.445, abs=0.001)

    def test_signals_that_are_no_numbers(self, released: Path) -> None:
        store = ReleaseStore(released)
        files = store.read("intents", "r0001").files
        held_out = orjson.loads(files["held_out.json"])
        # What isn't finite is null in JSON; a hand-written file may hold anything.
        text = orjson.dumps(held_out).decode()
        first = next(iter(held_out.values()))[0]
        files["held_out.json"] = text.replace(orjson.dumps(first).decode(), "-1e999", 1).encode()
        name = store.write("intents", files, {"student": "linear"})
        with pytest.raises(DamagedRelease, match=r"held_out\.json"):
            evaluate(settings(released), "intents", name)

    def test_ranks_that_arent_finite_are_never_served(
        self, publish: Make, write_log: Make, exchanges: Make, tmp_path: Path
    ) -> None:
        state = write_log(exchanges([("where is my card", "card"), ("no idea", "card")]))
        publish(state, "intents", {"my card": "card", "the parcel": "parcel"})
        store = ReleaseStore(state)
        files = store.read("intents", "r0001").files
        router = orjson.loads(files["router.json"])
        router["confidence"]["terms"].append(
            {"name": "never_given", "knots": [], "slopes": [1.0], "intercepts": [0.0]}
        )
        files["router.json"] = orjson.dumps(router)
        name = store.write("intents", files, {"student": "linear"})
        found = evaluate(settings(state), "intents", name)
        assert found.log is not None
        assert (found.log.coverage.value, found.log.disagreement.value) == (0.0, None)
        assert (found.log.levels, found.log.worst_answers) == ([], [])
        assert found.log.confidences[0].passed_on == 1.0

    def test_audits_that_could_never_have_been(self, publish: Make, write_log: Make, exchanges: Make) -> None:
        made = exchanges([("where is my card", "card")])
        state = write_log([served(made[0], "card", rate=0.0, audited=True)])
        publish(state, "intents", {"my card": "card", "the parcel": "parcel"})
        with pytest.raises(UnderstudyError, match="propensity 0"):
            evaluate(settings(state), "intents")


class TestAReleaseThatWentLiveAgain:
    """The watch begins anew there, and so does the verdict; what all its audits showed is still said."""

    def test_no_alarm_of_before_stands(self, released: Path, write_log: Make, exchanges: Make) -> None:
        made = exchanges(pairs(40, first=500), start=1e9)
        wrong = [served(one, "other", rate=0.5, audited=True) for one in made]
        write_log(wrong)
        store = ReleaseStore(released)
        live = store.live("intents")
        assert live is not None
        assert store.withdraw("intents", live, "disagreement", "40 of 40 audits disagreed") is not None
        found = evaluate(settings(released), "intents", "r0001")
        assert found.audits.alarmed
        store.set_live("intents", "r0001")
        found = evaluate(settings(released), "intents")
        assert (found.audits.audits, found.audits.alarmed, found.audits.evidence) == (40, False, 1.0)
        assert "hardly by chance, without an alarm since it last went live: 100.0 %" in verdict(found)
        assert any("40 of 40 audits disagreed" in note for note in found.notes)


class TestWhatIsntThere:
    def test_names(self, released: Path) -> None:
        with pytest.raises(UnknownRelease, match="it has: r0001"):
            evaluate(settings(released), "intents", "r0007")
        with pytest.raises(UnknownRelease, match=r"there is no task nothing under .*; there are: intents"):
            evaluate(settings(released), "nothing")
        (released / "tasks" / "young").mkdir()
        with pytest.raises(
            UnknownRelease, match="has no release to evaluate; `understudy learn --task young`"
        ):
            evaluate(settings(released), "young")
        with pytest.raises(UnknownTask):
            evaluate(settings(released), "../intents")
        with pytest.raises(UnknownTask, match="overflow"):
            evaluate(settings(released), "other")
        ReleaseStore(released).set_live("intents", None)
        with pytest.raises(UnknownRelease, match=r"is live; name one with --release: r0001"):
            evaluate(settings(released), "intents")
        assert not evaluate(settings(released), "intents", "r0001").live

    def test_an_agreement_without_a_normal_form(self, released: Path) -> None:
        with pytest.raises(UnderstudyError, match="no normal form"):
            evaluate(settings(released, agreement=AgreementChoice(kind="numeric")), "intents")

    def test_a_damaged_release(self, released: Path) -> None:
        (released / "tasks" / "intents" / "releases" / "r0001" / "student.npz").write_bytes(b"damaged")
        with pytest.raises(DamagedRelease, match=r"student\.npz"):
            evaluate(settings(released), "intents")
        (released / "tasks" / "intents" / "live").write_bytes(b"{")
        with pytest.raises(DamagedRelease, match="names no release"):
            evaluate(settings(released), "intents")


class TestARecording:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        """The teacher is right on 40 of 50, and wrong on the first 10, which the student gets right."""
        path = tmp_path / "dev.csv"
        rows = [
            (text, "refund" if number < 10 else answer, answer)
            for number, (text, answer) in enumerate(pairs(50, first=9000))
            if answer != "refund" or number >= 10
        ]
        path.write_text("text,teacher,gold\n" + "".join(f"{t},{a},{g}\n" for t, a, g in rows))
        return path

    def test_against_teacher_and_truth(self, released: Path, file: Path) -> None:
        recording = read_recording(file)
        found = evaluate(settings(released), "intents", recording=recording).recording
        assert found is not None
        assert found.accuracy is not None
        right = sum(row.teacher == row.gold for row in recording.rows)
        assert found.labels == len(recording)
        assert found.agreement.value == pytest.approx(right / len(recording))
        assert found.accuracy.student.value == 1.0
        assert found.accuracy.teacher.value == pytest.approx(right / len(recording))
        assert found.accuracy.served.value == 1.0
        assert (found.quality, found.ranking.apgr) == ("gold", None), "the teacher is the worse one"

    def test_what_it_was_fitted_on_is_left_out(self, released: Path, file: Path) -> None:
        text, answer = pairs(120)[0]
        file.write_text(file.read_text() + f"{text},{answer},{answer}\n")
        found = evaluate(settings(released), "intents", recording=read_recording(file))
        assert found.seen == 1
        assert found.recording is not None
        assert found.recording.labels == len(read_recording(file)) - 1
        assert any("1 rows of" in note for note in found.notes)

    def test_without_truth(self, released: Path, tmp_path: Path) -> None:
        path = tmp_path / "some.csv"
        path.write_text("text,teacher,gold\nwhere is my card 1,card,card\nthe parcel 2 please,parcel,\n")
        found = evaluate(settings(released), "intents", recording=read_recording(path))
        assert found.recording is not None
        assert (found.recording.accuracy, found.recording.quality) == (None, "agreement")
        assert any("no gold answer" in note for note in found.notes)

    def test_everything_was_seen(self, released: Path, tmp_path: Path) -> None:
        path = tmp_path / "same.csv"
        path.write_text("text,teacher\n" + "".join(f"{t},{a}\n" for t, a in pairs(120)))
        found = evaluate(settings(released), "intents", recording=read_recording(path))
        assert (found.recording, found.seen) == (None, 120)


def test_the_frontier_is_that_of_the_measures(write_log: Make, exchanges: Make, publish: Make) -> None:
    state = write_log(
        exchanges([*[("where is my card", "card")] * 30, *[("the parcel", "card")] * 10, ("?", "x")])
    )
    publish(state, "intents", {"my card": "card", "the parcel": "parcel"})
    found: Evaluation = evaluate(settings(state), "intents")
    past = read_past(ReleaseStore(state), "intents", "r0001")
    texts = [*["where is my card"] * 30, *["the parcel"] * 10, "?"]
    agreed = [True] * 30 + [False] * 11
    curve = frontier([past.rank(text)[0] for text in texts], agreed, [1] * 41)
    assert found.log is not None
    assert found.log.ranking.apgr == pytest.approx(curve.apgr())
    assert found.log.frontier[50][1] == pytest.approx(curve.at(0.5))
    assert math.isclose(found.log.worst_answers[0].risk.value or 0.0, 1.0)
    assert found.log.worst_answers[0].key == "parcel"
