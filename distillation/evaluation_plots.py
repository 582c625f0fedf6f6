"""An evaluation's plots, as SVG to stand inside a page. The one module that knows matplotlib, which is an extra.

Nothing a model or client wrote is drawn. Colours are variables of the page's style, so that they follow its light and
dark; text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.typing import RcKeyType

from distillation.audit_record import AuditRecord
from distillation.judgement import Judgement

# Colours that stand for variables of the page; matplotlib writes them out as they are.
_INK, _GRID, _STUDENT, _PROMISE, _BEST, _RANDOM = (
    "#010101",
    "#020202",
    "#030303",
    "#040404",
    "#050505",
    "#060606",
)
_VARIABLES = {
    _INK: "var(--ink)",
    _GRID: "var(--line)",
    _STUDENT: "var(--student)",
    _PROMISE: "var(--promise)",
    _BEST: "var(--best)",
    _RANDOM: "var(--quiet)",
}
_STYLE: dict[RcKeyType, object] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
}
_SIZE = (5.0, 3.3)
_PERCENT = FuncFormatter(lambda share, _: f"{100.0 * share:g} %")


def risk_coverage_plot(judgement: Judgement, max_disagreement: float, name: str) -> str:
    """Disagreement among what is answered, by how much is answered; with intervals and the promise."""

    def draw(axes: Axes) -> None:
        levels = judgement.levels
        coverage = [level.coverage for level in levels]
        axes.fill_between(
            coverage,
            [level.disagreement.low for level in levels],
            [level.disagreement.high for level in levels],
            color=_STUDENT,
            alpha=0.18,
            linewidth=0,
        )
        axes.plot(
            coverage,
            [level.disagreement.value or 0.0 for level in levels],
            color=_STUDENT,
            marker=".",
            label="any threshold",
        )
        axes.axhline(max_disagreement, color=_PROMISE, linestyle="--", label="promised at most")
        here = judgement.disagreement
        if here.value is not None and judgement.coverage.value is not None:
            axes.errorbar(
                [judgement.coverage.value],
                [here.value],
                yerr=[[max(here.value - here.low, 0.0)], [max(here.high - here.value, 0.0)]],
                color=_INK,
                marker="D",
                capsize=3,
                linestyle="none",
                label="this release",
            )
        _shares(axes, "share of requests the student answers", "disagreement among these")
        axes.set_xlim(0.0, 1.02)
        highest = max([max_disagreement, *((level.disagreement.value or 0.0) for level in levels)])
        axes.set_ylim(0.0, min(1.0, 1.5 * highest))
        axes.legend(loc="upper left")

    return _svg(
        draw, name, "Risk and coverage", "Disagreement among the answers served, by the share served."
    )


def reliability_plot(judgement: Judgement, name: str) -> str:
    """What agreed, by the confidence that was given; the diagonal is as it should be."""

    def draw(axes: Axes) -> None:
        bins = judgement.reliability
        shares = [one.agreement.value or 0.0 for one in bins]
        axes.plot([0, 1], [0, 1], color=_RANDOM, linestyle="--", label="as it should be")
        axes.errorbar(
            [one.confidence for one in bins],
            shares,
            yerr=[
                [max(share - one.agreement.low, 0.0) for share, one in zip(shares, bins, strict=True)],
                [max(one.agreement.high - share, 0.0) for share, one in zip(shares, bins, strict=True)],
            ],
            color=_STUDENT,
            marker="o",
            markersize=4,
            capsize=2,
            label="tenths of the traffic",
        )
        _shares(axes, "confidence", "share that agreed")
        axes.set_xlim(0.0, 1.0)
        axes.set_ylim(0.0, 1.02)
        axes.legend(loc="upper left")

    return _svg(
        draw, name, "Reliability", "Share of answers that agreed with the teacher, by their confidence."
    )


def frontier_plot(judgement: Judgement, name: str) -> str:
    """Quality by the share of teacher calls: this ranking, the oracle's and a random one."""

    def draw(axes: Axes) -> None:
        calls, quality = np.array(judgement.frontier).T
        best_calls, best = np.array(judgement.frontier_best).T
        axes.plot(best_calls, best, color=_BEST, label="oracle")
        axes.plot(calls, quality, color=_STUDENT, label="this ranking")
        axes.plot([0, 1], [quality[0], quality[-1]], color=_RANDOM, linestyle="--", label="random")
        if judgement.coverage.value is not None:
            here = 1.0 - judgement.coverage.value
            axes.plot(
                [here],
                [float(np.interp(here, calls, quality))],
                color=_INK,
                marker="D",
                linestyle="none",
                label="this release's share of calls",
            )
        what = "share right" if judgement.quality == "gold" else "share agreeing with the teacher"
        _shares(axes, "share of requests passed to the teacher", what)
        axes.set_xlim(0.0, 1.0)
        axes.legend(loc="lower right")

    return _svg(draw, name, "Cost and quality", "Quality of all answers, by the share of teacher calls.")


