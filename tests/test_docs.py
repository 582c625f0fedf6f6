"""The documents say what is there, and what is there stands in the documents."""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import understudy
from gateway import names
from gateway.metrics import Metrics
from routers.confidence import Confidence
from routers.router import Router
from serving.configuration import load_settings
from serving.pool import Pool
from serving.settings import ENV_PREFIX, Settings
from serving.student_settings import VllmSettings
from serving.task_settings import TaskPolicy, TaskSettings

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SOURCES = sorted(
    path
    for package in ("gateway", "routers", "serving", "distillation", "loadtest", "tests")
    for path in (ROOT / package).rglob("*.py")
)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


README = read(ROOT / "README.md")
MAKEFILE = read(ROOT / "Makefile")


def section(title: str) -> str:
    """The text of a chapter of the README."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found is not None, f"the README has no chapter {title}"
    return found[1]


def table(text: str, column: str) -> list[list[str]]:
    """The rows of the one table whose first column is named so; the cells without their backquotes."""
    (found,) = re.findall(rf"^\| {column} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in found.splitlines()]


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


# Configuration


def test_every_key_is_documented_with_its_default() -> None:
    documented = {row[0]: row[1] for row in table(section("Configuration"), "key")}
    assert documented == dict(keys(Settings))


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key under `model` as `section.key`, with its default as TOML would write it."""
    for name, field in model.model_fields.items():
        if model is TaskSettings and name in TaskPolicy.model_fields:
            continue  # those of [task_defaults]
        inner = model_in(field.annotation)
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, default_of(field)


def model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in typing.get_args(annotation) if (found := model_in(inner))), None)


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "–" if field.default is None else json.dumps(field.default, default=str)


def test_examples_of_the_configuration_load(tmp_path: Path) -> None:
    documents = [README, read(ROOT / "docs" / "students.md")]
    examples = [example for document in documents for example in fenced(document, "toml")]
    assert len(examples) > 2
    for example in examples:
        path = tmp_path / "understudy.toml"
        path.write_text(example)
        assert load_settings(path).task[0].match is not None


def test_variables_that_are_named_exist() -> None:
    known = {f"{ENV_PREFIX}{key.upper().replace('.', '__')}" for key, _ in keys(Settings)}
    named = {found for path in DOCUMENTS for found in re.findall(r"UNDERSTUDY_\w+__\w+", read(path))}
    assert named
    assert named <= known


# Headers, reasons, metrics


def test_headers_are_documented_both_ways() -> None:
    text = section("Headers")
    documented = {row[0] for column in ("request header", "response header") for row in table(text, column)}
    assert documented == {value for key, value in vars(names).items() if key.endswith("_HEADER")}


def test_response_headers_are_those_that_are_sent(stand_in: Any, gateway: Any, publish: Any) -> None:
    running = gateway(stand_in({"hello": "x"}).url, task=[{"name": "small"}])
    publish(running.state_dir, "small", {"hello world": "x"})
    sent: set[str] = set()
    for path in ("/v1/chat/completions", "/v1/models"):
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        sent |= {name for name in running.post(path, json=body).headers if name.startswith("x-")}
    assert sent <= {row[0] for row in table(section("Headers"), "response header")}


def test_reasons_are_documented_both_ways() -> None:
    router = Router(Confidence.of_score(1.0, 0.0), rank_threshold=0.0, always_escalate=frozenset({"never"}))
    rules = replace(router, vetoed=frozenset({"worse"}), unproven=frozenset({"named"}))
    decided = {router.decide(score, {}, "answer").reason for score in (1.0, -1.0, math.nan)}
    decided |= {rules.decide(1.0, {}, answer).reason for answer in ("never", "worse", "named")}
    declared = {value for key, value in vars(names).items() if re.match("REASON_(?!HEADER)", key)}
    documented = {row[0] for row in table(section("Headers"), "reason")}
    assert documented == declared | decided


def test_metrics_are_documented_both_ways_with_their_labels() -> None:
    documented = {}
    for row in table(section("Metrics"), "metric"):
        name, _, labels = row[0].rstrip("}").partition("{")
        documented[name] = set(labels.split(",")) - {""}
    assert documented == dict(exposed())


