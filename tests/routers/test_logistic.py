from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import logsumexp

from routers.logistic import fit_logistic


def points(classes: int, labels: int = 200, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, classes, labels)
    return rng.normal(size=(labels, 4)) + 1.5 * np.eye(max(4, classes))[answers][:, :4], answers * 10


def test_it_is_the_optimum_of_the_penalised_likelihood() -> None:
    features, answers = points(3)
    fitted = fit_logistic(features, answers, inverse_penalty=2.0)
    assert fitted.classes.tolist() == [0, 10, 20]
    assert fitted.weights.shape == (4, 3) and fitted.intercept.shape == (3,)

    def loss(flat: NDArray[np.float64]) -> float:
        weights, intercept = flat[:12].reshape(4, 3), flat[12:]
        odds = features @ weights + intercept
        likelihood = (odds[np.arange(len(odds)), answers // 10] - logsumexp(odds, axis=1)).sum()
        return float(0.5 * (weights**2).sum() - 2.0 * likelihood)

    best = minimize(loss, np.zeros(15), method="L-BFGS-B")
    found = loss(np.concatenate([fitted.weights.ravel(), fitted.intercept]))
    assert found == pytest.approx(best.fun, rel=1e-4)


def test_two_classes_are_two_columns_the_first_all_zeros() -> None:
    features, answers = points(2)
    fitted = fit_logistic(features, answers, inverse_penalty=10.0)
    assert fitted.weights.shape == (4, 2) and not fitted.weights[:, 0].any() and fitted.intercept[0] == 0.0
    odds = features @ fitted.weights + fitted.intercept
    assert (fitted.classes[odds.argmax(axis=1)] == answers).mean() > 0.8


def test_one_class_is_always_given() -> None:
    fitted = fit_logistic(np.ones((5, 3)), np.full(5, 7), inverse_penalty=1.0)
    assert fitted.classes.tolist() == [7]
    assert fitted.weights.shape == (3, 1) and not fitted.weights.any() and not fitted.intercept.any()


def test_sparse_features_give_the_same_model() -> None:
    features, answers = points(3)
    features[np.abs(features) < 0.5] = 0.0
    dense = fit_logistic(features, answers, inverse_penalty=1.0)
    thin = fit_logistic(sparse.csr_array(features), answers, inverse_penalty=1.0)
    assert thin.weights == pytest.approx(dense.weights, abs=1e-2)


def test_a_weight_of_two_is_a_row_twice() -> None:
    features, answers = points(3, 120)
    twice = np.arange(120) < 60
    weighted = fit_logistic(features, answers, inverse_penalty=1.0, sample_weight=np.where(twice, 2.0, 1.0))
    repeated = fit_logistic(
        np.concatenate([features, features[twice]]),
        np.concatenate([answers, answers[twice]]),
        inverse_penalty=1.0,
    )
    plain = fit_logistic(features, answers, inverse_penalty=1.0)
    assert weighted.weights == pytest.approx(repeated.weights, abs=2e-2)
    assert np.abs(plain.weights - repeated.weights).max() > 4e-2


def test_many_answers_seen_once_are_a_young_log_and_no_warning() -> None:
    rng = np.random.default_rng(0)
    fitted = fit_logistic(rng.normal(size=(30, 4)), np.arange(30) // 2 * 2, inverse_penalty=1.0)
    assert len(fitted.classes) == 15
    assert len(fit_logistic(rng.normal(size=(30, 4)), np.arange(30), inverse_penalty=1.0).classes) == 30
