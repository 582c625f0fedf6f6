"""Real vLLM servers on the CPU, one that writes and one that sorts, with tiny models trained for the purpose.

Each starts with the first test that asks for it and serves the whole session. UNDERSTUDY_TEST_VLLM_URL and
UNDERSTUDY_TEST_VLLM_POOLING_URL name servers that run already (the model is the first they list, its folder what they
were started with).
"""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.tiny_models import Recipe, trained

CHECKOUT = Path(__file__).parents[2]
PROMPT = CHECKOUT / "examples" / "system_prompt.txt"
REPLY_PROMPT = Path(__file__).with_name("reply_prompt.txt")
START_S = 420.0
PATIENCE_S = 90.0

# When whoever holds the other end of its stdin is gone, however that came, the group of processes goes too.
_GUARD = """\
import contextlib, os, sys
sys.stdin.buffer.read()
with contextlib.suppress(ProcessLookupError):
    os.killpg(int(sys.argv[1]), 9)
"""

_WARM_UP: dict[str, dict[str, Any]] = {
    "vllm": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "logprobs": True},
    "vllm_pooling": {"input": "Hello"},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests here may wait for a server to start; those that kill it come last."""
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        item.add_marker(pytest.mark.timeout(600))
        item.add_marker(pytest.mark.torch)
    items.sort(key=lambda item: item.get_closest_marker("kills") is not None)


@dataclass(frozen=True)
class TinyModels:
    """Where the models and the rows they were trained on are."""

    lm: Path
    classifier: Path
    past: Path


@dataclass
class RunningVllm:
    """A vLLM server: its root `url`, the `model` it serves by this name from `folder`. `log` is None for another's."""

    url: str
    model: str
    folder: Path
    warm_up: dict[str, Any]
    log: Path | None = None
    command: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    _guard: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it (again); it isn't ready yet."""
        assert self.log is not None
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound, it would wait for the core that others keep busy
            "OMP_NUM_THREADS": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment.pop("PYTHONPATH", None)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        guard = [sys.executable, "-c", _GUARD, str(self.process.pid)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)

    def wait(self) -> None:
        """Wait until it is ready and has answered once: the first answer takes seconds."""
        deadline = time.monotonic() + START_S
        while not self.answers():
            if self.process is not None and self.process.poll() is not None:
                pytest.fail(f"vLLM ended instead of starting:\n{self.said()}")
            if time.monotonic() > deadline:
                pytest.fail(f"vLLM wasn't ready within {START_S:.0f} s:\n{self.said()}")
            time.sleep(0.25)
        path = "/v1/chat/completions" if "messages" in self.warm_up else "/classify"
        answer = self.post(path, {"model": self.model, **self.warm_up})
        assert answer.status_code == 200, f"{answer.text}\n{self.said()}"

    def answers(self) -> bool:
        """Whether it is there."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        return False

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Ask it directly."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE_S)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels, as the server counts."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(f'{k}="{v}"' in series for k, v in labels.items()):
                total += float(value)
        return total

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and all of its children. Skips the test where the server isn't ours."""
        if self.process is None:
            pytest.skip("the server that was named is somebody's")
        with contextlib.suppress(ProcessLookupError):
            if self.process.returncode is None:
                os.killpg(self.process.pid, number)

    @contextlib.contextmanager
    def slowed(self) -> Iterator[None]:
        """Give it a tenth of its time while the context lasts: whoever wants to meet it at work will.

        At full speed its longest answer takes about a second, and on a machine where others work too, a client can be
        late by as much.
        """
        done = threading.Event()

        def hold() -> None:
            while not done.wait(0.002):
                self.signal(signal.SIGSTOP)
                done.wait(0.018)
                self.signal(signal.SIGCONT)

        held = threading.Thread(target=hold)
        if self.process is not None:  # somebody's server keeps its speed
            held.start()
        try:
            yield
        finally:
            done.set()
            if held.is_alive():
                held.join()

    def kill(self) -> None:
        """End it as the kernel does when memory is short; nothing of it is left then. Skips if it isn't ours."""
        self.signal(signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """End it and its children, if it is ours and there."""
        if self._guard is not None:
            self._guard.communicate(timeout=30)
            self._guard = None
        if self.process is not None:
            self.process.wait(30)

    def said(self) -> str:
        """The end of its log."""
        return "" if self.log is None else self.log.read_text(errors="replace")[-6000:]


@pytest.fixture(scope="session")
def tiny_models(torch_python: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """The models, trained unless an earlier session did it (below .cache/models, or where UNDERSTUDY_MODELS says)."""
    cache = Path(os.environ.get("UNDERSTUDY_MODELS", CHECKOUT / ".cache" / "models"))
    past, replies = _rows(tmp_path_factory.mktemp("rows"))
    recipes = (
        Recipe("lm", rows=(past, replies), prompts=(PROMPT, REPLY_PROMPT)),
        Recipe("classifier", rows=(past,), steps=300),
    )
    with ThreadPoolExecutor() as both:
        lm, classifier = both.map(lambda recipe: trained(recipe, cache, python=torch_python), recipes)
    return TinyModels(lm, classifier, past)


def _rows(folder: Path) -> tuple[Path, Path]:
    """What the models learn from: messages of the kind the demo sends, none of those it sends, and replies to some."""
    with (CHECKOUT / "examples" / "parcels.csv").open(newline="", encoding="utf-8") as file:
        sent = {row["text"] for row in csv.DictReader(file)}
    with Path(__file__).with_name("replies.csv").open(newline="", encoding="utf-8") as file:
        reply_to = {row["label"]: row["reply"] for row in csv.DictReader(file)}
    past, replies = folder / "past.csv", folder / "replies.csv"
    generate = [
        sys.executable,
        str(CHECKOUT / "examples" / "generate.py"),
        "--seed",
        "7",
        "--count",
        "1100",
        str(past),
    ]
    subprocess.run(generate, check=True)
    with past.open(newline="", encoding="utf-8") as file:
        drawn = [(row["text"], row["teacher"]) for row in csv.DictReader(file) if row["text"] not in sent]
    for path, rows in (
        (past, drawn[:900]),
        (replies, [(text, reply_to[teacher]) for text, teacher in drawn[:200]]),
    ):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "teacher"])
            writer.writerows(rows)
    return past, replies


