"""From a log on disk to a release that is live: due, declined, held, released; and what damage does."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from distillation.console import print_lessons
from distillation.economics import summarise
from distillation.journal import LookJournal
from distillation.learning import Lesson, learn
from distillation.past import read_past
from distillation.simulated import SimulatedRelease
from loadtest.stack import command, environment
from routers.looks import PastLook, spent
from routers.simulator import LiveStudent, Message, simulate
from serving.errors import UnknownTask
from serving.events import answered, audited
from serving.exchange import Exchange
from serving.linear import LinearStudent
from serving.log import EventLog, LogReader
from serving.log_settings import LogSettings
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.task_settings import TaskPolicy, TaskSettings

Make = Callable[..., Any]
KINDS = {
    "card": ("where is my card {}", "card {} hasn't come"),
    "parcel": ("the parcel {} please", "track parcel {}"),
    "refund": ("refund order {} now", "I want money back for {}"),
}


def pairs(count: int, *, noise: float = 0.0, seed: int = 1) -> list[tuple[str, str]]:
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        kind = chance.choice(list(KINDS))
        text = chance.choice(KINDS[kind]).format(chance.randrange(1000))
        made.append((text, chance.choice(list(KINDS)) if chance.random() < noise else kind))
    return made


def settings(state_dir: Path, **task: Any) -> Settings:
    own = TaskSettings(**{"name": "intents", "max_disagreement": 0.1, "certainty": 0.9, **task})
    return Settings(state_dir=state_dir, task=[own])


def lesson(state_dir: Path, **task: Any) -> Lesson:
    (found,) = learn(settings(state_dir, **task), "intents")
    return found


def looks(state_dir: Path) -> list[PastLook]:
    return LookJournal(state_dir, "intents").past()


class TestOutcomes:
    def test_a_task_with_twelve_exchanges(self, write_log: Make, exchanges: Make) -> None:
        found = lesson(write_log(exchanges(pairs(12))))
        assert (found.outcome, found.labels, found.needed) == ("not_due", 12, 68)
        assert found.message == (
            "12 labels; the first look needs 68; at this rate the 68 labels of the next look are there within a minute"
        )

    def test_when_the_labels_will_be_there(self, write_log: Make, exchanges: Make) -> None:
        slow = [dataclasses.replace(e, created=3600.0 * i) for i, e in enumerate(exchanges(pairs(12)))]
        assert "there in 2 days" in lesson(write_log(slow)).message

    def test_released(self, write_log: Make, exchanges: Make) -> None:
        state = write_log(exchanges(pairs(120)))
        found = lesson(state)
        assert (found.outcome, found.release, found.labels) == ("released", "r0001", 120)
        assert "answers about 100% with at most 10.0% disagreement, 90% certain" in found.message
        live = ReleaseStore(state).live("intents")
        assert live is not None
        assert (live.release, live.generation) == ("r0001", 1)
        assert looks(state) == [PastLook(1, 120, True)]

    def test_the_release_verifies_and_answers(self, write_log: Make, exchanges: Make) -> None:
        state = write_log(exchanges(pairs(120)))
        card = lesson(state).look
        release = ReleaseStore(state).read("intents", "r0001")
        assert set(release.files) == {"student.npz", "student.json", "router.json", "held_out.json"}
        assert card is not None
        assert {name: release.card[name] for name in card} == card
        assert card["labels"] == 120
        assert card["teacher_models"] == {"big": 120}
        assert card["learning"]["looks"] == 1
        assert card["learning"]["core_s"] > 0
        assert card["learning"]["usd"] == pytest.approx(card["learning"]["core_s"] * 0.05 / 3600)
        (summary,) = summarise(settings(state))
        assert summary.learning is not None and summary.learning.to_json() == card["learning"]
        student = LinearStudent.load(release.files)
        prediction = student.predict("where is my card 5555")
        assert student.answers[prediction.index].choices[0]["message"]["content"] == "card"
        assert student.answers[prediction.index].completion_tokens == 2

    def test_held(self, write_log: Make, exchanges: Make) -> None:
        state = write_log(exchanges(pairs(120, noise=1.0)))
        found = lesson(state)
        assert (found.outcome, found.release) == ("held", None)
        assert found.message.startswith("not yet: ")
        assert found.needed == 150
        assert ReleaseStore(state).live("intents") is None
        assert ReleaseStore(state).list("intents") == []
        again = lesson(state)
        assert (again.outcome, again.needed) == ("not_due", 150)
        assert looks(state) == [PastLook(1, 120, False)]

    def test_what_is_short_and_when_it_will_be_there(
        self, write_log: Make, exchanges: Make, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Twelve labels an hour; three answers, the last one named in the policy and one nobody gives."""
        minutes = [dataclasses.replace(e, created=300.0 * i) for i, e in enumerate(exchanges(pairs(120)))]
        found = lesson(write_log(minutes), prove={"refund": 0.02, "magic": 0.1})
        assert found.outcome == "released" and found.look is not None
        assert found.look["labels_per_hour"] == pytest.approx(12.0)
        magic, refund = found.look["short"]
        given = found.look["named"]["refund"]["given"]
        assert (refund["answer"], refund["given"], refund["accepted"]) == ("refund", given, given)
        # ln(δ/4)/ln(0.98) with half of look 1's δ for two named answers, less those that are there.
        needed = math.ceil(math.log(spent(1, 0.1) / 4) / math.log(0.98))
        assert refund["if_all_agree"] == refund["at_this_rate"] == needed - given
        assert refund["hours_if_all_agree"] == pytest.approx((needed - given) / (12.0 * given / 120))
        assert magic["given"] == 0 and magic["hours_if_all_agree"] is None
        print_lessons([found])
        printed = capsys.readouterr().out.splitlines()
        assert "intents: released" in printed[0]
        assert (
            printed[1] == "  the answer 'magic': the student never gives it, so that it can't prove anything"
        )
        assert printed[2].endswith(
            f"{needed - given} (at this rate in 2 days) are short if all of them agree"
        )

    def test_a_promise_that_few_labels_cant_prove(self, write_log: Make, exchanges: Make) -> None:
        state = write_log(exchanges(pairs(120)))
        assert lesson(state, max_disagreement=0.01).needed == 698
        LookJournal(state, "intents").begin(300, 90)
        found = lesson(state)
        assert found.outcome == "held", "look 301 may spend next to nothing"
        assert found.look is not None
        (short,) = found.look["short"]
        assert short["answer"] is None
        assert (short["accepted"], short["disagreements"]) == (120, 0)
        assert short["if_all_agree"] == math.ceil(math.log(spent(302, 0.1)) / math.log(0.9)) - 120

    def test_a_narrower_release_replaces_a_wider_one(self, write_log: Make, exchanges: Make) -> None:
        """Keeping the widest that ever passed would keep the luckiest."""
        state = write_log(exchanges(pairs(120)))
        assert lesson(state).outcome == "released"
        # From now on nobody can guess what becomes of a refund; r0001 answers everything, all of it audited.
        chance = random.Random(2)
        said = [(t, chance.choice(list(KINDS)) if a == "refund" else a) for t, a in pairs(200, seed=2)]
        write_log(
            exchanges(
                said,
                start=2_000_000.0,
                route="student",
                release="r0001",
                propensity=1.0,
                audit_rate=1.0,
                audit="answered",
                coin=True,
            )
        )
        found = lesson(state)
        assert (found.outcome, found.release) == ("released", "r0002")
        assert found.look is not None
        assert found.look["coverage"] < 1.0
        assert looks(state)[-1] == PastLook(1, 320, True)
        live = ReleaseStore(state).live("intents")
        assert live is not None
        assert (live.release, live.generation) == ("r0002", 2)

    @pytest.mark.parametrize("passes", [True, False])
    def test_a_better_release_replaces_the_live_one(
        self, write_log: Make, exchanges: Make, passes: bool
    ) -> None:
        state = write_log(exchanges(pairs(120)))
        assert lesson(state).outcome == "released"
        # Half of what comes now is new to r0001, which leaves it to the teacher.
        later = exchanges(
            pairs(150, seed=3, noise=0.0 if passes else 1.0), start=2_000_000.0, release="r0001"
        )
        write_log(later)
        found = lesson(state)
        assert found.outcome == ("released" if passes else "held")
        live = ReleaseStore(state).live("intents")
        assert live is not None
        assert (live.release, live.generation) == (("r0002", 2) if passes else ("r0001", 1))

    def test_one_answer_only(self, write_log: Make, exchanges: Make) -> None:
        found = lesson(write_log(exchanges([(f"text {i}", "yes") for i in range(100)])))
        assert found.outcome == "released"
        assert "answers about 100%" in found.message

    def test_an_open_answer_space_is_declined(self, write_log: Make, exchanges: Make) -> None:
        state = write_log(exchanges([(f"write {i}", f"essay {i}") for i in range(100)]))
        found = lesson(state)
        assert found.outcome == "declined"
        assert "100 distinct answers in 100 labels" in found.message
        assert looks(state) == [], "declining costs no look"

    def test_untrainable_answers_are_declined(self, write_log: Make, exchanges: Make) -> None:
        mine = [
            dataclasses.replace(e, teacher=dataclasses.replace(e.teacher, trainable=False))
            for e in exchanges(pairs(100))
        ]
        found = lesson(write_log(mine))
        assert found.outcome == "declined"
        assert "none of 100 answers may be used" in found.message

    def test_numeric_agreement_is_declined(self, write_log: Make, exchanges: Make) -> None:
        found = lesson(write_log(exchanges(pairs(100))), agreement={"kind": "numeric"})
        assert (found.outcome, found.labels) == ("declined", 100)

    def test_refusals_only_are_declined(self, write_log: Make, exchanges: Make) -> None:
        refusal = [{"index": 0, "message": {"content": None, "refusal": "no"}, "finish_reason": "stop"}]
        mine = [
            dataclasses.replace(e, teacher=dataclasses.replace(e.teacher, choices=refusal))
            for e in exchanges(pairs(100))
        ]
        assert lesson(write_log(mine)).outcome == "declined"

    def test_json_answers_in_the_teachers_own_form(self, write_log: Make, exchanges: Make) -> None:
        forms = ('{"label": "%s"}', '```json\n{"label":"%s"}\n```', '{ "label" : "%s" }')
        said = [(text, forms[0 if i % 4 else i % 3] % answer) for i, (text, answer) in enumerate(pairs(120))]
        state = write_log(exchanges(said))
        assert lesson(state, agreement={"kind": "json"}).outcome == "released"
        student = LinearStudent.load(ReleaseStore(state).read("intents", "r0001").files)
        assert [a.key for a in student.answers] == [f'{{"label":"{kind}"}}' for kind in sorted(KINDS)]
        given = [a.choices[0]["message"]["content"] for a in student.answers]
        assert given == [forms[0] % kind for kind in sorted(KINDS)]

    def test_labels_with_newlines_and_quotes(self, write_log: Make, exchanges: Make) -> None:
        said = [(text, f"\"{answer}\"\n- 'why'\t\\") for text, answer in pairs(120)]
        state = write_log(exchanges(said))
        assert lesson(state).outcome == "released"
        student = LinearStudent.load(ReleaseStore(state).read("intents", "r0001").files)
        assert {a.choices[0]["message"]["content"] for a in student.answers} == {a for _, a in said}

    def test_a_teacher_with_odd_usage(self, write_log: Make, exchanges: Make) -> None:
        mine = [
            dataclasses.replace(e, teacher=dataclasses.replace(e.teacher, usage={"prompt_tokens": "many"}))
            for e in exchanges(pairs(100))
        ]
        assert lesson(write_log(mine)).outcome == "released"

    def test_every_task_is_learned(self, write_log: Make, exchanges: Make) -> None:
        state = write_log(exchanges(pairs(100)))
        write_log(exchanges(pairs(12)), "parcels")
        write_log(exchanges(pairs(100)), "other")
        found = learn(Settings(state_dir=state, task_defaults=TaskPolicy(max_disagreement=0.1)))
        assert [(one.task, one.outcome) for one in found] == [("intents", "released"), ("parcels", "not_due")]

    def test_an_unknown_task(self, write_log: Make, exchanges: Make, tmp_path: Path) -> None:
        with pytest.raises(UnknownTask, match="tasks with one: none yet"):
            learn(Settings(state_dir=tmp_path / "state"), "intents")
        state = write_log(exchanges(pairs(2)))
        with pytest.raises(UnknownTask, match=r"'parcels'.*tasks with one: intents"):
            learn(Settings(state_dir=state), "parcels")
        assert learn(Settings(state_dir=tmp_path / "empty")) == []


