"""What all tests share: real servers on free ports, and a way to say what a test can't do without."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
import hypothesis
import numpy as np
import openai
import pytest
import uvicorn
from uvicorn.server import ServerState

from routers.confidence import Confidence
from routers.router import Router
from serving.closed_answers import KnownAnswer, TokenEstimate
from serving.disk import Disk
from serving.events import answered
from serving.exchange import Exchange, TeacherAnswer
from serving.failures import Failures
from serving.linear import LinearStudent
from serving.log import EventLog, LogReader
from serving.log_settings import LogSettings
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.stand_in import StandIn, create_stand_in
from serving.stand_in_call import StandInHttp

TEACHER_KEY = "teacher-key"

# How fast examples are made says how busy the machine is, and nothing about the code.
hypothesis.settings.register_profile("any-machine", suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any-machine")

App = Callable[..., Any]
Require = Callable[[str], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs torch, for `make test-vllm`."""
    for item in items:
        if "torch_python" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.torch)


@pytest.fixture(scope="session")
def require() -> Require:
    """Skip a test that needs a program this machine lacks; fail it where UNDERSTUDY_REQUIRE names it."""

    def check(name: str) -> None:
        if shutil.which(name) is None:
            _absent(f"{name} isn't installed", name)

    return check


@pytest.fixture(scope="session")
def torch_python() -> Path:
    """The Python that has torch, transformers and vLLM: `make install-vllm`, or UNDERSTUDY_VLLM_PYTHON."""
    beside = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    named = os.environ.get("UNDERSTUDY_VLLM_PYTHON")
    python = beside if named is None else Path(named)
    if not python.is_file():
        why = f"there is no {python}: make install-vllm, or name another in UNDERSTUDY_VLLM_PYTHON"
        _absent(why, "torch", "vllm")
    return python


def _absent(why: str, *names: str) -> NoReturn:
    required = {item.strip() for item in os.environ.get("UNDERSTUDY_REQUIRE", "").split(",")}
    for name in names:
        if name in required:
            pytest.fail(f"{why}, and UNDERSTUDY_REQUIRE names {name}")
    pytest.skip(why)


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serve ASGI apps with a real uvicorn, each on a free port, until the test ends; gives the base URL.

    `state` is what its connections share; other keywords go to uvicorn.
    """
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: App, *, state: ServerState | None = None, **options: Any) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=5, **options)
        server = uvicorn.Server(config)
        server.server_state = state or server.server_state
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        running.append((server, thread))
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "the server ended instead of starting"
            assert time.monotonic() < deadline, "the server didn't start within 20 s"
            time.sleep(0.005)
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(timeout=20)
        assert not thread.is_alive(), "a server didn't stop within 20 s"


@pytest.fixture
def classifier(serve: Callable[..., str]) -> Callable[..., str]:
    """Serve `/classify` as vLLM's pooling runner does; gives the base URL of its `/v1`.

    `classify` makes of a text the probabilities of `labels`, or a whole answer: a status and a body.
    """

    def start(classify: Callable[[str], list[float] | tuple[int, Any]], labels: Sequence[str]) -> str:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return
            raw = b""
            while True:
                message = await receive()
                raw += message.get("body", b"")
                if not message.get("more_body"):
                    break
            asked = json.loads(raw)
            made = (
                classify(asked["input"]) if scope["path"] == "/classify" else (404, {"detail": "Not Found"})
            )
            status, body = (
                made if isinstance(made, tuple) else (200, _classified(made, labels, asked["model"]))
            )
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": data})

        return f"{serve(app, lifespan='off')}/v1"

    return start


def _classified(probs: list[float], labels: Sequence[str], model: str) -> dict[str, Any]:
    item = {"index": 0, "label": labels[max(range(len(probs)), key=probs.__getitem__)]}
    usage = {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0}
    return {
        "id": "classify-1",
        "object": "list",
        "created": 1,
        "model": model,
        "data": [{**item, "probs": probs, "num_classes": len(probs)}],
        "usage": usage,
    }


class ForgetfulDisk(Disk):
    """A disk that knows what would be left of it without power: synced bytes under synced names.

    `sync` takes a moment, so that whoever doesn't wait for it is seen.
    """

    def __init__(self, sync_s: float = 0.0) -> None:
        self.syncs = 0
        self._sync_s = sync_s
        self._bytes: dict[int, int] = {}  # inode → how many of its bytes are safe
        self._names: dict[int, dict[str, int]] = {}  # a directory's inode → its safe names and their inodes
        self._lock = threading.Lock()

    def create(self, path: Path) -> int:
        fd = super().create(path)
        with self._lock:
            self._bytes[os.fstat(fd).st_ino] = 0  # it may have been the inode of another file before
        return fd

    def sync(self, fd: int) -> None:
        status = os.fstat(fd)
        time.sleep(self._sync_s)
        super().sync(fd)
        with self._lock:
            self.syncs += 1
            self._bytes[status.st_ino] = status.st_size

    def rename(self, source: Path, target: Path) -> None:
        with self._lock:
            super().rename(source, target)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        with self._lock:
            self._names[path.stat().st_ino] = {e.name: e.stat().st_ino for e in path.iterdir()}

    def without_power(self, state_dir: Path, copy: Path) -> Path:
        """Write into `copy` what would be left of `state_dir`."""
        with self._lock:
            inodes = {path.stat().st_ino: path for path in state_dir.rglob("*")}
            self._restore(state_dir, copy, inodes)
        return copy

    def _restore(self, directory: Path, copy: Path, inodes: dict[int, Path]) -> None:
        copy.mkdir(parents=True)
        for name, inode in self._names.get(directory.stat().st_ino, {}).items():
            path = inodes.get(inode)
            if path is not None and path.is_dir():
                self._restore(path, copy / name, inodes)
            elif path is not None:
                (copy / name).write_bytes(path.read_bytes()[: self._bytes.get(inode, 0)])


@pytest.fixture
def forgetful_disk() -> Callable[..., ForgetfulDisk]:
    """Make a disk that forgets what wasn't synced; `sync_s` is how long a sync takes."""
    return ForgetfulDisk


