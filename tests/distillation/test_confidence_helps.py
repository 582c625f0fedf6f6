"""What signals add to the score, on recorded answers of GPT-4: `pytest -s` prints the figures."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from distillation.cross_fit import cross_fit
from distillation.dataset import Row
from routers.confidence import SCORE
from routers.confidence_fit import MODELS
from routers.held_out import HeldOutConfidence
from routers.measures import expected_calibration_error, reliability, risk_coverage
from routers.newton import log_loss, sigmoid

DATA = Path(os.environ.get("UNDERSTUDY_DATA") or Path(__file__).parents[3] / "shared" / "data")
STREAM = DATA / "banking77_gpt4" / "stream.csv"
LABELS, SEEDS = 1000, 2


@pytest.mark.skipif(
    not STREAM.is_file(),
    reason=f"there is no {STREAM}; UNDERSTUDY_DATA names the folder that holds banking77_gpt4",
)
def test_signals_tell_more_than_the_score_alone() -> None:
    with STREAM.open() as file:
        recorded = [(line["text"], line["teacher"]) for line in csv.DictReader(file)]
    measured: dict[str, list[tuple[float, float, float]]] = {"score": [], "all": []}
    for seed in range(SEEDS):
        chosen = np.random.default_rng(seed).permutation(len(recorded))[:LABELS]
        rows = [_row(int(number), *recorded[number]) for number in chosen]
        fitted = cross_fit(rows, seed=seed)
        given = (fitted.scores, fitted.signals, fitted.predicted, fitted.agreed)
        for name, models in (("score", [SCORE]), ("all", MODELS)):
            with threadpool_limits(1):
                fitted_confidence = HeldOutConfidence(models, seed=seed).fit(*given)
            ranks = fitted_confidence.ranks(*given[:3])
            curve = risk_coverage(ranks, fitted.agreed)
            measured[name].append(
                (
                    float(log_loss(ranks, fitted.agreed.astype(np.float64)).mean()),
                    expected_calibration_error(reliability(sigmoid(ranks), fitted.agreed)) or 0.0,
                    float(curve.coverage[curve.risk <= 0.1].max(initial=0.0)),
                )
            )
            print(
                name,
                seed,
                fitted_confidence.estimator_.confidence_.model,
                "log-loss, ECE, coverage:",
                measured[name][-1],
            )
    alone, signals = (np.mean(measured[name], axis=0) for name in ("score", "all"))
    assert signals[0] < alone[0] - 0.01
    assert signals[2] > alone[2]


def _row(number: int, text: str, answer: str) -> Row:
    choices = [{"message": {"content": answer}, "finish_reason": "stop"}]
    return Row(str(number), text, answer, choices, 10, 2, "gpt-4", None)
