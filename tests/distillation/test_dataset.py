"""Which exchanges become rows or traffic, and what the closed answer space is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from distillation.dataset import Row, build_dataset, known_answers, token_estimate
from routers.noise import Noise
from serving.agreement import comparison
from serving.exchange import Exchange, Json, StudentAnswer, TeacherAnswer
from serving.task_settings import AgreementChoice

EXACT = comparison(AgreementChoice())
JSON = comparison(AgreementChoice(kind="json"))


def choices(content: object, finish: str = "stop", **message: Any) -> list[Json]:
    said = {"role": "assistant", "content": content, **message}
    return [{"index": 0, "message": said, "finish_reason": finish}]


def teacher(content: object = "lost", *, usage: Json | None = None, **more: Any) -> TeacherAnswer:
    return TeacherAnswer("big", choices(content), usage, 0.1, **{"trainable": True, **more})


def student() -> StudentAnswer:
    return StudentAnswer("linear", choices("lost"), None, 0.0, score=2.0)


def exchange(id: str = "a", **changes: Any) -> Exchange:
    """An escalated exchange, teacher's answer and all, unless `changes` say otherwise."""
    known = Exchange(
        id=id,
        request_id=id,
        created=100.0,
        task="t",
        tenant="",
        request={"model": "m", "messages": [{"role": "user", "content": "where is my card"}]},
        route="teacher",
        reason="low_confidence",
        release="r0001",
        teacher=teacher(),
        student=student(),
        audit_rate=0.05,
        propensity=1.0,
    )
    return replace(known, **changes)


def accepted(id: str = "a", **changes: Any) -> Exchange:
    """One that the student answered; no coin fell."""
    served: dict[str, Any] = {"route": "student", "reason": "confident", "teacher": None, "propensity": 0.05}
    return exchange(id, **{**served, **changes})


OTHER = [{"role": "user", "content": [{"type": "image_url"}]}]
CASES: dict[str, tuple[Exchange, int, int, str | None]] = {
    # name: (exchange, rows, traffic, left out as)
    "day 0": (exchange(release=None, reason="no_release", student=None), 1, 1, None),
    "escalated": (exchange(), 1, 1, None),
    "escalated, and the coin fell": (exchange(coin=True, audit="answered"), 1, 1, None),
    "accepted": (accepted(), 0, 1, None),
    "accepted and audited": (accepted(coin=True, audit="answered", teacher=teacher()), 1, 1, None),
    "accepted, and the audit is missing": (accepted(coin=True, audit="missing"), 1, 1, None),
    "not eligible": (exchange(eligible=False, propensity=None), 0, 0, "not eligible"),
    "superseded": (exchange(superseded_by="b"), 0, 0, "superseded by a retry"),
    "superseded though audited": (
        accepted(superseded_by="b", audit="answered", teacher=teacher()),
        0,
        0,
        "superseded by a retry",
    ),
    "cancelled": (exchange(cancelled=True, teacher=None), 0, 0, "cancelled by the client"),
    "cancelled, and the answer still came": (exchange(cancelled=True), 0, 0, "cancelled by the client"),
    "cancelled though audited": (
        accepted(cancelled=True, audit="answered", teacher=teacher()),
        0,
        0,
        "cancelled by the client",
    ),
    "audit under way": (accepted(coin=True, audit="pending"), 0, 0, "behind an audit still pending"),
    "not trainable": (exchange(teacher=teacher(trainable=False)), 0, 0, "teacher not marked trainable"),
    "no answer": (exchange(teacher=None), 0, 0, "teacher gave no answer"),
    "content": (exchange(request={"messages": OTHER}), 0, 0, "unsupported: content"),
    "n": (exchange(request={**exchange().request, "n": 2}), 0, 0, "unsupported: n"),
    "odd modalities": (exchange(request={**exchange().request, "modalities": 5}), 0, 0, "unsupported: audio"),
}


@pytest.mark.parametrize(("given", "rows", "traffic", "why"), CASES.values(), ids=CASES.keys())
def test_rows_and_traffic(given: Exchange, rows: int, traffic: int, why: str | None) -> None:
    dataset = build_dataset([given], EXACT)
    assert len(dataset.rows) == rows
    assert sum(period.exchanges for period in dataset.traffic.values()) == traffic
    assert dict(dataset.left_out) == ({why: 1} if why else {})


