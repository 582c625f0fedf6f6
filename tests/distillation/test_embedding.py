"""The student `linear` over embeddings, the whole way: a sentence encoder, a log, releases, a gateway that answers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from distillation.candidate import CandidateFile
from distillation.economics import summarise
from distillation.evaluate import evaluate
from distillation.learning import Lesson, learn
from distillation.past import read_past
from serving.closed_students import load_closed_student
from serving.embedded import EmbeddedLinear
from serving.engines import Engines
from serving.errors import DamagedRelease
from serving.learning_settings import LearningSettings
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.student_choice import StudentChoice
from serving.student_settings import OnnxSettings, StudentSettings
from serving.task_settings import TaskSettings

Make = Callable[..., Any]
TOPICS = ("card", "parcel", "refund", "loan")
WORDS = {
    f"{topic}{number}": [
        float(place == index) + 0.1 * number * (place == (index + 1) % 4) for place in range(4)
    ]
    for index, topic in enumerate(TOPICS)
    for number in range(5)
}
"""Each topic has five words, the later ones nearer to the next topic."""


def messages(count: int, *, noise: float = 0.05, seed: int = 1) -> list[tuple[str, str]]:
    """Distinct messages of a few words and what the teacher answers: the topic of most of them, mostly."""
    chance = random.Random(seed)
    made: dict[str, str] = {}
    while len(made) < count:
        topic = chance.choice(TOPICS)
        said = [f"{topic}{chance.randrange(5)}" for _ in range(4)]
        said += chance.choices(list(WORDS), k=chance.randrange(3))
        made[" ".join(said)] = chance.choice(TOPICS) if chance.random() < noise else topic
    return list(made.items())


@pytest.fixture
def embedder(tmp_path: Path, text_files: Make) -> Path:
    folder = tmp_path / "encoder"
    folder.mkdir()
    for name, data in text_files(WORDS, longest=24).items():
        (folder / name).write_bytes(data)
    return folder


def settings(state: Path, embedder: Path, python: Path | None = None, **task: Any) -> Settings:
    student = StudentChoice(kind="linear", features="embedding", embedder=embedder)
    own = {
        "name": "intents",
        "match": {"model": "intents"},
        "max_disagreement": 0.1,
        "student": student,
        **task,
    }
    return Settings(
        state_dir=state, task=[TaskSettings(**own)], learning=LearningSettings(python=python, interval_s=0)
    )


def lesson(configured: Settings) -> Lesson:
    (found,) = learn(configured, "intents")
    return found


def test_from_a_log_to_a_release(write_log: Make, exchanges: Make, embedder: Path) -> None:
    state = write_log(exchanges(messages(300)))
    configured = settings(state, embedder)
    found = lesson(configured)
    assert (found.outcome, found.release) == ("released", "r0001"), found.message
    assert found.look is not None
    assert found.look["agreement"] > 0.85
    about = {name: found.look[name] for name in ("student", "features", "embedder", "sees")}
    assert about == {"student": "linear", "features": "embedding", "embedder": "encoder", "sees": "message"}
    release = ReleaseStore(state).read("intents", "r0001")
    assert {"model.onnx", "tokenizer.json", "student.npz", "student.json"} <= set(release.files)
    assert release.files["model.onnx"] == (embedder / "model.onnx").read_bytes()
    student = load_closed_student(release.files, Engines())
    assert isinstance(student, EmbeddedLinear)
    assert student.answers[student.predict("card0 card0 card1").index].key == "card"
    assert {name: student.files()[name] for name in ("student.json", "model.onnx")} == {
        name: release.files[name] for name in ("student.json", "model.onnx")
    }
    judged = evaluate(
        configured,
        "intents",
        recording=Recording(Path("more.csv"), tuple(Recorded(t, a) for t, a in messages(50, seed=2))),
    )
    assert judged.log is not None
    assert judged.log.agreement.value == pytest.approx(found.look["agreement"])
    assert judged.recording is not None
    assert (judged.recording.agreement.value or 0.0) > 0.8
    # The next look redoes what this release decided.
    write_log(exchanges(messages(700, seed=3), start=2_000_000.0, release="r0001", route="teacher"))
    second = lesson(configured)
    assert second.release == "r0002", second.message
    past = read_past(ReleaseStore(state), "intents", "r0001", Engines(remember=1000))
    text = messages(1, seed=4)[0][0]
    assert past.rank(text) == read_past(ReleaseStore(state), "intents", "r0001").rank(text)


def test_what_is_too_long_is_never_accepted(write_log: Make, exchanges: Make, embedder: Path) -> None:
    long = " ".join(["card0"] * 40)
    state = write_log(exchanges([*messages(300), (long, "card")]))
    found = lesson(settings(state, embedder))
    assert (found.release, found.labels) == ("r0001", 301), found.message
    release = ReleaseStore(state).read("intents", "r0001")
    assert len(orjson.loads(release.files["held_out.json"])) == 300


def test_a_gateway_answers_and_says_the_same_after_a_restart(
    write_log: Make, exchanges: Make, embedder: Path, stand_in: Make, gateway: Make
) -> None:
    lines = messages(300)
    state = write_log(exchanges(lines))
    configured = settings(state, embedder)
    assert lesson(configured).release == "r0001"
    long = " ".join(["card0"] * 40)
    teacher = stand_in({**dict(lines), long: "card"}, model="big")
    task = [one.model_dump(exclude_unset=True) for one in configured.task]

    def answered() -> dict[str, tuple[str, str, str]]:
        running = gateway(teacher.url, task=task)
        said = {}
        for text, _ in lines[:30]:
            answer = running.post(json=asking(text))
            route, sure = answer.headers["x-understudy-route"], answer.headers["x-understudy-confidence"]
            said[text] = (route, sure, answer.json()["choices"][0]["message"]["content"])
        refused = running.post(json=asking(long))
        assert refused.headers["x-understudy-reason"].startswith("unsupported:")
        served = next(one for one in running.exchanges() if one.by_student)
        assert served.student.model == "linear-embedding"
        assert served.student.device_s > 0
        return said

    first, second = answered(), answered()
    assert first == second
    served = [text for text, (route, _, _) in first.items() if route == "student"]
    assert len(served) > 10
    expected = load_closed_student(ReleaseStore(state).read("intents", "r0001").files, Engines())
    for text in served:
        assert first[text][2] == expected.answers[expected.predict(text).index].key


def test_an_e_process_tests_what_was_fixed(write_log: Make, exchanges: Make, embedder: Path) -> None:
    state = write_log(exchanges(messages(300, noise=0.01)))
    configured = settings(state, embedder, admission="e-process")
    assert "candidate 1 is fixed" in lesson(configured).message
    task = state / "tasks" / "intents"
    beside = list((task / "candidate").iterdir())
    assert len(beside) == 2, "the encoder lies beside the candidate"
    write_log(exchanges(messages(290, noise=0.01, seed=5), start=2_000_000.0))
    found = lesson(configured)
    assert (found.outcome, found.release) == ("released", "r0001"), found.message
    policy = configured.for_task("intents")
    assert CandidateFile(state, "intents").read(policy) is not None
    elsewhere = StudentSettings(onnx=OnnxSettings(providers=["MadeUpExecutionProvider"]))
    (summary,) = summarise(configured.model_copy(update={"student": elsewhere}))
    assert summary.outlook.startswith(
        "its candidate can't be tested: ONNX Runtime knows no MadeUpExecutionProvider, and this build has "
    )
    beside[0].write_bytes(b"damaged")
    assert CandidateFile(state, "intents").read(policy) is None


def test_a_candidate_of_before_a_setting_stays(write_log: Make, exchanges: Make, tmp_path: Path) -> None:
    state = write_log(exchanges([(f"{text} {number}", text) for number in range(150) for text in ("a", "b")]))
    task = TaskSettings(name="intents", max_disagreement=0.1, admission="e-process")
    assert "is fixed" in lesson(Settings(state_dir=state, task=[task])).message
    written = CandidateFile(state, "intents")
    kept = written.read(task)
    assert kept is not None
    path = state / "tasks" / "intents" / "candidate.json"
    data = orjson.loads(path.read_bytes())
    for name in ("features", "embedder"):
        del data["content"]["promise"]["student"][name]
    from distillation.candidate import _checksum

    path.write_bytes(orjson.dumps({**data, "checksum": _checksum(data["content"])}))
    assert written.read(task) is not None
    other = task.model_copy(update={"student": StudentChoice(sees="last")})
    assert written.read(other) is None


class TestFolders:
    """What `student.embedder` may name, and what is said of what it may not."""

    def held(self, write_log: Make, exchanges: Make, folder: Path) -> str:
        found = lesson(settings(write_log(exchanges(messages(80))), folder))
        assert (found.outcome, found.release) == ("held", None)
        return found.message

    def test_one_that_isnt_there(self, write_log: Make, exchanges: Make, tmp_path: Path) -> None:
        said = self.held(write_log, exchanges, tmp_path / "nowhere")
        assert "student.embedder: there is no folder" in said

    def test_one_that_holds_nothing(self, write_log: Make, exchanges: Make, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        said = self.held(write_log, exchanges, tmp_path / "empty")
        assert "config.json can't be read (No such file or directory); nor is there an export" in said

    def test_weights_that_broke_off(self, write_log: Make, exchanges: Make, tmp_path: Path) -> None:
        folder = tmp_path / "cut"
        folder.mkdir()
        for name in ("config.json", "tokenizer.json"):
            (folder / name).write_text("{}")
        (folder / "model.safetensors").write_bytes(b"cut off")
        said = self.held(write_log, exchanges, folder)
        assert "model.safetensors isn't whole: copy or download it again; nor is there an export" in said

    def test_a_model_that_broke_off(self, write_log: Make, exchanges: Make, embedder: Path) -> None:
        data = (embedder / "model.onnx").read_bytes()
        (embedder / "model.onnx").write_bytes(data[: len(data) // 2])
        said = self.held(write_log, exchanges, embedder)
        assert "the export in" in said
        assert "can't load model.onnx" in said

    def test_no_tokenizer(self, write_log: Make, exchanges: Make, embedder: Path) -> None:
        (embedder / "tokenizer.json").unlink()
        said = self.held(write_log, exchanges, embedder)
        assert "nor is there an export, model.onnx with tokenizer.json" in said

    def test_an_export_in_a_folder_of_its_own(self, write_log: Make, exchanges: Make, embedder: Path) -> None:
        (embedder / "onnx").mkdir()
        (embedder / "model.onnx").rename(embedder / "onnx" / "model.onnx")
        assert lesson(settings(write_log(exchanges(messages(300))), embedder)).release == "r0001"

    def test_no_python_that_could_export_it(self, write_log: Make, exchanges: Make, embedder: Path) -> None:
        (embedder / "model.onnx").unlink()
        (embedder / "config.json").write_text("{}")
        (embedder / "pytorch_model.bin").write_bytes(b"")
        configured = settings(write_log(exchanges(messages(80))), embedder, Path("/nowhere/python"))
        for _ in range(2):  # that shows at once, so that it may be tried each time
            (found,) = learn(configured, "intents", unattended=True)
            assert found.outcome == "held"
            assert "/nowhere/python can't be run" in found.message
            assert "learning.python" in found.message


def exportable(tmp_path: Path) -> Path:
    """A folder with a model that has to be exported, by its looks."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"")
    return folder