@pytest.fixture(scope="session")
def _servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, RunningVllm]]:
    """Both servers, as far as this session's tests ask for them, started at once."""
    wanted = {
        name
        for item in request.session.items
        for name in ("vllm", "vllm_pooling")
        if name in getattr(item, "fixturenames", ())
    }
    servers = {}
    with contextlib.ExitStack() as ended:
        for name in sorted(wanted):
            server = _another(name)
            if server is None:
                server = _ours(name, request, tmp_path_factory.mktemp(name))
                ended.callback(server.close)
                server.start()
            servers[name] = server
        yield servers


def _another(name: str) -> RunningVllm | None:
    """The server that the environment names, if it names one."""
    named = {"vllm": "UNDERSTUDY_TEST_VLLM_URL", "vllm_pooling": "UNDERSTUDY_TEST_VLLM_POOLING_URL"}[name]
    url = os.environ.get(named, "").rstrip("/")
    if not url:
        return None
    served = httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]
    return RunningVllm(url, served["id"], Path(served["root"]), _WARM_UP[name])


def _ours(name: str, request: pytest.FixtureRequest, folder: Path) -> RunningVllm:
    python: Path = request.getfixturevalue("torch_python")
    models: TinyModels = request.getfixturevalue("tiny_models")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    if name == "vllm":
        model, weights = "tiny", models.lm
        options = ["--max-model-len", "1024", "--enable-lora", "--max-loras", "4", "--max-lora-rank", "16"]
        options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    else:
        model, weights = "tiny-classifier", models.classifier
        options = ["--runner", "pooling"]
    server = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", port]
    what = [
        "--model",
        str(weights),
        "--served-model-name",
        model,
        "--dtype",
        "float32",
        "--max-num-seqs",
        "16",
    ]
    command = (*server, *what, "--enforce-eager", *options)
    return RunningVllm(
        f"http://127.0.0.1:{port}", model, weights, _WARM_UP[name], folder / "log.txt", command
    )


@pytest.fixture(scope="session")
def vllm(_servers: dict[str, RunningVllm]) -> RunningVllm:
    """A vLLM that writes: the demo's labels for the demo's prompt, and replies for that of `reply_prompt.txt`."""
    server = _servers["vllm"]
    server.wait()
    return server


@pytest.fixture
def revived(vllm: RunningVllm) -> RunningVllm:
    """The same, started again if a test before ended it."""
    if not vllm.answers():
        vllm.start()
        vllm.wait()
    return vllm


@pytest.fixture
def patiently() -> Callable[[Callable[[], bool]], None]:
    """Wait until something holds that takes a model on a busy machine; fail after a minute and a half."""

    def wait(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, f"it didn't happen within {PATIENCE_S:.0f} s"
            time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def vllm_pooling(_servers: dict[str, RunningVllm]) -> RunningVllm:
    """A vLLM that sorts the demo's messages (`/classify`)."""
    server = _servers["vllm_pooling"]
    server.wait()
    return server
