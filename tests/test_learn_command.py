"""`learn`, `tasks`, `promote` and `rollback` as a person runs them: output, exit codes, and never a traceback."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadtest.stack import command, environment
from serving.releases import ReleaseStore

Make = Callable[..., Any]
TEXTS = [
    (f"where is {'my card' if i % 2 else 'the parcel'} {i}", "card" if i % 2 else "parcel") for i in range(90)
]
ANSWERS = {"my card": "card", "the parcel": "parcel"}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command in a folder with an `understudy.toml`; fail on any traceback."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "understudy.toml").write_text(f"""state_dir = "{tmp_path / "state"}"
[task_defaults]
max_disagreement = 0.1
""")

    def start(*arguments: str, code: int = 0, cwd: Path = folder) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60
        )
        assert "Traceback" not in done.stderr + done.stdout
        assert done.returncode == code, done.stdout + done.stderr
        if code == 2:
            assert done.stdout == ""
            assert done.stderr.startswith("understudy: ")
            assert done.stderr.count("\n") == 1
        return done

    return start


def test_the_whole_loop(run: Make, write_log: Make, exchanges: Make, tmp_path: Path) -> None:
    write_log(exchanges(TEXTS))
    assert "a look is due" in " ".join(run("tasks").stdout.split())
    said = run("learn", "--task", "intents").stdout
    assert said.startswith("intents: released: r0001 is live: answers about 100%")
    assert said.count("\n") == 1
    (lesson,) = orjson.loads(run("learn", "--json").stdout)["tasks"]
    assert (lesson["task"], lesson["outcome"], lesson["release"]) == ("intents", "not_due", None)
    (summary,) = orjson.loads(run("tasks", "--json").stdout)["tasks"]
    assert (summary["task"], summary["release"], summary["labels"]) == ("intents", "r0001", 90)
    assert summary["cost_usd"] == pytest.approx(0.09)
    assert run("rollback", "intents").stdout == "intents: the teacher alone is live (generation 2)\n"
    assert run("promote", "intents", "r0001").stdout == "intents: r0001 is live (generation 3)\n"
    store = ReleaseStore(tmp_path / "state")
    live = store.live("intents")
    assert live is not None
    assert store.withdraw("intents", live, "disagreement", "9 of 20 audits disagreed") is not None
    assert "r0001 was withdrawn on" in run("tasks").stdout
    again = run("promote", "intents", "r0001")
    assert again.stdout == "intents: r0001 is live (generation 5)\n"
    assert again.stderr.startswith("WARNING: r0001 was withdrawn on")
    assert "9 of 20 audits disagreed" in again.stderr
    said = orjson.loads(run("rollback", "intents", "--json").stdout)
    assert said == {"task": "intents", "release": None, "generation": 6}
    said = orjson.loads(run("promote", "intents", "r0001", "--json").stdout)
    assert said == {"task": "intents", "release": "r0001", "generation": 7}


def test_promote_and_rollback_between_releases(run: Make, publish: Make, tmp_path: Path) -> None:
    for _ in range(2):
        publish(tmp_path / "state", "intents", ANSWERS)
    assert run("rollback", "intents").stdout == "intents: r0001 is live (generation 3)\n"
    assert run("promote", "intents", "r0002").stdout == "intents: r0002 is live (generation 4)\n"


def test_nothing_there_yet(run: Make, tmp_path: Path) -> None:
    assert run("learn").stdout == "nothing to learn: no task has a log yet\n"
    assert run("tasks").stdout == "no tasks yet: send requests through the gateway first\n"
    assert orjson.loads(run("learn", "--json").stdout) == {"tasks": []}
    assert orjson.loads(run("tasks", "--json").stdout) == {"tasks": [], "templates": []}
    assert not (tmp_path / "state").exists(), "looking creates nothing"


def test_without_a_configuration_the_defaults_hold(run: Make, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("tasks", cwd=empty).stdout.startswith("no tasks yet")
    assert run("learn", cwd=empty).stdout.startswith("nothing to learn")
    assert list(empty.iterdir()) == []
    missing = run("learn", "--config", "nowhere.toml", code=2).stderr
    assert missing == "understudy: there is no configuration file nowhere.toml\n"


def test_a_wrong_setting(run: Make, tmp_path: Path) -> None:
    config = tmp_path / "wrong.toml"
    config.write_text("[task_defaults]\nmax_disagrement = 0.1\n")
    for arguments in (["learn"], ["tasks"], ["promote", "intents", "r0001"], ["rollback", "intents"]):
        assert "max_disagreement" in run(*arguments, "--config", str(config), code=2).stderr


def test_unknown_names(run: Make, write_log: Make, exchanges: Make, publish: Make, tmp_path: Path) -> None:
    state = write_log(exchanges(TEXTS[:12]))
    publish(state, "intents", ANSWERS)
    assert "tasks with one: intents" in run("learn", "--task", "parcels", code=2).stderr
    assert "it has: r0001" in run("promote", "intents", "r0007", code=2).stderr
    assert "has no release" in run("promote", "intents", "../r0001", code=2).stderr
    assert "can't be the name of a task" in run("rollback", "../intents", code=2).stderr
    assert "there is no task parcels" in run("promote", "parcels", "r0001", code=2).stderr
    assert "there is no task intent under" in run("rollback", "intent", code=2).stderr
    assert not (state / "tasks" / "intent").exists(), "a slip of the keyboard makes no task"
    live = ReleaseStore(state).live("intents")
    assert live is not None
    assert (live.release, live.generation) == ("r0001", 1)


def test_a_disk_that_refuses(run: Make, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    said = run("promote", "intents", "r0001", code=2).stderr
    assert str(tmp_path / "state") in said or "has no release" in said


def test_a_damaged_release(run: Make, publish: Make, tmp_path: Path) -> None:
    state = tmp_path / "state"
    for _ in range(2):
        publish(state, "intents", ANSWERS)
    releases = state / "tasks" / "intents" / "releases"
    (releases / "r0001" / "student.npz").write_bytes(b"damaged")
    said = run("promote", "intents", "r0001", code=2).stderr
    assert "student.npz doesn't match its checksum" in said
    assert run("rollback", "intents").stdout == "intents: the teacher alone is live (generation 3)\n"
    (releases.parent / "live").write_bytes(b"{")
    assert "names no release" in run("rollback", "intents", code=2).stderr
    assert run("promote", "intents", "r0002").stdout.startswith("intents: r0002 is live (generation ")


def test_twelve_exchanges_and_damaged_lines(run: Make, write_log: Make, exchanges: Make) -> None:
    state = write_log(exchanges(TEXTS[:12]))
    (segment,) = (state / "tasks" / "intents" / "events").iterdir()
    segment.write_bytes(segment.read_bytes() + b'{"crc":"00')
    assert run("learn").stdout.startswith("intents: not due: 12 labels; the first look needs 68")
    assert "1 damaged lines in the log were skipped" in run("tasks").stdout


def test_wrong_usage(run: Make) -> None:
    for arguments in (["learn", "--bogus"], ["promote", "intents"], ["rollback"], ["tasks", "more"]):
        done = subprocess.run(
            command(*arguments), env=environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert "Usage: understudy" in done.stderr
        assert "Traceback" not in done.stderr
