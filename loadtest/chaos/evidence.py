"""What a fault did: judged from what the clients received and what the log holds, and from nothing else."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.chaos.traffic import Receipt
from serving.exchange import Exchange
from serving.log import LogReader


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the campaign's table.

    `failed`: requests whose client saw an error. `wrong`: it was told something that isn't so, or an answer broke
    off without an error. `lost`: the client has an answer of the teacher's that the log doesn't have exactly once.
    `counted`: how many exchanges the gateway's metrics say it could not log.
    `added_p50_s` and `added_p99_s`: latency of what was answered during the fault, minus before it.
    `recovery_s`: from the fault's end to the last request that still suffered from it; None: it didn't end.
    """

    fault: str
    requests: int
    failed: int
    wrong: int
    lost: int
    added_p50_s: float | None
    added_p99_s: float | None
    recovery_s: float | None
    counted: int = 0
    note: str = ""

    @property
    def unnoticed(self) -> int:
        """Return how many answers were lost without the gateway having said so."""
        return max(0, self.lost - self.counted)


def logged(state_dir: Path) -> dict[str, list[Exchange]]:
    """Return every exchange in the log by the id of its request."""
    reader = LogReader(state_dir)
    found: dict[str, list[Exchange]] = {}
    for task in reader.tasks():
        for exchange in reader.exchanges(task).exchanges:
            found.setdefault(exchange.request_id, []).append(exchange)
    return found


def lost(receipts: Iterable[Receipt], found: dict[str, list[Exchange]]) -> int:
    """Count the teacher's answers that a client has and the log doesn't have, or has more than once."""
    return sum(
        1
        for receipt in receipts
        if receipt.route == "teacher"
        and receipt.content is not None
        and [content_of(exchange) for exchange in found.get(receipt.request_id, [])] != [receipt.content]
    )


def content_of(exchange: Exchange) -> str | None:
    """Return the text of the teacher's answer in the log."""
    if exchange.teacher is None:
        return None
    content = exchange.teacher.choices[0]["message"]["content"]
    return content if isinstance(content, str) else None


def added(before: Sequence[Receipt], during: Sequence[Receipt]) -> tuple[float | None, float | None]:
    """Return by how much the median and the 99th percentile of answered requests grew, in seconds."""
    calm = [receipt.seconds for receipt in before if not receipt.failed]
    bad = [receipt.seconds for receipt in during if not receipt.failed]
    if len(calm) < 2 or len(bad) < 2:
        return None, None
    return (
        statistics.median(bad) - statistics.median(calm),
        percentile(bad, 0.99) - percentile(calm, 0.99),
    )


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that `share` of the values don't exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def recovery(after: Iterable[Receipt], ended: float) -> float:
    """Return how long after the fault's end the last request began that failed or was wrong, in seconds."""
    return max((receipt.began - ended for receipt in after if receipt.failed or receipt.wrong), default=0.0)


def errors(receipts: Iterable[Receipt]) -> str:
    """Say what the clients' errors were, the most frequent first."""
    counted = Counter(receipt.error or "nothing" for receipt in receipts if receipt.failed)
    return ", ".join(f"{count} × {error}" for error, count in counted.most_common(3))
