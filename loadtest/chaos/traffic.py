"""The campaign's clients: requests at a steady rate, and an independent note of what each client received.

Every message of the recording is known to the clients, so that a wrong answer is seen at once. About half of
the messages are on topics the student knows, a third repeats what was asked before, two in five are streamed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from serving.errors import UpstreamError
from serving.sse import EventParser
from serving.upstream import Upstream

MODEL = "chaos"
STUDENT_TOPICS = ("parcels", "refunds", "invoices", "passwords", "addresses", "returns", "vouchers", "orders")
TEACHER_TOPICS = (
    "allergies",
    "warranties",
    "complaints",
    "contracts",
    "damages",
    "taxes",
    "customs",
    "loans",
)
SYSTEM_PROMPT = "Name the topic."
PATIENCE_S = 8.0
"""How long a client waits for anything before it calls the request failed."""

_REPEATS = 0.35
_STREAMS = 0.4
_KEPT = 150
_MOST_UNDER_WAY = 1500


@dataclass(frozen=True, slots=True)
class Message:
    """One text and the teacher's answer to it."""

    text: str
    answer: str


@dataclass(slots=True)
class Receipt:
    """What one client saw. Times are of the monotonic clock, in seconds.

    `content` is the whole answer, or None where the client could tell that it has none; `status` 0: nothing
    came. `quiet`: the answer ended without an error, and without being whole. `hung_up`: the client went away.
    """

    request_id: str
    expected: str
    stream: bool
    began: float
    ended: float = 0.0
    status: int = 0
    route: str = ""
    content: str | None = None
    error: str = ""
    quiet: bool = False
    hung_up: bool = False

    @property
    def seconds(self) -> float:
        """Return how long the request took."""
        return self.ended - self.began

    @property
    def wrong(self) -> bool:
        """Say whether the client was told something that isn't so."""
        return self.quiet or (self.content is not None and self.content != self.expected)

    @property
    def failed(self) -> bool:
        """Say whether the client saw an error, or had to give up."""
        return self.content is None and not self.hung_up


def recorded(count: int) -> list[Message]:
    """Make the recording: `count` messages, all different. The teacher's own topics get answers that differ."""
    topics = STUDENT_TOPICS + TEACHER_TOPICS
    made = []
    for number in range(count):
        topic = topics[number % len(topics)]
        answer = topic if topic in STUDENT_TOPICS else f"{topic} {number:06d}"
        made.append(Message(f"ticket {number:06d} about {topic}", answer))
    return made


class Traffic:
    """Clients of one gateway. `receipts` grows as answers come in."""

    def __init__(self, base_url: str, messages: Iterator[Message], *, seed: int = 0) -> None:
        self.receipts: list[Receipt] = []
        self._messages = messages
        self._seed = seed
        self._random = random.Random(seed)
        self._upstream = Upstream(base_url, timeout_s=PATIENCE_S, max_connections=_MOST_UNDER_WAY)
        self._recent: list[Message] = []
        self._under_way: set[asyncio.Task[None]] = set()
        self._number = 0

    async def flow(self, per_second: float, seconds: float) -> None:
        """Send requests at a steady rate, whatever becomes of those before; returns when the last is sent."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        for position in range(round(per_second * seconds)):
            await asyncio.sleep(max(0.0, start + position / per_second - loop.time()))
            if len(self._under_way) < _MOST_UNDER_WAY:
                self.send()

    def send(self) -> asyncio.Task[None]:
        """Send one request and go on; its receipt is there when it is over."""
        if len(self._recent) == _KEPT and self._random.random() < _REPEATS:
            message = self._random.choice(self._recent)
        else:
            message = next(self._messages)
            self._recent = [*self._recent[-_KEPT + 1 :], message]
        self._number += 1
        task = asyncio.create_task(self._one(message, f"chaos-{self._seed}-{self._number:06d}"))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def settle(self) -> None:
        """Wait for everything under way."""
        if self._under_way:
            await asyncio.wait(self._under_way)

    async def aclose(self) -> None:
        """Wait for everything under way and close the connections."""
        await self.settle()
        await self._upstream.aclose()

    async def _one(self, message: Message, request_id: str) -> None:
        stream = self._random.random() < _STREAMS
        receipt = Receipt(request_id, message.answer, stream, time.monotonic())
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._ask(message, receipt)
        except (UpstreamError, TimeoutError) as error:
            receipt.error = receipt.error or type(error).__name__
        except asyncio.CancelledError:
            receipt.hung_up = True
        finally:
            receipt.ended = time.monotonic()
            self.receipts.append(receipt)

    async def _ask(self, message: Message, receipt: Receipt) -> None:
        body: dict[str, Any] = {
            "model": MODEL,
            "temperature": 0,
            "messages": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": message.text},
            ],
        }
        if receipt.stream:
            body["stream"] = True
        headers = [
            ("content-type", "application/json"),
            ("authorization", "Bearer chaos"),
            ("x-request-id", receipt.request_id),
        ]
        response = await self._upstream.request(
            "POST", "/chat/completions", headers=headers, body=orjson.dumps(body)
        )
        async with response:
            receipt.status = response.status
            receipt.route = dict(response.headers).get("x-understudy-route", "")
            if response.status != 200:
                receipt.error = f"status {response.status}"
                await response.read()
            elif receipt.stream:
                await self._read_stream(receipt, response.chunks())
            else:
                receipt.content = _content(await response.read())
                receipt.quiet = receipt.content is None

    @staticmethod
    async def _read_stream(receipt: Receipt, pieces: Any) -> None:
        parser = EventParser()
        text = ""
        async for piece in pieces:
            for event in parser.feed(piece):
                if event == b"[DONE]":
                    receipt.content = text
                    return
                data = orjson.loads(event)
                if "error" in data:
                    receipt.error = "error in the stream"
                    return
                for choice in data["choices"]:
                    text += choice["delta"].get("content") or ""
        receipt.quiet = True


def _content(raw: bytes) -> str | None:
    try:
        content = orjson.loads(raw)["choices"][0]["message"]["content"]
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None
