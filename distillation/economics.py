"""What a task costs with the teacher alone, and whether a student looks worth it. Reads the log only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from distillation.candidate import CandidateFile
from distillation.dataset import Dataset, dataset_of
from distillation.due import not_due
from distillation.journal import LookJournal
from distillation.learning_cost import LearningCost, all_of
from distillation.named_answers import never_given
from distillation.prompts import Prompts
from distillation.split import Split
from distillation.watching import Watched, came_after, live_of, watched
from routers.looks import unseen_chance
from routers.noise import Noise
from serving.engines import Engines
from serving.errors import ConfigError, DamagedRelease, UnknownRelease
from serving.exchange import Exchange, Json
from serving.live import Withdrawal
from serving.log import LogReader
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.task_settings import RESERVED_TASKS, TaskSettings

_SEE_MORE = 'student.sees = "last" or "conversation" would see them'


@dataclass(frozen=True, slots=True)
class Spared:
    """What skipping the student has spared: requests, and by what they take on average its device's seconds and USD."""

    requests: int
    seconds: float
    usd: float


@dataclass(frozen=True, slots=True)
class StudentCost:
    """What a student's answers take on average, as the log measured it: seconds of what it runs on, and USD.

    Of the student that answered last: one of another kind may have taken a hundred times as long.
    """

    answers: int
    seconds: float
    usd: float


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """One line of `understudy tasks`.

    `cost_usd` is what was spent: audits, rejected student answers and answers whose clients left are included.
    `teacher_cost_usd` is what one teacher answer costs on average (None: no price is known), `unpriced` how many of
    them have no price, `unseen` the chance that the next answer is new. `outlook` says in words whether a student
    looks worth it, and why; `sees` what of a request the next student will see. `watched` is how the live release does,
    `withdrawn` why none is live, if the watch took it away: `labels` and `outlook` are then of what came since.
    `student` is what a student's answers cost, served or not, and `learning` what all looks so far did.
    `spared` is there where the student was skipped, `noise` where the teacher was asked twice. `unknown` says which
    answers the configuration names and no label has, `unusable` why the live release can't answer.
    """

    task: str
    exchanges: int
    routes: dict[str, int]
    labels: int
    distinct_answers: int
    unseen: float
    cost_usd: float
    teacher_cost_usd: float | None
    release: str | None
    outlook: str
    damaged_lines: int
    unpriced: int = 0
    sees: str = "message"
    watched: Watched | None = None
    withdrawn: Withdrawal | None = None
    spared: Spared | None = None
    unknown: list[str] = field(default_factory=list)
    unusable: str | None = None
    noise: Noise | None = None
    student: StudentCost | None = None
    learning: LearningCost | None = None

    def to_json(self) -> Json:
        """The summary as `--json` prints it."""
        return asdict(self)


def summarise(settings: Settings, prompts: Prompts | None = None) -> list[TaskSummary]:
    """All tasks that have a log, the most expensive first.

    `prompts` takes in those of the tasks that aren't configured: each log is read once.
    """
    reader = LogReader(settings.state_dir)
    summaries = [_summary(settings, reader, task, prompts) for task in reader.tasks()]
    return sorted(summaries, key=lambda summary: (-summary.cost_usd, -summary.exchanges, summary.task))