def test_a_row_says_what_the_teacher_said() -> None:
    usage = {"prompt_tokens": 30, "completion_tokens": 2, "total_tokens": 32}
    (row,) = build_dataset([exchange("x", teacher=teacher(" lost \n card", usage=usage))], EXACT).rows
    assert row == Row("x", "where is my card", "lost card", choices(" lost \n card"), 30, 2, "big", "r0001")


def test_a_missing_answer_is_a_row_without_one() -> None:
    dataset = build_dataset([accepted("x", coin=True, audit="missing")], EXACT)
    assert dataset.rows == [Row("x", "where is my card", None, None, None, None, None, "r0001")]
    assert dataset.answers == []


def test_periods_count_all_eligible_traffic() -> None:
    dataset = build_dataset(
        [
            exchange("a", release=None, audit_rate=0.05),
            exchange("b", release="r0001", audit_rate=0.05),
            accepted("c", release="r0001", audit_rate=0.05),
            accepted("d", release="r0001", audit_rate=0.02, coin=True, audit="answered", teacher=teacher()),
            accepted("e", release="r0002", audit_rate=0.02),
            accepted("f", release="r0002", audit_rate=0.02, eligible=False),
        ],
        EXACT,
    )
    assert list(dataset.traffic) == [None, "r0001", "r0002"]
    first, second = dataset.traffic["r0001"], dataset.traffic["r0002"]
    assert (dataset.traffic[None].exchanges, dataset.traffic[None].accepted) == (1, 0)
    assert (first.exchanges, first.accepted) == (3, 2)
    assert first.audit_rate == pytest.approx(0.04)
    assert (second.exchanges, second.accepted, second.audit_rate) == (1, 1, 0.02)
    assert [row.release for row in dataset.rows] == [None, "r0001", "r0001"]


def test_without_a_period() -> None:
    dataset = build_dataset(
        [exchange("a", release=None), exchange("b"), accepted("c"), exchange("d", release="r0002")], EXACT
    )
    less = dataset.without_period("r0001")
    assert [row.id for row in less.rows] == ["a", "d"]
    assert list(less.traffic) == [None, "r0002"]
    assert less.left_out["release is gone"] == 1
    assert len(dataset.rows) == 3, "the dataset itself stays whole"


def test_nothing_behind_an_audit_under_way_is_used() -> None:
    log = [
        exchange("a", created=1.0),
        accepted("b", created=2.0, coin=True, audit="pending"),
        exchange("c", created=3.0),
        accepted("d", created=4.0),
    ]
    dataset = build_dataset(log, EXACT)
    assert [row.id for row in dataset.rows] == ["a"]
    assert dataset.traffic["r0001"].exchanges == 1
    assert dataset.left_out["behind an audit still pending"] == 3


def test_an_audit_owed_for_an_hour_is_missing() -> None:
    log = [accepted("b", created=2.0, coin=True, audit="pending"), exchange("c", created=3603.0)]
    dataset = build_dataset(log, EXACT)
    assert [(row.id, row.answer) for row in dataset.rows] == [("b", None), ("c", "lost")]
    assert not dataset.left_out


def rows_of(*answers: TeacherAnswer, by: Any = EXACT) -> list[Row]:
    return build_dataset([exchange(str(i), teacher=a) for i, a in enumerate(answers)], by).rows


