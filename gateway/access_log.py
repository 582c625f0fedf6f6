"""At most one line for a request, when it is over: who answered, why, how long it took and what it cost.

Never content, never keys. Every request stands in the exchange log and in the metrics anyway, so that
lines are for what failed (always, as often as `Throttle` lets them) and for a sample of the rest.
"""

from __future__ import annotations

import logging
import random
import time

from gateway.client import Client
from gateway.log_format import FIELDS, Value
from gateway.turn import Turn

log = logging.getLogger("understudy.access")

_LONGEST = 200


class AccessLog:
    """Writes the lines. `sample` is the share (0 to 1) of requests that get one though nothing failed."""

    def __init__(self, *, sample: float) -> None:
        self._sample = sample

    def over(self, client: Client) -> None:
        """Note that a request is over."""
        turn = client.turn
        status = status_of(client)
        if status >= 500 or (turn is not None and turn.lost):
            log.warning("request", extra={FIELDS: _fields(client, turn, status)})
        elif self._sample and random.random() < self._sample:
            log.info("request", extra={FIELDS: _fields(client, turn, status)})


def status_of(client: Client) -> int:
    """Return how a request ended: its books' status if it had a turn, 499 for a client that went away."""
    if client.turn is not None and client.turn.status is not None:
        return client.turn.status
    return 499 if client.gone or client.status is None else client.status


def _fields(client: Client, turn: Turn | None, status: int) -> dict[str, Value]:
    """Return what the line says; what isn't known is left out."""
    fields: dict[str, Value] = {
        "request_id": client.request_id,
        "method": client.method,
        # Without its query, in which people have sent keys before.
        "path": client.target.partition("?")[0][:_LONGEST],
        "status": status,
        "duration_ms": _ms(time.perf_counter() - client.began),
    }
    if turn is not None:
        fields |= _of_turn(turn)
    if client.gone:
        fields["client_gone"] = True
    if client.failure is not None:
        fields["failure"] = client.failure[:_LONGEST]
    return fields


def _of_turn(turn: Turn) -> dict[str, Value]:
    usage = (turn.given.usage if turn.given else None) or {}
    fields: dict[str, Value] = {
        "task": turn.task,
        "route": turn.route,
        "reason": turn.reason,
        "release": turn.release.name if turn.release else None,
        "model": turn.chat.model[:_LONGEST],
        "stream": turn.chat.stream,
        "tenant": turn.arrival.caller.tenant,
        "overhead_ms": None if turn.overhead_s is None else _ms(turn.overhead_s),
        "input_tokens": _count(usage.get("prompt_tokens")),
        "output_tokens": _count(usage.get("completion_tokens")),
        "cost_usd": None if turn.cost_usd is None else round(turn.cost_usd, 12),
        "failure": turn.failure,
        "lost": turn.lost or None,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
