"""The student `encoder` behind a server: what it asks, what it makes of the answers, and what it doesn't believe."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.meter import TokenMeter
from serving.classification import Classification
from serving.classify import ClassifyStudent
from serving.classify_plan import PLAN_FILE, ClassifyPlan
from serving.errors import ConfigError, DamagedRelease, UpstreamBroken, UpstreamTimeout
from serving.exchange import Json, StudentAnswer
from serving.served import read_plan, served_student
from serving.student_server import StudentBroken, StudentRefused

Start = Callable[..., Any]
LABELS = ("card", "parcel", "refund")
SURE = [0.01, 0.95, 0.04]


def asking(text: str, **more: Any) -> Json:
    return {"model": "intents", "messages": [{"role": "user", "content": text}], **more}


def ask(url: str, *texts: str, **plan: Any) -> list[StudentAnswer]:
    async def asked() -> list[StudentAnswer]:
        student = ClassifyStudent.of(ClassifyPlan(url, "bert", **plan))
        try:
            return [await student.answer(asking(text)) for text in texts]
        finally:
            assert not student.busy
            await student.aclose()

    return asyncio.run(asked())


@pytest.mark.parametrize("suffix", ["", "/", "-root"])
def test_the_name_of_the_class_is_the_answer(classifier: Start, suffix: str) -> None:
    url = classifier(lambda text: SURE if text == "where is it" else [0.4, 0.3, 0.3], LABELS)
    url = url.removesuffix("/v1") if suffix == "-root" else url + suffix
    sure, unsure = ask(url, "where is it", "hm")
    assert sure.choices[0]["message"]["content"] == "parcel"
    assert sure.choices[0]["finish_reason"] == "stop"
    assert sure.score == pytest.approx(math.log(0.95) - math.log(0.04))
    assert sure.signals["probability"] == pytest.approx(0.95)
    assert sure.signals["entropy"] == pytest.approx(-sum(p * math.log(p) for p in SURE))
    assert "seen" not in sure.signals, "what it was trained on isn't known"
    assert sure.usage == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert (unsure.choices[0]["message"]["content"], sure.model) == ("card", "bert")
    assert unsure.score < sure.score


def test_it_goes_on_where_probabilities_round_to_one(classifier: Start) -> None:
    tails = {"a": [1e-30, 1.0, 0.0], "b": [1e-20, 1.0, 0.0], "c": [0.0, 1.0, 0.0]}
    a, b, c = ask(classifier(tails.__getitem__, LABELS), *tails)
    assert c.score > a.score > b.score
    assert all(math.isfinite(one.score) for one in (a, b, c))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ((200, b"<html>"), "isn't JSON"),
        ((200, []), "no classification"),
        ((200, {"data": []}), "no classification"),
        ((200, {"error": {"message": "out of memory"}}), "reported an error with status 200"),
        ([0.5, 0.4, 0.4], "sum to 1.3, not 1"),
        ([0.9, 0.2, -0.1], "aren't numbers between 0 and 1"),
        (
            (200, {"data": [{"label": "card", "probs": [0.5, "0.5"], "num_classes": 2}]}),
            "aren't numbers between",
        ),
        ([True, 0.0, 0.0], "aren't numbers between 0 and 1"),
        ([1.0], "tells 1 classes apart"),
        ((200, {"data": [{"label": "card", "probs": SURE, "num_classes": 4}]}), "4 classes and gives 3"),
        ((200, {"data": [{"label": None, "probs": SURE, "num_classes": 3}]}), "must carry id2label"),
        ((200, {"data": [{"label": "LABEL_1", "probs": SURE, "num_classes": 3}]}), "must carry id2label"),
        ((500, {"error": {"message": "dead"}}), "answered with status 500"),
        ((404, {"error": {"message": "The model `bert` does not exist."}}), "answered with status 404"),
    ],
)
def test_what_is_no_answer_is_an_error(classifier: Start, made: Any, said: str) -> None:
    with pytest.raises(StudentBroken, match=said) as caught:
        ask(classifier(lambda _: made, LABELS), "hello")
    assert not isinstance(caught.value, StudentRefused)


@pytest.mark.parametrize(
    "made", [(500, b"dead"), (400, b"too long"), (200, b"<html>"), [0.5, 0.5, 0.5], SURE]
)
def test_what_fails_says_how_long_its_server_was_at_it(classifier: Start, made: Any) -> None:
    async def took() -> list[float]:
        heard: list[float] = []
        student = ClassifyStudent.of(ClassifyPlan(classifier(lambda _: made, LABELS), "bert"))
        with contextlib.suppress(StudentBroken):
            await student.answer(asking("hello"), failed=heard.append)
        await student.aclose()
        return heard

    heard = asyncio.run(took())
    assert len(heard) == (made is not SURE)
    assert all(0.0 < seconds < 60.0 for seconds in heard)


def test_one_that_is_broken_off_says_so_too(classifier: Start) -> None:
    asked, answers = threading.Event(), threading.Event()

    def classify(_: str) -> list[float]:
        asked.set()
        answers.wait(60)
        return SURE

    async def took() -> list[float]:
        heard: list[float] = []
        student = ClassifyStudent.of(ClassifyPlan(classifier(classify, LABELS), "bert"))
        asking_it = asyncio.create_task(student.answer(asking("hello"), failed=heard.append))
        await asyncio.to_thread(asked.wait, 60)
        asking_it.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking_it
        await student.aclose()
        return heard

    try:
        (seconds,) = asyncio.run(took())
    finally:
        answers.set()
    assert seconds > 0.0


def test_a_text_that_is_too_long_is_refused(classifier: Start) -> None:
    error = {
        "error": {"message": "maximum context length is 512 tokens", "type": "BadRequestError", "code": 400}
    }
    with pytest.raises(StudentRefused, match="maximum context length"):
        ask(classifier(lambda _: (400, error), LABELS), "long")


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ([0.1, 0.9], "tells 2 classes apart, and told 3 apart before"),
        ((200, {"data": [{"label": "loan", "probs": SURE, "num_classes": 3}]}), "number 1, is called 'loan'"),
        ((200, {"data": [{"label": "parcel", "probs": SURE[::-1], "num_classes": 3}]}), None),
        ((200, {"data": [{"label": "parcel", "probs": [0.98, 0.01, 0.01], "num_classes": 3}]}), "number 0"),
    ],
)
def test_another_model_under_the_same_name_isnt_believed(
    classifier: Start, then: Any, said: str | None
) -> None:
    url = classifier(lambda text: SURE if text == "before" else then, LABELS)
    if said is None:
        assert len(ask(url, "before", "after")) == 2
        return
    with pytest.raises(StudentBroken, match=said):
        ask(url, "before", "after")


@pytest.mark.parametrize(
    ("labels", "probs", "said"),
    [
        (LABELS, SURE, None),
        (("loan", "parcel", "refund"), SURE, None),  # a class it never answered with
        (("card", "loan", "refund"), SURE, "number 1, is called 'loan'"),
        (("parcel", "card", "refund"), SURE, "number 1, is called 'card'"),
        ((*LABELS, "loan"), [*SURE, 0.0], "tells 4 classes apart, and told 3 apart before"),
    ],
)
def test_nor_is_one_that_answers_under_it_after_a_restart(
    classifier: Start, labels: Sequence[str], probs: list[float], said: str | None
) -> None:
    async def tested() -> ClassifyPlan:
        student = ClassifyStudent.of(ClassifyPlan(classifier(lambda _: SURE, LABELS), "bert"))
        try:
            assert student.tested() == student.plan
            await student.answer(asking("hello"))
            return student.tested()
        finally:
            await student.aclose()

    kept = ClassifyPlan.load(asyncio.run(tested()).files())
    assert (kept.classes, kept.labels) == (3, ((1, "parcel"),))
    now = {"classes": kept.classes, "labels": kept.labels}
    url = classifier(lambda _: probs, labels)
    if said is None:
        assert len(ask(url, "hello", **now)) == 1
        return
    with pytest.raises(StudentBroken, match=said):
        ask(url, "hello", **now)


def test_one_that_isnt_there() -> None:
    with pytest.raises(UpstreamBroken, match="can't be reached"):
        ask("http://127.0.0.1:9/v1", "hello")


def test_one_that_stalls(serve: Start) -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    with pytest.raises(UpstreamTimeout, match=r"0\.2 s"):
        ask(serve(silent, lifespan="off"), "hello", timeout_s=0.2)


def test_a_key_stays_secret(classifier: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLASSIFIER_KEY", "sk-secret-1")
    url = classifier(lambda _: (401, {"error": "sk-secret-1 isn't valid"}), LABELS)
    with pytest.raises(StudentBroken, match="status 401") as caught:
        ask(url, "hello", api_key_env="CLASSIFIER_KEY")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("CLASSIFIER_KEY", "sk-\nsecret")
    with pytest.raises(ConfigError, match="characters that can't be sent"):
        ask(url, "hello", api_key_env="CLASSIFIER_KEY")


def test_what_it_sees_and_what_it_doesnt_support() -> None:
    async def look() -> None:
        student = ClassifyStudent.of(ClassifyPlan("http://localhost/v1", "bert"))
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert not student.streams
        assert student.unsupported(asking("hello")) is None
        assert student.unsupported(asking("hello", tools=[{}])) == "tools"
        assert student.unsupported({"messages": [*talk, talk[0]]}) == "turns"
        sees = ClassifyStudent.of(ClassifyPlan("http://localhost/v1", "bert", sees="last"))
        assert sees.unsupported({"messages": [*talk, talk[0]]}) is None

    asyncio.run(look())


class TestFiles:
    PLAN = ClassifyPlan(
        "http://localhost:8000/v1", "bert", "KEY", 5.0, "last", 3, ((0, "card"), (2, "refund"))
    )

    def test_read_back(self) -> None:
        files = self.PLAN.files()
        assert ClassifyPlan.load(files) == read_plan(files) == self.PLAN
        assert isinstance(served_student(read_plan(files), TokenMeter), ClassifyStudent)

    def test_plans_that_knew_no_classes_are_read(self) -> None:
        written = orjson.loads(self.PLAN.files()[PLAN_FILE])
        del written["classes"], written["labels"]
        plan = ClassifyPlan.load({PLAN_FILE: orjson.dumps(written)})
        assert (plan.model, plan.classes, plan.labels) == ("bert", None, ())

    @pytest.mark.parametrize(
        "change",
        [
            {"schema": 2},
            {"kind": "lm"},
            {"base_url": "localhost"},
            {"model": ""},
            {"timeout_s": 0},
            {"timeout_s": "5"},
            {"sees": "all"},
            {"api_key_env": 7},
            {"classes": 1},
            {"classes": 2},
            {"classes": None},
            {"labels": 7},
            {"labels": [[0]]},
            {"labels": [[0, "card"], [0, "parcel"]]},
            {"labels": [[0, "card"], [1, "card"]]},
            {"labels": [[0, 7]]},
            {"labels": [[{}, "card"]]},
        ],
    )
    def test_damage_is_told(self, change: Json) -> None:
        written = orjson.loads(self.PLAN.files()[PLAN_FILE])
        with pytest.raises(DamagedRelease):
            ClassifyPlan.load({PLAN_FILE: orjson.dumps({**written, **change})})

    @pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b'"x"', None])
    def test_so_is_rubbish(self, data: bytes | None) -> None:
        files = {} if data is None else {PLAN_FILE: data}
        with pytest.raises(DamagedRelease):
            read_plan(files)
        with pytest.raises(DamagedRelease):
            ClassifyPlan.load(files)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["data", "label", "probs", "num_classes"]), inner)
    ),
    max_leaves=12,
)


@given(_json)
def test_whatever_comes_is_a_classification_or_an_error(body: object) -> None:
    try:
        found = Classification.read(orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS))
    except (StudentBroken, orjson.JSONEncodeError):
        return
    assert math.isfinite(found.score)


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=80))
def test_probabilities_make_finite_signals(weights: Sequence[float]) -> None:
    total = math.fsum(weights)
    if total < 1e-300:
        return
    probs = [weight / total for weight in weights]
    body = {"data": [{"label": "card", "probs": probs, "num_classes": len(probs)}]}
    found = Classification.read(orjson.dumps(body))
    assert found.score >= 0.0
    assert probs[found.index] == max(probs)
    assert -1e-9 <= found.entropy <= math.log(len(probs)) + 1e-9
    assert all(math.isfinite(value) for value in (found.score, *found.signals.values()))
