"""`understudy doctor`: a configuration held against the real teacher, Redis and disk, before clients do it.

Every check ends in a finding that says what was seen and, unless all is well, what to do. Nothing here shows a
key, a password or a URL that may hold one.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import orjson

from gateway.doctor_local import check_configuration, check_disk, check_machine, check_sources
from gateway.doctor_remote import check_redis, check_teacher
from gateway.doctor_student import check_students
from gateway.doctor_training import check_training
from gateway.doctor_vllm import check_vllm_start
from gateway.finding import Finding, Verdict
from serving.settings import Settings

_MARKS: dict[Verdict, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "problem": ("PROBLEM", "bold red"),
}


def examine(settings: Settings, *, file: Path, ask: bool) -> list[Finding]:
    """Run all checks.

    `file`: where the settings were read from. `ask`: also ask the teacher for one token, which costs what it costs.
    """
    findings = check_sources(file)
    findings += check_configuration(settings)
    findings += check_machine(settings)
    findings += check_disk(settings.state_dir)
    findings += check_training(settings)
    findings += check_vllm_start(settings)
    findings += asyncio.run(_remote(settings, ask=ask))
    return findings


def is_fit(findings: list[Finding]) -> bool:
    """Say whether the gateway can be run on this configuration: nothing found is a problem."""
    return all(finding.verdict != "problem" for finding in findings)


def print_findings(findings: list[Finding], *, as_json: bool) -> None:
    """Print them: for people a table, for programs one JSON object."""
    if as_json:
        found = [finding.to_json() for finding in findings]
        sys.stdout.write(orjson.dumps({"fit": is_fit(findings), "findings": found}).decode() + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.verdict]
        said = finding.said if finding.advice is None else f"{finding.said}\n→ {finding.advice}"
        table.add_row(Text(mark, style=style), Text(finding.check), Text(said))
    Console().print(table)


async def _remote(settings: Settings, *, ask: bool) -> list[Finding]:
    teacher, students, redis = await asyncio.gather(
        check_teacher(settings, ask=ask), check_students(settings), check_redis(settings.cache.url)
    )
    return [*teacher, *students, *redis]
