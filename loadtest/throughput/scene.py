"""The processes of the benchmark: a gateway with live students on one core, everything else on another.

The students are counted, not fitted: each answer's terms, weighted. They cost what fitted ones cost, since they know
as many terms and answers, and take a second instead of a minute. What they promise is next to nothing, since their
teacher says the same to everybody: they would be withdrawn after a few audits otherwise.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from loadtest.loopback import MODEL
from loadtest.processes import pinned
from loadtest.stack import KEY_VARIABLE, Child, start_gateway
from routers.confidence import Confidence
from routers.router import Router
from serving.closed_answers import KnownAnswer, TokenEstimate
from serving.linear import LinearStudent
from serving.recording import Recorded
from serving.releases import ReleaseStore
from serving.text_terms import terms

ANSWERED, ESCALATED, NO_RELEASE, CACHEABLE = "answered", "escalated", "no-release", "cacheable"
_EVERYTHING, _NOTHING = -1e6, 1e6
_PROMPT = (
    "You label messages that customers send to a support chat. Choose the one label that fits best, and answer with "
    "the label alone, exactly as it is written, nothing else."
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A way through the server: whom to ask, for which model, and what the head of its answers has to say."""

    name: str
    model: str
    expected: bytes
    cached: bool = False
    cacheable: bool = False


SCENARIOS = (
    Scenario("answered by linear", ANSWERED, b" 200 ,route: student,reason: confident"),
    Scenario("answered, may be cached", CACHEABLE, b" 200 ,route: student,reason: confident", cacheable=True),
    Scenario("from the cache", CACHEABLE, b" 200 ,route: cache", cached=True, cacheable=True),
    Scenario("escalated", ESCALATED, b" 200 ,route: teacher,reason: low_confidence"),
    Scenario("no release", NO_RELEASE, b" 200 ,route: teacher,reason: no_release"),
)
BARE = Scenario("a bare ASGI function", ANSWERED, b" 200 ")


class Script:
    """Requests that never repeat, made of recorded messages."""

    def __init__(self, rows: Sequence[Recorded]) -> None:
        self._texts = itertools.cycle([row.text for row in rows])
        self._numbers = itertools.count()

    def requests(self, scenario: Scenario, port: int, count: int) -> list[bytes]:
        """Write so many requests as bytes; those that are answered from the cache are all the same."""
        bodies = [self._body(scenario) for _ in range(1 if scenario.cached else count)]
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer unused\r\naccept: application/json\r\ncontent-length: %d\r\n\r\n"
        )
        written = [head % (port, len(body)) + body for body in bodies]
        return written * count if scenario.cached else written

    def _body(self, scenario: Scenario) -> bytes:
        messages = [
            {"role": "system", "content": _PROMPT},
            {"role": "user", "content": f"{next(self._texts)} (case {next(self._numbers)})"},
        ]
        extra = {"temperature": 0} if scenario.cacheable else {}
        return orjson.dumps({"model": scenario.model, "messages": messages, "max_tokens": 16, **extra})


@dataclass(frozen=True, slots=True)
class Running:
    """A server under test."""

    name: str
    port: int
    pid: int


@contextlib.contextmanager
def teacher(model: str = MODEL) -> Iterator[str]:
    """Run a teacher that answers at once, under a model's name; give the URL it has as one."""
    process = subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", "loadtest.loopback", model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the teacher was started without pipes")
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/at-once"
        process.stdin.close()


@contextlib.contextmanager
def gateway(
    name: str, work: Path, teacher_url: str, rows: Sequence[Recorded], *, checkout: Path | None, core: int
) -> Iterator[Running]:
    """Run a gateway, from this checkout or another one, pinned to a core. Its students answer as in `rows`."""
    state_dir = work / "state"
    student = _student(rows)
    for task, rank_threshold in ((ANSWERED, _EVERYTHING), (CACHEABLE, _EVERYTHING), (ESCALATED, _NOTHING)):
        router = Router(Confidence.of_score(slope=1.0, offset=0.0), rank_threshold)
        store = ReleaseStore(state_dir)
        files = {**student.files(), "router.json": router.dump()}
        store.set_live(task, store.write(task, files, {"student": "linear"}))
    config = work / "understudy.toml"
    config.write_text(_configuration(teacher_url, state_dir), encoding="utf-8")
    with pinned(core):
        child, base_url = start_gateway(config, work / "gateway.log", checkout=checkout)
    try:
        yield Running(name, int(base_url.rpartition(":")[2].partition("/")[0]), child.pid)
        child.check()
    finally:
        child.stop()


@contextlib.contextmanager
def bare(work: Path, *, core: int) -> Iterator[Running]:
    """Run the bare ASGI function, pinned to a core."""
    with pinned(core):
        child = Child("bare ASGI function", [], work / "bare.log", module="loadtest.throughput.bare")
    try:
        address = child.wait_for("listens on http")
        yield Running("bare", int(address.rpartition(":")[2]), child.pid)
    finally:
        child.stop()


def _student(rows: Sequence[Recorded]) -> LinearStudent:
    answers = sorted({row.teacher for row in rows if row.teacher is not None})
    words: Counter[tuple[str, int]] = Counter()
    characters: Counter[tuple[str, int]] = Counter()
    for row in rows:
        if row.teacher is not None:
            answer = answers.index(row.teacher)
            for counted, found in zip((words, characters), terms(row.text), strict=True):
                counted.update((term, answer) for term in found)
    word_names = sorted({term for term, _ in words})
    names = word_names + sorted({term for term, _ in characters})
    places = {term: place for place, term in enumerate(word_names)}
    weights = np.zeros((len(names), len(answers)), dtype=np.float32)
    for (term, answer), count in words.items():
        weights[places[term], answer] = count
    places = {term: len(word_names) + place for place, term in enumerate(names[len(word_names) :])}
    for (term, answer), count in characters.items():
        weights[places[term], answer] = count
    spread = (weights > 0).sum(axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    return LinearStudent(
        vocabulary=names,
        words=len(word_names),
        idf=(1.0 + np.log(len(answers) / spread)).astype(np.float32),
        weights=4 * weights,
        intercept=np.zeros(len(answers), dtype=np.float32),
        answers=[KnownAnswer(answer, [_choice(answer)], 4, 20) for answer in answers],
        tokens=TokenEstimate(fixed=20.0, per_character=0.25),
    )


def _choice(text: str) -> dict[str, object]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}


def _configuration(teacher_url: str, state_dir: Path) -> str:
    tasks = "".join(
        f'\n[[task]]\nname = "{name}"\nmatch = {{ model = "{name}" }}\nmax_disagreement = 0.9999\nnoise_rate = 0\n'
        for name in (ANSWERED, CACHEABLE, ESCALATED, NO_RELEASE)
    )
    return f"""\
state_dir = {orjson.dumps(str(state_dir)).decode()}

[server]
port = 0

[teacher]
base_url = "{teacher_url}"
api_key_env = "{KEY_VARIABLE}"
trainable = true
price = {{ input = 2.5, output = 10.0 }}

[learning]
interval_s = 0
{tasks}"""
