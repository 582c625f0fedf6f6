import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.events import (
    Fold,
    answered,
    audited,
    cancelled,
    completed,
    decode,
    encode,
    fold,
    repeated,
    superseded,
)
from serving.exchange import Exchange, Json, StudentAnswer, TeacherAnswer

CHOICES: list[Json] = [
    {"index": 0, "message": {"role": "assistant", "content": "card_arrival"}, "finish_reason": "stop"}
]
TEACHER = TeacherAnswer("gpt-4o", CHOICES, {"total_tokens": 9}, 0.5, cost_usd=0.001, trainable=True)
STUDENT = StudentAnswer("linear", CHOICES, None, 0.001, score=0.7, signals={"margin": 0.2})


def exchange(id: str = "x1", **fields: Any) -> Exchange:
    base: dict[str, Any] = {
        "request_id": "req",
        "created": 1.5,
        "task": "t",
        "tenant": "h",
        "request": {"model": "gpt-4o", "messages": [{"role": "user", "content": "wo ist „sie“?\n\u2028"}]},
        "route": "student",
        "reason": "confident",
        "student": STUDENT,
        "audit": "pending",
        "coin": True,
        "audit_rate": 0.05,
    }
    return Exchange(id=id, **{**base, **fields})


def test_an_exchange_comes_back_from_its_line_as_it_was() -> None:
    for original in (exchange(), exchange(teacher=TEACHER, student=None, agreement=False, release="r0001")):
        line = encode(answered(original))
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        event = decode(line)
        assert event is not None
        assert fold([event]) == {"x1": original}
        assert {name: value for name, value in event.items() if name != "event"} == original.to_json()


def test_numbers_that_json_has_no_word_for_come_back_as_nan() -> None:
    odd = dataclasses.replace(STUDENT, score=math.nan, signals={"distance": math.inf})
    event = decode(encode(answered(exchange(student=odd))))
    assert event is not None
    student = fold([event])["x1"].student
    assert student is not None
    assert math.isnan(student.score)
    assert math.isnan(student.signals["distance"])


def test_a_request_nested_deeper_than_orjson_writes_is_kept() -> None:
    deep: Json = {}
    for _ in range(300):
        deep = {"a": deep}
    event = answered(exchange(request={"messages": [], "metadata": deep}))
    assert decode(encode(event)) == event


def test_what_is_no_json_is_refused_with_its_id() -> None:
    with pytest.raises(ValueError, match="'x9' can't be written as JSON"):
        encode({"event": "answered", "id": "x9", "request": {"a": object()}})


@given(st.data())
def test_a_line_with_any_byte_changed_is_no_event(data: st.DataObject) -> None:
    line = encode(superseded("x1", by="x2", at=1.0))
    position = data.draw(st.integers(0, len(line) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != line[position]))
    assert decode(line[:position] + bytes([byte]) + line[position + 1 :]) is None


@given(st.binary(max_size=80))
def test_foreign_lines_are_no_events(line: bytes) -> None:
    assert decode(line) is None
    assert decode(line + b"\n") is None


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"{}\n", b'{"event":{}}\n', encode({})[:-1], encode({}) + b"\n"]
)
def test_other_json_and_torn_lines_are_no_events(line: bytes) -> None:
    assert decode(line) is None


LATE_TEACHER = dataclasses.replace(TEACHER, model="late")
EVENTS = [
    answered(exchange()),
    audited("x1", teacher=LATE_TEACHER, agreement=True, at=2.0),
    superseded("x1", by="x2", at=3.0),
    cancelled("x1", teacher=None, at=4.0),
    answered(exchange("x2", route="teacher", student=None, teacher=TEACHER, audit="none")),
]


@pytest.mark.parametrize("order", list(itertools.permutations(range(len(EVENTS))))[::7])
def test_the_order_of_events_does_not_matter_nor_do_repetitions(order: tuple[int, ...]) -> None:
    folded = fold([EVENTS[i] for i in (*order, *order)])
    assert folded == {
        "x1": exchange(
            teacher=LATE_TEACHER, audit="answered", agreement=True, superseded_by="x2", cancelled=True
        ),
        "x2": exchange("x2", route="teacher", student=None, teacher=TEACHER, audit="none"),
    }


