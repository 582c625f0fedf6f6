"""A server with vLLM's command line and the few endpoints that matter, ready in a blink: what runs vLLM is tried on it.

Run as a Python would be: `pretend_vllm.py -m vllm.entrypoints… --model FOLDER --port N …`. How it behaves stands in
FOLDER/behaviour.json, read anew whenever it matters:

- ready_after_s: /health says so from then on
- says: lines on stderr at the start; exit: the code it ends with then
- mute: accepts questions and never answers them, /health included if it is "wholly"
- deaf: doesn't end at SIGTERM
- children: whether it has a child of its own; "stubborn": one that ignores SIGTERM
- token_s: seconds between the tokens of an answer; answer: its words, each a token

Each start is a line of FOLDER/started: its pid, its child's, its command line and environment, as JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_BEGAN = time.monotonic()
_CHILD = "import signal, sys, time; signal.signal(signal.SIGTERM, int(sys.argv[1])); time.sleep(600)"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    model: str

    def log_message(self, format: str, *args: Any) -> None:
        print(f'INFO:     127.0.0.1:1 - "{self.command} {self.path} HTTP/1.1" 200 OK', flush=True)

    def do_GET(self) -> None:
        behaviour = read(self.folder)
        if behaviour.get("mute") == "wholly":
            time.sleep(600)
        ready = time.monotonic() - _BEGAN >= behaviour.get("ready_after_s", 0)
        if self.path == "/health":
            self.reply(200 if ready else 503, b"")
        elif self.path == "/v1/models" and self.admitted():
            self.reply(200, json.dumps({"data": [{"id": self.model}]}).encode())
        elif self.path == "/metrics":
            self.reply(200, f"vllm:generation_tokens_total {behaviour.get('progress', 0)}\n".encode())
        else:
            self.reply(404, b"{}")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.admitted():
            return
        behaviour = read(self.folder)
        if behaviour.get("mute"):
            time.sleep(600)
        if self.path == "/v1/completions":
            self.reply(200, json.dumps({"choices": [{"text": "a"}]}).encode())
            return
        print(f"INFO answering with {self.headers['authorization']}", flush=True)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        words = behaviour.get("answer", ["yes"])
        for number, word in enumerate(words):
            self.event(json.dumps(chunk(asked["model"], word, last=number == len(words) - 1)))
            time.sleep(behaviour.get("token_s", 0))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data: str) -> None:
        raw = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
        self.wfile.flush()

    def admitted(self) -> bool:
        if self.headers["authorization"] == f"Bearer {os.environ['VLLM_API_KEY']}":
            return True
        self.reply(401, b'{"error": "Unauthorized"}')
        return False

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def chunk(model: str, word: str, *, last: bool) -> dict[str, Any]:
    logprobs = {"content": [{"token": word, "logprob": -0.01, "bytes": None, "top_logprobs": []}]}
    choice = {"index": 0, "delta": {"content": word}, "logprobs": logprobs}
    return {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": model,
        "choices": [{**choice, "finish_reason": "stop" if last else None}],
    }


def read(folder: Path) -> dict[str, Any]:
    behaviour: dict[str, Any] = json.loads((folder / "behaviour.json").read_text())
    return behaviour


def main(arguments: list[str]) -> int:
    given = dict(itertools.pairwise(arguments))
    folder = Path(given["--model"])
    behaviour = read(folder)
    child = None
    if behaviour.get("children"):
        heeds = signal.SIG_IGN if behaviour["children"] == "stubborn" else signal.SIG_DFL
        child = subprocess.Popen([sys.executable, "-S", "-c", _CHILD, str(int(heeds))])
    started = {
        "pid": os.getpid(),
        "child": child.pid if child else None,
        "arguments": arguments,
        "environment": dict(os.environ),
        "at": time.time(),
    }
    with (folder / "started").open("a") as file:
        file.write(json.dumps(started) + "\n")
    for line in behaviour.get("says", []):
        print(line, file=sys.stderr, flush=True)
    if behaviour.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "exit" in behaviour:
        return int(behaviour["exit"])
    Handler.folder = folder
    Handler.model = given["--served-model-name"]
    server = ThreadingHTTPServer((given["--host"], int(given["--port"])), Handler)
    server.daemon_threads = True
    if not behaviour.get("deaf"):
        stop = threading.Thread(target=server.shutdown)
        signal.signal(signal.SIGTERM, lambda *_: stop.start())
    server.serve_forever(poll_interval=0.05)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
