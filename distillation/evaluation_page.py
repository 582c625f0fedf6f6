"""An evaluation as one HTML page: no scripts, nothing from elsewhere, to be opened from disk or sent to somebody.

Answers were written by models and may hold anything: all text goes through `_text`, and the page forbids itself
scripts and any request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from distillation.evaluation import Evaluation
from distillation.evaluation_plots import (
    audits_plot,
    confidence_plot,
    frontier_plot,
    reliability_plot,
    risk_coverage_plot,
)
from distillation.evaluation_style import STYLE
from distillation.evaluation_words import (
    costs,
    day,
    dollars,
    measures,
    percent,
    plain,
    printable,
    promise_in_words,
    releases_in_words,
    rules,
    samples,
    spent_in_words,
    verdict,
    with_interval,
)
from distillation.judgement import Judgement

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def evaluation_page(evaluation: Evaluation) -> str:
    """The page, as a whole document."""
    title = f"{evaluation.task} {evaluation.release}: evaluation"
    sections = [
        _summary(evaluation),
        _figures(evaluation),
        *(_sample(evaluation, *sample) for sample in samples(evaluation) if sample[0] != "since"),
        _audits(evaluation),
        _cost(evaluation),
        _rules(evaluation),
        _answers(evaluation),
        _releases(evaluation),
        _notes(evaluation),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _summary(evaluation: Evaluation) -> str:
    state = "live" if evaluation.live else "not live"
    judged = next((one for _, _, one in samples(evaluation)), None)
    facts = [("promise", promise_in_words(evaluation)), ("audits", verdict(evaluation))]
    if judged is not None:
        facts += [
            ("the student answers", f"{with_interval(judged.coverage)} of all requests"),
            ("of these, it disagrees on", with_interval(judged.disagreement)),
        ]
    facts += [
        (
            "1,000 requests cost",
            f"{dollars(evaluation.costs.with_audits)} with it and its audits, "
            f"{dollars(evaluation.costs.teacher_only)} with the teacher alone",
        ),
        ("how it was admitted", spent_in_words(evaluation)),
    ]
    return (
        f"<header><h1>{_text(evaluation.task)} <span>{_text(evaluation.release)}</span></h1>"
        f"<p>{state}, student {_text(evaluation.student)}, made {day(evaluation.created)}</p></header>"
        + _facts(facts)
    )


def _figures(evaluation: Evaluation) -> str:
    named = samples(evaluation)
    if not named:
        return _section("Measures", "<p>There are no labels to judge by.</p>")
    names = [what for what, _ in measures(max((one[2] for one in named), key=_has_truth))]
    columns = [dict(measures(judgement)) for _, _, judgement in named]
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    explained = (
        "In brackets behind a share: its 95 % interval; ~ marks one that is approximate, since the labels "
        "weigh differently. Behind a measure of ranking: what an oracle would reach that knows the outcome. Each label "
        "of the log stands for the traffic that had the same chance to be labelled."
    )
    table = _table(["", *(what for _, what, _ in named)], rows, "Measures by sample")
    return _section("Measures", f"<p>{_text(explained)}</p>{table}")


def _has_truth(judgement: Judgement) -> bool:
    return judgement.accuracy is not None


def _sample(evaluation: Evaluation, name: str, what: str, judgement: Judgement) -> str:
    alpha = evaluation.promise.max_disagreement
    truth = "is right" if judgement.quality == "gold" else "agrees with the teacher"
    figures = [
        _figure(
            risk_coverage_plot(judgement, alpha, f"{name}-risk"),
            "What any other threshold would do: the further right, the more the student answers, and the more of it "
            f"disagrees. The dashed line is the promise, {percent(alpha)}; the band is a 95 % interval at each point "
            "by itself. The promise wasn't tested on this curve: picking its best point would promise nothing.",
            _levels(judgement),
        ),
        _figure(
            reliability_plot(judgement, f"{name}-reliability"),
            "Whether a confidence means what it says: of answers given with 80 %, 80 % should agree. On average it is "
            f"off by {percent(judgement.ece)} (ECE).",
            _bins(judgement),
        ),
        _figure(
            frontier_plot(judgement, f"{name}-frontier"),
            f"How good all answers are together (the share that {truth}) if only so many requests go to the teacher, "
            "the least confident first. The oracle passes on exactly those that gain by it; a random choice gives the "
            "dashed line. The area between is what the ranking is worth.",
        ),
        _figure(
            confidence_plot(judgement, evaluation.threshold, f"{name}-confidence"),
            "Where the traffic lies. What is right of the threshold is served, unless a rule for its answer says "
            "otherwise.",
        ),
    ]
    worst = _table(
        ["answer", "served", "disagree"],
        [[plain(one.key), f"{one.risk.count:,}", with_interval(one.risk)] for one in judgement.worst_answers],
        "Answers that disagree most",
    )
    explained = (
        "<p>Answers the student serves at least five times, the one most surely bad first. The promise is about the "
        "average of all of them; among many, some look bad by chance.</p>"
    )
    return _section(
        f"By {what}",
        f'<div class="figures">{"".join(figures)}</div>'
        + (f"<h3>Answers that disagree most</h3>{explained}{worst}" if judgement.worst_answers else ""),
    )


def _levels(judgement: Judgement) -> str:
    return _table(
        ["answers", "confidence from", "disagree"],
        [
            [percent(one.coverage), f"{one.threshold:.4f}", with_interval(one.disagreement)]
            for one in judgement.levels
        ],
        "Disagreement by coverage",
    )


def _bins(judgement: Judgement) -> str:
    return _table(
        ["confidence", "of the traffic", "mean confidence", "agreed"],
        [
            [
                f"{one.low:.3f}–{one.high:.3f}",
                percent(one.mass),
                percent(one.confidence),
                with_interval(one.agreement),
            ]
            for one in judgement.reliability
        ],
        "Agreement by confidence",
    )


def _audits(evaluation: Evaluation) -> str:
    audits = evaluation.audits
    said = f"<p>{_text(_sentence(verdict(evaluation)))}."
    if audits.missing:
        said += f" {audits.missing:,} of them got no answer of the teacher's and count as disagreements."
    if audits.pending:
        said += f" {audits.pending:,} are still owed."
    said += "</p>"
    if not audits.points:
        return _section("Audits", said)
    plot = audits_plot(audits, evaluation.promise.max_disagreement, "audits")
    first, last = day(audits.points[0].at), day(audits.points[-1].at)
    caption = (
        f"Audits are requests picked by a coin, from {first} to {last}. The evidence is what a bet against the promise "
        f"has made of 1: while the promise holds, it ever reaches the alarm at {audits.alarm_at:,.0f} with a "
        f"probability of {percent(1.0 - evaluation.promise.certainty)} at the most. An alarm withdraws the release."
    )
    return _section("Audits", said + _figure(plot, caption))


def _cost(evaluation: Evaluation) -> str:
    cost = evaluation.costs
    explained = (
        "By what the teacher asked for the requests of the log, each weighted for the traffic it stands for; without a "
        "cache. What was measured includes cache, audits and failures."
    )
    if cost.unpriced:
        explained += f" {cost.unpriced:,} of the teacher's answers have no price and are left out."
    table = _table(["with", "USD"], [[what, value] for what, value in costs(evaluation)], "Cost")
    return _section("Cost of 1,000 requests", f"<p>{_text(explained)}</p>{table}")


def _rules(evaluation: Evaluation) -> str:
    found = rules(evaluation)
    if not found:
        return ""
    return _section(
        "Answers with rules of their own", _facts((what, ", ".join(keys)) for what, keys in found)
    )


def _answers(evaluation: Evaluation) -> str:
    """Every answer as it was tested: the average says nothing of one of them."""
    answers = evaluation.answers
    if not answers:
        return ""
    standings = Counter(one.standing for one in answers)
    counted = ", ".join(f"{count:,} {standing}" for standing, count in standings.most_common())
    explained = (
        f"By the labels the release was chosen with: {counted}. Unproven answers are served where the student is sure "
        "enough; that few disagree on the whole doesn't prove it of each. The estimate is shrunk towards the whole."
    )
    table = _table(
        ["answer", "labels", "disagreed", "estimate", "standing"],
        [
            [
                plain(one.answer),
                f"{one.labels:,}",
                f"{one.disagreements:,}",
                percent(one.estimate),
                one.standing,
            ]
            for one in answers
        ],
        "Answers one by one",
    )
    details = f"<details><summary>{len(answers):,} answers</summary>{table}</details>"
    return _section("Answers one by one", f"<p>{_text(explained)}</p>{details}")


def _releases(evaluation: Evaluation) -> str:
    rows = [
        [one.name + (" (live)" if one.live else ""), day(one.created), percent(one.coverage)]
        for one in evaluation.releases
    ]
    table = _table(["release", "made", "expected to answer"], rows, "Releases so far")
    return _section("Releases", f"<p>{_text(_sentence(releases_in_words(evaluation)))}.</p>{table}")


def _notes(evaluation: Evaluation) -> str:
    if not evaluation.notes:
        return ""
    return _section("Notes", f"<ul>{''.join(f'<li>{_text(note)}</li>' for note in evaluation.notes)}</ul>")


def _facts(named: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(name)}</dt><dd>{_text(value)}</dd>' for name, value in named)}</dl>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _text(text: str) -> str:
    """Text as it may stand in the page, in an attribute too."""
    return escape(printable(text))


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _figure(plot: str, caption: str, numbers: str = "") -> str:
    """A plot with what it means, and its numbers for who can't see it."""
    details = f"<details><summary>The numbers</summary>{numbers}</details>" if numbers else ""
    return f"<figure>{plot}<figcaption>{_text(caption)}{details}</figcaption></figure>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table whose first column heads its rows. `caption` names it to who can't see it."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' if name else "<td></td>" for name in columns)
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{_text(caption)}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