def test_an_audit_without_an_answer_is_missing_until_one_has_it() -> None:
    missing = audited("x1", teacher=None, agreement=None, at=2.0)
    found = audited("x1", teacher=TEACHER, agreement=False, at=3.0)
    assert fold([EVENTS[0], missing])["x1"].audit == "missing"
    assert fold([EVENTS[0], missing])["x1"].agreement is None
    for late in ([missing, found], [found, missing]):
        folded = fold([EVENTS[0], *late])["x1"]
        assert (folded.audit, folded.agreement, folded.teacher) == ("answered", False, TEACHER)


def test_of_two_answers_the_first_stays() -> None:
    assert fold([answered(exchange(reason="one")), answered(exchange(reason="two"))])["x1"].reason == "one"


def test_a_cancelled_exchange_keeps_the_answer_that_still_came() -> None:
    event = cancelled("x1", teacher=TEACHER, at=2.0)
    folded = fold([answered(exchange(route="teacher", student=None)), event])["x1"]
    assert folded.cancelled
    assert folded.teacher == TEACHER


def test_events_whose_exchange_never_came_make_none() -> None:
    assert fold(EVENTS[1:4]) == {}


WRONG: dict[str, list[Any]] = {
    "id": [None, 1, ["x"]],
    "created": ["2026", None, True],
    "request": [None, [], "x"],
    "route": ["elsewhere", None, []],
    "audit": ["maybe", None],
    "coin": [1, None, "yes"],
    "agreement": [1, "true"],
    "confidence": ["0.9", True],
    "teacher": [[], "gpt", {}, {"model": "m"}, {**EVENTS[4]["teacher"], "choices": [1]}],
    "student": [1, {"choices": []}, {**EVENTS[0]["student"], "signals": {"a": "b"}}],
    "schema": [True],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]])
def test_an_intact_event_with_a_wrong_field_is_damaged_and_changes_nothing(field: str, value: Any) -> None:
    folded = Fold()
    assert folded.add({**EVENTS[0], field: value}) == "damaged"
    assert folded.exchanges() == {}


@pytest.mark.parametrize(
    "event",
    [
        {"event": "answered"},
        {name: value for name, value in EVENTS[0].items() if name != "schema"},
        {"event": "audited", "id": "x1"},
        {"event": "audited", "id": 7, "teacher": None},
        {"event": "audited", "id": "x1", "teacher": {"model": "m"}},
        {"event": "audited", "id": "x1", "teacher": None, "agreement": "no"},
        {"event": "superseded", "id": "x1"},
        {"event": "superseded", "id": "x1", "by": None},
        {"event": "cancelled"},
        {"event": "cancelled", "id": "x1", "teacher": []},
    ],
)
def test_events_that_lack_something_are_damaged(event: Json) -> None:
    folded = Fold()
    folded.add(EVENTS[0])
    assert folded.add(event) == "damaged"
    assert folded.exchanges() == {"x1": exchange()}


@pytest.mark.parametrize(
    "event", [{}, {"event": "praised", "id": "x1"}, {"event": []}, {**EVENTS[0], "schema": 2}]
)
def test_kinds_and_schemas_of_other_versions_are_unknown(event: Json) -> None:
    assert Fold().add(event) == "unknown"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    event=st.sampled_from(EVENTS),
    changes=st.dictionaries(st.sampled_from(sorted(EVENTS[0])), json_values, max_size=3),
)
def test_the_fold_never_raises(event: Json, changes: Json) -> None:
    assert Fold().add({**event, **changes}) in ("taken", "unknown", "damaged")


CHECKPOINT: Json = {"tokens": 8, "bytes": 40, "score": 1.5, "signals": {"q0": -0.5}}


