"""Rules, dashboard and runbook: they speak of metrics there are, and Prometheus understands them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Require = Callable[[str], None]
ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "understudy.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
README = (ROOT / "README.md").read_text()
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()

ADDED = {"job", "instance", "le"}
"""Labels that Prometheus adds, or that histograms have."""


def metrics() -> dict[str, set[str]]:
    """Every metric and its labels, from the README's table, which tests/test_docs.py holds to the code."""
    rows = re.findall(r"^\| `(understudy_\w+)(?:\{([\w,]+)\})?` \|", README, re.M)
    return {name: set(labels.split(",")) - {""} for name, labels in rows}


def texts_of(label: str) -> set[str]:
    """What a label may say, as far as the README lists it."""
    if label == "reason":
        return set(re.findall(r"^\| `(\w+)` \| (?:teacher|student|cache|nobody|as|whoever)", README, re.M))
    return set(re.findall(r"`([a-z_]+)`", " ".join(re.findall(r"^\| `understudy_.*$", README, re.M))))


def expressions() -> Iterator[tuple[str, str]]:
    """Everything Prometheus is asked, by where it stands."""
    for rule in RULES:
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield f"annotation {annotation['name']}", annotation["expr"]


def plain(expression: str) -> str:
    """A dashboard's expression, its variables filled in."""
    for variable, value in (
        ("$__rate_interval", "5m"),
        ("$__range", "1h"),
        ("$job", "understudy"),
        ("$task", ".*"),
    ):
        expression = expression.replace(variable, value)
    return expression


EXPRESSIONS = [pytest.param(where, plain(expression), id=where) for where, expression in expressions()]


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS)
def test_metrics_and_labels_that_are_asked_for_exist(where: str, expression: str) -> None:
    known = metrics()
    asked = re.findall(r"(?<![\w:])(understudy_\w+)(?:\{([^}]*)\})?", expression)
    recorded = set(re.findall(r"\w+:\w+:\w+", expression))
    assert asked or recorded or expression.startswith("up{")
    assert recorded <= RECORDED
    labels: set[str] = set(ADDED)
    for name, selector in asked:
        base = name if name in known else re.sub(r"_(bucket|sum|count)$", "", name)
        assert base in known, where
        labels |= known[base]
        for label, value in re.findall(r'(\w+)[!=~]+"([^"]*)"', selector):
            assert label in known[base] | ADDED
            if label in ("outcome", "reason", "kind"):
                assert set(value.split("|")) <= texts_of(label), f"{where} asks for {label} {value}"
    for rule in recorded:
        labels |= {"task", "route", "reason"} & set(rule.split(":")[0].split("_"))
    for grouped in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= labels


def test_prometheus_understands_every_expression(require: Require, tmp_path: Path) -> None:
    require("promtool")
    # It can't check a dashboard: its expressions become rules.
    rules = [
        {"record": f"panel:understudy:{number}", "expr": plain(expression)}
        for number, (_, expression) in enumerate(expressions())
    ]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "panels.yml"))
    promtool("check", "rules", "rules.yml")
    promtool("check", "config", "--syntax-only", "prometheus.yml")


@pytest.mark.parametrize("file", sorted((PROMETHEUS / "tests").glob("*.yml")), ids=lambda path: path.stem)
def test_rules_do_what_they_are_for(require: Require, file: Path) -> None:
    require("promtool")
    promtool("test", "rules", str(file))


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    tested = {
        alert["alertname"]
        for file in (PROMETHEUS / "tests").glob("*.yml")
        for case in yaml.safe_load(file.read_text())["tests"]
        for alert in case.get("alert_rule_test", [])
        if alert["exp_alerts"]
    }
    assert tested == set(ALERTS)


def test_every_alert_says_what_it_is_and_what_to_do() -> None:
    headings = re.findall(r"^## (\w+)$", RUNBOOK, re.M)
    assert sorted(headings) == sorted(ALERTS)
    for entry in re.split(r"^## ", RUNBOOK, flags=re.M)[1:]:
        assert "**Means.**" in entry
        assert "**Do.**" in entry
    for name, rule in ALERTS.items():
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_metrics_that_the_runbook_names_exist() -> None:
    assert set(re.findall(r"`(understudy_\w+)`", RUNBOOK)) <= set(metrics())


def test_the_dashboard_shows_every_metric() -> None:
    shown = " ".join(expression for _, expression in expressions())
    assert {name for name in metrics() if name not in shown} == set()


def test_panels_say_what_they_show() -> None:
    assert DASHBOARD["schemaVersion"] >= 41
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert all(titles)
    assert len(set(titles)) == len(titles)
    assert [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"] == [
        "Money",
        "Who answers",
        "The promise",
        "Latency",
        "Cache",
        "Health",
    ]
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]


def test_panels_dont_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