def _summary(settings: Settings, reader: LogReader, task: str, prompts: Prompts | None) -> TaskSummary:
    read = reader.exchanges(task)
    if prompts is not None and all(task != configured.name for configured in settings.task):
        prompts.add(task, ((exchange, cost_of(exchange)) for exchange in read.exchanges))
    policy = settings.for_task(task) if task not in RESERVED_TASKS else TaskSettings(name=task)
    live = live_of(settings, task)
    fence = live.fence if live is not None else 0.0
    exchanges = came_after(read.exchanges, fence)
    split = Split.of(policy, ReleaseStore(settings.state_dir), exchanges)
    dataset = dataset_of(exchanges, policy, split.judges)
    answers = dataset.answers
    prices = [
        e.teacher.cost_usd
        for e in read.exchanges
        if e.teacher is not None and e.teacher.cost_usd is not None and _paid_for(e)
    ]
    withdrawn = (
        live.withdrawals[-1] if live is not None and live.release is None and live.withdrawals else None
    )
    return TaskSummary(
        task=task,
        exchanges=len(read.exchanges),
        routes=dict(Counter(e.route for e in read.exchanges)),
        labels=len(dataset.rows),
        distinct_answers=len(set(answers)),
        unseen=unseen_chance(answers),
        cost_usd=sum(cost_of(e) for e in read.exchanges) + read.unanswered_usd,
        teacher_cost_usd=sum(prices) / len(prices) if prices else None,
        release=live.release if live is not None else None,
        outlook=_outlook(settings, task, policy, dataset, max(fence, dataset.teacher_since)),
        damaged_lines=read.damaged,
        unpriced=sum(
            _paid_for(e) and e.teacher.cost_usd is None for e in read.exchanges if e.teacher is not None
        ),
        sees="request" if policy.student.kind == "lm" else policy.student.sees,
        watched=watched(settings, task, live, read.exchanges),
        withdrawn=withdrawn,
        spared=_spared(read.exchanges),
        unknown=never_given(policy, answers),
        unusable=_unusable(ReleaseStore(settings.state_dir), task),
        noise=dataset.noise if dataset.noise.asked else None,
        student=_student_cost(read.exchanges),
        learning=all_of(LookJournal(settings.state_dir, task).entries()),
    )


def _unusable(store: ReleaseStore, task: str) -> str | None:
    """Why what is live can't be loaded, so that the teacher answers; None where it can, or nothing is live."""
    try:
        live = store.live(task)
        if live is not None and live.release is not None:
            store.read(task, live.release)
    except (DamagedRelease, UnknownRelease) as error:
        return str(error)
    return None


def _spared(exchanges: Sequence[Exchange]) -> Spared | None:
    skipped = sum(exchange.reason == "skipped" for exchange in exchanges)
    if not skipped:
        return None
    student = _student_cost(exchanges)
    if student is None:
        return Spared(skipped, 0.0, 0.0)
    return Spared(skipped, skipped * student.seconds, skipped * student.usd)


def _student_cost(exchanges: Sequence[Exchange]) -> StudentCost | None:
    given = [e.student for e in exchanges if e.student is not None and not e.replayed]
    if not given:
        return None
    given = [answer for answer in given if answer.model == given[-1].model]
    return StudentCost(
        answers=len(given),
        seconds=sum(answer.took_s for answer in given) / len(given),
        usd=sum(answer.cost_usd or 0.0 for answer in given) / len(given),
    )


def _paid_for(exchange: Exchange) -> bool:
    """Whether its teacher's answer was paid for by itself: a replayed one was by the request it was first given to."""
    return not (exchange.replayed and not exchange.by_student)


def cost_of(exchange: Exchange) -> float:
    """What the exchange cost. An audit's answer came after the books of the request were closed: it comes on top.

    So does a second answer of the teacher's. One that was replayed was paid for by the request it was first given to.
    """
    cost = exchange.cost_usd or 0.0
    if exchange.repeat is not None:
        cost += exchange.repeat.cost_usd or 0.0
    if exchange.by_student and exchange.teacher is not None:
        cost += exchange.teacher.cost_usd or 0.0
    return cost


def _outlook(settings: Settings, task: str, policy: TaskSettings, dataset: Dataset, fence: float) -> str:
    if task in RESERVED_TASKS:
        return "no: the overflow of server.max_tasks is never learned"
    if not dataset.rows and dataset.left_out:
        reason, count = dataset.left_out.most_common(1)[0]
        hint = f"; {_SEE_MORE}" if reason == "unsupported: turns" and policy.student.sees == "message" else ""
        return f"no: {count} exchanges can't be used ({reason}{hint})"
    if policy.admission == "e-process":
        try:
            engines = Engines(onnx=settings.student.onnx)
            candidate = CandidateFile(settings.state_dir, task, engines=engines).read(policy)
        except ConfigError as error:  # what its student runs on isn't there
            return f"its candidate can't be tested: {error}"
        if candidate is not None and candidate.after > fence and not candidate.exhausted(len(dataset.rows)):
            since = sum(row.created > candidate.after for row in dataset.rows)
            return f"candidate {candidate.number} is being tested: {since:,} labels came since it was fixed"
    waiting = not_due(dataset, LookJournal(settings.state_dir, task).past(), policy, fence=fence)
    if waiting is None:
        return "yes: a look is due"
    return f"{'no' if waiting.declined else 'too early'}: {waiting.message}"