def test_what_a_student_said_in_the_end_is_part_of_its_exchange_in_any_order() -> None:
    of_before = CHECKPOINT | {"tokens": 24}
    del of_before["bytes"]
    checkpoints = [CHECKPOINT, of_before]
    begun = dataclasses.replace(STUDENT, complete=False, cost_usd=0.001, checkpoints=checkpoints)
    ended = dataclasses.replace(begun, complete=True, cost_usd=0.003, score=math.nan)
    escalated = exchange(route="teacher", student=begun, teacher=TEACHER, audit="answered", cost_usd=0.01)
    known = [answered(escalated), completed("x1", student=ended, agreement=True, usd=0.002, at=3.0)]
    for events in itertools.permutations([*known, known[1]]):
        (found,) = fold([decode(encode(event)) or {} for event in events]).values()
        assert found.student is not None
        assert found.student.complete
        assert found.student.cost_usd == 0.003
        assert found.student.checkpoints == checkpoints
        assert math.isnan(found.student.score)
        assert found.agreement is True
        assert found.cost_usd == pytest.approx(0.012)
    # One that was whole when it was logged stays as it was.
    whole = exchange(student=dataclasses.replace(begun, complete=True), cost_usd=0.01)
    (found,) = fold([answered(whole), known[1]]).values()
    assert found == whole


def test_students_answers_of_before_there_were_checkpoints_are_read() -> None:
    event = answered(exchange())
    del event["student"]["checkpoints"], event["student"]["complete"]
    assert fold([event])["x1"] == exchange()


@pytest.mark.parametrize(
    "wrong",
    [
        {"checkpoints": "x"},
        {"checkpoints": [{"tokens": 8}]},
        {"checkpoints": [{**CHECKPOINT, "tokens": "8"}]},
        {"checkpoints": [{**CHECKPOINT, "signals": {"q0": "low"}}]},
        {"checkpoints": [8]},
        {"complete": 1},
    ],
)
def test_damaged_checkpoints_make_a_damaged_event(wrong: Json) -> None:
    event = answered(exchange())
    event["student"] |= wrong
    folded = Fold()
    assert folded.add(event) == "damaged"
    assert folded.exchanges() == {}


def test_checkpoints_come_back_with_nan_for_what_json_has_no_word_for() -> None:
    odd = dataclasses.replace(STUDENT, checkpoints=[{**CHECKPOINT, "score": -math.inf}])
    student = fold([decode(encode(answered(exchange(student=odd)))) or {}])["x1"].student
    assert student is not None
    assert math.isnan(student.checkpoints[0]["score"])
    assert student.checkpoints[0]["signals"] == {"q0": -0.5}


@given(st.permutations(["answered", "first", "second", "missing", "redacted"]))
def test_a_repeat_labels_nothing_whatever_the_order(order: list[str]) -> None:
    original = exchange(teacher=TEACHER, student=None, route="teacher", audit="none")
    other = dataclasses.replace(TEACHER, choices=[{**CHOICES[0], "message": {"content": "refund"}}])
    first = repeated("x1", teacher=other, at=2.0)
    written: dict[str, Json] = {
        "answered": answered(original),
        "first": first,
        "second": dict(first),
        "missing": repeated("x1", teacher=None, at=3.0),
        "redacted": {**repeated("x1", teacher=TEACHER, at=2.0), "redacted": ["teacher"]},
    }
    folding = Fold()
    for name in order:
        event = decode(encode(written[name]))
        assert event is not None
        assert folding.add(event) == "taken"
    (folded,) = folding.exchanges().values()
    assert folded == dataclasses.replace(original, repeat=other)
    event = decode(encode(answered(folded)))
    assert event is not None
    assert fold([event])["x1"] == folded, "a whole exchange is read as it was written"


def test_a_damaged_repeat_is_no_repeat() -> None:
    for damage in ({"teacher": "lost"}, {"teacher": {"model": 3}}, {"at": "now"}):
        folding = Fold()
        folding.add(answered(exchange()))
        assert folding.add({**repeated("x1", teacher=TEACHER, at=1.0), **damage}) == "damaged"
        assert folding.exchanges()["x1"].repeat is None