@dataclass(frozen=True)
class RunningStandIn:
    """A teacher that answers from a recording."""

    url: str
    app: StandIn

    def stats(self) -> dict[str, int]:
        stats: dict[str, int] = httpx.get(f"{self.url}/stats", verify=False).json()
        return stats

    def fail(self, *rules: dict[str, Any]) -> None:
        """Let these rules be its script of failures from now on; none: all is well again."""
        script = "\n".join(json.dumps(rule) for rule in rules)
        httpx.post(f"{self.url}/failures", content=script, verify=False).raise_for_status()


@pytest.fixture
def stand_in(serve: Callable[..., str]) -> Callable[..., RunningStandIn]:
    """Start a stand-in for `{text: answer}`; keywords go to `create_stand_in`."""

    def start(answers: dict[str, str], *, failures: Failures | None = None, **options: Any) -> RunningStandIn:
        rows = tuple(Recorded(text, answer) for text, answer in answers.items())
        app = create_stand_in(Recording(Path("answers.csv"), rows), failures=failures, **options)
        return RunningStandIn(serve(app, http=StandInHttp), app)

    return start


@dataclass(frozen=True)
class RunningGateway:
    """A gateway in this process."""

    url: str
    state_dir: Path

    def client(self, api_key: str = "client-key", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, **{"max_retries": 0, **options})

    def post(self, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        # `verify`: nothing is encrypted here, and reading the certificates takes 40 ms each time.
        return httpx.request(method, f"{self.url}{path}", verify=False, **options)

    def exchanges(self) -> list[Exchange]:
        """Return everything in the log, oldest first."""
        reader = LogReader(self.state_dir)
        found = [exchange for task in reader.tasks() for exchange in reader.exchanges(task).exchanges]
        return sorted(found, key=lambda exchange: (exchange.created, exchange.id))

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            series, _, value = line.rpartition(" ")
            has_labels = all(f'{key}="{label}"' in series for key, label in labels.items())
            if series.partition("{")[0] == name and has_labels:
                total += float(value)
        return total


@pytest.fixture
def gateway(
    serve: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunningGateway]:
    """Start a gateway before a teacher; keywords are sections of the settings.

    With `edge` its connections are those of `understudy serve` (gateway/edge.py), which close slowly.
    """
    # Imported here: most tests need no gateway, and it takes most of a second.
    from gateway.app import create_app
    from gateway.edge import Door, Edge

    def start(
        base_url: str,
        *,
        teacher_key: str | None = TEACHER_KEY,
        disk: Disk | None = None,
        edge: bool = False,
        **sections: Any,
    ) -> RunningGateway:
        if teacher_key is None:
            monkeypatch.delenv("TEACHER_KEY", raising=False)
        else:
            monkeypatch.setenv("TEACHER_KEY", teacher_key)
        state_dir = tmp_path / "state"
        given = {
            "state_dir": state_dir,
            "learning": {"interval_s": 0},
            **sections,
            # Else the teacher is asked twice now and then: chance has no place where its calls are counted.
            "task_defaults": {"noise_rate": 0.0, **sections.get("task_defaults", {})},
            "teacher": {
                "base_url": f"{base_url}/v1",
                "api_key_env": "TEACHER_KEY",
                "timeout_s": 5.0,
                "max_retries": 0,
                "trainable": True,
                "price": {"input": 10.0, "output": 30.0},
                **sections.get("teacher", {}),
            },
        }
        connections = {"http": Edge, "state": Door(receive_timeout_s=30.0)} if edge else {}
        return RunningGateway(serve(create_app(Settings(**given), disk=disk), **connections), state_dir)

    return start


@dataclass(frozen=True)
class RunningCommand:
    """`understudy serve` as a child process, ready to serve."""

    child: subprocess.Popen[str]
    url: str
    config: Path
    errors: Path

    @property
    def stderr(self) -> str:
        return self.errors.read_text()

    def workers(self) -> list[int]:
        """Return the process ids of its workers."""
        listed = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in listed}
        return [pid for pid, line in commands.items() if b"spawn_main" in line]

    def metric(self, name: str, **labels: str) -> float:
        return RunningGateway(self.url, self.config.parent).metric(name, **labels)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., RunningCommand]]:
    """Run `understudy serve` on a configuration in TOML; gives it once it is ready."""
    started: list[subprocess.Popen[str]] = []

    def start(
        toml: str, *options: str, env: dict[str, str] | None = None, wait: bool = True
    ) -> RunningCommand:
        config = tmp_path / "understudy.toml"
        config.write_text(toml)
        errors = tmp_path / f"stderr-{len(started)}"
        path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        with errors.open("w") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", "understudy", "serve", "--port", "0", *options],
                cwd=tmp_path,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, path)),
                    "UNDERSTUDY_TASK_DEFAULTS__NOISE_RATE": "0",  # as in `gateway`
                    **(env or {}),
                },
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        started.append(child)
        assert child.stdout is not None
        line = child.stdout.readline()
        found = re.search(r"http://[^ ]+", line)
        assert found, f"no address in {line!r}: {errors.read_text()}"
        running = RunningCommand(child, found.group().replace("0.0.0.0", "127.0.0.1"), config, errors)
        deadline = time.monotonic() + 60
        while wait:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{running.url}/readyz", timeout=5, verify=False).status_code == 200:
                    break
            assert time.monotonic() < deadline, f"not ready: {errors.read_text()}"
            time.sleep(0.05)
        return running

    yield start
    for child in started:
        child.kill()
        child.communicate()


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Wait until something holds that happens after an answer; fail after ten seconds."""

    def wait(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < deadline, "it didn't happen within 10 s"
            time.sleep(0.02)

    return wait


@pytest.fixture
def publish() -> Callable[..., str]:
    """Write a release and make it live; gives its name.

    Its student is sure of the given answers to texts of two words, and knows nothing about any other text. `rules` are
    the answers' (`routers.router.Router`).
    """

    def write(state_dir: Path, task: str, answers: dict[str, str], *, live: bool = True, **rules: Any) -> str:
        student = LinearStudent(
            vocabulary=list(answers),
            words=len(answers),
            idf=np.ones(len(answers), dtype=np.float32),
            weights=10 * np.eye(len(answers), dtype=np.float32),
            intercept=np.zeros(len(answers), dtype=np.float32),
            answers=[KnownAnswer(answer, [_choice(answer)], 3) for answer in answers.values()],
            tokens=TokenEstimate(fixed=8.0, per_character=0.25),
        )
        router = Router(Confidence.of_score(slope=1.0, offset=-2.0), rank_threshold=1.0, **rules)
        store = ReleaseStore(state_dir)
        files = {**student.files(), "router.json": router.dump()}
        name = store.write(task, files, {"student": "linear"})
        if live:
            store.set_live(task, name)
        return name

    return write


@pytest.fixture(scope="session")
def text_files() -> Callable[..., dict[str, bytes]]:
    """Make the files of a small model for ONNX Runtime: a text's numbers are the mean of its words' `weights`.

    It takes the time of so many large products (`slow`), and fails on texts with a certain word.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def make(
        weights: dict[str, list[float]],
        *,
        longest: int | None = 32,
        precision: str | None = "fp32",
        slow: int = 0,
        fails_on: str | None = None,
    ) -> dict[str, bytes]:
        width = len(next(iter(weights.values())))
        table = np.array([[0.0] * width, [0.0] * width, *weights.values()], dtype=np.float32)
        vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *weights])}
        nodes = [
            helper.make_node("Gather", ["table", "input_ids"], ["words"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["weight"]),
            helper.make_node("Mul", ["words", "weight"], ["seen"]),
            helper.make_node("ReduceSum", ["seen", "tokens"], ["sum"], keepdims=0),
            helper.make_node("ReduceSum", ["weight", "tokens"], ["count"], keepdims=0),
            helper.make_node("Max", ["count", "one"], ["divisor"]),
            helper.make_node("Div", ["sum", "divisor"], ["mean"]),
            # A place that isn't in the table of one is what the word leads to.
            helper.make_node("Gather", ["places", "input_ids"], ["place"]),
            helper.make_node("Gather", ["one", "place"], ["ones"]),
            helper.make_node("ReduceMin", ["ones"], ["least"], keepdims=0),
            helper.make_node("Expand", ["least", "large"], ["product0"]),
            *(
                helper.make_node("MatMul", [f"product{number}", "square"], [f"product{number + 1}"])
                for number in range(slow)
            ),
            helper.make_node("ReduceMin", [f"product{slow}"], ["nothing"], keepdims=0),
            helper.make_node("Mul", ["nothing", "zero"], ["zeros"]),
            helper.make_node("Add", ["mean", "zeros"], ["logits"]),
        ]
        given = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "tokens"])
            for name in ("input_ids", "attention_mask")
        ]
        made = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", width])
        constants = {
            "table": table,
            "last": np.array([2]),
            "tokens": np.array([1]),
            "one": np.array([1.0], dtype=np.float32),
            "places": np.array([int(word == fails_on) for word in vocabulary]),
            "large": np.array([1000, 1000] if slow else [1, 1]),
            "square": np.full((1000, 1000) if slow else (1, 1), 0.001, dtype=np.float32),
            "zero": np.zeros(1, dtype=np.float32),
        }
        held = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
        graph = helper.make_graph(nodes, "words", given, [made], held)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        said = {"gives": "logits", "precision": precision, "longest": longest}
        for name, value in said.items():
            if value is not None:
                model.metadata_props.add(key=f"understudy.{name}", value=str(value))
        tokenizer = {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        }
        return {"model.onnx": model.SerializeToString(), "tokenizer.json": json.dumps(tokenizer).encode()}

    return make


