"""The page of an evaluation: whole, alone, safe whatever a model wrote, and readable without eyes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from distillation.evaluate import evaluate
from distillation.evaluation import Evaluation, JudgedAnswer
from distillation.evaluation_page import evaluation_page
from routers.intervals import share
from routers.measures import Slice
from serving.recording import read_recording
from serving.releases import ReleaseStore
from serving.settings import Settings

Make = Callable[..., Any]
HOSTILE = (
    "</title></style></svg><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "javascript:alert(1)",
    "<a href='https://example.com'>&lt;",
    "\u202e\x1b[31m\x00\n",
    "var(--ink) #010101 url(#x) {{}} %s",
)
VOID = {"meta", "br"}


class Page(HTMLParser):
    """What stands in a page: every tag with its attributes, the text, and whether all that opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def evaluation(write_log: Make, exchanges: Make, publish: Make, tmp_path: Path) -> Evaluation:
    state = write_log(
        exchanges([*[("where is my card", "card")] * 30, *[("my card please", "parcel")] * 10, ("?", "x")])
    )
    publish(state, "intents", {"my card": "card", "the parcel": "parcel"})
    ReleaseStore(state).rewrite("intents", "r0001", {"held_out.json": b"{}"})
    file = tmp_path / "dev.csv"
    file.write_text("text,teacher,gold\nmy card again,other,card\nthe parcel here,parcel,parcel\n")
    return evaluate(Settings(state_dir=state), "intents", recording=read_recording(file))


def hostile(evaluation: Evaluation) -> Evaluation:
    """The same, with what a hostile model, operator or log might have brought in wherever there is text."""
    assert evaluation.log is not None
    worst = [Slice(text, share([True, False])) for text in HOSTILE]
    return dataclasses.replace(
        evaluation,
        student=HOSTILE[0],
        log=dataclasses.replace(evaluation.log, worst_answers=worst),
        rules=dataclasses.replace(evaluation.rules, vetoed=list(HOSTILE), always_escalate=list(HOSTILE)),
        answers=[JudgedAnswer(text, 3, 1, 0.3, HOSTILE[1]) for text in HOSTILE],
        releases=[dataclasses.replace(one, name=HOSTILE[1]) for one in evaluation.releases],
        notes=list(HOSTILE),
    )


def test_it_stands_alone(evaluation: Evaluation) -> None:
    page = evaluation_page(evaluation)
    found = Page(page)
    assert page.startswith("<!doctype html>\n")
    tags = {tag for tag, _ in found.tags}
    assert tags.isdisjoint(
        {"script", "link", "img", "iframe", "object", "form", "base", "image", "foreignobject"}
    )
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert re.findall(r"@import|url\((?!#)", page) == []
    (policy,) = (given for tag, given in found.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_what_a_model_wrote_stays_text(evaluation: Evaluation) -> None:
    usual, found = Page(evaluation_page(evaluation)), Page(evaluation_page(hostile(evaluation)))
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in usual.tags} | {"li", "ul"}
    for text in HOSTILE[:4]:
        assert text in found.text
    assert not any(character in found.text for character in "\x00\x1b\u202e")
    assert "var(--ink) #010101 url(#x) {{}} %s" in found.text


def test_ids_are_of_one_thing_each_and_references_lead_somewhere(evaluation: Evaluation) -> None:
    page = evaluation_page(evaluation)
    ids = [given["id"] for _, given in Page(page).tags if "id" in given]
    assert len(ids) == len(set(ids)) > 100
    referred = re.findall(r'(?:url\(#|href="#)([^")]+)', page)
    assert referred
    assert set(referred) <= set(ids)


def test_it_can_be_read_out(evaluation: Evaluation) -> None:
    found = Page(evaluation_page(evaluation))
    plots = [given for tag, given in found.tags if tag == "svg"]
    assert len(plots) == 8, "four of each sample, and no audits yet"
    ids = {given.get("id") for _, given in found.tags}
    for plot in plots:
        assert plot["role"] == "img"
        assert set((plot["aria-labelledby"] or "").split()) <= ids
    assert [given["lang"] for tag, given in found.tags if tag == "html"] == ["en"]
    heads = [given["scope"] for tag, given in found.tags if tag == "th"]
    assert set(heads) == {"col", "row"}
    regions = [given for tag, given in found.tags if given.get("role") == "region"]
    assert len(regions) == sum(tag == "table" for tag, _ in found.tags)
    assert all(given["aria-label"] and given["tabindex"] == "0" for given in regions)
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_it_follows_light_and_dark(evaluation: Evaluation) -> None:
    page = evaluation_page(evaluation)
    assert "prefers-color-scheme: dark" in page
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert "var(--student)" in drawn
    # Every colour of a plot is one of the page's.
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#ffffff"}
    assert set(re.findall(r"var\((--[a-z]+)\)", page)) <= set(re.findall(r"(--[a-z]+):", page))


def test_nothing_to_judge_by(publish: Make, tmp_path: Path) -> None:
    state = tmp_path / "state"
    publish(state, "intents", {"my card": "card"})
    ReleaseStore(state).rewrite("intents", "r0001", {"held_out.json": b"{}"})
    found = Page(evaluation_page(evaluate(Settings(state_dir=state), "intents")))
    assert "no labels to judge by" in found.text
    assert "Not audited yet" in found.text


def test_audits_are_drawn_with_the_evidence(evaluation: Evaluation) -> None:
    from distillation.audit_record import AuditPoint

    points = [AuditPoint(1e9 + 60.0 * n, n, n // 10, 1.1**n) for n in range(1, 101)]
    audits = dataclasses.replace(
        evaluation.audits, audits=100, missing=2, points=points, evidence=1.1**100, alarmed=True
    )
    found = Page(evaluation_page(dataclasses.replace(evaluation, audits=audits)))
    assert "of 100 audits disagreed, evidence of 13,781 to 1" in found.text
    assert "2 of them got no answer" in found.text
    assert "audits-title" in {given.get("id") for _, given in found.tags}
