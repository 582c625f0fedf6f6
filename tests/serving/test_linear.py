"""The linear student: the same as scikit-learn's, the same after a round trip, and safe with whatever it gets."""

from __future__ import annotations

import asyncio
import io
import math
import time
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_union

from distillation.dataset import Row, known_answers, token_estimate
from distillation.linear_training import INVERSE_PENALTY, TermCounts
from serving.chat import ChatRequest
from serving.closed_answers import ANSWERS_FILE, KnownAnswer, TokenEstimate
from serving.errors import DamagedRelease, RequestError
from serving.linear import ARRAYS_FILE, LinearStudent
from serving.sight import seen_text, unsupported

PHRASES = {
    "lost": ["where is my {} card", "my {} card is gone", "I lost the {} card", "can't find my {} card"],
    "late": ["the {} parcel is late", "when does my {} parcel come", "still waiting for the {} parcel"],
    "refund": ["give me my {} money back", "I want a refund for the {} one", "refund the {} order please"],
    "other": ["what's the weather in {}", "tell me about {}", "who are you, {}?", "do you like {} tea?"],
}
WORDS = ("red", "old", "blue", "second", "new", "small", "Paris", "debit", "café", "express")
TEXTS = [(p.format(word), answer) for answer, ps in PHRASES.items() for p in ps for word in WORDS]
ODD_TEXTS = [
    *("", " ", "a", "\x00", "card\x00card", "😀", "👩‍👩‍👧 card", "где моя карта", "私のカード", "ａ" * 5000),
    "\u0301" * 50,
    "card " * 300,
]


def train(
    labelled: Sequence[tuple[str, str]], *, tokens: TokenEstimate | None = None
) -> tuple[LinearStudent, list[str]]:
    rows = [row(str(i), text, answer) for i, (text, answer) in enumerate(labelled)]
    known = known_answers(rows)
    place = {answer.key: index for index, answer in enumerate(known)}
    answers = np.array([place[answer] for _, answer in labelled], dtype=np.int64)
    counts = TermCounts([text for text, _ in labelled])
    fitted = counts.fit(np.arange(len(rows)), answers, known, tokens or token_estimate(rows))
    return fitted, [text for text, _ in labelled]


