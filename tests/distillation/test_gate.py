"""One look: who passes, what it costs, and what the traffic of earlier releases weighs."""

from __future__ import annotations

import random
from typing import Any

import orjson
import pytest

from distillation.dataset import Dataset, Row, Traffic
from distillation.due import not_due
from distillation.gate import Look, take_look
from distillation.past import PastRelease, past_of, read_past
from routers.confidence import Confidence
from routers.looks import PastLook, spent
from routers.router import Router
from serving.errors import DamagedRelease
from serving.releases import ReleaseStore
from serving.task_settings import AgreementChoice, TaskPolicy

KINDS = {"card": "where is my card {}", "parcel": "the parcel {} please", "refund": "refund order {} now"}
POLICY = TaskPolicy(max_disagreement=0.1, certainty=0.9)


def row(number: int, text: str, answer: str | None, release: str | None = None) -> Row:
    choices = [{"message": {"content": answer}, "finish_reason": "stop"}] if answer is not None else None
    return Row(str(number), text, answer, choices, 10, 2, "big", release)


def labelled(count: int, *, noise: float = 0.0, first: int = 0) -> list[Row]:
    """Three kinds of messages; with probability `noise` the teacher gives any of the answers."""
    chance = random.Random(count + first)
    rows = []
    for number in range(first, first + count):
        kind = chance.choice(list(KINDS))
        answer = chance.choice(list(KINDS)) if chance.random() < noise else kind
        rows.append(row(number, KINDS[kind].format(number), answer))
    return rows


def day_zero(rows: list[Row]) -> Dataset:
    return Dataset(rows, {None: Traffic(len(rows), 0, 0.05 * len(rows))})


def look(dataset: Dataset, policy: TaskPolicy = POLICY, **more: Any) -> Look[PastRelease]:
    return take_look(dataset, more.pop("past", {}), policy, **{"number": 1, "seed": 1, **more})


class TestColdStart:
    def test_a_student_that_agrees_passes(self) -> None:
        found = look(day_zero(labelled(120)))
        assert found.candidate is not None
        assert found.coverage == 1.0
        assert found.agreement == 1.0
        assert found.delta == pytest.approx(spent(1, 0.1))
        assert found.candidate.router.rank_threshold == found.verdict.whole.threshold
        assert all(found.candidate.accepts(r.id, r.text) for r in labelled(120))

    def test_a_student_that_guesses_doesnt(self) -> None:
        found = look(day_zero(labelled(120, noise=1.0)))
        assert found.candidate is None
        assert found.coverage is None
        assert found.agreement < 0.6
        estimates = [one.estimate for one in found.verdict.slices]
        assert estimates and estimates == sorted(estimates, reverse=True)

    def test_later_looks_spend_less(self) -> None:
        rows = labelled(70)
        assert look(day_zero(rows)).candidate is not None
        late = look(day_zero(rows), number=20)
        assert late.candidate is None, "70 clean labels can't prove 10 % with what look 20 may spend"
        assert late.delta == pytest.approx(spent(1, 0.1) / 400)

    def test_missing_answers_count_as_disagreement(self) -> None:
        rows = labelled(120)
        gone = [row(1000 + i, KINDS["card"].format(1000 + i), None) for i in range(40)]
        found = look(day_zero([*rows, *gone]))
        assert found.agreement == pytest.approx(120 / 160)
        assert found.coverage is None or found.coverage < 0.8

    def test_the_same_seed_finds_the_same(self) -> None:
        one, other = (look(day_zero(labelled(90, noise=0.2)), seed=5) for _ in range(2))
        assert repr(one.verdict) == repr(other.verdict)

    def test_one_answer_only(self) -> None:
        """All scores tie, so every level's threshold accepts everything: that is the coverage."""
        found = look(day_zero([row(i, f"text {i}", "yes") for i in range(80)]))
        assert found.candidate is not None
        assert found.coverage == 1.0
        assert found.candidate.accepts("new", "never seen")

    def test_nothing_a_student_could_say(self) -> None:
        with pytest.raises(ValueError, match="no row has an answer"):
            look(day_zero([row(i, f"text {i}", ' {"refusal":"no"}') for i in range(80)]))


