"""Fitting the student `linear`: TF-IDF features and multinomial logistic regression (Salton & Buckley, 1988).

Features are counted once for all texts; each fit takes its own rows, its own vocabulary and its own IDF from them, so
nothing of a held-out text reaches the student that scores it.

With fewer texts than features the same optimum is found in far fewer dimensions: by the representer theorem the weights
lie in the span of the training texts, so the regression runs on coordinates in that span (the Cholesky factor L of the
Gram matrix XXᵀ = LLᵀ) and is mapped back. It is the same model, several times faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import solve_triangular
from threadpoolctl import threadpool_limits

from routers.logistic import Logistic, fit_logistic
from serving.closed_answers import KnownAnswer, TokenEstimate
from serving.linear import LinearStudent
from serving.sight import Sees
from serving.text_terms import terms

INVERSE_PENALTY = 40.0
_MAX_GRAM = 4000
_MAX_FEATURES = 100_000

Ints = NDArray[np.int64]


class TermCounts:
    """How often every term occurs in every text: int matrices [n, F], one of words and one of characters."""

    def __init__(self, texts: Sequence[str]) -> None:
        split = [terms(text) for text in texts]
        self.word_names, self._words = _count([words for words, _ in split])
        self.character_names, self._characters = _count([characters for _, characters in split])

    @property
    def readable(self) -> NDArray[np.bool_]:
        """All of them: a text that is too long is cut."""
        return np.ones(self._words.shape[0], dtype=np.bool_)

    def fit(
        self,
        rows: Ints,
        answers: Ints,
        known: Sequence[KnownAnswer],
        tokens: TokenEstimate,
        sees: Sees = "message",
    ) -> LinearStudent:
        """Fit a student to the texts numbered `rows` int[m], whose answers are `known[answers[i]]`, int[m].

        The student knows only the answers among `answers`, and sees of requests what `sees` says. Takes one core: the
        others are the gateway's, and BLAS threads that have to wait for one spin.
        """
        word_columns, word_idf, words = _tfidf(self._words[rows])
        character_columns, character_idf, characters = _tfidf(self._characters[rows])
        features = sparse.hstack([words, characters], format="csr", dtype=np.float32) * np.float32(
            np.sqrt(0.5)
        )
        with threadpool_limits(1):
            fitted = _fit(features, answers)
        return LinearStudent(
            vocabulary=[self.word_names[c] for c in word_columns]
            + [self.character_names[c] for c in character_columns],
            words=len(word_columns),
            idf=np.concatenate([word_idf, character_idf]).astype(np.float32),
            weights=np.ascontiguousarray(fitted.weights, dtype=np.float32),
            intercept=fitted.intercept.astype(np.float32),
            answers=[replace(known[c], seen=int((answers == c).sum())) for c in fitted.classes],
            tokens=tokens,
            sees=sees,
        )


def _count(documents: Sequence[Sequence[str]]) -> tuple[list[str], sparse.csr_array]:
    columns: dict[str, int] = {}
    indptr: list[int] = [0]
    indices: list[int] = []
    data: list[int] = []
    for document in documents:
        counted = Counter(document)
        indices += [columns.setdefault(term, len(columns)) for term in counted]
        data += counted.values()
        indptr.append(len(indices))
    shape = (len(documents), len(columns))
    return list(columns), sparse.csr_array((data, indices, indptr), shape=shape, dtype=np.float64)


def _tfidf(counts: sparse.csr_array) -> tuple[Ints, NDArray[np.float64], sparse.csr_array]:
    """The columns in use, their IDF, and the rows as unit vectors of (1+ln tf)·idf with idf = 1+ln((1+n)/(1+df))."""
    frequency = np.bincount(counts.indices, minlength=counts.shape[1])
    columns = np.flatnonzero(frequency)
    if len(columns) > _MAX_FEATURES:
        columns = np.sort(np.argsort(-frequency, kind="stable")[:_MAX_FEATURES])
    weighted = counts[:, columns]
    weighted.data = 1.0 + np.log(weighted.data)
    idf = 1.0 + np.log((1.0 + counts.shape[0]) / (1.0 + frequency[columns]))
    # The student serves float32: round first, normalise then, exactly as it will.
    idf = idf.astype(np.float32).astype(np.float64)
    weighted = weighted.multiply(idf[None, :]).tocsr()
    norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    norms[norms == 0.0] = 1.0
    return columns, idf, sparse.csr_array(sparse.diags_array(1.0 / norms) @ weighted)


def _fit(features: sparse.csr_array, answers: Ints) -> Logistic:
    if features.shape[0] > min(_MAX_GRAM, features.shape[1]):
        return fit_logistic(features, answers, inverse_penalty=INVERSE_PENALTY)
    gram = (features @ features.T).toarray().astype(np.float64)
    # Equal texts make the matrix singular; this much of a ridge is far below the penalty.
    gram[np.diag_indices_from(gram)] += 1e-5
    coordinates = np.linalg.cholesky(gram)
    fitted = fit_logistic(coordinates.astype(np.float32), answers, inverse_penalty=INVERSE_PENALTY)
    weights = features.T @ solve_triangular(coordinates, fitted.weights, lower=True, trans="T")
    return Logistic(fitted.classes, np.asarray(weights), fitted.intercept)
