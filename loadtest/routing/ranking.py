"""How well answers are ranked: what quality costs in teacher calls, by the true labels of FrugalML's shop reviews.

The student's own confidence, ours fitted to it and the predicted label, and the best order there is. The measures are
RouteLLM's (arXiv 2406.18665).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from loadtest.routing.runner import Runner
from loadtest.routing.shop import Shop, read_shop
from routers.confidence_fit import ConfidenceEstimator
from routers.frontier import Frontier, frontier, oracle_frontier
from routers.held_out import HeldOutConfidence

LABELS = 1000


def own_confidence(shop: Shop) -> Frontier:
    """By the student's confidence as recorded."""
    return _frontier(shop, shop.confidence)


def of_few_labels(shop: Shop) -> tuple[Frontier, str]:
    """By a confidence fitted to 1,000 labels, as a look would; and the model it chose."""
    rows = np.random.default_rng(0).permutation(len(shop))[:LABELS]
    keys = [str(answer) for answer in shop.answer]
    estimator = ConfidenceEstimator().fit(
        shop.confidence[rows], {}, [keys[row] for row in rows], shop.agreed[rows]
    )
    return _frontier(
        shop, estimator.confidence_.ranks(shop.confidence, {}, keys)
    ), estimator.confidence_.model


def cross_fitted(shop: Shop) -> tuple[Frontier, str]:
    """By confidences fitted to all other folds; and the model chosen."""
    keys = [str(answer) for answer in shop.answer]
    fitted = HeldOutConfidence().fit(shop.confidence, {}, keys, shop.agreed)
    ranks = fitted.ranks(shop.confidence, {}, keys)
    return _frontier(shop, ranks), fitted.estimator_.confidence_.model


def _frontier(shop: Shop, ranks: NDArray[np.float64]) -> Frontier:
    return frontier(ranks, shop.student_right, shop.teacher_right)


def tables(runner: Runner) -> Iterator[Table]:
    """Rank every review in each way and give the table; fewer reviews at a smaller scale."""
    shop = read_shop(runner.data / "frugalml_shop" / "SHOP.csv")
    shop = shop.first(runner.scaled(len(shop)))
    few, chosen_of_few = of_few_labels(shop)
    crossed, chosen = cross_fitted(shop)
    yield table_of(
        {
            "the student's own confidence": own_confidence(shop),
            f"ours, fitted to {LABELS:,} labels ({chosen_of_few})": few,
            f"ours, cross-fitted on all ({chosen})": crossed,
            "the best order, by hindsight": oracle_frontier(shop.student_right, shop.teacher_right),
        },
        len(shop),
    )


def table_of(found: dict[str, Frontier], rows: int) -> Table:
    """A row for each ranking."""
    table = Table(
        title=f"Ranking: FrugalML's shop reviews, {rows:,} rows, quality by the true label",
        title_justify="left",
    )
    table.add_column("")
    for name in ("APGR", "CPT(50 %)", "CPT(80 %)"):
        table.add_column(name, justify="right")
    for name, ranking in found.items():
        apgr, half, most = ranking.apgr(), ranking.cpt(0.5), ranking.cpt(0.8)
        table.add_row(
            name,
            "–" if apgr is None else f"{apgr:.3f}",
            *("–" if share is None else f"{share:.1%}" for share in (half, most)),
        )
    return table
