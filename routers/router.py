"""Score → confidence → decision. The threshold is compared here and nowhere else. NumPy-free: a decision takes 1 µs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import orjson

from serving.errors import DamagedRelease

SCHEMA = 1


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

    The decision compares the student's untied score with `score_threshold`; `slope` and `offset` turn a score into the
    confidence people read, the calibrated probability of agreement 1/(1+exp(−(slope·score+offset))) (Platt, 1999).
    Since slope > 0 both rank alike. `always_escalate` holds the keys of answers that only the teacher may give.
    """

    score_threshold: float
    slope: float
    offset: float
    always_escalate: frozenset[str] = frozenset()

    def confidence(self, score: float) -> float:
        """The calibrated probability that an answer with this score agrees with the teacher's."""
        z = self.slope * score + self.offset
        return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))

    @property
    def threshold(self) -> float:
        """The confidence from which an answer is served."""
        return self.confidence(self.score_threshold)

    def decide(self, score: float, answer_key: str | None = None) -> Decision:
        """Accept or escalate an answer. A score that isn't finite is never trusted: what computed it is broken."""
        finite = math.isfinite(score)
        confidence = self.confidence(score) if finite else 0.0
        if answer_key is not None and answer_key in self.always_escalate:
            return Decision(False, confidence, self.threshold, "always_escalate")
        if finite and score >= self.score_threshold:
            return Decision(True, confidence, self.threshold, "confident")
        return Decision(False, confidence, self.threshold, "low_confidence")

    def dump(self) -> bytes:
        """The router as the file `router.json` of a release."""
        return orjson.dumps(
            {
                "schema": SCHEMA,
                "score_threshold": self.score_threshold,
                "slope": self.slope,
                "offset": self.offset,
                "always_escalate": sorted(self.always_escalate),
            }
        )

    @classmethod
    def load(cls, data: bytes) -> Router:
        """Read what `dump` wrote. Raises DamagedRelease for another schema or values that decide nothing."""
        try:
            read = orjson.loads(data)
            if read["schema"] != SCHEMA:
                raise DamagedRelease(
                    f"router.json has schema {read['schema']!r}, this version reads {SCHEMA}"
                )
            if not isinstance(read["always_escalate"], list):
                raise TypeError("always_escalate is no list")
            router = cls(
                score_threshold=float(read["score_threshold"]),
                slope=float(read["slope"]),
                offset=float(read["offset"]),
                always_escalate=frozenset(str(key) for key in read["always_escalate"]),
            )
        except DamagedRelease:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedRelease(f"router.json can't be read: {type(error).__name__}: {error}") from error
        if not (math.isfinite(router.offset) and math.isfinite(router.slope) and router.slope > 0):
            raise DamagedRelease(
                f"router.json has slope {router.slope} and offset {router.offset}; slope must be > 0"
            )
        if math.isnan(router.score_threshold):
            raise DamagedRelease("router.json has no usable score_threshold")
        return router
