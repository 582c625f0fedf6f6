"""Is the promise kept? A thousand random splits of recorded traffic for each α and size, beside MAPIE and the oracle.

A split draws the traffic a release was calibrated on, and judges its threshold on all other rows: what it would have
answered there, and how much of that disagrees. Rows are drawn without replacement, so that the unseen rows of a lucky
sample are a little unlucky: a test that is exact on i.i.d. traffic may break Φ(−√(1−f)·z) instead of δ = Φ(−z), for
a calibration on the share f of all rows. That is 11 % instead of 10 % at 5,000 of 62,774 rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from loadtest.routing.runner import Runner
from loadtest.routing.shop import Shop, read_shop
from loadtest.routing.verdict import is_kept
from routers.promise import COVERAGES, Promise
from routers.propensity import Period, pooled_propensity

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

ALPHAS = (0.01, 0.03, 0.05, 0.1)
SIZES = (200, 1000, 5000)
CERTAINTY = 0.9
SPLITS = 1000
AUDIT_RATE = 0.05
EARLIER = 0.5
"""The share of the traffic that an earlier release answered."""

_PIECE = 250


@dataclass(frozen=True, slots=True)
class Sample:
    """What a release is calibrated on: the rows its traffic had, those labelled, and with which propensity."""

    traffic: NDArray[np.int64]
    labelled: NDArray[np.int64]
    propensity: Floats | None


Draw = Callable[[Shop, int, np.random.Generator], Sample]


def reference(shop: Shop, labels: int, rng: np.random.Generator) -> Sample:
    """Only coin-selected rows."""
    traffic = rng.permutation(len(shop))[:labels]
    return Sample(traffic, traffic, None)


def weighted(shop: Shop, labels: int, rng: np.random.Generator) -> Sample:
    """All labels of a period in which an earlier release answered the surest half, audited at 5 %."""
    return _after_earlier(shop, labels, 0, rng)


def pooled(shop: Shop, labels: int, rng: np.random.Generator) -> Sample:
    """Half of the labels from a day 0, when everything was escalated, and half from such a period."""
    return _after_earlier(shop, labels, labels // 2, rng)


WAYS: dict[str, Draw] = {"reference": reference, "weighted": weighted, "pooled": pooled}


def _after_earlier(shop: Shop, labels: int, first: int, rng: np.random.Generator) -> Sample:
    """`first` rows of day 0, and traffic under an earlier release that is expected to give the other labels."""
    later = round((labels - first) / (1.0 - EARLIER + EARLIER * AUDIT_RATE))
    traffic = rng.permutation(len(shop))[: first + later]
    accepted = shop.confidence[traffic] >= np.quantile(shop.confidence, 1.0 - EARLIER)
    day_zero = np.arange(len(traffic)) < first
    labelled = day_zero | ~accepted | (rng.random(len(traffic)) < AUDIT_RATE)
    kept = accepted[labelled]
    propensity = pooled_propensity(
        [Period(first, AUDIT_RATE, np.zeros(len(kept), np.bool_)), Period(later, AUDIT_RATE, kept)]
    )
    return Sample(traffic, traffic[labelled], propensity)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table: a way to have labels, a number of them, and a promise."""

    way: str
    labels: int
    max_disagreement: float


@dataclass(slots=True)
class Tally:
    """What came of a cell's splits. Coverages are of the unseen rows, 0 where nothing passed.

    `provable` counts the splits in which at least one level had the labels without which it can't pass.
    """

    splits: int = 0
    broken: int = 0
    provable: int = 0
    coverage: float = 0.0
    oracle: float = 0.0
    mapie_broken: int = 0
    mapie_coverage: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.splits + other.splits,
            self.broken + other.broken,
            self.provable + other.provable,
            self.coverage + other.coverage,
            self.oracle + other.oracle,
            self.mapie_broken + other.mapie_broken,
            self.mapie_coverage + other.mapie_coverage,
        )


def cells() -> list[Cell]:
    """Every cell of the table."""
    return [Cell(way, labels, alpha) for way in WAYS for labels in SIZES for alpha in ALPHAS]


def split(shop: Shop, way: str, labels: int, seeds: Sequence[int]) -> dict[float, Tally]:
    """Calibrate and judge once for each seed, for every α on the same split."""
    tallies = {alpha: Tally() for alpha in ALPHAS}
    ranked = np.argsort(-shop.confidence, kind="stable")
    for seed in seeds:
        sample = WAYS[way](shop, labels, np.random.default_rng([seed, labels]))
        unseen = np.ones(len(shop), dtype=np.bool_)
        unseen[sample.traffic] = False
        best = oracle_coverages(shop, ranked[unseen[ranked]])
        for alpha, tally in tallies.items():
            tally.splits += 1
            tally.oracle += best[alpha]
            _calibrate(shop, sample, unseen, alpha, seed, tally)
    return tallies


