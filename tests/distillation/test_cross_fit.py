"""Cross-fitting: no label scores its own exchange."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from distillation.cross_fit import FOLDS, cross_fit
from distillation.dataset import Row, known_answers, token_estimate
from distillation.linear_training import TermCounts


def row(number: int, text: str, answer: str | None) -> Row:
    choices = [{"message": {"content": answer}, "finish_reason": "stop"}] if answer is not None else None
    return Row(str(number), text, answer, choices, 10, 2, "big", None)


def learnable(count: int) -> list[Row]:
    kinds = [("my card number {}", "card"), ("the parcel {} please", "parcel"), ("refund {} now", "refund")]
    return [row(i, kinds[i % 3][0].format(i), kinds[i % 3][1]) for i in range(count)]


def test_what_can_be_learned_is_agreed_on() -> None:
    fitted = cross_fit(learnable(60), seed=1)
    assert fitted.agreed.all()
    assert np.isfinite(fitted.scores).all()
    assert [answer.key for answer in fitted.student.answers] == ["card", "parcel", "refund"]


def test_a_label_doesnt_score_its_own_exchange() -> None:
    """Random labels on unmistakable texts: whoever has seen them knows them all, others guess."""
    coin = random.Random(5)
    rows = [row(i, f"word{i} only{i}", coin.choice("abcd")) for i in range(120)]
    fitted = cross_fit(rows, seed=1)
    known = [fitted.student.answers[fitted.student.predict(r.text).index].key == r.answer for r in rows]
    assert np.mean(known) > 0.99, "the student for release has seen them"
    assert np.mean(fitted.agreed) < 0.4


def test_scores_are_those_of_the_student_that_would_be_served() -> None:
    rows = learnable(40)
    seed = 9
    fitted = cross_fit(rows, seed=seed)
    known = known_answers(rows)
    place = {answer.key: index for index, answer in enumerate(known)}
    folds = np.random.default_rng(seed).permutation(len(rows)) % FOLDS
    training = np.flatnonzero(folds != 2)
    student = TermCounts([r.text for r in rows]).fit(
        training, np.array([place[rows[i].answer or ""] for i in training]), known, token_estimate(rows)
    )
    served = type(student).load(student.files())
    for index in map(int, np.flatnonzero(folds == 2)):
        prediction = served.predict(rows[index].text)
        assert prediction.score == fitted.scores[index]
        assert prediction.signals == {name: fitted.signals[name][index] for name in fitted.signals}
        of_its_answer = sum(rows[i].answer == fitted.predicted[index] for i in training)
        assert prediction.signals["seen"] == math.log1p(of_its_answer)


def test_the_seed_deals_the_folds() -> None:
    rows = learnable(30)
    assert (cross_fit(rows, seed=3).scores == cross_fit(rows, seed=3).scores).all()
    assert (cross_fit(rows, seed=3).scores != cross_fit(rows, seed=4).scores).any()


def test_a_missing_answer_never_agrees_and_teaches_nothing() -> None:
    """Not even where the empty answer is one of the known ones."""
    rows = [*learnable(30), *[row(100 + i, f"silence {i}", "") for i in range(10)]]
    rows += [row(200 + i, f"lost wire {i}", None) for i in range(10)]
    fitted = cross_fit(rows, seed=1)
    assert not fitted.agreed[-10:].any()
    assert np.isfinite(fitted.scores[-10:]).all(), "it is scored all the same"
    without = cross_fit(rows[:-10], seed=1)
    assert fitted.student.files() == without.student.files()


def test_unordinary_answers_never_agree_and_teach_nothing() -> None:
    rows = [*learnable(30), row(99, "tell me a secret", ' {"refusal":"no"}')]
    fitted = cross_fit(rows, seed=1)
    assert not fitted.agreed[-1]
    assert [answer.key for answer in fitted.student.answers] == ["card", "parcel", "refund"]


@pytest.mark.parametrize("answer", [None, ' {"finish":"length"}'])
def test_nothing_to_learn(answer: str | None) -> None:
    with pytest.raises(ValueError, match="no row has an answer"):
        cross_fit([row(i, f"text {i}", answer) for i in range(20)], seed=1)


def test_one_answer_seen_once() -> None:
    """The fold that holds it has nothing to learn from: its rows are never accepted."""
    rows = [row(0, "the only one", "yes"), *[row(i, f"text {i}", None) for i in range(1, 10)]]
    fitted = cross_fit(rows, seed=1)
    assert fitted.scores[0] == -np.inf
    assert fitted.predicted[0] == ""
    assert not fitted.agreed.any()
