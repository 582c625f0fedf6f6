"""`understudy forget` as people run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serving.events import answered
from serving.log import LogReader
from serving.redaction import Redactor
from serving.tenant import tenant_of

Start = Callable[..., Any]
ROOT = Path(__file__).parents[1]
KEY = "sk-of-somebody"


def forget(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "understudy", "forget", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def folder(tmp_path: Path, write_log: Start, exchanges: Start) -> Path:
    write_log(
        [
            *exchanges([("parcel", "lost"), ("card", "stolen")], tenant=tenant_of(KEY)),
            *exchanges([("other", "text")], start=2_000_000.0, tenant="b" * 16),
        ]
    )
    return tmp_path


def left(folder: Path) -> int:
    return len(LogReader(folder / "state").exchanges("intents").exchanges)


def test_a_key_names_its_tenant_and_a_dry_run_only_tells(folder: Path) -> None:
    told = forget(folder, "--key-env", "THEIR_KEY", "--dry-run", THEIR_KEY=KEY)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout == "intents: 2 exchanges, 1970-01-12 to 1970-01-12 would be erased\n"
    assert left(folder) == 3
    done = forget(folder, "--key-env", "THEIR_KEY", THEIR_KEY=KEY)
    assert done.returncode == 0
    assert "intents: 2 exchanges, 1970-01-12 to 1970-01-12 erased\n" in done.stdout
    assert "the response cache (until 3960 s are over)" in done.stdout
    assert KEY not in done.stdout + done.stderr
    assert left(folder) == 1
    assert forget(folder, "--tenant", tenant_of(KEY)).stdout == "nothing found\n"


def test_the_report_for_programs(folder: Path) -> None:
    done = forget(folder, "--tenant", "b" * 16, "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert (report["dry_run"], report["left"]) == (False, [])
    assert report["tasks"]["intents"]["exchanges"] == 1
    assert left(folder) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "whose exchanges? Give --tenant, --key-env or --user"),
        (["--user", ""], "whose exchanges? Give --tenant, --key-env or --user"),
        (["--tenant", KEY], "--tenant should be 16 hex digits as in the log, or anonymous; a key goes into"),
        (["--tenant", "b" * 16, "--key-env", "X"], "--tenant and --key-env both name a tenant"),
        (["--key-env", "NOT_SET"], "the environment variable NOT_SET (--key-env) is not set"),
    ],
)
def test_what_cant_be_meant_is_said_in_one_line(folder: Path, options: list[str], message: str) -> None:
    done = forget(folder, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"understudy: {message}")
    assert done.stderr.count("\n") == 1
    assert KEY not in done.stderr
    assert left(folder) == 3


def test_ids_that_were_redacted_are_told_of(tmp_path: Path, write_log: Start, exchanges: Start) -> None:
    """They can't be recognised: to report success would be wrong."""
    requests = [
        {"model": "m", "messages": [], "user": "someone@example.org"},
        {"model": "m", "messages": [], "metadata": {"user_id": "x someone@example.org"}},
        {"model": "m", "messages": [{"role": "user", "content": "to a@example.org"}], "user": "u7"},
    ]
    redactor = Redactor(["email"])
    logged = []
    for number, request in enumerate(requests):
        (made,) = exchanges([("t", "lost")], start=1_000_000.0 + number, request=request)
        event = redactor.event(answered(made))
        logged.append(replace(made, request=event["request"], redacted=event["redacted"]))
    write_log(logged)
    told = forget(tmp_path, "--user", "someone@example.org", "--json")
    assert (told.returncode, json.loads(told.stdout)["unrecognisable"]) == (0, 2)
    told = forget(tmp_path, "--user", "someone@example.org")
    assert "WARNING: in 2 exchanges log.redact had replaced the end user's id" in told.stdout
    assert json.loads(forget(tmp_path, "--tenant", "b" * 16, "--json").stdout)["unrecognisable"] == 0