def exposed() -> Iterator[tuple[str, set[str]]]:
    """Every metric and its labels, after everything has been recorded once."""
    metrics = Metrics()
    metrics.record_request("t", "teacher", "no_release", 200, 0.1)
    metrics.record_overhead(0.1)
    metrics.record_first_token("t", "teacher", 0.1)
    metrics.record_spending("t", "student", 0.1, 0.1)
    metrics.record_tokens("t", "teacher", {"prompt_tokens": 1, "completion_tokens": 1})
    metrics.record_confidence("t", 0.5)
    metrics.record_student("t", answers=1, seconds=0.1, usage={"completion_tokens": 2}, counted=None)
    metrics.record_spared("t", 0.25)
    metrics.record_hedge("t", "used")
    metrics.record_audit("t", True, 0.1)
    metrics.record_repeat("t", True, 0.001, None)
    metrics.record_logged("t")
    metrics.record_lost("t")
    metrics.record_late("t")
    metrics.record_upstream_error("teacher", "timeout")
    metrics.record_servers(Pool(Path("unused"), VllmSettings(model="m")))
    metrics.record_cache("t", "hit")
    metrics.record_cache_age(0.1)
    metrics.record_cache_bytes(1)
    metrics.record_cache_put("stored")
    metrics.record_breaker("chat", 2)
    metrics.record_retry("answered")
    metrics.record_live("t", "r0001", None, 0.5)
    metrics.record_promise("t", 0.05)
    metrics.record_watched("t")
    metrics.record_evidence("t", 1.5, 10.0)
    metrics.record_withdrawal("t", "disagreement")
    metrics.record_drift("t", 0.1)
    metrics.record_keeper_round()
    metrics.record_learning("ended")
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        name = family.name + ("_total" if family.type == "counter" else "")
        if name.endswith("_created"):
            continue
        assert family.samples, f"{name} was never recorded"
        yield name, set(family.samples[0].labels) - {"le"}


# Commands


COMMANDS: dict[str, Any] = typer.main.get_command(understudy.app).commands  # type: ignore[attr-defined]


def test_commands_are_documented_both_ways() -> None:
    documented = {row[0].split()[1] for row in table(section("Commands"), "command")}
    assert documented == set(COMMANDS)


def test_arguments_are_documented_as_they_are() -> None:
    for row in table(section("Commands"), "command"):
        _, name, *arguments = row[0].split()
        declared = [
            parameter.name.upper()
            for parameter in COMMANDS[name].params
            if parameter.param_type_name == "argument"
        ]
        assert arguments == declared


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_examples_exist(document: Path) -> None:
    for line in shell_lines(document):
        found = re.search(r"(?:^|/)understudy ([a-z-]+)(.*)", line)
        if found is None:
            continue
        options = {option for parameter in COMMANDS[found[1]].params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", found[2])) <= options, line


def shell_lines(document: Path) -> Iterator[str]:
    for block in fenced(read(document), "sh"):
        yield from (line.partition(" #")[0] for line in block.replace("\\\n", " ").splitlines())


# Make


def test_make_targets_are_documented_both_ways() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.M))
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert phony is not None
    assert targets == set(phony[1].split())
    named = {found for path in DOCUMENTS for found in re.findall(r"(?:^|`)make ([a-z-]+)", read(path), re.M)}
    assert named == targets


# Links and citations


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", read(document)):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        found = document.parent / file if file else document
        assert found.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", read(found), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def test_what_the_code_cites_is_there() -> None:
    statistics = read(ROOT / "docs" / "STATISTICS.md")
    sections = set(re.findall(r"^## (\d)", statistics, re.M))
    cited = [found for path in SOURCES for found in re.findall(r"STATISTICS\.md §(\d)", read(path))]
    assert cited
    assert set(cited) <= sections
    documents = {found for path in SOURCES for found in re.findall(r"docs/[\w-]+\.md", read(path))}
    assert all((ROOT / name).is_file() for name in documents)


def test_files_that_are_named_exist() -> None:
    for document in DOCUMENTS:
        packages = r"(?:gateway|routers|serving|distillation|loadtest|tests|examples|docs|deploy)"
        for name in re.findall(rf"`({packages}/[\w/.-]+\.\w+)`", read(document)):
            assert (ROOT / name).is_file(), f"{document.name} names {name}"


# The snippets


def test_the_python_example_works(
    stand_in: Any, gateway: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    (snippet,) = fenced(README, "python")
    running = gateway(stand_in({"Where is my parcel?": "where_is_my_parcel"}, model="gpt-4o").url)
    assert "http://127.0.0.1:8080/v1" in snippet
    exec(snippet.replace("http://127.0.0.1:8080", running.url), {})
    assert capsys.readouterr().out == "where_is_my_parcel\n"


def test_every_table_of_results_names_its_command() -> None:
    results = section("Results")
    tables = re.findall(r"^(.*)\n\n\|", results, re.M)
    assert tables
    for introduction in tables:
        (command,) = re.findall(r"`(make [a-z-]+|[\w./-]*(?:understudy|python -m) [^`]+)`", introduction)
        module = re.search(r"python -m (\w+)\.(\w+)", command)
        assert module is None or (ROOT / module[1] / f"{module[2]}.py").is_file()


def test_the_house_lists_every_module() -> None:
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", read(ROOT / "ARCHITECTURE.md"), re.M)
    packages = ("gateway", "routers", "serving", "distillation", "loadtest")
    there = [
        str(path.relative_to(ROOT)) for package in packages for path in (ROOT / package).rglob("[!_]*.py")
    ]
    assert sorted(listed) == sorted(there)
