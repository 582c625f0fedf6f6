"""The chance an exchange had to be labelled, pooled over everything the task has been through.

An exchange's own propensity is 1 or the audit rate, and 1/0.05 makes a test of weighted labels very noisy.
Under i.i.d. traffic an exchange could as well have come in any other period, so the labels of all periods are
one sample in which an exchange x was labelled with probability π̄(x) = Σ_t N_t π_t(x) / Σ_t N_t, where N_t counts
the eligible traffic of period t and π_t(x) is 1 if the release live in t would have escalated x, else its audit
rate. This is the balance heuristic of multiple importance sampling (Veach & Guibas, 1995), and the
post-stratification of STATISTICS.md §3 with the releases' own decisions as bands. The labels of day 0, when
everything was escalated, bound it from below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Period:
    """The eligible traffic that came while one release was live, or none.

    `exchanges` counts all of it, labelled or not; `audit_rate` is its mean audit rate; `accepted` bool[n] says which
    of the n labelled exchanges of *all* periods this release accepts (by scores it wasn't fitted on).
    """

    exchanges: int
    audit_rate: float
    accepted: NDArray[np.bool_]


def pooled_propensity(periods: Sequence[Period]) -> NDArray[np.float64]:
    """π̄ of each labelled exchange, float[n] in (0, 1].

    Raises ValueError without periods, or where an accepted exchange could never have been labelled.
    """
    total = sum(period.exchanges for period in periods)
    if total == 0:
        raise ValueError("no eligible traffic, so nothing could be labelled")
    pooled: NDArray[np.float64] = np.zeros(len(periods[0].accepted))
    for period in periods:
        pooled += period.exchanges * np.where(period.accepted, period.audit_rate, 1.0)
    pooled /= total
    if not (pooled > 0.0).all():
        raise ValueError("some labelled exchanges have propensity 0: an audit rate of 0 proves nothing")
    return np.minimum(pooled, 1.0)
