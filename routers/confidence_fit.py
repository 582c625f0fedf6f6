"""Fitting a confidence: a few small models of agreement, the simplest of the best by cross-validated log-loss.

All are logistic regressions whose log-odds are a sum of piecewise-linear functions, so that all become the same arrays
(`routers.confidence`):

- `score`: the student's score alone (Platt, 1999)
- `linear`: every signal, linearly
- `hinges`: every signal in pieces between its quantiles, the pieces' slopes drawn towards each other (a P-spline of
  degree 1: Eilers & Marx, 1996)
- each of them `+answers`: and an offset an answer, shrunk towards none by how much the answers differ at all (empirical
  Bayes, the variance by moments: DerSimonian & Laird, 1986)

The score's slopes are never negative. Beyond what was seen a signal adds no more than at the edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from routers.confidence import SCORE, Confidence, Term
from routers.newton import fit_odds, log_loss, sigmoid

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MODELS = ("score", "score+answers", "linear", "linear+answers", "hinges", "hinges+answers")
"""Simplest first."""

FOLDS = 5
LEAST_LABELS = 50
"""With fewer labels, or fewer than a tenth of that many of either kind, only the simplest model is tried."""

_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
_KNOWN_SHARE = 0.95
_LEAST_SLOPE = 1e-6
_FIRM, _LOOSE = 1.0, 1e-3
"""Penalties, in labels, on slopes a standard deviation: of signals and of differences, and of the score's slope."""


@dataclass(frozen=True, slots=True)
class _Labels:
    """n usable labels: inputs as columns by name, the score's first; `weight` sums to the effective number of them."""

    columns: dict[str, Floats]
    keys: list[str | None]
    agreed: Floats
    weight: Floats

    def rows(self, chosen: NDArray[np.bool_]) -> _Labels:
        return _Labels(
            {name: column[chosen] for name, column in self.columns.items()},
            [key for key, kept in zip(self.keys, chosen, strict=True) if kept],
            self.agreed[chosen],
            self.weight[chosen],
        )

    @property
    def target(self) -> Floats:
        """The labels drawn in as Platt does, (N₊+1)/(N₊+2) and 1/(N₋+2): n that all agree prove no certainty."""
        agreeing = float(self.weight @ self.agreed)
        for_one, for_other = (agreeing + 1) / (agreeing + 2), 1 / (float(self.weight.sum()) - agreeing + 2)
        return for_other + (for_one - for_other) * self.agreed


