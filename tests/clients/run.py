"""`make test-clients`: other people's clients, through the gateway, to the stand-in. Prints one table.

Each client has a program of its own in an environment of its own: it gets the gateway's base URL and the
stand-in's, and writes one JSON object a check: `client`, `version`, `check`, `ok`, `detail`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.stack import Plan, running

HERE = Path(__file__).resolve().parent
PROGRAMS = {
    "node": ["node", str(HERE / "node" / "checks.mjs")],
    "python": [".venv-clients/bin/python", str(HERE / "python" / "checks.py")],
}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": '{"city":"Paris"}'}}
RECORDING: list[dict[str, Any]] = [
    {"text": "hello", "teacher": "one two three four five six seven", "latency_s": 0},
    {"text": "structured", "teacher": '{"label":"refund","score":3}', "latency_s": 0},
    {"text": "tools", "teacher": "", "tool_calls": [CALL], "latency_s": 0},
    {"text": "limited", "teacher": "never given", "latency_s": 0},
    {"text": "breaks", "teacher": "one two three four five six seven", "latency_s": 0},
    {"text": "slow", "teacher": "word " * 40, "latency_s": 30},
]
FAILURES = [
    {"text": "limited", "status": 429, "retry_after": 0},
    {"text": "breaks", "break_after": 4},
]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def results_of(name: str, base_url: str, stand_in_url: str) -> list[dict[str, Any]]:
    """Run one program. One that ends early or says nothing is a failed check of its own."""
    program = [*PROGRAMS[name], base_url, stand_in_url]
    try:
        done = subprocess.run(program, capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [{"client": name, "version": "", "check": "runs", "ok": False, "detail": str(error)}]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"client"')]
    if done.returncode != 0 or not found:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        found.append({"client": name, "version": "", "check": "runs", "ok": False, "detail": said})
    return found


def main() -> int:
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        failures = lines(work / "failures.jsonl", FAILURES)
        plan = Plan(
            recording=lines(work / "recording.jsonl", RECORDING),
            work=work,
            task="clients",
            max_disagreement=0.05,
            certainty=0.9,
            price=(1.0, 1.0),
            latency_ms=None,
            stand_in_options=("--script", str(failures)),
        )
        with running(plan) as stack:
            for name in PROGRAMS:
                results += results_of(name, stack.base_url, stack.stand_in_url)
    table = Table("client", "version", "check", "result", title="Clients through the gateway")
    for found in results:
        said = "ok" if found["ok"] else f"[red]failed[/red]: {found['detail']}"
        table.add_row(found["client"], found["version"], found["check"], said)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    failed = sum(not found["ok"] for found in results)
    print(f"{len(results)} checks, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
