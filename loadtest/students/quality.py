"""How good a student's answers to the test half are, and how well it knows which of them are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from loadtest.students.outcome import Quality
from loadtest.students.probe import Said
from loadtest.students.split import Example
from routers.measures import aurc, expected_calibration_error, reliability, risk_coverage
from routers.router import Router
from serving.agreement import comparison
from serving.task_settings import AgreementChoice

MAX_DISAGREEMENT = 0.05


def quality_of(answers: Sequence[Said], test: Sequence[Example], router: Router) -> Quality:
    """The measures of a release's answers to `test`, ranked and calibrated by its own router."""
    comparing = comparison(AgreementChoice())
    keys = [comparing.key(answer.choices) for answer in answers]
    agreed = np.array([key == _key(one.teacher) for key, one in zip(keys, test, strict=True)], dtype=np.bool_)
    right = [key == _key(one.gold) for key, one in zip(keys, test, strict=True)]
    ranks = [_rank(router, answer, key) for answer, key in zip(answers, keys, strict=True)]
    confidence = [router.judge(rank).confidence for rank in ranks]
    curve = risk_coverage(ranks, agreed)
    kept = curve.coverage[curve.risk <= MAX_DISAGREEMENT]
    return Quality(
        agreement=float(agreed.mean()),
        accuracy=float(np.mean(right)),
        answered=float(kept.max()) if len(kept) else 0.0,
        aurc=aurc(ranks, agreed) or 0.0,
        ece=expected_calibration_error(reliability(confidence, agreed)) or 0.0,
    )


def _rank(router: Router, answer: Said, key: str | None) -> float:
    signals = {name: _number(value) for name, value in answer.signals.items()}
    return router.confidence.rank(_number(answer.score), signals, key)


def _key(text: str) -> str | None:
    message = {"role": "assistant", "content": text}
    return comparison(AgreementChoice()).key([{"message": message, "finish_reason": "stop"}])


def _number(value: float | None) -> float:
    return math.nan if value is None else value
