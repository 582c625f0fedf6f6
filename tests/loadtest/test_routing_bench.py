from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from loadtest.routing.shop import Shop, UnreadableShop, read_shop
from loadtest.routing.validity import ALPHAS, WAYS, Tally, cells, judged, oracle_coverages, split, table_of
from loadtest.routing.verdict import chance_of, is_kept


def shop(rows: int, seed: int = 0, distinct: int = 400) -> Shop:
    """Reviews on which the student disagrees on 4 %, the more often the less sure it is; scores are tied."""
    rng = np.random.default_rng(seed)
    confidence = rng.integers(0, distinct, rows) / distinct
    agreed = rng.random(rows) >= 0.2 * (1 - confidence) ** 4
    return Shop(confidence, rng.integers(0, 2, rows), agreed, agreed, np.ones(rows, bool))


def write(where: Shop, folder: Path) -> None:
    folder.mkdir()
    lines = ["true,pred_3,pred_4,conf_4"]
    for confidence, answer, agreed in zip(where.confidence, where.answer, where.agreed, strict=True):
        lines.append(f"{answer},{answer if agreed else 1 - answer},{answer},{confidence}")
    (folder / "SHOP.csv").write_text("\n".join(lines) + "\n")


def test_the_verdict_is_the_one_sided_binomial_test() -> None:
    for broken, lives, delta in (
        (0, 200, 0.1),
        (20, 200, 0.1),
        (33, 200, 0.1),
        (34, 200, 0.1),
        (9, 20, 0.25),
    ):
        expected = binomtest(broken, lives, delta, alternative="greater").pvalue
        assert chance_of(broken, lives, delta) == pytest.approx(expected, rel=1e-6)
        assert is_kept(broken, lives, delta) == (expected > 0.01)


def test_the_oracle_is_the_best_of_all_thresholds() -> None:
    for seed in range(5):
        reviews = shop(500, seed, distinct=60)
        unseen = np.random.default_rng(seed).random(500) < 0.8
        ranked = np.argsort(-reviews.confidence, kind="stable")
        found = oracle_coverages(reviews, ranked[unseen[ranked]])
        for alpha in ALPHAS:
            best = 0.0
            for threshold in np.unique(reviews.confidence):
                accepted = unseen & (reviews.confidence >= threshold)
                if accepted.any() and (~reviews.agreed[accepted]).mean() <= alpha:
                    best = max(best, accepted.sum() / unseen.sum())
            assert found[alpha] == pytest.approx(best)
        assert found[0.1] > 0


@pytest.mark.parametrize("way", WAYS)
def test_labels_stand_for_the_traffic_they_come_from(way: str) -> None:
    reviews = shop(20_000)
    sample = WAYS[way](reviews, 4000, np.random.default_rng(1))
    assert len(sample.labelled) == pytest.approx(4000, rel=0.03)
    assert np.isin(sample.labelled, sample.traffic).all()
    weights = np.ones(4000) if sample.propensity is None else 1 / sample.propensity
    everywhere = np.average(reviews.confidence)
    assert np.average(reviews.confidence[sample.labelled], weights=weights) == pytest.approx(
        everywhere, abs=0.03
    )
    assert (way == "reference") == (sample.propensity is None)


def test_a_cell_counts_what_broke_what_was_covered_and_what_could_not_be_proven() -> None:
    reviews = shop(6000)
    hopeless = split(reviews, "reference", 200, range(5))[0.01]
    assert (hopeless.provable, hopeless.coverage, hopeless.splits) == (0, 0.0, 5)
    found = split(reviews, "reference", 1000, range(20))
    easy, tight = found[0.1], found[0.03]
    assert (easy.provable, easy.broken) == (20, 0)
    assert easy.coverage > 19 and easy.oracle == 20  # 4 % disagree: everything may be answered
    assert 0 < tight.coverage <= tight.oracle < 20
    assert 0 < tight.mapie_coverage <= tight.coverage
    assert sum([hopeless, easy], Tally()).splits == 25
    shown = table_of(dict.fromkeys(cells(), easy))
    assert shown.row_count == 36


def test_a_test_that_admits_what_it_must_not_is_seen() -> None:
    """The same judging, of a threshold nobody tested: everything is accepted."""
    reviews = shop(4000)
    unseen = np.ones(4000, bool)
    assert judged(reviews, unseen, 0.0, 0.03) == (True, 1.0)
    assert judged(reviews, unseen, None, 0.03) == (False, 0.0)


def test_the_command_prints_the_table_or_says_what_is_missing(tmp_path: Path) -> None:
    write(shop(12_000), tmp_path / "frugalml_shop")
    command = [
        sys.executable,
        "-m",
        "loadtest.routing",
        str(tmp_path),
        "--jobs",
        "2",
        "--scale",
        "0.002",
        "--only",
    ]
    done = subprocess.run([*command, "validity"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "vacuous" in done.stdout and "MAPIE" in done.stdout and "pooled" in done.stdout
    assert "validity: 9 of 9" in done.stderr

    refused = subprocess.run([*command, "stream"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "banking77_gpt4/stream.csv" in refused.stderr.replace("\n", "")
    assert "Traceback" not in refused.stderr


def test_a_recording_that_is_something_else_is_refused_by_name(tmp_path: Path) -> None:
    other = tmp_path / "SHOP.csv"
    other.write_text("text,label\nfine,1\n")
    with pytest.raises(UnreadableShop, match=r"SHOP\.csv can't be read"):
        read_shop(other)
    with pytest.raises(UnreadableShop, match="can't be read"):
        read_shop(tmp_path / "absent.csv")
