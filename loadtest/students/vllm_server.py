"""A vLLM with one model, for as long as a student of it is measured."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import orjson

from loadtest.processes import pinned
from serving.errors import UnderstudyError

_PATIENCE_S = 600.0
_ON_ONE_CORE = ("--enforce-eager", "--max-model-len", "1024", "--dtype", "float32", "--max-num-seqs", "16")
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it is pinned from outside
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class NoServer(UnderstudyError):
    """vLLM didn't come up; holds its last words."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers: where, the session its processes are in, and how long it took to the first answer."""

    base_url: str
    session: int
    start_s: float


@contextlib.contextmanager
def vllm_server(python: Path, model: Path, name: str, work: Path, *, core: int | None) -> Iterator[Server]:
    """Run vLLM with a language model: on one core, or as it likes where there is none. Raises NoServer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--model", str(model), "--served-model-name", name]
    if core is not None:
        command += [*_ON_ONE_CORE]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | _ENVIRONMENT
    log = work / "vllm.log"
    began = time.perf_counter()
    with log.open("wb") as output, nullcontext() if core is None else pinned(core):
        process = subprocess.Popen(  # noqa: S603 - the environment that the user names
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        base_url = f"http://127.0.0.1:{port}/v1"
        _wait(process, base_url, name, log)
        yield Server(base_url, process.pid, time.perf_counter() - began)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], base_url: str, name: str, log: Path) -> None:
    asked = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    request = urllib.request.Request(  # noqa: S310 - our own http URL
        f"{base_url}/chat/completions",
        data=orjson.dumps(asked),
        headers={"content-type": "application/json"},
    )
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(request, timeout=60.0),  # noqa: S310 - the same
        ):
            return
        if process.poll() is not None:
            break
        time.sleep(0.25)
    said = " | ".join(log.read_text(errors="replace").splitlines()[-5:])
    raise NoServer(f"vLLM with {name} wasn't ready after {_PATIENCE_S:.0f} s, or ended; it said: {said}")