def _calibrate(shop: Shop, sample: Sample, unseen: Bools, alpha: float, seed: int, tally: Tally) -> None:
    scores, agreed = shop.confidence[sample.labelled], shop.agreed[sample.labelled]
    admission = Promise(alpha, CERTAINTY, seed=seed).admit(scores, agreed, propensity=sample.propensity)
    broken, coverage = judged(shop, unseen, admission.threshold, alpha)
    tally.broken += broken
    tally.coverage += coverage
    tally.provable += any(level.p_value is not None for level in admission.levels)
    if sample.propensity is None:  # MAPIE knows no propensities
        broken, coverage = judged(shop, unseen, _mapie(scores, agreed, alpha), alpha)
        tally.mapie_broken += broken
        tally.mapie_coverage += coverage


def judged(shop: Shop, unseen: Bools, threshold: float | None, max_disagreement: float) -> tuple[bool, float]:
    """Whether more than α of the unseen rows at or above the threshold disagree, and how many of all those are."""
    if threshold is None:
        return False, 0.0
    accepted = unseen & (shop.confidence >= threshold)
    count = int(accepted.sum())
    disagreed = int((accepted & ~shop.agreed).sum())
    return disagreed > max_disagreement * count, count / int(unseen.sum())


def oracle_coverages(shop: Shop, ranked: NDArray[np.int64]) -> dict[float, float]:
    """For each α the largest coverage of the rows `ranked` at which at most α of them disagree.

    They are given from surest to least sure; equal scores go together.
    """
    scores = shop.confidence[ranked]
    disagreed = np.cumsum(~shop.agreed[ranked])
    count = np.arange(1, len(ranked) + 1)
    last_of_equals = np.append(scores[1:] < scores[:-1], True)
    share = np.where(last_of_equals, disagreed / count, 1.0)
    found = {alpha: np.flatnonzero(share <= alpha) for alpha in ALPHAS}
    return {
        alpha: float(count[kept[-1]] / len(ranked)) if len(kept) else 0.0 for alpha, kept in found.items()
    }


def _mapie(scores: Floats, agreed: Bools, max_disagreement: float) -> float | None:
    """MAPIE's lowest valid threshold on the same grid: learn-then-test with its Hoeffding–Bentkus p-values."""
    from mapie.risk_control import BinaryClassificationController, precision  # a peer, not a dependency

    ranked = np.sort(scores)[::-1]
    cuts = np.unique([ranked[math.ceil(share * len(scores) - 1e-6) - 1] for share in COVERAGES])[::-1]
    controller = BinaryClassificationController(
        predict_function=_both_columns,
        risk=precision,
        target_level=1.0 - max_disagreement,
        confidence_level=CERTAINTY,
        list_predict_params=cuts,
        fwer_method="fixed_sequence",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says so when nothing passes
        controller.calibrate(scores[:, None], agreed.astype(np.int64))
    valid = np.asarray(controller.valid_predict_params)
    return float(valid.min()) if len(valid) else None


def _both_columns(given: Floats) -> Floats:
    return np.column_stack([1.0 - given[:, 0], given[:, 0]])


def tables(runner: Runner) -> Iterator[Table]:
    """Run every cell and give the table."""
    shop = read_shop(runner.data / "frugalml_shop" / "SHOP.csv")
    splits = runner.scaled(SPLITS)
    pieces = [
        (shop, way, labels, range(start, min(start + _PIECE, splits)))
        for way in WAYS
        for labels in SIZES
        for start in range(0, splits, _PIECE)
    ]
    found = {cell: Tally() for cell in cells()}
    for (_, way, labels, _), tallies in runner.each("validity", split, pieces):
        for alpha, tally in tallies.items():
            found[Cell(way, labels, alpha)] += tally
    yield table_of(found)


def table_of(found: dict[Cell, Tally]) -> Table:
    """The table: a row for each way, number of labels and α."""
    splits = max(tally.splits for tally in found.values())
    table = Table(
        title=f"Validity: FrugalML's shop reviews, δ = {1 - CERTAINTY:.0%}, {splits:,} random splits a row",
        title_justify="left",
    )
    for name in (
        "labels",
        "how many",
        "α",
        "broken",
        "",
        "coverage",
        "oracle's",
        "MAPIE: broken",
        "coverage",
    ):
        table.add_column(name, justify="left" if name in ("labels", "") else "right")
    for cell, tally in found.items():
        if cell.max_disagreement == ALPHAS[0]:
            table.add_section()
        row = [cell.way, f"{cell.labels:,}", f"{cell.max_disagreement:.0%}"]
        oracle = f"{tally.oracle / tally.splits:.1%}"
        if not tally.provable:
            row += ["–", "vacuous", "–", oracle]
        else:
            kept = is_kept(tally.broken, tally.splits, 1.0 - CERTAINTY)
            row += [f"{tally.broken / tally.splits:.1%}", "kept" if kept else "BROKEN"]
            row += [f"{tally.coverage / tally.splits:.1%}", oracle]
        if cell.way == "reference":
            row += [
                f"{tally.mapie_broken / tally.splits:.1%}",
                f"{tally.mapie_coverage / tally.splits:.1%}",
            ]
        table.add_row(*row)
    return table