def test_an_export_that_failed_waits_unless_somebody_asks_or_something_changes(
    write_log: Make, exchanges: Make, tmp_path: Path
) -> None:
    folder, starts, python = exportable(tmp_path), tmp_path / "starts", tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho x >> {starts}; kill -9 $$\n")
    python.chmod(0o755)
    configured = settings(write_log(exchanges(messages(80))), folder, python)

    def tried(*, unattended: bool = False, configured: Settings = configured) -> str:
        """What is said, if it wasn't tried."""
        before = starts.read_text() if starts.exists() else ""
        (found,) = learn(configured, "intents", unattended=unattended)
        assert found.outcome == "held"
        return "" if starts.exists() and starts.read_text() != before else found.message

    assert tried(unattended=True) == "", "the first time"
    assert tried(unattended=True) == (
        f"no look was taken: student.embedder: exporting {folder} failed, and it hasn't changed since; it is tried "
        "again in 60 minutes, or now by `understudy learn`"
    )
    assert tried() == "", "a person asks"
    (setback,) = (configured.state_dir / "embedders").glob("*.setback.json")
    setback.write_bytes(orjson.dumps({**orjson.loads(setback.read_bytes()), "at": 0}))
    assert tried(unattended=True) == "", "an hour has passed"
    assert tried(unattended=True), "and waits again"
    (folder / "config.json").write_text('{"mended": true}')
    assert tried(unattended=True) == "", "the folder has changed"
    assert tried(unattended=True)
    patient = LearningSettings(python=python, interval_s=0, stall_timeout_s=9000)
    changed = configured.model_copy(update={"learning": patient})
    assert tried(unattended=True, configured=changed) == "", "the configuration has changed"