class TestAlwaysEscalate:
    def test_an_answer_only_the_teacher_may_give(self) -> None:
        policy = POLICY.model_copy(update={"always_escalate": ["refund"]})
        rows = labelled(150)
        found = look(day_zero(rows), policy)
        assert found.candidate is not None
        accepted = {r.answer for r in rows if found.candidate.accepts(r.id, r.text)}
        assert accepted == {"card", "parcel"}
        assert found.coverage == pytest.approx(sum(r.answer != "refund" for r in rows) / 150)
        decision = found.candidate.router.decide(99.0, {}, "refund")
        assert (decision.accepted, decision.reason) == (False, "always_escalate")

    def test_an_answer_that_has_something_to_prove(self) -> None:
        policy = POLICY.model_copy(update={"prove": {"refund": 0.02, "never given": 0.1}})
        rows = labelled(150)
        found = look(day_zero(rows), policy)
        assert found.candidate is not None
        assert {r.answer for r in rows if found.candidate.accepts(r.id, r.text)} == {"card", "parcel"}
        assert found.candidate.router.decide(99.0, {}, "refund").reason == "unproven_answer"
        assert found.verdict.unproven == {"refund", "never given"}
        assert found.verdict.given["never given"] == 0
        enough = look(day_zero(labelled(900)), policy)
        assert enough.candidate is not None
        assert enough.coverage == 1.0
        assert set(enough.candidate.router.proven) == {"refund"}

    def test_named_twice_the_stricter_bound_holds(self) -> None:
        policy = POLICY.model_copy(update={"prove": {"refund": 0.02, " refund ": 0.01}})
        assert look(day_zero(labelled(90)), policy).terms.prove == {"refund": 0.01}

    @pytest.mark.parametrize(
        ("kind", "written", "key"),
        [
            ("exact", "  ask  a\nperson ", "ask a person"),
            ("json", '{ "b": 1, "a": "x" }', '{"a":"x","b":1}'),
            ("json", '```json\n{"a": "x"}\n```', '{"a":"x"}'),
        ],
    )
    def test_it_is_compared_as_answers_are(self, kind: str, written: str, key: str) -> None:
        policy = TaskPolicy(
            max_disagreement=0.1, agreement=AgreementChoice(kind=kind), always_escalate=[written]
        )
        found = look(day_zero(labelled(80)), policy)
        assert found.candidate is not None
        assert found.candidate.router.always_escalate == {key}


