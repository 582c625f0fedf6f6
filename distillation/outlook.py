"""What a look found short, and when it will be there at the present rate: in numbers, and in words for a person."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from distillation.dataset import Row
from routers.admission import AnswerTerms, Verdict
from routers.promise import Admission, binomial_tail
from routers.shortfall import labels_short
from serving.exchange import Json

PRESENT = 200
"""The present rate is that of so many labels, the last ones."""

_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))


@dataclass(frozen=True, slots=True)
class Shortfall:
    """What is missing to one test that didn't pass: of the answer named in `prove`, or (None) of all others.

    The level is the one that failed, or else the loosest there was, with so many labels `accepted` and
    `disagreements` among them, out of `given` that were counted at all. With `delta`, which the next look may spend, it
    would pass with `if_all_agree` more accepted labels, or with `at_this_rate` if they disagree as often as these; the
    hours are those until then. None: never, or it can't be told.
    """

    answer: str | None
    max_disagreement: float
    delta: float
    given: int
    accepted: int
    disagreements: int
    if_all_agree: int | None
    at_this_rate: int | None
    hours_if_all_agree: float | None
    hours_at_this_rate: float | None

    def to_json(self) -> Json:
        """The same as plain JSON."""
        return asdict(self)


def labels_per_hour(rows: Sequence[Row]) -> float | None:
    """How fast labels come in at present; None if that can't be told."""
    times = [row.created for row in rows[-PRESENT:]]
    seconds = times[-1] - times[0] if times else 0.0
    if not (math.isfinite(seconds) and seconds > 0):
        return None
    return (len(times) - 1) * 3600.0 / seconds


def shortfalls(
    verdict: Verdict,
    terms: AnswerTerms,
    max_disagreement: float,
    next_delta: float,
    rows: Sequence[Row],
    p_value: Callable[[int, int, float], float] = binomial_tail,
) -> list[Shortfall]:
    """What is short of labels: all answers but the named ones if none of their levels passed, and each unproven one.

    `next_delta` is what all tests of the next look may spend together, `p_value` the test (`labels_short`).
    """
    whole_delta, named_delta = terms.shares(next_delta)
    per_hour = labels_per_hour(rows)

    def short(answer: str | None, test: Admission, bound: float, delta: float, given: int) -> Shortfall:
        tested = [level for level in test.levels if level.p_value is not None] or test.levels
        accepted, wrong = (tested[-1].accepted, tested[-1].disagreements) if tested else (0, 0)
        clean, same = labels_short(accepted, wrong, bound, delta, p_value)
        accepted_per_hour = None if per_hour is None else per_hour * accepted / len(rows)

        def hours(labels: int | None) -> float | None:
            return labels / accepted_per_hour if accepted_per_hour and labels is not None else None

        return Shortfall(answer, bound, delta, given, accepted, wrong, clean, same, hours(clean), hours(same))

    found = []
    others = len(rows) - sum(verdict.given.values())
    if verdict.whole.threshold is None and others:
        found.append(short(None, verdict.whole, max_disagreement, whole_delta, others))
    for answer in sorted(verdict.unproven):
        bound = terms.prove[answer]
        found.append(short(answer, verdict.named[answer], bound, named_delta, verdict.given[answer]))
    return found


def in_words(short: Json) -> str:
    """One line about a shortfall of a report card."""
    who = "what the student may answer" if short["answer"] is None else f"the answer {short['answer']!r}"
    if not short["given"]:
        return f"{who}: the student never gives it, so that it can't prove anything"
    bound = f"at most {short['max_disagreement']:.1%} may disagree"
    seen = f"{short['disagreements']} of {short['accepted']} accepted labels do"
    if short["if_all_agree"] is None:
        return f"{who}: {bound}, and {seen}: no number of labels would do"
    if not short["accepted"] or short["at_this_rate"] == short["if_all_agree"]:
        more = f"{_more(short, 'if_all_agree')} are short if all of them agree"
    else:
        more = f"{_more(short, 'if_all_agree')} are short if all of them agree, " + (
            "and no number is enough if as many disagree as so far"
            if short["at_this_rate"] is None
            else f"{_more(short, 'at_this_rate')} if as many disagree as so far"
        )
    return f"{who}: {bound}, and {seen}; {more}"


def _more(short: Json, which: str) -> str:
    hours = short[f"hours_{which}"]
    when = "" if hours is None else f" (at this rate {after(hours * 3600.0)})"
    return f"{short[which]:,}{when}"


def after(seconds: float) -> str:
    """A time to come, as one says it."""
    for unit, size in _UNITS:
        if seconds >= size:
            return f"in {seconds / size:.0f} {unit}"
    return "within a minute"
