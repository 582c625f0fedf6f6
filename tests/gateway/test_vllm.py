"""vLLM as a child: started, watched, started again, ended. On a small server that behaves as it is told."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.vllm import Rhythm, Vllm
from serving import leash
from serving.settings import Settings
from serving.vllm_place import VllmPlace, lock_file, read_place, write_place

Make = Callable[..., Any]
QUICK = Rhythm(starting_s=0.05, settled_s=0.5, first_pause_s=0.2, grace_s=1.0)
HASTY = Rhythm(
    starting_s=0.05, look_every_s=0.05, look_s=0.3, ask_every_s=0.1, patience_s=0.3, misses=2, first_pause_s=0.2,
    grace_s=0.5,
)  # fmt: skip


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_runs_while_the_context_lasts(
    pretend_vllm: Any, eventually: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-teacher")
    monkeypatch.setenv("UNDERSTUDY_SERVER__ADMIN_KEY", "sk-admin")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/ours")
    pretend_vllm.behaves(ready_after_s=0.3, children="stubborn")
    settings = pretend_vllm.settings(
        gpu_memory_utilization=0.4, quantization="fp8", enable_prefix_caching=True, tensor_parallel_size=2,
        max_model_len=512, enable_lora=True, max_loras=3, args=["--enforce-eager"],
    )  # fmt: skip
    with Vllm(settings, rhythm=QUICK):
        eventually(lambda: pretend_vllm.phase() == "starting")
        eventually(lambda: pretend_vllm.phase() == "ready")
        place = pretend_vllm.place()
        assert place is not None
        assert httpx.get(f"{place.url}/v1/models").status_code == 401, "a key of its own"
        said = httpx.get(f"{place.url}/v1/models", headers={"authorization": f"Bearer {place.key}"}).json()
        assert said["data"][0]["id"] == "small" == place.model
        assert stat.S_IMODE((pretend_vllm.state_dir / "vllm.json").stat().st_mode) == 0o600
    assert pretend_vllm.place() is None
    assert not (pretend_vllm.state_dir / "vllm.json").exists()
    (start,) = pretend_vllm.starts()
    line = " ".join(start["arguments"])
    for flag in (
        "-m vllm.entrypoints.openai.api_server", "--runner generate", "--host 127.0.0.1",
        "--gpu-memory-utilization 0.4", "--quantization fp8", "--enable-prefix-caching", "--tensor-parallel-size 2",
        "--max-model-len 512", "--enable-lora", "--max-loras 3", "--enforce-eager",
    ):  # fmt: skip
        assert flag in line
    environment = start["environment"]
    assert place.key not in line
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert environment["HF_HUB_OFFLINE"] == "1"
    hidden = {"OPENAI_API_KEY", "UNDERSTUDY_SERVER__ADMIN_KEY", "PROMETHEUS_MULTIPROC_DIR", "PYTHONPATH"}
    assert not hidden & environment.keys()
    assert not [value for value in environment.values() if "sk-" in value]


def test_one_that_cant_start_says_why_and_is_tried_again_less_and_less_often(
    pretend_vllm: Any, eventually: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "understudy")
    pretend_vllm.behaves(
        says=[
            "(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1] torch.OutOfMemoryError: CUDA out of memory."
        ],
        exit=1,
    )
    with Vllm(pretend_vllm.settings(), rhythm=QUICK):
        eventually(lambda: len(pretend_vllm.starts()) >= 3)
        eventually(lambda: pretend_vllm.phase() == "waiting")
        place = pretend_vllm.place()
        assert place is not None
        assert place.error == (
            "ended before it was ready, with exit code 1: torch.OutOfMemoryError: CUDA out of memory."
        )
        assert place.restarts >= 2
        pretend_vllm.behaves()
        eventually(lambda: pretend_vllm.phase() == "ready")
    first, second, third = (start["at"] for start in pretend_vllm.starts()[:3])
    assert second - first >= 0.15
    assert third - second >= 0.3
    assert "is started again in" in caplog.text
    assert [
        each.levelname
        for each in caplog.records
        if each.name == "understudy.vllm" and "core.py" in each.message
    ]


@pytest.mark.parametrize(
    ("behaviour", "settings", "said"),
    [
        ({"ready_after_s": 600}, {"ready_timeout_s": 0.5}, "wasn't ready within 0.5 s (student.vllm.ready_timeout_s)"),
        ({"ready_after_s": 600, "deaf": True}, {"ready_timeout_s": 0.5}, "wasn't ready within 0.5 s"),
        ({"says": ["api_server.py: error: unrecognized arguments: --wrong"], "exit": 2}, {}, "unrecognized arguments"),
        ({}, {"python": "/nowhere/python"}, "can't be started: student.vllm.python: /nowhere/python isn't there, or"),
        ({}, {"model": "/nowhere/model"}, "can't be started: student.vllm.model: there is no /nowhere/model"),
        ({"says": ["python: Error while finding module: No module named 'vllm'"], "exit": 1}, {}, "(pip install vllm)"),
        ({}, {"host": "203.0.113.1"}, "can't be started: "),
    ],
)  # fmt: skip
def test_why_it_isnt_there_is_said(
    pretend_vllm: Any, eventually: Make, behaviour: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    pretend_vllm.behaves(**behaviour)
    with Vllm(pretend_vllm.settings(**settings), rhythm=QUICK):
        eventually(lambda: pretend_vllm.phase() == "waiting")
        place = pretend_vllm.place()
        assert place is not None
        assert place.error is not None
        assert said in place.error


@pytest.mark.parametrize("mute", ["wholly", "only answers"])
def test_one_that_is_up_and_answers_nothing_is_started_again(
    pretend_vllm: Any, eventually: Make, mute: str
) -> None:
    with Vllm(pretend_vllm.settings(), rhythm=HASTY):
        eventually(lambda: pretend_vllm.phase() == "ready")
        pretend_vllm.behaves(mute=mute)
        eventually(lambda: pretend_vllm.phase() == "waiting")
        place = pretend_vllm.place()
        assert place is not None
        assert place.error is not None
        assert ("wasn't healthy 2 times" if mute == "wholly" else "answered nothing, 2 times") in place.error
        pretend_vllm.behaves()
        eventually(lambda: pretend_vllm.phase() == "ready")
        assert len(pretend_vllm.starts()) >= 2


def test_one_that_is_killed_is_started_again_with_another_key(pretend_vllm: Any, eventually: Make) -> None:
    pretend_vllm.behaves(children="stubborn")
    with Vllm(pretend_vllm.settings(), rhythm=QUICK):
        eventually(lambda: pretend_vllm.phase() == "ready")
        before = pretend_vllm.place()
        (start,) = pretend_vllm.starts()
        os.kill(start["pid"], signal.SIGKILL)
        eventually(lambda: pretend_vllm.phase() == "ready" and len(pretend_vllm.starts()) == 2)
        after = pretend_vllm.place()
        assert before is not None
        assert after is not None
        assert (after.restarts, after.key != before.key) == (1, True)
        assert not lives(start["child"]), "what it left running is ended"


def test_a_leash_that_is_killed_takes_all_with_it(pretend_vllm: Any, eventually: Make) -> None:
    pretend_vllm.behaves(children="stubborn")
    with Vllm(pretend_vllm.settings(), rhythm=QUICK):
        eventually(lambda: pretend_vllm.phase() == "ready")
        (start,) = pretend_vllm.starts()
        os.kill(parent_of(start["pid"]), signal.SIGKILL)
        eventually(lambda: not lives(start["pid"]) and not lives(start["child"]))
        eventually(lambda: pretend_vllm.phase() == "ready" and len(pretend_vllm.starts()) == 2)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_reload_keeps_it_unless_its_own_settings_change(pretend_vllm: Any, eventually: Make) -> None:
    settings = pretend_vllm.settings()
    with Vllm(settings, rhythm=QUICK) as vllm:
        eventually(lambda: pretend_vllm.phase() == "ready")
        vllm.adopt(settings.model_copy(update={"cache": settings.cache.model_copy(update={"ttl_s": 1.0})}))
        time.sleep(0.2)  # nothing is to happen
        assert len(pretend_vllm.starts()) == 1
        vllm.adopt(pretend_vllm.settings(max_model_len=64))
        eventually(lambda: pretend_vllm.phase() == "ready" and len(pretend_vllm.starts()) == 2)
        assert "--max-model-len" in pretend_vllm.starts()[1]["arguments"]
        vllm.adopt(Settings(state_dir=pretend_vllm.state_dir))
        eventually(lambda: pretend_vllm.place() is None)


def test_a_reload_leaves_it_in_its_state_directory(
    pretend_vllm: Any, eventually: Make, tmp_path: Path
) -> None:
    with Vllm(pretend_vllm.settings(), rhythm=QUICK) as vllm:
        eventually(lambda: pretend_vllm.phase() == "ready")
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        vllm.adopt(pretend_vllm.settings(max_model_len=64).model_copy(update={"state_dir": elsewhere}))
        eventually(lambda: len(pretend_vllm.starts()) == 2 and pretend_vllm.phase() == "ready")
        assert list(elsewhere.iterdir()) == []


def test_what_it_says_is_logged_without_keys_and_without_end(
    pretend_vllm: Any, eventually: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "understudy")
    pretend_vllm.behaves(
        says=[
            "\x1b[32m(APIServer pid=1)\x1b[0m WARNING 11-22 10:00:00 [a.py:1] a warning",
            "a line that goes on with it",
            "INFO 11-22 10:00:00 [c.py:1] non-default args: {'hf_token': 'of-a-person'}",
            *(f"INFO 11-22 10:00:00 [b.py:2] line {n}" for n in range(500)),
        ]
    )
    with Vllm(pretend_vllm.settings(args=["--hf-token", "of-a-person"]), rhythm=QUICK):
        eventually(lambda: pretend_vllm.phase() == "ready")
        place = pretend_vllm.place()
        assert place is not None
        asked = {"model": "small", "messages": []}
        headers = {"authorization": f"Bearer {place.key}"}
        httpx.post(f"{place.url}/v1/chat/completions", json=asked, headers=headers)
    records = [record for record in caplog.records if record.name == "understudy.vllm"]
    warned = [record.message for record in records if record.levelno == logging.WARNING]
    assert warned[:2] == [
        "(APIServer pid=1) WARNING 11-22 10:00:00 [a.py:1] a warning",
        "a line that goes on with it",
    ]
    assert 40 < sum("line " in record.message for record in records) < 300
    assert place.key not in caplog.text
    assert "of-a-person" not in caplog.text
    assert "--hf-token …" in caplog.text
    assert "{'hf_token': '…'}" in caplog.text
    assert "HTTP/1.1" not in caplog.text, "no access log"


def test_two_for_one_state_directory_are_one(pretend_vllm: Any, eventually: Make) -> None:
    with Vllm(pretend_vllm.settings(), rhythm=QUICK), Vllm(pretend_vllm.settings(), rhythm=QUICK):
        eventually(lambda: pretend_vllm.phase() == "ready")
        time.sleep(0.3)  # nothing is to happen
        assert len(pretend_vllm.starts()) == 1


def test_a_place_counts_while_its_writer_lives(tmp_path: Path) -> None:
    place = VllmPlace("ready", "http://127.0.0.1:9", "key", "small")
    lock = lock_file(tmp_path)
    assert lock is not None
    with lock:
        write_place(tmp_path, place)
        assert read_place(tmp_path) == place
        (tmp_path / "vllm.json").write_bytes(b'{"schema": 2}')
        assert read_place(tmp_path) is None
        write_place(tmp_path, place)
    assert read_place(tmp_path) is None, "left over by one that was killed"


class TestLeash:
    def hold(self, pretend_vllm: Any, *, grace_s: float = 5.0) -> subprocess.Popen[bytes]:
        command = [
            str(pretend_vllm.python),
            "--model",
            str(pretend_vllm.folder),
            "--served-model-name",
            "small",
        ]
        return subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                leash.__file__,
                str(grace_s),
                *command,
                "--host",
                "127.0.0.1",
                "--port",
                "0",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )

    @pytest.mark.parametrize("deaf", [False, True])
    def test_all_end_when_its_holder_is_killed(self, pretend_vllm: Any, eventually: Make, deaf: bool) -> None:
        pretend_vllm.behaves(children="stubborn", deaf=deaf)
        holder = "import subprocess, sys; subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE).wait()"
        command = [
            sys.executable,
            "-I",
            "-S",
            leash.__file__,
            "0.5",
            str(pretend_vllm.python),
            "--model",
            str(pretend_vllm.folder),
        ]
        command += ["--served-model-name", "small", "--host", "127.0.0.1", "--port", "0"]
        with subprocess.Popen([sys.executable, "-c", holder, *command], stdout=subprocess.DEVNULL) as held:
            eventually(lambda: len(pretend_vllm.starts()) == 1)
            (start,) = pretend_vllm.starts()
            held.kill()
        eventually(lambda: not lives(start["pid"]) and not lives(start["child"]))

    def test_the_exit_code_is_the_commands(self, pretend_vllm: Any) -> None:
        pretend_vllm.behaves(exit=7)
        with self.hold(pretend_vllm) as held:
            assert held.wait(timeout=20) == 7

    def test_a_signal_is_told_apart(self, pretend_vllm: Any, eventually: Make) -> None:
        with self.hold(pretend_vllm) as held:
            eventually(lambda: len(pretend_vllm.starts()) == 1)
            os.kill(pretend_vllm.starts()[0]["pid"], signal.SIGKILL)
            assert held.wait(timeout=20) == 128 + signal.SIGKILL

    def test_sigterm_lets_go(self, pretend_vllm: Any, eventually: Make) -> None:
        with self.hold(pretend_vllm) as held:
            eventually(lambda: len(pretend_vllm.starts()) == 1)
            held.terminate()
            assert held.wait(timeout=20) == 128 + signal.SIGTERM or held.returncode == 0