class LearnsFromDisk:
    """The simulator's learner that writes every exchange to a real log and runs the real `learn` on it."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.lessons: list[Lesson] = []
        self._written = 0

    def learn(self, exchanges: Sequence[Exchange]) -> tuple[str, LiveStudent] | None:
        asyncio.run(self._write(exchanges[self._written :]))
        self._written = len(exchanges)
        self.lessons.append(lesson(self.state_dir))
        release = self.lessons[-1].release
        if release is None:
            return None
        past = read_past(ReleaseStore(self.state_dir), "intents", release)
        return release, SimulatedRelease(past)

    async def _write(self, exchanges: Sequence[Exchange]) -> None:
        log = EventLog(self.state_dir, LogSettings(durability="relaxed"))
        for exchange in exchanges:
            late = exchange.route == "student" and exchange.audit != "none"
            first = dataclasses.replace(exchange, audit="pending", teacher=None) if late else exchange
            await log.append("intents", answered(first))
            if late:
                event = audited(exchange.id, teacher=exchange.teacher, agreement=None, at=exchange.created)
                await log.append("intents", event)
        await log.aclose()


def test_a_tasks_life_on_disk(tmp_path: Path) -> None:
    """Cold start, release, audits, later looks: as in memory, only through the log."""
    chance = random.Random(7)
    messages = []
    for text, answer in pairs(800, seed=7):
        # A seventh of the messages says nothing about the teacher's answer, and can be told from the others.
        hard = chance.random() < 0.15
        messages.append(
            Message("anything else, please?", chance.choice(list(KINDS))) if hard else Message(text, answer)
        )
    learner = LearnsFromDisk(tmp_path / "state")
    run = simulate(messages, learner, learn_every=160, seed=3)
    outcomes = [one.outcome for one in learner.lessons]
    assert "released" in outcomes
    assert len(looks(tmp_path / "state")) == sum(o in ("released", "held") for o in outcomes) >= 2
    assert run.teacher_share() < 0.6
    assert all(kept.disagreement <= 0.1 for kept in run.releases)
    logged = LogReader(tmp_path / "state").exchanges("intents").exchanges
    assert sum(e.route == "student" and e.audit == "answered" for e in logged) > 5
    last = learner.lessons[-1]
    assert last.labels < len(logged), "accepted exchanges without an audit are no labels"


class TestDamage:
    def test_damaged_lines_are_skipped(self, write_log: Make, exchanges: Make) -> None:
        state = write_log(exchanges(pairs(120)))
        (segment,) = (state / "tasks" / "intents" / "events").iterdir()
        lines = segment.read_bytes().splitlines(keepends=True)
        lines[3] = (
            lines[3].replace(b"card", b"cart").replace(b"parcel", b"parzel").replace(b"refund", b"refuse")
        )
        lines[7] = b"hello\n"
        segment.write_bytes(b"".join(lines) + b'{"crc":"0000')
        read = LogReader(state).exchanges("intents")
        assert (len(read.exchanges), read.damaged) == (118, 3)
        found = lesson(state)
        assert (found.outcome, found.labels) == ("released", 118)

    def test_a_damaged_releases_traffic_is_left_out(self, write_log: Make, exchanges: Make) -> None:
        state = write_log(exchanges(pairs(120)))
        assert lesson(state).outcome == "released"
        write_log(exchanges(pairs(60, seed=2), start=2_000_000.0, release="r0001"))
        (state / "tasks" / "intents" / "releases" / "r0001" / "router.json").write_bytes(b"{}")
        said: list[str] = []
        (found,) = learn(settings(state), "intents", progress=said.append)
        assert any("leaving out the traffic of release r0001" in step for step in said)
        assert (found.outcome, found.labels) == ("not_due", 120), "less is left than the last look had"
        write_log(exchanges(pairs(60, seed=4), start=3_000_000.0))
        found = lesson(state)
        assert (found.labels, found.outcome, found.release) == (180, "released", "r0002")
        assert found.look is not None
        assert found.look["left_out"] == {"release is gone": 60}

    def test_only_traffic_of_a_release_that_is_gone(self, write_log: Make, exchanges: Make) -> None:
        found = lesson(write_log(exchanges(pairs(120), release="r0001")))
        assert (found.outcome, found.labels) == ("not_due", 0)

    def test_two_at_the_same_time(self, write_log: Make, exchanges: Make) -> None:
        state = write_log(exchanges(pairs(120)))
        with LookJournal(state, "intents").alone():
            named = run_learn(state, "--task", "intents")
            every = run_learn(state)
        busy = "task intents is being learned by another process; wait for it\n"
        assert (named.returncode, named.stdout, named.stderr) == (2, "", f"understudy: {busy}")
        assert (every.returncode, every.stdout) == (0, f"intents: not due: {busy}"), "other tasks don't wait"
        assert looks(state) == []

    def test_a_process_killed_in_the_middle_of_a_look_has_spent_it(
        self, write_log: Make, exchanges: Make
    ) -> None:
        state = write_log(exchanges(pairs(3000, noise=0.1)))
        child = subprocess.Popen(
            command("learn", "--config", str(config_for(state))),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while not looks(state):  # the file is there a moment before its line
            assert child.poll() is None, "it ended before it took a look"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert looks(state) == [PastLook(1, 3000, False)]
        assert ReleaseStore(state).list("intents") == []
        again = lesson(state)
        assert (again.outcome, again.needed) == ("not_due", 3750)


def config_for(state: Path) -> Path:
    config = state.parent / "understudy.toml"
    config.write_text(f"""state_dir = "{state}"
