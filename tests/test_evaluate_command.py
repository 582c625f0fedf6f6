"""`understudy evaluate` as a person runs it: table, JSON, errors of one line, and answers that mean harm."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadtest.stack import command, environment
from serving.releases import ReleaseStore

Make = Callable[..., Any]
HOSTILE = '</style><script>alert("x")</script>[bold]\x1b[31m\x07\n&amp;'


@pytest.fixture
def state(write_log: Make, exchanges: Make, publish: Make) -> Path:
    """A log and a release whose answers are what a hostile model might write."""
    made: Path = write_log(
        exchanges([*[("where is my card", HOSTILE)] * 30, *[("my card please", "other")] * 10, ("?", "x")])
    )
    publish(made, "intents", {"my card": " ".join(HOSTILE.split()), "the parcel": "parcel"})
    ReleaseStore(made).rewrite("intents", "r0001", {"held_out.json": b"{}"})
    return made


@pytest.fixture
def run(state: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    (tmp_path / "understudy.toml").write_text(f'state_dir = "{state}"\n')

    def start(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command("evaluate", *arguments),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr + done.stdout
        assert done.returncode == code, done.stdout + done.stderr
        if code == 2:
            assert done.stdout == ""
            assert done.stderr.startswith("understudy: ")
            assert done.stderr.count("\n") == 1
        return done

    return start


def test_the_table(run: Make) -> None:
    said = run("intents").stdout
    assert said.startswith("intents r0001 (live), student linear, made unknown\n")
    assert "at most 5.0 % disagreement, 90 % certain" in said
    assert "not audited yet" in said
    assert '</style><script>alert("x")</script>[bold]' in said, "markup is text"
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "25.0 %" in said
    assert max(map(len, said.splitlines())) <= 80


def test_the_json(run: Make) -> None:
    found = orjson.loads(run("intents", "--json").stdout)
    assert (found["schema"], found["task"], found["release"], found["live"]) == (1, "intents", "r0001", True)
    assert found["log"]["labels"] == 41
    assert found["log"]["agreement"]["value"] == pytest.approx(30 / 41)
    assert found["log"]["worst_answers"][0]["risk"]["count"] == 40


def test_a_recording(run: Make, tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_text(
        "text,teacher,gold\nmy card again,other,other\nthe parcel here,parcel,parcel\n"
    )
    found = orjson.loads(run("intents", "--release", "r0001", "--file", "dev.csv", "--json").stdout)
    assert found["recording"]["accuracy"]["student"]["value"] == 0.5


def test_the_page(run: Make, tmp_path: Path) -> None:
    assert run("intents", "--html", "page.html").stdout.endswith("\nwith its plots: page.html\n")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in page
    assert [path.name for path in tmp_path.iterdir() if "writing" in path.name] == []
    said = run("intents", "--html", "nowhere/page.html", code=2).stderr
    assert said == "understudy: there is no folder nowhere to write page.html into\n"
    (tmp_path / "pages").mkdir()
    said = run("intents", "--html", "pages", code=2).stderr
    assert said == "understudy: pages is a folder: name a file in it, such as pages/page.html\n"


def test_without_matplotlib(run: Make, tmp_path: Path, state: Path) -> None:
    without = tmp_path / "without"
    without.mkdir()
    (without / "matplotlib.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')"
    )
    done = subprocess.run(
        command("evaluate", "intents", "--html", "page.html"),
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": f"{without}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "understudy: the page's plots need matplotlib, which isn't installed: pip install"
    )
    assert not (tmp_path / "page.html").exists()


def test_what_isnt_there(run: Make, state: Path) -> None:
    assert "there is no task parcels under" in run("parcels", code=2).stderr
    assert "nowhere.csv can't be read" in run("intents", "--file", "nowhere.csv", code=2).stderr
    (state / "tasks" / "intents" / "releases" / "r0001" / "router.json").write_bytes(b"{}")
    assert "router.json doesn't match its checksum" in run("intents", code=2).stderr
