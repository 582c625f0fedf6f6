"""Recorded traffic, split by a seed: what students learn from, as a log, and what they are tested on."""

from __future__ import annotations

import asyncio
import csv
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from serving import events
from serving.errors import UnderstudyError
from serving.estimate import unfinished_usage
from serving.exchange import Exchange, Json, TeacherAnswer
from serving.log import EventLog
from serving.log_settings import LogSettings
from serving.pricing import PriceList

TASK = "banking"
TEACHER = "gpt-4"
_FIRST = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
_CHARACTERS_A_TOKEN = 4
_ROWS_AN_ANSWER = 60


class NoRecording(UnderstudyError):
    """A file of the recording can't be read."""


@dataclass(frozen=True, slots=True)
class Example:
    """A message, what the teacher answered, and what is right."""

    text: str
    teacher: str
    gold: str


@dataclass(frozen=True, slots=True)
class Split:
    """One half of the stream to test on; the other one, with the messages beside the stream, to learn from.

    The messages of `seed.csv` have no teacher's answer: their gold label stands in for it.
    """

    seed: int
    prompt: str
    training: list[Example]
    test: list[Example]

    def request(self, text: str) -> Json:
        """A message as a client sends it."""
        messages = [{"role": "system", "content": self.prompt}, {"role": "user", "content": text}]
        return {"model": TASK, "messages": messages, "max_tokens": 32}

    def moment(self, number: int) -> datetime:
        """When the training message of this number was logged."""
        return datetime.fromtimestamp(_FIRST + number, UTC)

    def teacher_usd(self, prices: PriceList, example: Example) -> float | None:
        """USD that the teacher asks for its answer; its tokens are estimated, four characters each."""
        return prices.cost(TEACHER, self._usage(example))[0]

    def write_log(self, state_dir: Path, prices: PriceList) -> None:
        """Write the training messages as the log of a day 0."""
        asyncio.run(self._write(state_dir, prices))

    async def _write(self, state_dir: Path, prices: PriceList) -> None:
        log = EventLog(state_dir, LogSettings(durability="relaxed"))
        ids = random.Random(self.seed)
        try:
            for number, example in enumerate(self.training):
                exchange = self._exchange(example, number, ids, prices)
                await log.append(TASK, events.answered(exchange))
        finally:
            await log.aclose()

    def _exchange(self, example: Example, number: int, ids: random.Random, prices: PriceList) -> Exchange:
        created = _FIRST + number
        message = {"role": "assistant", "content": example.teacher, "refusal": None}
        teacher = TeacherAnswer(
            model=TEACHER,
            choices=[{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            usage=self._usage(example),
            latency_s=1.0,
            cost_usd=self.teacher_usd(prices, example),
            trainable=True,
        )
        return Exchange(
            id=f"{round(created * 1000):012x}{ids.getrandbits(64):016x}",
            request_id=f"req_{number}",
            created=created,
            task=TASK,
            tenant="bench",
            request=self.request(example.text),
            route="teacher",
            reason="no_release",
            teacher=teacher,
            propensity=1.0,
            cost_usd=teacher.cost_usd,
        )

    def _usage(self, example: Example) -> Json:
        prompt = unfinished_usage(self.request(example.text), None)["prompt_tokens"]
        answer = math.ceil(len(example.teacher) / _CHARACTERS_A_TOKEN)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def read_split(data: Path, seed: int, *, rows: int | None = None) -> Split:
    """Split the recording in the folder `data` by a seed; `rows` takes about so many to learn from, of a few answers.

    Raises NoRecording.
    """
    stream = _read(data / "stream.csv")
    random.Random(seed).shuffle(stream)
    half = len(stream) // 2
    training = [*stream[:half], *_read(data / "dev.csv"), *_read(data / "seed.csv")]
    random.Random(seed).shuffle(training)
    test = stream[half:]
    try:
        prompt = (data / "system_prompt.txt").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise NoRecording(f"{error.filename}: {error.strerror}") from error
    if rows is not None:
        few = sorted({one.gold for one in training})[: max(2, rows // _ROWS_AN_ANSWER)]
        training, test = (
            [one for one in part if one.teacher in few and one.gold in few][:rows]
            for part in (training, test)
        )
    return Split(seed, prompt, training, test)


def _read(path: Path) -> list[Example]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows: Sequence[dict[str, str]] = list(csv.DictReader(file))
        return [Example(row["text"], row.get("teacher") or row["gold"], row["gold"]) for row in rows]
    except (OSError, KeyError) as error:
        raise NoRecording(
            f"{path} is no recording with the columns text, teacher and gold: {error}"
        ) from error
