"""`understudy doctor`, run as people run it, against teachers and Redis servers that are well and that aren't."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from pydantic import SecretStr

from gateway.doctor_local import check_configuration, check_disk
from gateway.doctor_remote import check_redis
from gateway.doctor_student import check_students
from gateway.doctor_training import check_training
from gateway.doctor_vllm import check_vllm_start
from gateway.finding import Finding
from serving.cache_settings import CacheSettings
from serving.learning_settings import LearningSettings
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.server_settings import ServerSettings
from serving.settings import Settings
from serving.stand_in import create_stand_in
from serving.stand_in_call import StandInHttp
from serving.student_choice import StudentChoice
from serving.student_settings import StudentSettings, VllmSettings
from serving.task_settings import TaskSettings
from serving.teacher_settings import TeacherSettings

Start = Callable[..., Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def doctor(tmp_path: Path) -> Start:
    """Run the command on a configuration; gives its exit code and what it printed."""

    def run(toml: str, *options: str, **env: str) -> tuple[int, str, str]:
        (tmp_path / "understudy.toml").write_text(toml)
        done = subprocess.run(
            [sys.executable, "-m", "understudy", "doctor", *options],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def config(teacher: str, more: str = "") -> str:
    return f"""
state_dir = "here"
[teacher]
base_url = "{teacher}/v1"
model = "big"
api_key_env = "TEACHER_KEY"
trainable = true
price = {{input = 10.0, output = 30.0}}
{more}
"""


def verdicts(out: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in json.loads(out)["findings"]:
        assert (finding["advice"] is None) == (finding["verdict"] == "ok")
        found.setdefault(finding["check"], []).append(finding["verdict"])
    return found


def test_a_sound_configuration_is_found_so(
    doctor: Start, stand_in: Start, redis: Start, tmp_path: Path
) -> None:
    teacher = stand_in({}, api_key="sk-teacher", default="yes", model="big")
    cache = redis("--maxmemory", "32mb", "--maxmemory-policy", "allkeys-lru", password="redis-secret")
    toml = config(teacher.url, f'[cache]\nurl = "{cache.url}"')
    code, out, err = doctor(toml, "--ask", "--json", TEACHER_KEY="sk-teacher")
    assert (code, err) == (0, "")
    assert json.loads(out)["fit"] is True
    found = verdicts(out)
    assert found["teacher"] == ["ok", "ok"]
    assert found["clock"] == found["price"] == found["answer"] == ["ok"]
    assert found["redis"] == ["ok", "ok"]
    assert not any("problem" in each for each in found.values())
    assert teacher.stats()["answered"] == 1, "one answer was paid for"
    assert list((tmp_path / "here").iterdir()) == [], "nothing is left behind"
    assert cache.command("DBSIZE") == 0
    code, out, err = doctor(toml, TEACHER_KEY="sk-teacher")
    assert (code, err) == (0, "")
    assert "an fsync takes" in out
    assert teacher.stats()["answered"] == 1, "only --ask pays"
    assert "secret" not in out
    assert "sk-teacher" not in out


def test_what_is_wrong_is_named_with_what_to_do_and_without_secrets(
    doctor: Start, stand_in: Start, redis: Start
) -> None:
    teacher = stand_in({}, api_key="sk-right")
    cache = redis(password="redis-secret")
    url = cache.url.replace("redis-secret", "redis-wrong-secret")
    toml = config(teacher.url, f'[server]\nhost = "0.0.0.0"\nadmin_key = "sk-admin"\n[cache]\nurl = "{url}"')
    code, out, err = doctor(toml, "--json", "--ask", TEACHER_KEY="sk-wrong")
    assert (code, err) == (1, "")
    found = verdicts(out)
    assert found["keys"] == ["problem"], "anyone may spend the teacher's key"
    assert found["teacher"] == ["ok", "problem"]
    assert found["answer"] == ["problem"]
    assert found["redis"] == ["problem"]
    assert "doesn't accept the key in TEACHER_KEY: 401" in out
    for secret in ("sk-wrong", "sk-admin", "secret"):
        assert secret not in out


def test_what_cant_be_read_or_reached_is_said(doctor: Start, tmp_path: Path) -> None:
    code, out, err = doctor("[server]\nprot = 1\n")
    assert (code, out) == (2, "")
    assert err == "understudy: understudy.toml: unknown key server.prot: did you mean server.port?\n"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (tmp_path / "here").write_text("")
    code, out, _ = doctor(config(f"http://127.0.0.1:{port}"), "--json", TEACHER_KEY="k")
    assert code == 1
    assert f"no connection to 127.0.0.1:{port}: connection refused" in out
    found = verdicts(out)
    assert found["disk"] == found["teacher"] == ["problem"]


def test_where_settings_come_from_is_said(doctor: Start, tmp_path: Path) -> None:
    unreachable = {"UNDERSTUDY_TEACHER__BASE_URL": "http://127.0.0.1:9/v1"}
    _, out, _ = doctor("", **unreachable)
    assert "read from understudy.toml; over it go UNDERSTUDY_TEACHER__BASE_URL" in out
    assert "127.0.0.1:9: connection refused" in out
    (tmp_path / "understudy.toml").rename(tmp_path / "other.toml")
    done = subprocess.run(
        [sys.executable, "-m", "understudy", "doctor", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **unreachable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "there is no understudy.toml: every key has its default" in done.stdout


def test_https_where_there_is_none_is_told_from_a_bad_certificate(doctor: Start, stand_in: Start) -> None:
    teacher = stand_in({})
    _, out, _ = doctor(config(teacher.url.replace("http:", "https:")), "--json", TEACHER_KEY="k")
    assert "it doesn't speak TLS; is it http:// there?" in out


def test_a_database_that_redis_doesnt_have_is_named(redis: Start) -> None:
    url = redis().url + "/99"
    (finding,) = asyncio.run(check_redis(SecretStr(url)))
    assert finding.verdict == "problem"
    assert finding.said == "it can't be used: it has no database of the number in cache.url"


@pytest.mark.parametrize(
    ("status", "verdict"),
    [(401, "problem"), (403, "problem"), (404, "warning"), (500, "warning"), (429, "warning")],
)
def test_a_teacher_without_models_may_still_do(
    doctor: Start, serve: Start, status: int, verdict: str
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    code, out, _ = doctor(config(serve(app)), "--json", TEACHER_KEY="k")
    assert verdicts(out)["teacher"] == ["ok", verdict]
    assert code == (1 if verdict == "problem" else 0)


def test_settings_that_contradict_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    settings = Settings(
        server=ServerSettings(host="10.0.0.1", port=9000, api_keys=["plain"]),
        teacher=TeacherSettings(base_url="http://127.0.0.1:9000/v1", api_key_env="TEACHER_KEY"),
        cache=CacheSettings(share="task"),
    )
    found = {finding.check: finding for finding in check_configuration(settings)}
    assert "environment variable TEACHER_KEY is empty" in found["keys"].said
    assert "nobody can read /metrics" in found["metrics"].said
    assert found["learning"].said == "nothing is learned: teacher.trainable is false"
    itself = settings.model_copy(update={"server": ServerSettings(port=9000)})
    assert "this gateway itself" in {f.check: f for f in check_configuration(itself)}["teacher"].said


def test_a_redis_that_grows_or_fills_up_is_warned_about(redis: Start) -> None:
    grows = asyncio.run(check_redis(CacheSettings(url=redis().url).url))
    assert [finding.verdict for finding in grows] == ["ok", "warning"]
    assert "maxmemory 0" in grows[1].said
    fills = asyncio.run(check_redis(CacheSettings(url=redis("--maxmemory", "32mb").url).url))
    assert "noeviction" in fills[1].said
    full = asyncio.run(check_redis(CacheSettings(url=redis("--maxmemory", "1").url).url))
    assert [finding.verdict for finding in full] == ["problem"]
    assert full[0].said.startswith("refuses to store anything (O")


def test_a_folder_that_cant_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (finding,) = check_disk(tmp_path / "file" / "state")
    assert finding.verdict == "problem"


@pytest.mark.parametrize(
    ("logprobs", "waits_s", "verdict", "said"),
    [
        (True, 20.0, "ok", "'small' answered in "),
        (True, 0.0001, "warning", "'small' answered in "),
        (False, 20.0, "problem", "'small' gives no log-probabilities, so that it can never be trusted"),
        (None, 20.0, "problem", "'small': the student at 127.0.0.1:9 can't be reached"),
    ],
)
def test_a_student_behind_a_server(
    serve: Start, logprobs: bool | None, waits_s: float, verdict: str, said: str
) -> None:
    row = Recorded("Say yes.", "yes", confidence=0.9 if logprobs else None)
    url = serve(create_stand_in(Recording(Path("student.csv"), (row,)), model="small"), http=StandInHttp)
    choice = StudentChoice(
        kind="lm",
        base_url="http://127.0.0.1:9/v1" if logprobs is None else f"{url}/v1",
        model="small",
        hold_back_s=waits_s,
    )
    # The same student of two tasks is asked once, a linear one not at all.
    tasks = [TaskSettings(name=name, student=choice) for name in ("a", "b")]
    (found,) = asyncio.run(check_students(Settings(task=[*tasks, TaskSettings(name="c")])))
    assert (found.check, found.verdict) == ("student", verdict)
    assert found.said.startswith(said)
    assert (found.advice is None) == (verdict == "ok")


def test_a_served_classifier(classifier: Start) -> None:
    def found(labels: tuple[str, str]) -> Finding:
        url = classifier(lambda _: [0.9, 0.1], labels)
        choice = StudentChoice(kind="encoder", base_url=url, model="bert")
        (said,) = asyncio.run(check_students(Settings(task=[TaskSettings(name="a", student=choice)])))
        return said

    well, nameless = found(("yes", "no")), found(("LABEL_0", "LABEL_1"))
    assert (well.verdict, well.said.startswith("'bert' answered in ")) == ("ok", True)
    assert nameless.verdict == "problem"
    assert "must carry id2label" in nameless.said


def test_another_python_is_asked_without_our_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, seen = tmp_path / "python", tmp_path / "seen"
    asked.write_text(f'#!/bin/sh\nenv >> {seen}\nexec {sys.executable} "$@"\n')
    asked.chmod(0o755)
    monkeypatch.setenv("TEACHERS_KEY", "sk-of-ours")
    monkeypatch.setenv("UNDERSTUDY_SERVER__ADMIN_KEY", "sk-of-ours")
    settings = Settings(
        teacher=TeacherSettings(api_key_env="TEACHERS_KEY"),
        learning=LearningSettings(python=asked),
        student=StudentSettings(vllm=VllmSettings(model="named", python=str(asked))),
        task=[TaskSettings(name="a", student=StudentChoice(kind="encoder", base=tmp_path))],
    )
    check_training(settings)
    assert "sk-of-ours" not in seen.read_text()
    seen.unlink()
    check_vllm_start(settings)
    assert "PYTHONSAFEPATH=1" in seen.read_text()
    assert "sk-of-ours" not in seen.read_text()


def test_the_folder_of_a_sentence_encoder(tmp_path: Path) -> None:
    bare = python_with_nothing(tmp_path)

    def found(folder: Path) -> list[Finding]:
        choice = StudentChoice(features="embedding", embedder=folder)
        tasks = [TaskSettings(name=name, student=choice) for name in ("a", "b")]
        learning = LearningSettings(python=bare)
        return check_training(Settings(learning=learning, task=[*tasks, TaskSettings(name="c")]))

    whole = tmp_path / "whole"
    (whole / "onnx").mkdir(parents=True)
    (whole / "onnx" / "model.onnx").write_bytes(b"")
    (whole / "tokenizer.json").write_bytes(b"")
    assert [(said.check, said.verdict) for said in found(whole)] == [("student", "ok")] * 2
    for folder, said in ((tmp_path, "nor is there an export"), (tmp_path / "no", "no folder")):
        assert found(folder)[0].verdict == "problem"
        assert said in found(folder)[0].said
    # One that is yet to be exported needs a Python that can.
    unexported = tmp_path / "unexported"
    unexported.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (unexported / name).write_text("{}")
    (unexported / "pytorch_model.bin").write_bytes(b"x")
    assert [(said.check, said.verdict) for said in found(unexported)] == [
        ("student", "ok"),
        ("student", "ok"),
        ("training", "warning"),
    ]
    assert "can't export sentence encoders: it has no torch" in found(unexported)[2].said


def test_a_live_release_that_needs_onnx_runtime(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    store = ReleaseStore(tmp_path)
    for name, files in (
        ("plain", {"student.json": b"{}"}),
        ("encoded", {"model.onnx": b"", "student.json": b"{}"}),
    ):
        assert check_training(settings) == []
        store.set_live(name, store.write(name, files, {}))
    assert [(said.check, said.said) for said in check_training(settings)] == [
        ("student", "what serves encoders is installed")
    ]
    elsewhere = Settings.model_validate(
        {"state_dir": tmp_path, "student": {"onnx": {"providers": ["OpenVINO"]}}}
    )
    (found,) = check_training(elsewhere)
    assert (found.verdict, found.said) == (
        "problem",
        "an encoder can't be served: ONNX Runtime knows no OpenVINO (OpenVINOExecutionProvider?), and this build has "
        f"{', '.join(onnxruntime.get_available_providers())}: change student.onnx.providers",
    )
    store.set_live("encoded", None)
    assert check_training(settings) == []


def test_the_vllm_that_is_to_be_run(tmp_path: Path) -> None:
    def found(**vllm: Any) -> list[tuple[str, str]]:
        settings = Settings.model_validate({"student": {"vllm": {"model": str(tmp_path), **vllm}}})
        return [(said.verdict, f"{said.said} → {said.advice}") for said in check_vllm_start(settings)]

    ((verdict, said),) = found(python=str(python_with_nothing(tmp_path)))
    assert (verdict, "has no vLLM → install vLLM there (pip install vllm)" in said) == ("problem", True)
    ((verdict, said),) = found(python="/nowhere/python")
    assert (verdict, "/nowhere/python isn't there" in said) == ("problem", True)
    ((verdict, said),) = found(python=sys.executable, model="/nowhere/model")
    assert (verdict, "there is no /nowhere/model" in said) == ("problem", True)
    ((verdict, said),) = found(python="/bin/false")
    assert (verdict, "/bin/false can't be asked for vLLM" in said) == ("problem", True)
    has = tmp_path / "python"
    has.write_text(f'#!{sys.executable}\nprint("[]")\n')
    has.chmod(0o755)
    assert found(python=str(has)) == [("ok", f"{has} has vLLM → None")]
    assert check_vllm_start(Settings()) == []


def python_with_nothing(folder: Path) -> Path:
    bare = folder / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    return bare


def test_what_fine_tunes_encoders(tmp_path: Path) -> None:
    def found(base: Path, python: Path | None) -> dict[str, list[str]]:
        settings = Settings.model_validate(
            {
                "learning": {"python": python},
                "task": [{"name": "a", "student": {"kind": "encoder", "base": base}}],
            }
        )
        said: dict[str, list[str]] = {}
        for finding in check_training(settings):
            said.setdefault(finding.verdict, []).append(f"{finding.said} → {finding.advice}")
        return said

    assert check_training(Settings()) == []
    problems = found(tmp_path / "nowhere", python_with_nothing(tmp_path))["problem"]
    assert any("there is no folder" in said for said in problems)
    assert any(
        "has no torch, transformers, onnx, onnxruntime, tokenizers → run `pip install 'understudy[train]'`"
        in said
        for said in problems
    )
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    well = found(folder, tmp_path / "gone")
    assert f"{folder} can be fine-tuned → None" in well["ok"]
    assert any("set learning.python to a Python that runs" in said for said in well["problem"])


def test_the_command_asks_students(doctor: Start, stand_in: Start) -> None:
    teacher = stand_in({}, api_key="sk-teacher", default="yes", model="big")
    student = (
        '[[task]]\nname = "a"\nstudent = {kind = "lm", base_url = "http://127.0.0.1:9/v1", model = "small"}'
    )
    code, out, _ = doctor(config(teacher.url, student), "--json", TEACHER_KEY="sk-teacher")
    assert (code, verdicts(out)["student"]) == (1, ["problem"])