@pytest.mark.parametrize("admission", ["looks", "e-process"])
def test_without_the_extra_it_is_said_what_to_install(
    write_log: Make, exchanges: Make, embedder: Path, tmp_path: Path, admission: str
) -> None:
    state = write_log(exchanges(messages(300)))
    if admission == "e-process":
        assert "is fixed" in lesson(settings(state, embedder, admission=admission)).message
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "onnxruntime.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'onnxruntime'\", name='onnxruntime')"
    )
    (tmp_path / "understudy.toml").write_text(
        f'''state_dir = "{state}"
        [[task]]
        name = "intents"
        max_disagreement = 0.1
        admission = "{admission}"
        student = {{ kind = "linear", features = "embedding", embedder = "{embedder}" }}
        '''
    )
    done = subprocess.run(
        [sys.executable, "-m", "understudy", "learn", "--task", "intents"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(gone), str(Path(__file__).parents[2])])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "intents: held: " in done.stdout, done.stderr
    assert "pip install 'understudy[encoder]'" in done.stdout.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_damage_is_told(write_log: Make, exchanges: Make, embedder: Path) -> None:
    state = write_log(exchanges(messages(300)))
    lesson(settings(state, embedder))
    files = ReleaseStore(state).read("intents", "r0001").files
    described = orjson.loads(files["student.json"])
    damages = [
        {"model.onnx": files["model.onnx"][:-40]},
        {"tokenizer.json": b"{}"},
        {"student.npz": files["student.npz"][:-40]},
        {"student.json": orjson.dumps({**described, "features": "pixels"})},
        {"student.json": orjson.dumps({**described, "answers": described["answers"][1:]})},
        {"student.json": b"[]"},
    ]
    for damage in damages:
        with pytest.raises(DamagedRelease):
            load_closed_student({**files, **damage}, Engines())
    without = {name: data for name, data in files.items() if name != "model.onnx"}
    with pytest.raises(DamagedRelease, match=r"no model\.onnx"):
        load_closed_student(without, Engines())


