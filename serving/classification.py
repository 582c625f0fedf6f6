"""What a classifier's server says of one text: a label and the probabilities of all classes, checked before use.

The answer of vLLM's `/classify` (its pooling runner): `{"data": [{"label", "probs", "num_classes"}], …}`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import orjson
from numpy.typing import NDArray

from serving.exchange import Json
from serving.failed_answer import error_in
from serving.student_server import StudentBroken

_NO_NAME = re.compile(r"LABEL_\d+")
_ROUNDED = 0.01
"""Probabilities in half precision are off by so much, in all."""
_LEAST = float(np.finfo(np.float32).smallest_subnormal)
"""A probability that came as 0 was smaller than this."""


@dataclass(frozen=True, slots=True)
class Classification:
    """The class `index` of `classes` is the most probable one, and is called `label`.

    `score` is the margin between the two largest log-probabilities: it goes on where probabilities round to 1.
    """

    index: int
    classes: int
    label: str
    score: float
    probability: float
    entropy: float

    @property
    def signals(self) -> dict[str, float]:
        """What the classifier says of itself beside its score."""
        return {"probability": self.probability, "entropy": self.entropy}

    @classmethod
    def read(cls, raw: bytes) -> Classification:
        """Read the answer to one text. Raises StudentBroken for what doesn't tell a label and probabilities."""
        body = _object(raw)
        if error_in(body) is not None:
            raise StudentBroken("the student's server reported an error with status 200")
        match body:
            case {"data": [{"label": label, "probs": list(probs), "num_classes": int(classes)}]}:
                pass
            case _:
                raise StudentBroken(f"the student's answer is no classification ({len(raw)} bytes)")
        p = _probabilities(probs)
        if classes != len(p):
            raise StudentBroken(f"the student speaks of {classes} classes and gives {len(p)} probabilities")
        if not isinstance(label, str) or not label.strip() or _NO_NAME.fullmatch(label):
            raise StudentBroken(
                f"the student's classes have no names ({str(label)[:40]!r}), and a name is what it answers: its model "
                "must carry id2label in its config.json"
            )
        best = int(p.argmax())
        largest, second = float(p[best]), float(np.delete(p, best).max())
        return cls(
            index=best,
            classes=classes,
            label=label,
            score=math.log(largest) - math.log(max(second, _LEAST)),
            probability=min(largest, 1.0),
            entropy=float(-(p[p > 0] * np.log(p[p > 0])).sum()),
        )


def _object(raw: bytes) -> Json:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise StudentBroken(f"the student's answer isn't JSON ({len(raw)} bytes)") from None
    return body if isinstance(body, dict) else {}


def _probabilities(values: list[object]) -> NDArray[np.float64]:
    """Raises StudentBroken unless these are the probabilities of classes of which exactly one is right."""
    numbers = [float(value) for value in values if isinstance(value, int | float) and type(value) is not bool]
    if len(numbers) != len(values) or not all(0.0 <= number <= 1.0 + _ROUNDED for number in numbers):
        raise StudentBroken("the student's probabilities aren't numbers between 0 and 1")
    if len(numbers) < 2:
        raise StudentBroken(f"the student tells {len(numbers)} classes apart, and needs two at least")
    total = math.fsum(numbers)
    if abs(total - 1.0) > _ROUNDED:
        raise StudentBroken(
            f"the student's probabilities sum to {total:.3g}, not 1: it has to choose one class of several"
        )
    return np.array(numbers)
