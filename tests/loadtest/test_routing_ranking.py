from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loadtest.routing.ranking import cross_fitted, of_few_labels, own_confidence, table_of
from loadtest.routing.shop import Shop


def shop(rows: int) -> Shop:
    """Half of the answers are far better than the student's confidence says: only the label tells which."""
    rng = np.random.default_rng(0)
    confidence, answer = rng.random(rows), rng.integers(0, 2, rows)
    right = rng.random(rows) < 0.5 + 0.45 * np.where(answer == 1, 1.0, confidence)
    teacher = rng.random(rows) < 0.97
    return Shop(confidence, answer, right, right, teacher)


def test_our_confidence_ranks_by_what_it_learned_of_the_answers() -> None:
    reviews = shop(4000)
    own = own_confidence(reviews).apgr()
    few, _ = of_few_labels(reviews)
    crossed, chosen = cross_fitted(reviews)
    found = few.apgr(), crossed.apgr()
    assert own is not None and found[0] is not None and found[1] is not None
    assert chosen.endswith("+answers")
    assert min(found[0], found[1]) > own + 0.05


def test_the_table_has_a_row_for_each_ranking() -> None:
    reviews = shop(500)
    shown = table_of({"raw": own_confidence(reviews)}, 500)
    assert [*shown.columns[1].cells] == [f"{own_confidence(reviews).apgr():.3f}"]
    assert len(reviews.first(20)) == 20 == len(reviews.first(20).agreed)


def test_no_gap_to_recover_is_said() -> None:
    reviews = shop(500)
    same = replace(reviews, teacher_right=reviews.student_right)
    assert [*table_of({"raw": own_confidence(same)}, 500).columns[2].cells] == ["–"]
    assert own_confidence(same).student == pytest.approx(own_confidence(same).teacher)