def confidence_plot(judgement: Judgement, threshold: float, name: str) -> str:
    """How the traffic's confidence is distributed, and what of it is served."""

    def draw(axes: Axes) -> None:
        counts = judgement.confidences
        left = [one.low for one in counts]
        width = counts[0].high - counts[0].low
        served = [one.served for one in counts]
        axes.bar(left, served, width, align="edge", color=_STUDENT, label="served by the student")
        axes.bar(
            left,
            [one.passed_on for one in counts],
            width,
            bottom=served,
            align="edge",
            color=_RANDOM,
            alpha=0.6,
            label="passed on",
        )
        axes.axvline(threshold, color=_PROMISE, linestyle="--", label="threshold")
        _shares(axes, "confidence", "share of requests")
        axes.set_xlim(0.0, 1.0)
        axes.legend(loc="upper left")

    return _svg(draw, name, "Confidence", "Share of requests by the confidence of the student's answer.")


def audits_plot(audits: AuditRecord, max_disagreement: float, name: str) -> str:
    """Disagreement among the audits so far, and the watch's evidence against the promise below it."""

    def draw(upper: Axes, lower: Axes) -> None:
        number = [point.audits for point in audits.points]
        upper.plot(
            number,
            [point.disagreements / point.audits for point in audits.points],
            color=_STUDENT,
            label="disagreed so far",
        )
        upper.axhline(max_disagreement, color=_PROMISE, linestyle="--", label="promised at most")
        upper.yaxis.set_major_formatter(_PERCENT)
        upper.set_ylim(0.0, None)
        upper.set_ylabel("disagreement")
        upper.legend(loc="upper right")
        lower.plot(
            number, [max(point.evidence, 1e-3) for point in audits.points], color=_STUDENT, label="evidence"
        )
        lower.axhline(audits.alarm_at, color=_PROMISE, linestyle="--", label="alarm")
        lower.set_yscale("log")
        lower.set_ylabel("evidence")
        lower.set_xlabel("audits, in the order of the requests")
        lower.legend(loc="upper right")

    description = "Disagreement among audits so far, and the evidence against the promise."
    return _svg(draw, name, "Audits", description, panels=2)


def _shares(axes: Axes, x: str, y: str) -> None:
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _svg(draw: Callable[..., None], name: str, title: str, description: str, *, panels: int = 1) -> str:
    """What `draw` makes of so many axes, as an `svg` element with a title and a description to be read out.

    Its ids begin with `name`.
    """
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_SIZE[0], _SIZE[1] + 0.8 * (panels - 1)), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        for one in axes:
            one.patch.set_alpha(0.0)
        draw(*axes)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(written.getvalue(), name, title, description)


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """What matplotlib wrote as a document, as an element of a page."""
    _, _, body = svg.partition("<svg ")
    attributes, _, body = body.partition(">")
    box = re.search(r'viewBox="([^"]+)"', attributes)
    # Its style sheet would hold for the whole page; the metadata is about a file.
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<defs>\s*</defs>", "", body, flags=re.S)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box[1] if box else ""}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc" stroke-linejoin="round" stroke-linecap="butt">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{body.strip()}'
    )
