"""Recorded rows as real traffic: chat completions with the official client, and what came back for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import openai
from openai.types.chat import ChatCompletion

from serving.exchange import Json
from serving.recording import Recorded

OWN_HEADER_PREFIX = "x-understudy-"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row.

    `choices` are OpenAI's, None when the request failed (`error` says how). `cost_usd` and the names come
    from the gateway's headers, None when they were absent. `latency_s` is the client's.
    """

    row: Recorded
    latency_s: float
    choices: list[Json] | None = None
    error: str | None = None
    request_id: str | None = None
    route: str | None = None
    reason: str | None = None
    task: str | None = None
    release: str | None = None
    cost_usd: float | None = None


@dataclass(frozen=True, slots=True)
class Sender:
    """Sends rows to `base_url`, each as a request of its own at temperature 0.

    None of them is answered from the cache: what is measured is who answers a request that hasn't been asked before,
    and a text that was recorded twice may have been answered in two ways.
    """

    client: openai.AsyncOpenAI
    model: str
    task: str | None
    system_prompt: str | None

    async def send(
        self, rows: Sequence[Recorded], *, concurrency: int, report: Callable[[Outcome], None]
    ) -> None:
        """Send `rows` in order, at most `concurrency` at a time; `report` gets each outcome as it comes.

        What `report` raises ends the sending and is raised from here.
        """
        waiting = iter(rows)

        async def work() -> None:
            for row in waiting:
                report(await self.ask(row))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(rows))):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors

    async def ask(self, row: Recorded) -> Outcome:
        """Send one row. What goes wrong is an outcome, not an exception."""
        messages: list[openai.types.chat.ChatCompletionMessageParam] = []
        if self.system_prompt:
            messages.append({"role": "system", "content": self.system_prompt})
        messages.append({"role": "user", "content": row.text})
        began = time.perf_counter()
        try:
            raw = await self.client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=messages,
                temperature=0,
                extra_headers={
                    "cache-control": "no-store",
                    **({f"{OWN_HEADER_PREFIX}task": self.task} if self.task else {}),
                },
            )
            latency_s = time.perf_counter() - began
            completion: ChatCompletion = raw.parse()
        except openai.APIStatusError as error:
            return Outcome(row, time.perf_counter() - began, error=f"{error.status_code}: {error.message}")
        except openai.OpenAIError as error:
            return Outcome(row, time.perf_counter() - began, error=str(error))

        def told(name: str) -> str | None:
            value = raw.headers.get(f"{OWN_HEADER_PREFIX}{name}")
            return None if value is None else str(value)

        cost = told("cost-usd")
        return Outcome(
            row=row,
            latency_s=latency_s,
            choices=[choice.model_dump(mode="json", exclude_unset=True) for choice in completion.choices],
            request_id=raw.headers.get("x-request-id"),
            route=told("route"),
            reason=told("reason"),
            task=told("task"),
            release=told("release"),
            cost_usd=None if cost is None else float(cost),
        )


def recorded_choices(row: Recorded) -> list[Json]:
    """Return the recorded answer as the choices of a completion, to compare with what came back."""
    message: Json = {"role": "assistant", "content": row.teacher}
    if row.tool_calls:
        message["tool_calls"] = row.tool_calls
    finish = "tool_calls" if row.tool_calls else "stop"
    return [{"index": 0, "message": message, "finish_reason": finish}]


def gold_choices(row: Recorded) -> list[Json]:
    """Return the right answer in the same form; `row.gold` must be known."""
    message = {"role": "assistant", "content": row.gold}
    return [{"index": 0, "message": message, "finish_reason": "stop"}]