@pytest.fixture
def write_log(tmp_path: Path) -> Callable[..., Path]:
    """Write exchanges to a task's log as the gateway does; gives the state directory."""

    def write(exchanges: Iterable[Exchange], task: str = "intents") -> Path:
        async def append() -> None:
            log = EventLog(tmp_path / "state", LogSettings(durability="relaxed"))
            await asyncio.gather(*(log.append(task, answered(exchange)) for exchange in exchanges))
            await log.aclose()

        asyncio.run(append())
        return tmp_path / "state"

    return write


@pytest.fixture
def exchanges() -> Callable[..., list[Exchange]]:
    """Make the day-0 exchanges of `(text, teacher's answer)` pairs, a second apart."""

    def make(
        pairs: Iterable[tuple[str, str]], *, start: float = 1_000_000.0, **changes: Any
    ) -> list[Exchange]:
        made = []
        for number, (text, answer) in enumerate(pairs):
            usage = {"prompt_tokens": 20, "completion_tokens": 2, "total_tokens": 22}
            exchange = Exchange(
                id=f"{start:.0f}-{number:05d}",
                request_id=f"req_{number}",
                created=start + number,
                task="intents",
                tenant="t",
                request={"model": "intents", "messages": [{"role": "user", "content": text}]},
                route="teacher",
                reason="no_release",
                teacher=TeacherAnswer("big", [_choice(answer)], usage, 0.5, cost_usd=0.001, trainable=True),
                audit_rate=0.05,
                propensity=1.0,
                cost_usd=0.001,
            )
            made.append(dataclasses.replace(exchange, **changes))
        return made

    return make


def _choice(text: str) -> dict[str, Any]:
    return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
