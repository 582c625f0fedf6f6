"""Fitting: from its own rows alone, and the same model whichever way it is found."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from distillation import linear_training
from distillation.linear_training import TermCounts
from routers.logistic import fit_logistic
from serving.closed_answers import KnownAnswer, TokenEstimate
from serving.linear import ARRAYS_FILE, LinearStudent

TEXTS = ["red card", "blue card", "red parcel", "blue parcel", "zebra crossing"]
KNOWN = [KnownAnswer(key, [{"message": {"content": key}}], 1) for key in ("card", "parcel", "zebra")]
NO_TOKENS = TokenEstimate(0.0, 0.0)


def arrays(student: LinearStudent) -> dict[str, Any]:
    with np.load(io.BytesIO(student.files()[ARRAYS_FILE])) as loaded:
        return dict(loaded)


def test_nothing_of_a_held_out_text_reaches_the_student() -> None:
    counts = TermCounts(TEXTS)
    rows, answers = np.arange(4), np.array([0, 0, 1, 1])
    with_zebra_elsewhere = counts.fit(rows, answers, KNOWN, NO_TOKENS)
    alone = TermCounts(TEXTS[:4]).fit(rows, answers, KNOWN, NO_TOKENS)
    fitted, expected = arrays(with_zebra_elsewhere), arrays(alone)
    assert b"zebra" not in fitted["vocabulary"].tobytes()
    assert all((fitted[name] == expected[name]).all() for name in expected)
    assert [answer.key for answer in with_zebra_elsewhere.answers] == ["card", "parcel"]


def test_inverse_document_frequencies_are_of_its_own_rows() -> None:
    student = TermCounts(TEXTS).fit(np.array([0, 1, 2]), np.array([0, 0, 1]), KNOWN, NO_TOKENS)
    fitted = arrays(student)
    idf = dict(zip(fitted["vocabulary"].tobytes().decode().split("\n"), fitted["idf"], strict=True))
    assert idf["blue card"] == pytest.approx(1 + np.log(4 / 2))
    assert idf["red card"] == pytest.approx(1 + np.log(4 / 2))
    assert fitted["words"] == 7


def test_both_ways_of_fitting_find_the_same_model() -> None:
    """Fewer texts than features go through the Gram matrix, others through the features themselves."""
    rng = np.random.default_rng(0)
    answers = np.arange(60) % 3
    dense = rng.normal(size=(60, 90)) / 10
    dense[np.arange(60), answers] += 1.0
    features = sparse.csr_array(dense.astype(np.float32))
    by_gram = linear_training._fit(features, answers)
    direct = fit_logistic(features, answers, inverse_penalty=linear_training.INVERSE_PENALTY)
    unseen = rng.normal(size=(60, 90)) / 10
    unseen[np.arange(60), answers] += 1.0
    ours = unseen @ by_gram.weights + by_gram.intercept
    theirs = unseen @ direct.weights + direct.intercept
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).all()


def test_equal_texts_with_different_answers() -> None:
    counts = TermCounts(["same words"] * 30)
    student = counts.fit(np.arange(30), np.array([0] * 20 + [1] * 10), KNOWN, NO_TOKENS)
    prediction = student.predict("same words")
    assert student.answers[prediction.index].key == "card"
    assert prediction.probability == pytest.approx(2 / 3, abs=0.02)


def test_empty_texts_can_be_learned_from() -> None:
    student = TermCounts(["", " ", "word"]).fit(np.arange(3), np.array([0, 0, 1]), KNOWN, NO_TOKENS)
    assert student.answers[student.predict("").index].key == "card"
    assert student.answers[student.predict("word").index].key == "parcel"
