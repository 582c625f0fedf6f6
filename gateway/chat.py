"""`POST /v1/chat/completions`: the hot path, a plain ASGI endpoint around the pipeline."""

from __future__ import annotations

import time

from gateway import names
from gateway.auth import Gate
from gateway.client import Client, ClientGone
from gateway.envelope import refusal_of
from gateway.metrics import NOWHERE, Metrics
from gateway.pipeline import Pipeline
from gateway.turn import Arrival
from serving.errors import RequestError


class ChatEndpoint:
    """Admits the caller, reads the body, hands it to the pipeline and sends what comes back."""

    def __init__(self, pipeline: Pipeline, gate: Gate, metrics: Metrics, *, max_body_bytes: int) -> None:
        self._pipeline = pipeline
        self._gate = gate
        self._metrics = metrics
        self.max_held_bytes = max_body_bytes

    async def __call__(self, client: Client) -> None:
        """Serve one request to its end."""
        began = time.perf_counter()
        try:
            caller = self._gate.admit(client.header("authorization"))
            raw = await client.read(self.max_held_bytes)
        except ClientGone:
            return
        except RequestError as error:
            refusal = refusal_of(error)
            self._metrics.record_request(
                NOWHERE, NOWHERE, names.REASON_REFUSED, refusal.status, time.perf_counter() - began
            )
            await client.refuse(refusal)
            return
        arrival = Arrival(
            raw=raw,
            request_id=client.request_id,
            caller=caller,
            headers=client.headers,
            task=client.header(names.TASK_HEADER),
            route=client.header(names.ROUTE_HEADER),
            retries=_count(client.header(names.RETRY_COUNT_HEADER)),
        )
        with client.watched():
            reply = await self._pipeline.serve(arrival, client.has_turn)
            delivered = False
            try:
                await client.answer(reply)
                delivered = not client.gone
            finally:
                await reply.finish(delivered)


def _count(value: str | None) -> int:
    return int(value) if value is not None and value.isdecimal() and len(value) < 6 else 0