class TestLaterLooks:
    """Easy texts, two thirds of the traffic, which a first release answers; hard ones it leaves to the teacher."""

    @staticmethod
    def traffic(count: int, release: str | None, wrong_every: int) -> list[tuple[bool, Row]]:
        """(easy, row) of i.i.d. requests; of the easy ones every `wrong_every`th has an answer nobody can guess."""
        chance = random.Random(count)
        made = []
        for number in range(count):
            kind = list(KINDS)[number % 3]
            answer = kind
            if kind != "refund" and (number // 3) % wrong_every == wrong_every - 1:
                answer = "parcel" if kind == "card" else "card"
            id = count * 1000 + number
            made.append(
                (kind != "refund", row(id, KINDS[kind].format(chance.randrange(1000)), answer, release))
            )
        return made

    def history(self, wrong_every: int) -> tuple[Dataset, dict[str, PastRelease]]:
        zero = [r for _, r in self.traffic(60, None, wrong_every)]
        first = look(day_zero(labelled(90)))
        assert first.candidate is not None
        router = Router(Confidence.of_score(1.0, 0.0), 0.0, frozenset({"refund"}))
        later = self.traffic(510, "r0001", wrong_every)
        # Of 340 easy ones a twentieth was audited, wrong ones and right ones alike.
        easy = [r for is_easy, r in later if is_easy]
        wrong = [r for r in easy if str(r.answer) not in r.text]
        right = [r for r in easy if str(r.answer) in r.text]
        audited = [*wrong[::20], *right[::20]]
        escalated = [r for is_easy, r in later if not is_easy]
        traffic = {None: Traffic(60, 0, 3.0), "r0001": Traffic(510, 340, 25.5)}
        past = PastRelease(first.candidate.student, router, {})
        assert all(past.accepts(r.id, r.text) for r in audited)
        assert not any(past.accepts(r.id, r.text) for r in escalated)
        return Dataset([*zero, *audited, *escalated], traffic), {"r0001": past}

    def test_audits_weigh_what_they_stand_for(self) -> None:
        dataset, past = self.history(wrong_every=5)
        found = look(dataset, past=past)
        assert found.agreement == pytest.approx(0.867, abs=0.05), "a fifth of two thirds disagrees"
        assert found.coverage is None or found.coverage < 0.8
        # The same labels, had they been a plain sample: the escalated ones hide the disagreement.
        plain = look(Dataset(dataset.rows, {None: Traffic(len(dataset.rows), 0, 1.0)}))
        assert plain.agreement > 0.92
        assert plain.coverage is not None and plain.coverage > 0.8

    def test_audits_that_agree_keep_the_coverage(self) -> None:
        dataset, past = self.history(wrong_every=10**6)
        found = look(dataset, past=past)
        assert found.agreement > 0.95
        assert found.coverage == pytest.approx(1.0)


class TestVetoes:
    def test_an_answer_that_is_mostly_wrong_is_left_to_the_teacher(self) -> None:
        chance = random.Random(3)
        rows = labelled(400)
        # What asks for refunds gets one or the other answer, whatever it says.
        rows = [
            row(int(r.id), r.text, chance.choice(["refund", "human"])) if r.answer == "refund" else r
            for r in rows
        ]
        found = look(day_zero(rows))
        assert found.candidate is not None
        router = found.candidate.router
        assert {"human"} <= router.vetoed <= {"human", "refund"}
        assert router.decide(99.0, {}, "human").reason == "vetoed_answer"
        # A past release decides by its own rules, whatever the next one's are.
        texts = [kind.format(9000 + number) for kind in KINDS.values() for number in range(50)]
        asked = {text: found.candidate.predict(text)[2] for text in texts}
        assert "human" in asked.values()
        assert {answer for text, answer in asked.items() if found.candidate.accepts("new", text)} == {
            "card",
            "parcel",
        }

    def test_rows_it_was_fitted_on_are_redone_by_the_vetoes_of_others(self, tmp_path: Any) -> None:
        chance = random.Random(5)
        rows = []
        for number in range(480):
            kind = number % 8
            wrong = chance.random() < (0.22 if kind < 3 else 0.01)  # hardly enough to be vetoed
            rows.append(row(number, f"topic{kind} {number}", f"{chance.randrange(8) if wrong else kind}"))
        found = look(day_zero(rows))
        made = found.candidate
        assert made is not None
        by_all = [made.held_out[r.id][1] in made.router.vetoed for r in rows]
        assert made.router.vetoed and by_all != found.verdict.refused.tolist()
        store = ReleaseStore(tmp_path)
        read = read_past(store, "t", store.write("t", made.files(), {"student": "linear"}))
        for past in (made, read):
            for one, refused in zip(rows, found.verdict.refused, strict=True):
                if one.id not in past.held_out:
                    continue
                rank, _ = past.held_out[one.id]
                redone = past.redo(one)
                assert redone is not None
                assert redone.decision.accepted is bool(rank >= past.router.rank_threshold and not refused)
                assert past.accepts(one.id, one.text) is redone.decision.accepted
        # Another request has no label that had a hand in it; and an older release goes by its own vetoes throughout.
        assert made.refused.vetoed("new", made.held_out.keys()) is None
        older = {name: data for name, data in made.files().items() if name != "refused.json"}
        past = past_of(older, "an older release")
        for one in rows:
            _, key = past.held_out.get(one.id, (0.0, None))
            assert key not in past.router.vetoed or not past.accepts(one.id, one.text)

    @pytest.mark.parametrize("data", [b"", b"7", b"[1]", b"null"])
    def test_refusals_that_cant_be_read(self, data: bytes) -> None:
        found = look(day_zero(labelled(90)))
        assert found.candidate is not None
        with pytest.raises(DamagedRelease, match=r"refused\.json"):
            past_of({**found.candidate.files(), "refused.json": data}, "a release")


class TestPastRelease:
    def test_it_comes_back_from_the_store(self, tmp_path: Any) -> None:
        found = look(day_zero(labelled(150, noise=0.04)))
        assert found.candidate is not None
        store = ReleaseStore(tmp_path)
        name = store.write("t", found.candidate.files(), {"student": "linear"})
        past = read_past(store, "t", name)
        assert past.held_out == found.candidate.held_out
        texts = [
            ("x", "where is my card"),
            ("y", "zebra"),
            *[(r.id, r.text) for r in labelled(150, noise=0.04)],
        ]
        assert [past.accepts(*t) for t in texts] == [found.candidate.accepts(*t) for t in texts]

    def test_one_of_schema_1_decides_as_it_did(self, tmp_path: Any) -> None:
        """It remembers scores instead of ranks, and its router compares scores."""
        found = look(day_zero(labelled(90)))
        assert found.candidate is not None
        router = {
            "schema": 1,
            "score_threshold": 2.0,
            "slope": 3.0,
            "offset": -5.0,
            "always_escalate": ["parcel"],
        }
        held_out = {"at": [2.0, "card"], "below": [1.999, "card"], "never": [9.0, "parcel"]}
        files = found.candidate.files() | {
            "router.json": orjson.dumps(router),
            "held_out.json": orjson.dumps(held_out),
        }
        store = ReleaseStore(tmp_path)
        past = read_past(store, "t", store.write("t", files, {"student": "linear"}))
        assert [past.accepts(id, "where is my card") for id in held_out] == [True, False, False]
        score, _, _ = past.predict("where is my card")
        assert past.accepts("another", "where is my card") is (score >= 2.0)

    @pytest.mark.parametrize("held_out", [b"", b"[]", b'{"a": 1}', b'{"a": ["x", "y"]}', b'{"a": [1]}', None])
    def test_held_out_scores_that_cant_be_read(self, tmp_path: Any, held_out: bytes | None) -> None:
        found = look(day_zero(labelled(80)))
        assert found.candidate is not None
        files = found.candidate.files()
        if held_out is None:
            del files["held_out.json"]
        else:
            files["held_out.json"] = held_out
        store = ReleaseStore(tmp_path)
        name = store.write("t", files, {"student": "linear"})
        with pytest.raises(DamagedRelease, match="r0001"):
            read_past(store, "t", name)


class TestDue:
    def due(self, rows: list[Row], *past: PastLook, **policy: Any) -> tuple[bool, str] | None:
        waiting = not_due(day_zero(rows), past, TaskPolicy(**{"max_disagreement": 0.1, **policy}))
        return None if waiting is None else (waiting.declined, waiting.message)

    def test_it_is(self) -> None:
        assert self.due(labelled(100)) is None

    def test_too_few(self) -> None:
        assert self.due(labelled(12)) == (False, "12 labels; the first look needs 68")

    def test_not_grown_since_the_last(self) -> None:
        assert self.due(labelled(100), PastLook(1, 90, False)) == (
            False,
            "100 labels; the next look needs 113",
        )
        assert self.due(labelled(113), PastLook(1, 90, False)) is None

    def test_an_open_answer_space(self) -> None:
        rows = [row(i, f"write about {i}", f"essay {i}" if i % 5 == 0 else "yes") for i in range(100)]
        declined, message = self.due(rows) or (False, "")
        assert declined
        assert "20.0%" in message
        assert "10.0%" in message
        assert "21 distinct" in message

    def test_answers_seen_too_rarely(self) -> None:
        rows = [row(i, f"text {i}", f"label {i // 3}") for i in range(99)]
        assert self.due(rows) == (
            False,
            "99 labels; the first look waits until half of the traffic gets answers seen 10 times",
        )
        assert self.due(rows, PastLook(1, 70, False)) is None

    def test_numbers_have_no_normal_form(self) -> None:
        declined, message = self.due(labelled(100), agreement=AgreementChoice(kind="numeric")) or (False, "")
        assert declined
        assert "not numeric" in message

    def test_only_untrainable_answers(self) -> None:
        dataset = Dataset()
        dataset.left_out["teacher not marked trainable"] = 50
        waiting = not_due(dataset, (), POLICY)
        assert waiting is not None
        assert waiting.declined
        assert "50 answers" in waiting.message
        assert "teacher.trainable" in waiting.message

    def test_only_refusals(self) -> None:
        rows = [row(i, f"text {i}", ' {"refusal":"no"}') for i in range(100)]
        declined, message = self.due(rows) or (False, "")
        assert declined
        assert "none of 100 labels" in message
