"""Signals → confidence → decision. The threshold is compared here and nowhere else. A decision takes microseconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson

from routers.confidence import Confidence, probability
from serving.beginning import may_become
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
    probability people read is the rank's own.

    The rest are the answers' rules (STATISTICS.md §4), by their keys: `always_escalate` only the teacher may give,
    `vetoed` were shown to disagree more than promised, `unproven` have yet to prove a bound of their own, and `proven`
    did so: each of those has a threshold of its own. A `rank_threshold` of ∞ serves nothing but them.
    """

    confidence: Confidence
    rank_threshold: float
    always_escalate: frozenset[str] = frozenset()
    vetoed: frozenset[str] = frozenset()
    unproven: frozenset[str] = frozenset()
    proven: Mapping[str, float] = field(default_factory=dict)

    @property
    def threshold(self) -> float:
        """The confidence from which an answer is served."""
        return probability(self.rank_threshold)

    def decide(self, score: float, signals: Mapping[str, float], answer_key: str | None = None) -> Decision:
        """Accept or escalate an answer. What can't be ranked is never trusted: what computed it is broken."""
        return self.judge(self.confidence.rank(score, signals, answer_key), answer_key)

    def judge(self, rank: float, answer_key: str | None = None, *, vetoed: bool | None = None) -> Decision:
        """As `decide`, for an answer whose rank is known already.

        `vetoed` says whether its answer is, where that mustn't go by the release's own vetoes (None: it does).
        """
        known = math.isfinite(rank)
        confidence = probability(rank) if known else 0.0
        reason, rank_threshold = "no_signals", self.rank_threshold
        if answer_key is not None:
            rank_threshold = self.proven.get(answer_key, rank_threshold)
            if answer_key in self.always_escalate:
                known, reason = False, "always_escalate"
            elif answer_key in self.vetoed if vetoed is None else vetoed:
                known, reason = False, "vetoed_answer"
            elif answer_key in self.unproven:
                known, reason = False, "unproven_answer"
        accepted = known and rank >= rank_threshold
        if known:
            reason = "confident" if accepted else "low_confidence"
        return Decision(accepted, confidence, probability(rank_threshold), reason)

    def held_to(self, said: str) -> str | None:
        """The key of an answer that one beginning with `said` may become, and that is held to more than others.

        What is left to the teacher comes first, then what has proven itself only at higher ranks.
        """
        ruled_out = self.always_escalate | self.vetoed | self.unproven
        stricter = [key for key, rank in self.proven.items() if rank > self.rank_threshold]
        stricter.sort(key=lambda key: -self.proven[key])
        return next((key for key in (*ruled_out, *stricter) if may_become(said, key)), None)

    def judge_begun(self, rank: float, said: str) -> Decision:
        """As `judge`, for an answer of which only this beginning is known: held to all that it may become."""
        decision = self.judge(rank)
        key = self.held_to(said) if decision.accepted else None
        return decision if key is None else self.judge(rank, key)

    def dump(self) -> bytes:
        """The router as the file `router.json` of a release."""
        return orjson.dumps(
            {
                "schema": SCHEMA,
                # JSON has no infinity; read back, the text is one.
                "rank_threshold": "inf" if self.rank_threshold == math.inf else self.rank_threshold,
                "confidence": self.confidence.to_json(),
                "always_escalate": sorted(self.always_escalate),
                "vetoed": sorted(self.vetoed),
                "unproven": sorted(self.unproven),
                "proven": dict(self.proven),
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
        if any(math.isnan(threshold) for threshold in (router.rank_threshold, *router.proven.values())):
            raise DamagedRelease("router.json has no usable threshold")
        return router


def _of_signals(read: Json) -> Router:
    return Router(
        Confidence.from_json(read["confidence"]),
        float(read["rank_threshold"]),
        _keys(read, "always_escalate"),
        _keys(read, "vetoed"),
        _keys(read, "unproven"),
        {str(key): float(rank) for key, rank in read["proven"].items()},
    )


def _of_score(read: Json) -> Router:
    slope, offset = float(read["slope"]), float(read["offset"])
    if not (math.isfinite(offset) and math.isfinite(slope) and slope > 0):
        raise DamagedRelease(f"router.json has slope {slope} and offset {offset}; slope must be > 0")
    confidence = Confidence.of_score(slope, offset)
    # Summed as a rank is: a score at the threshold has exactly its rank.
    rank_threshold = offset + (0.0 + slope * float(read["score_threshold"]))
    return Router(confidence, rank_threshold, _keys(read, "always_escalate"))


def _keys(read: Json, name: str) -> frozenset[str]:
    if not isinstance(read[name], list):
        raise TypeError(f"{name} is no list")
    return frozenset(str(key) for key in read[name])