class TestKnownAnswers:
    def test_the_teachers_most_common_form(self) -> None:
        known = known_answers(rows_of(*map(teacher, ["b", "lost  card", "lost card", "lost  card", "a"])))
        assert [a.key for a in known] == ["a", "b", "lost card"]
        assert known[2].choices == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "lost  card", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ]

    def test_json_in_the_teachers_own_form(self) -> None:
        own = '```json\n{"label": "lost", "n": 1}\n```'
        rows = rows_of(*map(teacher, ['{"n":1,"label":"lost"}', own, own]), by=JSON)
        (known,) = known_answers(rows)
        assert known.key == '{"label":"lost","n":1}'
        assert known.choices[0]["message"]["content"] == own

    @pytest.mark.parametrize(
        "answer",
        [
            replace(teacher(), choices=choices("lost", finish="length")),
            replace(teacher(), choices=choices("lost", finish="content_filter")),
            replace(teacher(), choices=choices(None, refusal="I can't help with that")),
            replace(
                teacher(), choices=choices(None, tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])
            ),
            replace(teacher(), choices=[*choices("lost"), *choices("lost")]),
            replace(teacher(), choices=[]),
        ],
        ids=["cut off", "filtered", "refused", "tool call", "two choices", "none"],
    )
    def test_what_isnt_plain_text_is_never_imitated(self, answer: TeacherAnswer) -> None:
        rows = rows_of(answer, teacher("late"))
        assert len(rows) == 2, "it counts in every test"
        assert [a.key for a in known_answers(rows)] == ["late"]

    def test_text_in_a_json_task_is_never_imitated(self) -> None:
        assert known_answers(rows_of(teacher("sorry, I can't"), by=JSON)) == []

    def test_a_missing_answer_is_none_of_them(self) -> None:
        missing = build_dataset([accepted(coin=True, audit="missing")], EXACT).rows
        assert known_answers(missing) == []

    @pytest.mark.parametrize("message", [{"role": "assistant"}, {"content": None}, None], ids=repr)
    def test_a_message_without_content_is_the_empty_answer(self, message: Json | None) -> None:
        answer = replace(teacher(), choices=[{"index": 0, "message": message, "finish_reason": "stop"}])
        (known,) = known_answers(rows_of(answer))
        assert known.key == known.choices[0]["message"]["content"] == ""

    def test_parts_become_text(self) -> None:
        (known,) = known_answers(rows_of(teacher([{"type": "text", "text": "lost"}])))
        assert known.choices[0]["message"]["content"] == "lost"

    def test_newlines_and_quotes_stay(self) -> None:
        odd = "say \"yes\"\nor 'no'\t\\n"
        assert known_answers(rows_of(teacher(odd)))[0].choices[0]["message"]["content"] == odd

    def test_tokens_are_the_usual_number(self) -> None:
        usages = [{"completion_tokens": 3}, {"completion_tokens": 4}, {"completion_tokens": 4}, None, {}]
        (known,) = known_answers(rows_of(*[teacher(usage=usage) for usage in usages]))
        assert known.completion_tokens == 4

    @pytest.mark.parametrize("count", ["7", 7.5, None, [], True, -1], ids=repr)
    def test_odd_usage_counts_nothing(self, count: object) -> None:
        rows = rows_of(teacher(usage={"prompt_tokens": count, "completion_tokens": count}))
        assert known_answers(rows)[0].completion_tokens == 0
        assert token_estimate(rows).prompt_tokens(4) == 0


class TestTokenEstimate:
    @staticmethod
    def rows(tokens: Callable[[int], int | None], lengths: range) -> list[Row]:
        return [Row(str(n), "x" * n, "a", None, tokens(n), None, None, None) for n in lengths]

    def test_it_finds_the_prompt_and_the_rate(self) -> None:
        estimate = token_estimate(self.rows(lambda n: 50 + n // 4, range(0, 400, 4)))
        assert estimate.fixed == pytest.approx(50.0)
        assert estimate.per_character == pytest.approx(0.25)
        assert estimate.prompt_tokens(100) == 75

    def test_one_length_tells_no_rate(self) -> None:
        estimate = token_estimate(self.rows(lambda n: 60, range(10, 11)) * 3)
        assert (estimate.fixed, estimate.per_character) == (60.0, 0.0)

    def test_longer_texts_never_cost_less(self) -> None:
        estimate = token_estimate(self.rows(lambda n: 100 - n, range(50)))
        assert estimate.per_character == 0.0
        assert estimate.prompt_tokens(1000) == pytest.approx(75.5, abs=0.51)

    def test_unknown_usage_is_left_out(self) -> None:
        rows = self.rows(lambda n: None if n % 2 else 50 + n, range(100))
        assert token_estimate(rows).fixed == pytest.approx(50.0)


def test_a_second_answer_says_how_steady_the_teacher_is_and_labels_nothing() -> None:
    day0: dict[str, Any] = {"release": None, "reason": "no_release", "student": None}
    pairs = [
        exchange("a", repeat=teacher(), **day0),
        exchange("b", repeat=teacher("late"), **day0),
        exchange("c", **day0),
        exchange("d", repeat=teacher("late"), redacted=["teacher"], **day0),
        exchange("e", repeat=teacher("late")),
        exchange("f", repeat=teacher("late"), eligible=False, **day0),
    ]
    dataset = build_dataset(pairs, EXACT)
    assert [row.steady for row in dataset.rows] == [True, False, None, None, None]
    assert dataset.noise == Noise(2, 1)
    assert [row.answer for row in dataset.rows[:3]] == ["lost"] * 3
    near = comparison(AgreementChoice(kind="numeric", tolerance=0.1))
    close = exchange("n", teacher=teacher("100"), repeat=teacher("101"), **day0)
    assert build_dataset([close], near).noise == Noise(1, 0), "by the task's comparison"