def test_a_real_sentence_encoder(write_log: Make, exchanges: Make, torch_python: Path, minilm: Path) -> None:
    """all-MiniLM-L6-v2, exported once by the Python that has torch, tells topics that share no word."""
    asked = {
        "card": ("where is my new bank card", "the plastic you sent hasn't come", "my visa is still missing"),
        "loan": ("can I borrow ten thousand", "what does a mortgage cost", "interest on credit for a house"),
    }
    lines = [
        (f"{text}, case {number}", topic)
        for number in range(25)
        for topic, said in asked.items()
        for text in said
    ]
    state = write_log(exchanges(lines))
    configured = settings(state, minilm, torch_python)
    assert lesson(configured).release == "r0001"
    (made,) = [path for path in (state / "embedders").iterdir() if path.is_dir()]
    at = made.stat().st_mtime_ns
    write_log(exchanges([(f"{text}!", answer) for text, answer in lines * 1], start=2_000_000.0))
    again = settings(state, minilm, Path("/nowhere/python"))
    assert lesson(again).release == "r0002", "what was exported stays"
    assert made.stat().st_mtime_ns == at
    inodes = {
        (state / f"tasks/intents/releases/{name}/model.onnx").stat().st_ino for name in ("r0001", "r0002")
    }
    assert len(inodes) == 1, "one file on the disk"
    student = load_closed_student(ReleaseStore(state).read("intents", "r0002").files, Engines())
    assert isinstance(student, EmbeddedLinear)
    assert student.answers[student.predict("a mortgage for our flat").index].key == "loan"
    vector = student.embedder.numbers("where is my card")
    assert vector.shape == (384,)
    assert float(np.linalg.norm(vector)) == pytest.approx(1.0, abs=1e-4)


def asking(text: str) -> dict[str, Any]:
    return {"model": "intents", "messages": [{"role": "user", "content": text}]}
