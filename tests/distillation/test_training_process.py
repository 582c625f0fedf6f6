"""Scripts that train, as processes of their own: real ones, without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillation.training_process import TrainingFailed, run_script, training_folder
from loadtest.processes import is_running
from serving.learning_settings import LearningSettings
from serving.settings import Settings
from serving.student_choice import StudentChoice
from serving.student_settings import StudentSettings, VllmSettings
from serving.task_settings import TaskSettings
from serving.teacher_settings import TeacherSettings

ENDS_WITH_PARENT = """
import os, threading
def end():
    while os.read(0, 1):
        pass
    os._exit(3)
threading.Thread(target=end, daemon=True).start()
"""

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a script of this text on a job; gives what it came to."""

    def start(text: str, job: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        script = tmp_path / "script.py"
        script.write_text(ENDS_WITH_PARENT + text)
        with training_folder(tmp_path / "state", "intents") as folder:
            return run_script(
                script,
                job or {},
                Settings(learning=LearningSettings(**{"python": sys.executable, **changes})),
                folder,
                changes.pop("progress", lambda _: None),
            )

    return start


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it didn't happen within 60 s"
        time.sleep(0.02)


def test_it_says_how_far_it_is_and_what_it_came_to(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "job = json.load(open(sys.argv[1]))\n"
        "print('a library talks')\n"
        "print(json.dumps(['and', 'knows JSON']))\n"
        "for number in range(job['steps']): print(json.dumps({'progress': {'step': number}}), flush=True)\n"
        "print(json.dumps({'done': {'text': job['text']}}))\n"
    )
    heard: list[dict[str, Any]] = []
    with training_folder(tmp_path, "intents") as folder:
        job = {"steps": 2, "text": "Überweisung"}
        done = run_script(script, job, Settings(), folder, heard.append)
    assert done == {"text": "Überweisung"}
    assert heard == [{"step": 0}, {"step": 1}]


def test_nothing_of_ours_leads_in_and_nothing_is_fetched(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run(
        "import json, os, sys\n"
        "seen = {name: os.environ.get(name) for name in "
        "('PYTHONPATH', 'HF_HUB_OFFLINE', 'OMP_NUM_THREADS')}\n"
        "print(json.dumps({'done': {**seen, 'nice': os.nice(0), 'path': sys.path}}))\n",
        threads=3,
    )
    assert done["PYTHONPATH"] is None
    assert (done["HF_HUB_OFFLINE"], done["OMP_NUM_THREADS"]) == ("1", "3")
    assert done["nice"] >= 10
    assert str(tmp_path) not in done["path"]


def test_no_key_and_no_setting_of_ours_leads_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = (
        "OPENAI_API_KEY",
        "TEACHERS_KEY",
        "STUDENTS_KEY",
        "SERVERS_KEY",
        "UNDERSTUDY_CACHE__URL",
        "understudy_api_keys",
    )
    settings = Settings(
        teacher=TeacherSettings(api_key_env="TEACHERS_KEY"),
        student=StudentSettings(vllm=VllmSettings(urls=["http://127.0.0.1:1/v1"], api_key_env="SERVERS_KEY")),
        task=[
            TaskSettings(
                name="intents",
                student=StudentChoice(
                    kind="lm", model="m", base_url="http://127.0.0.1:1/v1", api_key_env="STUDENTS_KEY"
                ),
            )
        ],
    )
    for name in held:
        monkeypatch.setenv(name, "sk-of-ours")
    monkeypatch.setenv("LD_OF_THE_SYSTEM", "stays")
    script = tmp_path / "script.py"
    script.write_text("import json, os\nprint(json.dumps({'done': dict(os.environ)}))\n")
    with training_folder(tmp_path / "state", "intents") as folder:
        seen = run_script(script, {}, settings, folder, lambda _: None)
    assert [name for name, value in seen.items() if name in held or "sk-of-ours" in value] == []
    assert seen["LD_OF_THE_SYSTEM"] == "stays"


def test_a_missing_module_says_where_and_what_to_do(run: Run) -> None:
    with pytest.raises(TrainingFailed) as failed:
        run('print(\'{"missing": "torch"}\'); raise SystemExit(2)')
    assert str(failed.value) == (
        f"{sys.executable} has no module torch: run `pip install 'understudy[train]'` there (in a "
        "checkout: '.[train]'), or set learning.python to a Python that has it"
    )


def test_a_python_that_isnt_there(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingFailed, match=r"nowhere can't be run \(No such file or directory\): set learning\.python"
    ):
        run("", python=tmp_path / "nowhere")


def test_a_path_is_seen_from_here_and_a_name_in_path(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ours").symlink_to(sys.executable)
    says = "print('{\"done\": {}}')"
    assert run(says, python="bin/ours") == {}
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert run(says, python="ours") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("print('{\"error\": \"the base is odd\"}'); raise SystemExit(2)", "^the base is odd$"),
        ("raise ValueError('odd')", r"^script\.py ended with code 1: .*\| ValueError: odd$"),
        ("pass", r"^script\.py ended with code 0$"),
        ("print('{\"done\": {}}'); raise SystemExit(1)", r"^script\.py ended with code 1$"),
        ("print('{\"done\": ')", r"^script\.py ended with code 0$"),
        ("os.kill(os.getpid(), 9)", r"^script\.py was killed, as the system does when memory runs out$"),
        ("os.kill(os.getpid(), 15)", r"^script\.py was ended by signal 15$"),
    ],
)  # fmt: skip
def test_what_fails_says_why(run: Run, text: str, said: str) -> None:
    with pytest.raises(TrainingFailed, match=said):
        run(text)


def test_much_that_is_said_beside_blocks_nobody(run: Run) -> None:
    done = run(
        "import sys\nsys.stderr.write('x' * 10_000_000)\nprint('y' * 1_000_000)\nprint('{\"done\": {}}')\n"
    )
    assert done == {}


SILENT = "for 1 s it hadn't said how far it is, as one that has hung; .* raise learning.stall_timeout_s"


@pytest.mark.parametrize(
    "hangs",
    [
        "import time; time.sleep(600)",
        "while True: sys.stdout.write('a library tries again\\n'); sys.stdout.flush()",
        "sys.stdout.write('a library without an end of its line'); sys.stdout.flush(); time.sleep(600)",
        "print('{\"done\": {}}', flush=True); time.sleep(600)",
        "print('{\"done\": {}}', flush=True); os.close(1); time.sleep(600)",
        "subprocess.Popen(['sleep', '30'])",  # its child holds standard output, and says nothing either
    ],
    ids=["at once", "talking", "in a line", "at its end", "behind its end", "by its child"],
)
def test_what_hangs_is_ended(run: Run, tmp_path: Path, hangs: str) -> None:
    pid = tmp_path / "pid"
    text = (
        "import subprocess, sys, time\nfrom pathlib import Path\n"
        f"Path({str(tmp_path / 'writing')!r}).write_text(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'writing')!r}, {str(pid)!r})\n"  # it may be killed at any time
        f"print('odd', file=sys.stderr, flush=True)\n{hangs}\n"
    )
    with pytest.raises(TrainingFailed, match=rf"^script\.py was ended: {SILENT}") as failed:
        run(text, stall_timeout_s=1)
    assert (
        str(failed.value).endswith(": odd") or not pid.exists()
    )  # a machine too slow to start it within a second
    assert not pid.exists() or not Path(f"/proc/{pid.read_text()}").exists()


def test_what_says_now_and_then_how_far_it_is_may_take_its_time(run: Run) -> None:
    done = run(
        "import json, time\n"
        "for number in range(3): print(json.dumps({'progress': {}}), flush=True); time.sleep(3.5)\n"
        "print(json.dumps({'done': {'whole': True}}), end='')\n",
        stall_timeout_s=10,
    )
    assert done == {"whole": True}


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_us(tmp_path: Path, by: signal.Signals) -> None:
    script, pid = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(
        f"{ENDS_WITH_PARENT}\n"
        f"from pathlib import Path\nPath({str(pid)!r}).write_text(str(os.getpid()))\n"
        "import time; time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal\n"
            "from pathlib import Path\n"
            "from distillation.training_process import run_script, training_folder\n"
            "from serving.settings import Settings\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whoever started us may ignore it
            f"with training_folder(Path({str(tmp_path / 'state')!r}), 'intents') as folder:\n"
            f"    run_script(Path({str(script)!r}), {{}}, Settings(), folder, print)\n",
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        until(lambda: pid.exists() and bool(pid.read_text()))
    finally:
        parent.send_signal(by)
        parent.wait(timeout=60)
    until(lambda: not is_running(int(pid.read_text())))
    left = tmp_path / "state" / "tasks" / "intents" / "training"
    assert (left / "job.json").exists() == (by != signal.SIGINT), "only a Ctrl-C leaves time to clear up"
    with training_folder(tmp_path / "state", "intents") as folder:
        assert folder == left
        assert list(folder.iterdir()) == []
    assert not left.exists()


def test_a_training_that_is_broken_off_ends_its_process_and_what_that_started(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, subprocess, time\n"
        "started = subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL)\n"
        "print(json.dumps({'progress': {'pids': [os.getpid(), started.pid]}}), flush=True)\n"
        "time.sleep(600)\n"
    )
    heard: list[int] = []

    def enough(said: dict[str, Any]) -> None:
        heard.extend(said["pids"])
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), training_folder(tmp_path, "intents") as folder:
        run_script(script, {}, Settings(), folder, enough)
    assert time.monotonic() - began < 300
    own, started = heard
    assert not Path(f"/proc/{own}").exists()
    until(lambda: not is_running(started))