class ConfidenceEstimator:
    """Chooses among `models` and fits: `confidence_`, and `losses_`, the cross-validated log-loss of each it tried.

    `seed` deals the folds. Deterministic.
    """

    confidence_: Confidence
    losses_: dict[str, float]

    def __init__(self, models: Sequence[str] = MODELS, *, seed: int = 0) -> None:
        self.models = models
        self.seed = seed

    def fit(
        self,
        score: ArrayLike,
        signals: Mapping[str, ArrayLike],
        answer_keys: Sequence[str | None],
        agreed: ArrayLike,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Fit to n labelled answers, each weighted by `sample_weight` float[n] > 0, 1/propensity (None: equally).

        `score` and every signal float[n], `agreed` bool[n]; a missing label is False. Answers without a finite score,
        or without a signal that nearly all others have, aren't used; signals that a twentieth lacks aren't used either.
        No usable answer gives a confidence that is as unsure as can be: log-odds of 0, at nearly any score.
        """
        labels = _usable(score, signals, answer_keys, agreed, sample_weight)
        tried = self._worth_trying(labels)
        self.losses_ = {}
        chosen = tried[0]
        if len(tried) > 1:
            chosen = self._choose(labels, tried)
        self.confidence_ = _fit(chosen, labels)
        return self

    def _worth_trying(self, labels: _Labels) -> Sequence[str]:
        count, agreeing = len(labels.agreed), float(labels.agreed.sum())
        if count < LEAST_LABELS or min(agreeing, count - agreeing) < LEAST_LABELS / 10:
            return self.models[:1]
        # Without signals `linear` is the score's own model once more.
        alone = len(labels.columns) == 1 and SCORE in self.models
        return [model for model in self.models if not (alone and model.startswith("linear"))]

    def _choose(self, labels: _Labels, models: Sequence[str]) -> str:
        """The simplest whose loss exceeds the least by at most the standard error of their difference."""
        folds = np.random.default_rng(self.seed).permutation(len(labels.agreed)) % FOLDS
        losses = {model: np.zeros(len(folds)) for model in models}
        for fold in range(FOLDS):
            held_out = folds == fold
            fitted_on, judged = labels.rows(~held_out), labels.rows(held_out)
            for model in models:
                ranks = _ranks(_fit(model, fitted_on), judged)
                losses[model][held_out] = log_loss(ranks, judged.agreed)
        self.losses_ = {
            model: float(np.average(loss, weights=labels.weight)) for model, loss in losses.items()
        }
        best = min(models, key=self.losses_.__getitem__)
        for model in models:
            excess = (losses[model] - losses[best]) * labels.weight / labels.weight.mean()
            if excess.mean() <= excess.std() / np.sqrt(len(excess)):
                return model
        return best


def _usable(
    score: ArrayLike,
    signals: Mapping[str, ArrayLike],
    answer_keys: Sequence[str | None],
    agreed: ArrayLike,
    sample_weight: ArrayLike | None,
) -> _Labels:
    scores = np.asarray(score, dtype=np.float64)
    agreeing = np.asarray(agreed).astype(np.bool_)
    weights = np.ones(len(scores)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    if not len(scores) == len(agreeing) == len(weights) == len(answer_keys):
        raise ValueError(
            f"score, answer_keys, agreed and sample_weight must be equally long, got {len(scores)}, "
            f"{len(answer_keys)}, {len(agreeing)} and {len(weights)}"
        )
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise ValueError("every sample_weight must be finite and above 0")
    usable = np.isfinite(scores)
    columns = {SCORE: scores}
    for name in sorted(signals):
        column = np.asarray(signals[name], dtype=np.float64)
        known = np.isfinite(column)
        if usable.any() and known[usable].mean() >= _KNOWN_SHARE:
            columns[name] = column
    for column in columns.values():
        usable = usable & np.isfinite(column)
    labels = _Labels(columns, list(answer_keys), agreeing.astype(np.float64), weights).rows(usable)
    total = labels.weight.sum()
    # As many as equally weighted labels would say as much (Kish, 1965), so that penalties weigh what they should.
    scale = total / (labels.weight**2).sum() if total else 1.0
    return replace(labels, weight=labels.weight * scale)


def _ranks(confidence: Confidence, labels: _Labels) -> Floats:
    return confidence.ranks(labels.columns[SCORE], labels.columns, labels.keys)


def _fit(model: str, labels: _Labels) -> Confidence:
    kind, _, answers = model.partition("+")
    if len(labels.agreed) == 0:
        return replace(Confidence.of_score(_LEAST_SLOPE, 0.0), model=model)
    names = [SCORE] if kind == "score" else list(labels.columns)
    cuts = {name: _knots(labels.columns[name], name, kind) for name in names}
    names = [name for name in names if name == SCORE or len(cuts[name]) > 1]
    blocks = [_pieces(labels.columns[name], cuts[name], name) for name in names]
    scales = [float(labels.columns[name].std()) or 1.0 for name in names]
    features = np.concatenate(
        [np.ones((len(labels.agreed), 1)), *[block / s for block, s in zip(blocks, scales, strict=True)]],
        axis=1,
    )
    penalty, rising, start = np.zeros((features.shape[1],) * 2), np.zeros(features.shape[1], np.bool_), 1
    for name, block in zip(names, blocks, strict=True):
        here = slice(start, start + block.shape[1])
        penalty[here, here] = _penalty(block.shape[1], _LOOSE if name == SCORE else _FIRM)
        rising[here], start = name == SCORE, here.stop
    found = fit_odds(features, labels.target, labels.weight, penalty, rising)
    terms, start = [], 1
    for name, block, scale in zip(names, blocks, scales, strict=True):
        slopes = found[start : start + block.shape[1]] / scale
        start += block.shape[1]
        terms.append(_term(name, cuts[name], slopes, _LEAST_SLOPE / scale))
    confidence = Confidence(tuple(terms), float(found[0]), model=model)
    return replace(confidence, answers=_offsets(confidence, labels)) if answers else confidence


def _knots(column: Floats, name: str, kind: str) -> list[float]:
    """Where the pieces of a signal meet; the first and the last of a signal's are the edges of what was seen."""
    inner = np.quantile(column, _QUANTILES) if kind == "hinges" else np.empty(0)
    low, high = float(column.min()), float(column.max())
    within = {float(knot) for knot in inner if low < knot < high}
    return sorted(within if name == SCORE else within | {low, high})


def _pieces(column: Floats, knots: Sequence[float], name: str) -> Floats:
    """[n, pieces]: how much of each value lies in each piece, so that a piece's coefficient is its slope."""
    edges = [-np.inf, *knots, np.inf] if name == SCORE else list(knots)
    made = []
    for low, high in pairwise(edges):
        anchor = low if np.isfinite(low) else (high if np.isfinite(high) else 0.0)
        made.append(np.clip(column, low, high) - anchor)
    return np.stack(made, axis=1)


def _penalty(pieces: int, ridge: float) -> Floats:
    """On the pieces' slopes: their mean square by `ridge`, their differences firmly."""
    difference = np.diff(np.eye(pieces), axis=0)
    return np.asarray(ridge * np.eye(pieces) / pieces + _FIRM * difference.T @ difference)


def _term(name: str, knots: Sequence[float], slopes: Floats, least: float) -> Term:
    """The pieces as `Confidence` keeps them: continuous, and a signal's flat beyond its edges."""
    along = (
        [max(float(slope), least) for slope in slopes] if name == SCORE else [0.0, *map(float, slopes), 0.0]
    )
    # The function is 0 at the first knot; without knots at 0.
    intercepts = [-along[0] * knots[0] if knots else 0.0]
    for knot, before, after in zip(knots, along, along[1:], strict=False):
        intercepts.append(intercepts[-1] + (before - after) * knot)
    return Term(name, tuple(along), tuple(intercepts), tuple(knots))


def _offsets(confidence: Confidence, labels: _Labels) -> dict[str, float]:
    """An offset for each answer: the mode of its posterior, their prior being Normal(0, τ²)."""
    known = sorted({key for key in labels.keys if key is not None})
    place = {key: index for index, key in enumerate(known)}
    at = np.array([-1 if key is None else place[key] for key in labels.keys], dtype=np.int64)
    given = at >= 0
    at, ranks = at[given], _ranks(confidence, labels)[given]
    target, weight = labels.target[given], labels.weight[given]

    def derivatives(offsets: Floats) -> tuple[Floats, Floats]:
        chance = sigmoid(ranks + offsets[at])
        slope, curvature = np.zeros(len(known)), np.zeros(len(known))
        np.add.at(slope, at, weight * (target - chance))
        np.add.at(curvature, at, weight * chance * (1.0 - chance))
        return slope, curvature

    offsets: Floats = np.zeros(len(known))
    excess, information = derivatives(offsets)
    variance = float((excess**2 - information).sum() / max(float((information**2).sum()), 1e-12))
    if variance <= 0.0:
        return {}
    for _ in range(20):
        slope, curvature = derivatives(offsets)
        offsets = offsets + np.clip((slope - offsets / variance) / (curvature + 1.0 / variance), -1.0, 1.0)
    return dict(zip(known, offsets.tolist(), strict=True))