[[task]]
name = "intents"
max_disagreement = 0.1
certainty = 0.9
""")
    return config


def run_learn(state: Path, *more: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("learn", "--config", str(config_for(state)), *more),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )


WATCHED = """
import os, sys
allowed = tuple(os.path.realpath(path) + os.sep for path in sys.argv[1].split(os.pathsep))
code = tuple(os.path.realpath(path) for path in [sys.prefix, sys.base_prefix, *sys.path] if path)
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        raise RuntimeError(f"learning reached for {event} {arguments}")
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        data = not path.endswith((".py", ".pyc")) and not path.startswith(("/proc/", "/sys/", "/dev/"))
        if data and not path.startswith(allowed) and not (path.startswith(code) and path.endswith(CODE_DATA)):
            raise RuntimeError(f"learning opened {path}")
CODE_DATA = (".so", ".pth", ".json", ".txt", ".cfg", "METADATA", "INSTALLER", "RECORD", ".toml", ".css", ".zip")
from understudy import main
sys.argv = ["understudy", "learn", "--config", sys.argv[2], "--json"]
sys.addaudithook(watch)
main()
"""
"""Runs `understudy learn` in a process that may open its state directory and its own code, and nothing else."""


def test_learning_reads_nothing_but_the_log(write_log: Make, exchanges: Make, tmp_path: Path) -> None:
    state = write_log(exchanges(pairs(120)))
    empty = tmp_path / "empty"
    empty.mkdir()
    config = config_for(state)
    home = tmp_path / "configuration"
    home.mkdir()
    config = config.rename(home / config.name)
    done = subprocess.run(
        [sys.executable, "-P", "-c", WATCHED, os.pathsep.join([str(state), str(home)]), str(config)],
        cwd=empty,
        env={**environment(), "HOME": str(empty)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    (found,) = orjson.loads(done.stdout)["tasks"]
    assert found["outcome"] == "released"
    assert list(empty.iterdir()) == []