def row(id: str, text: str, answer: str) -> Row:
    choices = [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]
    return Row(id, text, answer, choices, 10 + len(text) // 4, len(answer), "big", None)


@pytest.fixture(scope="module")
def student() -> LinearStudent:
    return train(TEXTS)[0]


class TestParity:
    """The served arrays against scikit-learn's own pipeline on the same texts."""

    @staticmethod
    def reference(texts: Sequence[str]) -> Any:
        def vectorizer(**options: Any) -> TfidfVectorizer:
            # Its `smooth_idf` is ln((1+n)/(1+df))+1, ours too.
            return TfidfVectorizer(sublinear_tf=True, lowercase=True, norm="l2", **options)

        return make_union(
            vectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\w+"),
            vectorizer(analyzer="char_wb", ngram_range=(2, 4)),
        ).fit(texts)

    @pytest.mark.parametrize("answers", [4, 2])
    def test_fitted_students(self, answers: int) -> None:
        """Ours stops earlier than this reference, so log-odds are near and the loss is all but the lowest."""
        labelled = [(text, answer) for text, answer in TEXTS if answer in list(PHRASES)[:answers]]
        order = np.random.default_rng(3).permutation(len(labelled))
        training = [labelled[i] for i in order[::2]]
        unseen = [labelled[i][0] for i in order[1::2]] + ["card", "a red money parcel", "zzz"]
        ours, texts = train(training)
        union = self.reference(texts)
        theirs = LogisticRegression(C=INVERSE_PENALTY, tol=1e-6, max_iter=5000)
        theirs.fit(union.transform(texts) / np.sqrt(2), [answer for _, answer in training])
        features = union.transform(unseen) / np.sqrt(2)
        expected = np.sort(theirs.predict_log_proba(features), axis=1)
        for text, best, ranked in zip(unseen, theirs.predict(features), expected, strict=True):
            prediction = ours.predict(text)
            assert ours.answers[prediction.index].key == best
            assert prediction.score == pytest.approx(ranked[-1] - ranked[-2], rel=0.25, abs=0.1)
            assert prediction.probability == pytest.approx(np.exp(ranked[-1]), abs=0.05)

        def loss(weights: Any, log_probability: Sequence[float]) -> float:
            return 0.5 * float((weights**2).sum()) - INVERSE_PENALTY * sum(log_probability)

        column = {answer: i for i, answer in enumerate(theirs.classes_)}
        of_training = theirs.predict_log_proba(union.transform(texts) / np.sqrt(2))
        lowest = loss(theirs.coef_, [of_training[i, column[a]] for i, (_, a) in enumerate(training)])
        predicted = [ours.predict(text) for text in texts]
        assert [ours.answers[p.index].key for p in predicted] == [answer for _, answer in training]
        reached = loss(arrays_of(ours.files())["weights"], [float(np.log(p.probability)) for p in predicted])
        assert lowest * 0.999 <= reached <= lowest * 1.02

    def test_features_alone(self, student: LinearStudent) -> None:
        """With random weights in place of fitted ones nothing is left of the optimiser's tolerance."""
        union = self.reference([text for text, _ in TEXTS])
        names = [
            *union.transformer_list[0][1].get_feature_names_out(),
            *union.transformer_list[1][1].get_feature_names_out(),
        ]
        words = len(union.transformer_list[0][1].vocabulary_)
        weights = np.random.default_rng(0).normal(size=(len(names), 3)).astype(np.float32)
        idf = np.concatenate([union.transformer_list[i][1].idf_ for i in (0, 1)]).astype(np.float32)
        ours = LinearStudent(
            vocabulary=names,
            words=words,
            idf=idf,
            weights=weights,
            intercept=np.zeros(3, dtype=np.float32),
            answers=[KnownAnswer(str(i), [{}], 1) for i in range(3)],
            tokens=TokenEstimate(0.0, 0.0),
        )
        texts = [text for text, _ in TEXTS[::7]] + ["card card card Card", "an unseen word: ünïcödé"]
        expected = np.asarray((union.transform(texts) / np.sqrt(2)) @ weights)
        for text, logits in zip(texts, expected, strict=True):
            second, first = np.sort(logits)[-2:]
            assert ours.predict(text).score == pytest.approx(first - second, abs=1e-5)
            assert ours.predict(text).index == int(logits.argmax())

    def test_the_released_terms_are_those_of_scikit_learn(self, student: LinearStudent) -> None:
        union = self.reference([text for text, _ in TEXTS])
        theirs = [set(union.transformer_list[i][1].get_feature_names_out()) for i in (0, 1)]
        with np.load(io.BytesIO(student.files()[ARRAYS_FILE])) as arrays:
            vocabulary = arrays["vocabulary"].tobytes().decode().split("\n")
            words = int(arrays["words"])
        assert set(vocabulary[:words]) == theirs[0]
        assert set(vocabulary[words:]) == theirs[1]


class TestRoundTrip:
    def test_predictions_are_the_same_byte_for_byte(self, student: LinearStudent) -> None:
        loaded = LinearStudent.load(student.files())
        for text in [text for text, _ in TEXTS] + ODD_TEXTS:
            assert repr(loaded.predict(text)) == repr(student.predict(text))
        assert loaded.answers == student.answers

    def test_files_are_the_same_again(self, student: LinearStudent) -> None:
        loaded = LinearStudent.load(student.files())
        assert loaded.files()[ANSWERS_FILE] == student.files()[ANSWERS_FILE]
        with (
            np.load(io.BytesIO(loaded.files()[ARRAYS_FILE])) as one,
            np.load(io.BytesIO(student.files()[ARRAYS_FILE])) as other,
        ):
            assert set(one) == set(other)
            assert all((one[name] == other[name]).all() for name in one)

    def test_any_text_can_be_a_term_or_an_answer(self) -> None:
        labelled = [(text, f"answer\n\"{i}\" 'x' \x00 é") for i, text in enumerate(ODD_TEXTS)]
        trained, texts = train(labelled)
        loaded = LinearStudent.load(trained.files())
        for text in texts:
            assert repr(loaded.predict(text)) == repr(trained.predict(text))
        assert {a.choices[0]["message"]["content"] for a in loaded.answers} == {a for _, a in labelled}


class TestPredict:
    @pytest.mark.parametrize("text", ODD_TEXTS, ids=repr)
    def test_odd_texts_have_an_answer(self, student: LinearStudent, text: str) -> None:
        prediction = student.predict(text)
        assert 0 <= prediction.index < len(student.answers)
        assert prediction.score >= 0
        assert 1 / len(student.answers) - 1e-6 <= prediction.probability <= 1
        assert -1e-6 <= prediction.entropy <= np.log(len(student.answers)) + 1e-6

    @given(text=st.text(max_size=60))
    def test_any_text_and_always_the_same(self, student: LinearStudent, text: str) -> None:
        first = student.predict(text)
        assert np.isfinite([first.score, first.probability, first.entropy]).all()
        assert repr(student.predict(text)) == repr(first)

    def test_a_megabyte_is_cut(self, student: LinearStudent) -> None:
        began = time.thread_time()
        prediction = student.predict("where is my red card " * 50_000)
        assert time.thread_time() - began < 1.0
        assert student.answers[prediction.index].key == "lost"

    def test_a_term_may_come_as_often_as_unicode_can_make_it(self) -> None:
        fitted, _ = train([("\ufdfa", "a"), ("ab ab", "b")])  # one character, eighteen in normal form
        often, more_often = fitted.predict("\ufdfa" * 2000), fitted.predict("\ufdfa" * 4000)
        assert (often.index, more_often.index) == (0, 0)
        assert math.isfinite(more_often.score)

    def test_nothing_known_leaves_the_intercept(self) -> None:
        nothing = LinearStudent(
            vocabulary=["card"],
            words=1,
            idf=np.ones(1, dtype=np.float32),
            weights=np.ones((1, 2), dtype=np.float32),
            intercept=np.array([0.25, 1.5], dtype=np.float32),
            answers=[KnownAnswer(key, [{}], 1) for key in "ab"],
            tokens=TokenEstimate(0.0, 0.0),
        )
        prediction = nothing.predict("zebra")
        assert (prediction.index, prediction.score) == (1, 1.25)

    def test_a_single_known_answer(self) -> None:
        only, _ = train([(text, "yes") for text, _ in TEXTS])
        prediction = LinearStudent.load(only.files()).predict("anything")
        assert (prediction.index, prediction.score, prediction.probability) == (0, 0.0, 1.0)

    def test_two_answers(self) -> None:
        pair, _ = train([(text, answer) for text, answer in TEXTS if answer in ("lost", "late")])
        assert pair.answers[pair.predict("I lost the card").index].key == "lost"
        assert pair.answers[pair.predict("the parcel is late").index].key == "late"

    def test_an_answer_never_seen_in_the_training_rows_isnt_given(self) -> None:
        rows = [row(str(i), text, answer) for i, (text, answer) in enumerate(TEXTS)]
        known = known_answers(rows)
        place = {answer.key: index for index, answer in enumerate(known)}
        part = np.array([i for i, (_, answer) in enumerate(TEXTS) if answer != "lost"])
        answers = np.array([place[TEXTS[i][1]] for i in part])
        fitted = TermCounts([text for text, _ in TEXTS]).fit(part, answers, known, token_estimate(rows))
        assert [answer.key for answer in fitted.answers] == ["late", "other", "refund"]

    def test_more_texts_than_the_gram_matrix_takes(self) -> None:
        """Beyond 4,000 texts, or more texts than terms, the regression runs on the features themselves."""
        few_terms = [(f"{a} {b}", a) for a in ("aa", "bb", "cc") for b in ("xx", "yy")] * 20
        fitted, _ = train(few_terms)
        assert fitted.answers[fitted.predict("bb yy").index].key == "bb"

    def test_thousands_of_near_duplicates(self) -> None:
        """Their Gram matrix is all but singular."""
        labelled = [(f"where is parcel {'x' * (i % 3)}", ("a", "b")[i % 2]) for i in range(1500)]
        fitted, _ = train(labelled)
        assert np.isfinite(fitted.predict("where is parcel x").score)


class TestAnswer:
    def test_usage_and_signals(self) -> None:
        fitted, _ = train(TEXTS, tokens=TokenEstimate(fixed=8.0, per_character=0.25))
        request = {"messages": [{"role": "user", "content": "where is my red card"}]}
        answer = asyncio.run(fitted.answer(request))
        assert answer.choices[0]["message"]["content"] == "lost"
        assert answer.choices[0]["finish_reason"] == "stop"
        assert answer.usage == {"prompt_tokens": 13, "completion_tokens": 4, "total_tokens": 17}
        assert answer.latency_s > 0
        prediction = fitted.predict("where is my red card")
        assert answer.score == prediction.score
        seen = fitted.answers[prediction.index].seen
        assert answer.signals == {
            "probability": prediction.probability,
            "entropy": prediction.entropy,
            "seen": math.log1p(seen),
        }
        assert seen == sum(label == "lost" for _, label in TEXTS)

    def test_a_negative_estimate_is_no_tokens(self) -> None:
        assert TokenEstimate(fixed=-3.0, per_character=0.1).prompt_tokens(3) == 0


Files = dict[str, bytes]


def arrays_of(files: Files) -> dict[str, Any]:
    with np.load(io.BytesIO(files[ARRAYS_FILE])) as arrays:
        return dict(arrays)


def with_arrays(files: Files, **changes: Any) -> Files:
    changed = {name: a for name, a in {**arrays_of(files), **changes}.items() if a is not None}
    out = io.BytesIO()
    np.savez(out, **changed)
    return {**files, ARRAYS_FILE: out.getvalue()}


def with_answers(files: Files, **changes: Any) -> Files:
    described = {**orjson.loads(files[ANSWERS_FILE]), **changes}
    return {**files, ANSWERS_FILE: orjson.dumps(described)}


def spoiled(array: Any, value: float) -> Any:
    array = array.copy()
    array[-1] = value
    return array


def repacked(data: bytes) -> bytes:
    """The same archive with one member's compressed bytes garbled, but its sizes intact."""
    out = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        member = archive.getinfo("weights.npy")
    start = member.header_offset + 60
    out[start : start + 30] = bytes(30)
    return bytes(out)


DAMAGE: dict[str, Callable[[Files], Files]] = {
    "no arrays": lambda f: {ANSWERS_FILE: f[ANSWERS_FILE]},
    "no answers file": lambda f: {ARRAYS_FILE: f[ARRAYS_FILE]},
    "empty arrays": lambda f: {**f, ARRAYS_FILE: b""},
    "arrays are text": lambda f: {**f, ARRAYS_FILE: b"hello"},
    "arrays are one array": lambda f: {**f, ARRAYS_FILE: b"\x93NUMPY\x01\x00" + b"v\x00" + b" " * 200},
    "truncated": lambda f: {**f, ARRAYS_FILE: f[ARRAYS_FILE][: len(f[ARRAYS_FILE]) // 2]},
    "torn by a byte": lambda f: {**f, ARRAYS_FILE: f[ARRAYS_FILE][:-1]},
    "garbled": lambda f: {**f, ARRAYS_FILE: repacked(f[ARRAYS_FILE])},
    "without weights": lambda f: with_arrays(f, weights=None),
    "NaN weights": lambda f: with_arrays(f, weights=spoiled(arrays_of(f)["weights"], np.nan)),
    "infinite idf": lambda f: with_arrays(f, idf=spoiled(arrays_of(f)["idf"], np.inf)),
    "NaN intercept": lambda f: with_arrays(f, intercept=spoiled(arrays_of(f)["intercept"], np.nan)),
    "weights transposed": lambda f: with_arrays(f, weights=arrays_of(f)["weights"].T),
    "a term too few": lambda f: with_arrays(f, weights=arrays_of(f)["weights"][1:]),
    "flat weights": lambda f: with_arrays(f, weights=arrays_of(f)["weights"].ravel()),
    "intercept is a number": lambda f: with_arrays(f, intercept=np.float32(1.0)),
    "weights of text": lambda f: with_arrays(f, weights=arrays_of(f)["weights"].astype(str)),
    "weights of complex numbers": lambda f: with_arrays(f, weights=arrays_of(f)["weights"].astype(complex)),
    "object arrays": lambda f: with_arrays(f, idf=np.array([{}, []], dtype=object)),
    "vocabulary of text": lambda f: with_arrays(f, vocabulary=np.array(["a", "b"])),
    "vocabulary isn't UTF-8": lambda f: with_arrays(f, vocabulary=np.array([255, 254], dtype=np.uint8)),
    "more words than terms": lambda f: with_arrays(f, words=np.int64(10**9)),
    "fewer than no words": lambda f: with_arrays(f, words=np.int64(-1)),
    "words is a list": lambda f: with_arrays(f, words=np.arange(3)),
    "answers file is no JSON": lambda f: {**f, ANSWERS_FILE: b"{"},
    "answers file is a list": lambda f: {**f, ANSWERS_FILE: b"[]"},
    "another schema": lambda f: with_answers(f, schema=2),
    "no answers": lambda f: with_answers(f, answers=[]),
    "an answer too few": lambda f: with_answers(f, answers=orjson.loads(f[ANSWERS_FILE])["answers"][1:]),
    "answers is null": lambda f: with_answers(f, answers=None),
    "answers are numbers": lambda f: with_answers(f, answers=[1, 2, 3, 4]),
    "choices are null": lambda f: with_answers(
        f, answers=[{**a, "choices": None} for a in orjson.loads(f[ANSWERS_FILE])["answers"]]
    ),
    "choices are empty": lambda f: with_answers(
        f, answers=[{**a, "choices": []} for a in orjson.loads(f[ANSWERS_FILE])["answers"]]
    ),
    "a key is a number": lambda f: with_answers(
        f, answers=[{**a, "key": 1} for a in orjson.loads(f[ANSWERS_FILE])["answers"]]
    ),
    "seen less than never": lambda f: with_answers(
        f, answers=[{**a, "seen": -1} for a in orjson.loads(f[ANSWERS_FILE])["answers"]]
    ),
    "seen is null": lambda f: with_answers(
        f, answers=[{**a, "seen": None} for a in orjson.loads(f[ANSWERS_FILE])["answers"]]
    ),
    "no token estimate": lambda f: with_answers(f, tokens=None),
    "token estimate is text": lambda f: with_answers(f, tokens={"fixed": "nan", "per_character": 1}),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
    def test_damage_is_told(self, student: LinearStudent, damage: Callable[[Files], Files]) -> None:
        with pytest.raises(DamagedRelease) as raised:
            LinearStudent.load(damage(student.files()))
        assert "\n" not in str(raised.value)

    def test_one_of_before_answers_were_counted_still_answers(self, student: LinearStudent) -> None:
        files = student.files()
        answers = [
            {name: value for name, value in answer.items() if name != "seen"}
            for answer in orjson.loads(files[ANSWERS_FILE])["answers"]
        ]
        loaded, text = LinearStudent.load(with_answers(files, answers=answers)), "where is my card"
        now, before = student.predict(text), loaded.predict(text)
        assert (before.index, before.score, before.probability) == (now.index, now.score, now.probability)
        assert before.signals["seen"] == 0.0 < now.signals["seen"]

    def test_a_pickle_isnt_run(self, student: LinearStudent, tmp_path: Any) -> None:
        witness = tmp_path / "ran"

        class Payload:
            def __reduce__(self) -> Any:
                return witness.touch, ()

        files = with_arrays(student.files(), idf=np.array([Payload()], dtype=object))
        with pytest.raises(DamagedRelease):
            LinearStudent.load(files)
        assert not witness.exists()

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_any_flipped_byte_is_told_or_harmless(self, student: LinearStudent, data: st.DataObject) -> None:
        files = student.files()
        name = data.draw(st.sampled_from(sorted(files)))
        spoilt = bytearray(files[name])
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] ^= data.draw(st.integers(1, 255))
        try:
            loaded = LinearStudent.load({**files, name: bytes(spoilt)})
        except DamagedRelease:
            return
        assert np.isfinite(loaded.predict("where is my card").score)


def asked(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages), **more}


USER: dict[str, Any] = {"role": "user", "content": "hello"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE: dict[str, Any] = {"type": "image_url", "image_url": {"url": "data:"}}
TEXT: dict[str, Any] = {"type": "text", "text": "he"}


class TestUnsupported:
    @pytest.mark.parametrize(
        ("request_body", "feature"),
        [
            (asked(USER), None),
            (asked({"role": "system", "content": "be kind"}, USER), None),
            (
                asked({"role": "developer", "content": "be kind"}, {"role": "system", "content": 1}, USER),
                None,
            ),
            (asked({**USER, "name": "bob"}), None),
            (asked({"role": "user", "content": [TEXT, {"type": "text", "text": "llo"}]}), None),
            (asked({"role": "user", "content": ""}), None),
            (asked(USER, n=1, tools=[], functions=None, logprobs=False, top_logprobs=0, logit_bias={}), None),
            (asked(USER, n=None, modalities=["text"], audio=None, web_search_options=None), None),
            (asked(USER, modalities=[]), None),
            (
                asked(USER, temperature=0.7, seed=1, response_format={"type": "json_object"}, stream=True),
                None,
            ),
            (asked(USER, tools=[TOOL]), "tools"),
            (asked(USER, functions=[{"name": "f"}]), "tools"),
            (asked(USER, tools="odd"), "tools"),
            (asked(USER, n=2), "n"),
            (asked(USER, logprobs=True), "logprobs"),
            (asked(USER, top_logprobs=5), "logprobs"),
            (asked(USER, modalities=["text", "audio"]), "audio"),
            (asked(USER, modalities="audio"), "audio"),
            (asked(USER, modalities=5), "audio"),
            (asked(USER, audio={"voice": "alloy"}), "audio"),
            (asked(USER, logit_bias={"50256": -100}), "logit_bias"),
            (asked(USER, web_search_options={}), "web_search"),
            (asked(USER, {"role": "assistant", "content": "hi"}, USER), "turns"),
            (asked(USER, USER), "turns"),
            (asked(USER, {"role": "system", "content": "and now"}), "system"),
            (asked({"role": "system", "content": "only"}), "turns"),
            (asked({"role": "assistant", "content": "hello"}), "prefill"),
            (asked({"role": "tool", "content": "x", "tool_call_id": "1"}), "tools"),
            (asked({"role": "user", "content": None}), "content"),
            (asked({"role": "user"}), "content"),
            (asked({"role": "user", "content": 5}), "content"),
            (asked({"role": "user", "content": []}), "content"),
            (asked({"role": "user", "content": [TEXT, IMAGE]}), "content"),
            (asked({"role": "user", "content": ["hello"]}), "content"),
            (asked({"role": "user", "content": [{"type": "text", "text": None}]}), "content"),
            (asked({"role": "user", "content": {"type": "text", "text": "hello"}}), "content"),
        ],
        ids=repr,
    )
    def test_features(self, request_body: dict[str, Any], feature: str | None) -> None:
        assert unsupported(ChatRequest.parse(orjson.dumps(request_body)).body) == feature

    def test_the_text_of_parts(self) -> None:
        parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
        assert seen_text(asked({"role": "user", "content": parts})) == "hello"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
parts = st.fixed_dictionaries({}, optional={"type": st.just("text") | json_values, "text": json_values})
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "developer", "assistant", "tool", "x"])},
    optional={"content": json_values | st.lists(parts | json_values, max_size=3), "name": json_values},
)
FIELDS = ("n", "tools", "functions", "logprobs", "top_logprobs", "audio", "modalities", "logit_bias")
requests = st.fixed_dictionaries(
    {"model": st.just("m"), "messages": st.lists(messages, min_size=1, max_size=3)},
    optional=dict.fromkeys((*FIELDS, "web_search_options", "stop"), json_values),
)


@settings(deadline=None)
@given(body=requests)
def test_whatever_a_client_may_send_is_refused_or_answered(
    student: LinearStudent, body: dict[str, Any]
) -> None:
    try:
        request = ChatRequest.parse(orjson.dumps(body)).body
    except RequestError:
        return
    feature = unsupported(request)
    assert feature is None or feature.isidentifier()
    if feature is None:
        assert asyncio.run(student.answer(request)).choices == next(
            a.choices
            for a in student.answers
            if a is student.answers[student.predict(seen_text(request)).index]
        )
