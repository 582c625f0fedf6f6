"""The watch of a live release: an anytime-valid test of "disagreement ≤ α" on its audits (STATISTICS.md §5).

A gambler bets against the promise, audit by audit. Before each one they fix a disagreement p ≥ α they believe in, from
the audits before it, and their wealth is multiplied by p/α if the audit disagrees and by (1−p)/(1−α) if it agrees.
While the promise holds no such strategy can expect to win, whatever p: wealth is a non-negative supermartingale that
starts at 1, and P(it ever reaches 1/δ) ≤ δ (Ville, 1939; Waudby-Smith & Ramdas, arXiv 2010.09686). So it may be looked
at after every audit, for ever. Wealth of 1/δ is the alarm.

p is the *recent* mean, α where that is below α: then nothing is bet, and a long good life costs nothing. A test that
bets all of the past has lost so much by then that it never notices (docs/lab-notes.md).

Audits need no weights, though their rate changes: while it stands still the audits are a simple random sample of what
the release answers, so that each disagrees with the release's own disagreement, whatever the rate. The rate depends on
how many audits came before and never on the request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from routers.promise import check_terms
from serving.exchange import Json

_MEMORY = 5.0
"""The recent mean remembers about so many audits, in units of 1/α: those in which α promises five disagreements."""
_PRIOR = 1.5
"""It begins as if it had seen so many disagreements at α."""
_LARGEST_LOG = 700.0
"""Evidence beyond e^700 is no number any more."""
_FINDING_OUT = 3.3
"""What it costs the recent mean, in nats, to find out that disagreement has doubled; see `delay_audits`."""


@dataclass(slots=True)
class WatchState:
    """What a watch has seen, as plain numbers. `evidence` is the logarithm of the wealth.

    `recent` and `recent_disagreements` are how many audits the recent mean is of, and how many of them disagreed; both
    fade. `alarmed` stays: wealth may fall again afterwards, and what it has shown is shown.
    """

    audits: int = 0
    disagreements: int = 0
    evidence: float = 0.0
    recent: float = 0.0
    recent_disagreements: float = 0.0
    alarmed: bool = False


class Watch:
    """Watches one release: raises the alarm when its audits show more than `max_disagreement` (α) disagreement.

    A release that keeps its promise sets off a false alarm, ever, with probability at most 1 − `certainty` (δ). Both
    are in (0, 1); ValueError otherwise.
    """

    def __init__(self, max_disagreement: float, certainty: float) -> None:
        check_terms(max_disagreement, certainty)
        self.max_disagreement = max_disagreement
        self.certainty = certainty
        self._state = WatchState()
        self._keeps = math.exp(-max_disagreement / _MEMORY)
        self._alarm_at = -math.log(1.0 - certainty)

    @property
    def audits(self) -> int:
        """How many audits it has seen."""
        return self._state.audits

    @property
    def disagreements(self) -> int:
        """How many of them disagreed."""
        return self._state.disagreements

    @property
    def alarmed(self) -> bool:
        """Whether there ever was an alarm."""
        return self._state.alarmed

    @property
    def evidence(self) -> float:
        """The e-value: how many times its stake a bet against the promise has become. 1/δ is the alarm."""
        return math.exp(min(self._state.evidence, _LARGEST_LOG))

    @property
    def bet(self) -> float:
        """The disagreement the next audit is bet on: the recent mean, or α, which bets nothing."""
        alpha, state = self.max_disagreement, self._state
        mean = (_PRIOR + state.recent_disagreements) / (_PRIOR / alpha + state.recent)
        return max(alpha, mean)

    def observe(self, agreed: bool) -> bool:
        """Take in one audit, oldest first; True: alarm (and from then on always).

        One that is missing (the teacher could not be had) is a disagreement: False. ValueError for what is no bool,
        since NaN would pass for agreement.
        """
        if agreed not in (True, False):
            raise ValueError(f"agreed must be True or False (a missing audit is False), got {agreed!r}")
        alpha, bet, state = self.max_disagreement, self.bet, self._state
        state.evidence += math.log((1.0 - bet) / (1.0 - alpha) if agreed else bet / alpha)
        state.audits += 1
        state.disagreements += not agreed
        state.recent = state.recent * self._keeps + 1.0
        state.recent_disagreements = state.recent_disagreements * self._keeps + (not agreed)
        state.alarmed = state.alarmed or state.evidence >= self._alarm_at
        return state.alarmed

    def to_json(self) -> Json:
        """The watch as plain JSON: what `from_json` goes on from, bit by bit."""
        return {
            "max_disagreement": self.max_disagreement,
            "certainty": self.certainty,
            "audits": self._state.audits,
            "disagreements": self._state.disagreements,
            "evidence": self._state.evidence,
            "recent": self._state.recent,
            "recent_disagreements": self._state.recent_disagreements,
            "alarmed": self._state.alarmed,
        }

    @classmethod
    def from_json(cls, data: Json) -> Self:
        """Go on where `to_json` was called. Raises ValueError for what it can't have written."""
        try:
            watch = cls(float(data["max_disagreement"]), float(data["certainty"]))
            state = WatchState(
                int(data["audits"]),
                int(data["disagreements"]),
                float(data["evidence"]),
                float(data["recent"]),
                float(data["recent_disagreements"]),
                bool(data["alarmed"]),
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"this is no state of a watch: {type(error).__name__}: {error}") from error
        numbers = (state.evidence, state.recent, state.recent_disagreements)
        if not (all(map(math.isfinite, numbers)) and 0 <= state.disagreements <= state.audits):
            raise ValueError("this is no state of a watch: its numbers can't be")
        if not 0.0 <= state.recent_disagreements <= state.recent + 1e-9:
            raise ValueError("this is no state of a watch: its recent mean can't be")
        watch._state = state
        return watch


def delay_audits(max_disagreement: float, certainty: float) -> int | None:
    """About how many audits it takes (median) to notice that a release that was good for long disagrees 2α from now on.

    None where 2α is all there is. An audit at 2α is worth KL(2α‖α) nats of evidence to who knows that the jump came;
    the recent mean has to find out first, which costs as much as 3.3 nats (docs/lab-notes.md).
    """
    alpha = max_disagreement
    if 2.0 * alpha >= 1.0:
        return None
    worth = 2.0 * alpha * math.log(2.0) + (1.0 - 2.0 * alpha) * math.log((1.0 - 2.0 * alpha) / (1.0 - alpha))
    return math.ceil((_FINDING_OUT - math.log(1.0 - certainty)) / worth)
