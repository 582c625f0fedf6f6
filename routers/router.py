"""Signals → confidence → decision. The threshold is compared here and nowhere else. A decision takes microseconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from routers.confidence import Confidence, probability
from serving.errors import DamagedRelease
from serving.exchange import Json

SCHEMA = 2
SCORE_SCHEMA = 1
"""The schema of routers that knew a score only; read as a Confidence of the score alone."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the student's answer is served, and why. `reason` is a label of `understudy_requests_total`."""

    accepted: bool
    confidence: float
    threshold: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Router:
    """Decides for one release.

    `confidence` ranks an answer by its score and signals; the untied rank is compared with `rank_threshold`, and the
    probability people read is the rank's own. `always_escalate` holds the keys of answers that only the teacher may
    give.
    """

    confidence: Confidence
    rank_threshold: float
    always_escalate: frozenset[str] = frozenset()

    @property
    def threshold(self) -> float:
        """The confidence from which an answer is served."""
        return probability(self.rank_threshold)

    def decide(self, score: float, signals: Mapping[str, float], answer_key: str | None = None) -> Decision:
        """Accept or escalate an answer. What can't be ranked is never trusted: what computed it is broken."""
        return self.judge(self.confidence.rank(score, signals, answer_key), answer_key)

    def judge(self, rank: float, answer_key: str | None = None) -> Decision:
        """As `decide`, for an answer whose rank is known already."""
        known = math.isfinite(rank)
        confidence = probability(rank) if known else 0.0
        if answer_key is not None and answer_key in self.always_escalate:
            return Decision(False, confidence, self.threshold, "always_escalate")
        if not known:
            return Decision(False, confidence, self.threshold, "no_signals")
        if rank >= self.rank_threshold:
            return Decision(True, confidence, self.threshold, "confident")
        return Decision(False, confidence, self.threshold, "low_confidence")

    def dump(self) -> bytes:
        """The router as the file `router.json` of a release."""
        return orjson.dumps(
            {
                "schema": SCHEMA,
                "rank_threshold": self.rank_threshold,
                "confidence": self.confidence.to_json(),
                "always_escalate": sorted(self.always_escalate),
            }
        )

    @classmethod
    def load(cls, data: bytes) -> Router:
        """Read what `dump` wrote, now or in schema 1. Raises DamagedRelease for what decides nothing."""
        try:
            read = orjson.loads(data)
            match read["schema"]:
                case 1:
                    router = _of_score(read)
                case 2:
                    router = _of_signals(read)
                case schema:
                    raise DamagedRelease(
                        f"router.json has schema {schema!r}, this version reads up to {SCHEMA}"
                    )
        except DamagedRelease:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedRelease(f"router.json can't be read: {type(error).__name__}: {error}") from error
        if math.isnan(router.rank_threshold):
            raise DamagedRelease("router.json has no usable threshold")
        return router


def _of_signals(read: Json) -> Router:
    return Router(
        Confidence.from_json(read["confidence"]),
        float(read["rank_threshold"]),
        _keys(read["always_escalate"]),
    )


def _of_score(read: Json) -> Router:
    slope, offset = float(read["slope"]), float(read["offset"])
    if not (math.isfinite(offset) and math.isfinite(slope) and slope > 0):
        raise DamagedRelease(f"router.json has slope {slope} and offset {offset}; slope must be > 0")
    confidence = Confidence.of_score(slope, offset)
    # Summed as a rank is: a score at the threshold has exactly its rank.
    rank_threshold = offset + (0.0 + slope * float(read["score_threshold"]))
    return Router(confidence, rank_threshold, _keys(read["always_escalate"]))


def _keys(value: object) -> frozenset[str]:
    if not isinstance(value, list):
        raise TypeError("always_escalate is no list")
    return frozenset(str(key) for key in value)
