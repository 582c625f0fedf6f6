"""What the watch says of a task, for `understudy tasks`: how its live release does, or why none is live."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from routers.coin import audit_rate
from routers.watch import Watch, delay_audits
from serving.errors import DamagedRelease
from serving.exchange import Exchange, Json
from serving.live import Live, Withdrawal
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.watch_record import read_watch_record


@dataclass(frozen=True, slots=True)
class Watched:
    """The live release as the keeper's watch sees it. `evidence` of `limit` is the alarm.

    A jump of its disagreement to twice what it promised is noticed after about `delay_audits` audits, which at today's
    audit rate are about `delay_requests` requests of the task (None: not known).
    """

    release: str
    audits: int
    disagreements: int
    evidence: float
    limit: float
    max_disagreement: float
    delay_audits: int | None
    delay_requests: int | None

    def to_json(self) -> Json:
        """The same as `--json` prints it."""
        return asdict(self)

    def line(self) -> str:
        """The same for a person."""
        said = f"{self.release}: {self.disagreements:,} of {self.audits:,} audits disagreed; evidence of a broken "
        said += f"promise {self.evidence:.2g}, withdrawn at {self.limit:.3g}"
        if self.delay_audits is None:
            return said
        requests = f" ≈ {self.delay_requests:,} requests" if self.delay_requests is not None else ""
        doubled = f"a jump to {2 * self.max_disagreement:.1%} is noticed after about"
        return f"{said}; {doubled} {self.delay_audits:,} audits{requests}"


def live_of(settings: Settings, task: str) -> Live | None:
    """What is live for a task; None where nothing ever was, or the file that says so is damaged."""
    try:
        return ReleaseStore(settings.state_dir).live(task)
    except DamagedRelease:
        return None


def came_after(exchanges: Sequence[Exchange], fence: float) -> list[Exchange]:
    """The exchanges after a withdrawal (`Live.fence`): what came before is of a world that isn't there any more."""
    return [exchange for exchange in exchanges if exchange.created > fence or fence == 0.0]


def watched(
    settings: Settings, task: str, live: Live | None, exchanges: Sequence[Exchange]
) -> Watched | None:
    """How a task's live release does; None if there is none, or no keeper has looked at it yet."""
    record = read_watch_record(settings.state_dir, task)
    if live is None or record is None or (record.release, record.since) != (live.release, live.since):
        return None
    try:
        watch = Watch.from_json(record.watch)
    except ValueError:
        return None
    delay = delay_audits(watch.max_disagreement, watch.certainty)
    rate = audit_rate(watch.audits, settings.for_task(task).audit_rate)
    mine = [exchange.by_student for exchange in exchanges if exchange.release == live.release]
    share = sum(mine) / len(mine) if mine else 0.0
    return Watched(
        release=record.release,
        audits=watch.audits,
        disagreements=watch.disagreements,
        evidence=watch.evidence,
        limit=1.0 / (1.0 - watch.certainty),
        max_disagreement=watch.max_disagreement,
        delay_audits=delay,
        delay_requests=round(delay / (rate * share)) if delay is not None and share > 0 else None,
    )


def withdrawal_line(withdrawal: Withdrawal) -> str:
    """Why a release was withdrawn, for a person."""
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(withdrawal.at))
    return f"{withdrawal.release} was withdrawn on {when} UTC: {withdrawal.said}"
