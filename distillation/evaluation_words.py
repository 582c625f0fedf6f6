"""The words and numbers in which an evaluation is told to people, in a terminal and on a page alike."""

from __future__ import annotations

import time

from distillation.evaluation import Evaluation
from distillation.judgement import Judgement
from routers.intervals import Share

_LONGEST = 60


def percent(value: float | None) -> str:
    """A share for people; a dash where there is none."""
    return "–" if value is None else f"{100.0 * value:.1f} %"


def with_interval(share: Share) -> str:
    """A share with its 95 % interval. `~` marks an interval that is approximate."""
    if share.value is None:
        return "–"
    about = "" if share.exact else "~"
    return f"{100.0 * share.value:.1f} % ({about}{100.0 * share.low:.1f}–{100.0 * share.high:.1f})"


def dollars(value: float | None) -> str:
    """An amount of money; a dash where no price is known."""
    return "–" if value is None else f"${value:,.4f}"


def day(seconds: float | None) -> str:
    """The UTC day of a time."""
    return "unknown" if seconds is None else time.strftime("%Y-%m-%d", time.gmtime(seconds))


def printable(text: str) -> str:
    """Text without characters that control a terminal or turn the direction of writing."""
    return "".join(character if character.isprintable() else "·" for character in text)


def plain(text: str) -> str:
    """A model's answer on one line, not longer than what a table can take."""
    line = printable(text)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def promise_in_words(evaluation: Evaluation) -> str:
    """What the release promised."""
    made = evaluation.promise
    return f"at most {percent(made.max_disagreement)} disagreement, {100.0 * made.certainty:g} % certain"


def verdict(evaluation: Evaluation) -> str:
    """How the promise stands, by the audits: they are what nothing was chosen by."""
    audits, alpha = evaluation.audits, evaluation.promise.max_disagreement
    found = audits.disagreement
    if audits.alarmed:
        return (
            f"broken: {with_interval(found)} of {audits.audits:,} audits disagreed, evidence of "
            f"{_odds(audits.evidence)} to 1 against it (the alarm is at {audits.alarm_at:,.0f})"
        )
    if found.value is None:
        return "not audited yet: no answer of this release has been checked since it went live"
    state = (
        "nothing against the promise"
        if found.value <= alpha
        else "above what was promised, but that may be chance"
    )
    if found.high <= alpha:
        state = "within the promise, and clearly so"
    elif found.low > alpha:  # in all its life, of which the watch sees the last part
        state = "above what was promised, hardly by chance, without an alarm since it last went live"
    return f"{state}: {with_interval(found)} of {audits.audits:,} audits disagreed"


def measures(judgement: Judgement) -> list[tuple[str, str]]:
    """The measures of one sample as lines of a table: (what, how much)."""
    ranking, best = judgement.ranking, judgement.ranking_best
    lines = [
        ("labels", f"{judgement.labels:,}"),
        ("… as if of equal weight", f"{judgement.effective:,.0f}"),
        ("agrees with teacher", with_interval(judgement.agreement)),
        ("student answers", with_interval(judgement.coverage)),
        ("… and disagrees", with_interval(judgement.disagreement)),
    ]
    if judgement.accuracy is not None:
        right = judgement.accuracy
        lines += [
            ("right: student", with_interval(right.student)),
            ("right: teacher", with_interval(right.teacher)),
            ("right: as served", with_interval(right.served)),
            ("right where served", with_interval(right.student_where_served)),
            ("… the teacher there", with_interval(right.teacher_where_served)),
        ]
    lines += [
        ("AURC (best)", f"{judgement.aurc:.4f} ({judgement.aurc_best:.4f})"),
        ("quality by", judgement.quality),
        ("APGR (best)", f"{_number(ranking.apgr)} ({_number(best.apgr)})"),
        ("CPT(50 %) (best)", f"{percent(ranking.cpt50)} ({percent(best.cpt50)})"),
        ("CPT(80 %) (best)", f"{percent(ranking.cpt80)} ({percent(best.cpt80)})"),
        ("ECE, equal mass", percent(judgement.ece)),
        ("ECE, equal width", percent(judgement.ece_equal_width)),
    ]
    return lines


def samples(evaluation: Evaluation) -> list[tuple[str, str, Judgement]]:
    """The samples there are: (short name, what it is, judgement)."""
    named = (
        ("log", "all labels of the log", evaluation.log),
        ("since", "labels that came after the release was made", evaluation.since),
        ("recording", "the recording", evaluation.recording),
    )
    return [(name, what, judgement) for name, what, judgement in named if judgement is not None]


def costs(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What a thousand requests cost, as lines of a table."""
    cost = evaluation.costs
    return [
        ("the teacher alone", dollars(cost.teacher_only)),
        ("with this release", dollars(cost.with_student)),
        (f"with its audits ({percent(cost.audit_rate)} of its answers)", dollars(cost.with_audits)),
        (f"measured over {cost.requests:,} requests while it was live", dollars(cost.measured)),
    ]


def releases_in_words(evaluation: Evaluation) -> str:
    """How many releases there have been, and what that means for their promises."""
    count = len(evaluation.releases)
    return (
        f"{count:,} {'release' if count == 1 else 'releases'} of this task so far; each keeps its promise with its own "
        f"certainty, so that {evaluation.expected_broken:.1f} broken ones are to be expected at the most"
    )


def rules(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """The answers with rules of their own: (what is done with them, which)."""
    found = evaluation.rules
    named = (
        ("always passed on", found.always_escalate),
        ("passed on, shown to be worse than promised", found.vetoed),
        ("passed on until they have proven their bound", found.unproven),
        ("served by a bound of their own", found.proven),
    )
    return [(what, [plain(key) for key in keys]) for what, keys in named if keys]


def spent_in_words(evaluation: Evaluation) -> str:
    """What the release's look spent of δ."""
    admitted, delta = evaluation.admitted, 1.0 - evaluation.promise.certainty
    if admitted.look is None or admitted.delta is None:
        return "its card doesn't say how it was tested"
    if admitted.admission == "e-process":
        return (
            f"admitted by bets on candidate {admitted.look} since the release before, on {admitted.labels or 0:,} "
            f"labels that came after it was fixed; it may spend {100.0 * admitted.delta:.2f} of the "
            f"{100.0 * delta:.2f} % that all candidates may err together"
        )
    return (
        f"admitted by look {admitted.look} since the release before, on {admitted.labels or 0:,} labels; it spent "
        f"{100.0 * admitted.delta:.2f} of the {100.0 * delta:.2f} % that all looks may err together"
    )


def _odds(evidence: float) -> str:
    """An e-value for people: beyond a million it is only the number of digits that grows."""
    return "more than a million" if evidence > 1e6 else f"{evidence:,.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
