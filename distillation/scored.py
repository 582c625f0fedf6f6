"""Rows as a student that saw none of their labels answers them: what a look judges, whatever the student is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Scored:
    """One student's answers to n labelled rows, each scored as it would be served.

    `scores` float[n], `signals` float[n] by name (NaN where there is none), `predicted` the keys of the answers (None
    where it isn't known yet when an answer is judged, or answers have no normal form) and `agreed` bool[n] (a missing
    label never agrees).
    """

    scores: NDArray[np.float64]
    signals: dict[str, NDArray[np.float64]]
    predicted: Sequence[str | None]
    agreed: NDArray[np.bool_]
