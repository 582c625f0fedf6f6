"""Learning about a student that is trained on one part of the exchanges and judged by the other.

What trains it here is no network but a student that learns its texts by heart, as a network may: nothing tells better
whether what trained it judges it, too.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from distillation.dataset import dataset_of
from distillation.encoder_kind import EncoderKind, Tuning
from distillation.kind import LinearKind, Progress, StudentSilent
from distillation.linear_training import TermCounts
from distillation.past import PastRelease, propensity_of, read_past
from distillation.scored import Scored
from distillation.split import place_of
from routers.promise import Promise
from serving.closed_answers import AnswerSpace, KnownAnswer, Prediction, TextTooLong
from serving.disk import Disk
from serving.exchange import Exchange, TeacherAnswer
from serving.forgetting import Whose, forget
from serving.linear import LinearStudent
from serving.releases import ReleaseStore
from serving.sight import Sees
from serving.student_answers import ErasedMeanwhile, ErasureStamp, erase_answers
from serving.student_choice import StudentChoice
from serving.task_settings import TaskSettings

ALPHA = 0.15
POLICY = TaskSettings(
    name="intents",
    student=StudentChoice(kind="encoder", base=Path("base"), train_share=0.5, skip="never"),
    max_disagreement=ALPHA,
    certainty=0.9,
)
LENIENT = POLICY.model_copy(update={"max_disagreement": 0.4})
ANSWERS = ("lost", "fee", "pin")
SEEDS = 200
MOST_SURE, SLOPE = 4.0, 0.125


class ByHeart:
    """Knows the texts it was taught; of others it knows as much as their first words say."""

    def __init__(self, taught: dict[str, int], space: AnswerSpace) -> None:
        self._space = space
        self._taught = taught
        self._place = {answer.key: place for place, answer in enumerate(space.answers)}

    @property
    def answers(self) -> list[KnownAnswer]:
        return self._space.answers

    @property
    def sees(self) -> Sees:
        return self._space.sees

    def predict(self, text: str) -> Prediction:
        guess, sure, _ = text.split()
        if text in self._taught:
            index, score = self._taught[text], 9.0 + len(text) % 7 / 10
        else:
            index, score = self._place[guess], float(sure)
        probability = 1 / (1 + math.exp(-score))
        return Prediction(index, score, probability, entropy=1 - probability)

    def files(self) -> dict[str, bytes]:
        return {}


def by_heart(
    texts: Sequence[str], answers: NDArray[np.int64], space: AnswerSpace, *, progress: Progress
) -> ByHeart:
    return ByHeart(dict(zip(texts, answers.tolist(), strict=True)), space)


def requests(random: random.Random, count: int) -> list[tuple[str, str]]:
    """Texts, and the teacher's answer: what the first word says, the more often the higher the number behind it."""
    made = []
    for number in range(count):
        said, sure = random.choice(ANSWERS), random.uniform(0, MOST_SURE)
        agrees = random.random() < 0.5 + SLOPE * sure
        answer = said if agrees else random.choice([one for one in ANSWERS if one != said])
        made.append((f"{said} {sure:.4f} {number}", answer))
    return made


def logged(pairs: Sequence[tuple[str, str]], random: random.Random) -> list[Exchange]:
    exchanges = []
    for number, (text, answer) in enumerate(pairs):
        message = {"role": "assistant", "content": answer}
        choices: list[dict[str, Any]] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        exchanges.append(
            Exchange(
                id=f"{number:012x}{random.getrandbits(64):016x}",
                request_id="r",
                created=1_000_000.0 + number,
                task="intents",
                tenant="t",
                request={"messages": [{"role": "user", "content": text}]},
                route="teacher",
                reason="no_release",
                teacher=TeacherAnswer("big", choices, None, 0.5, trainable=True),
                audit_rate=0.05,
                propensity=1.0,
            )
        )
    return exchanges


def kind_of(state: Path, tuning: Tuning = by_heart, policy: TaskSettings = POLICY) -> EncoderKind:
    return EncoderKind(ReleaseStore(state), policy, tuning, ErasureStamp(state, "intents"))


def silent(_: str) -> None:
    """Nobody looks on."""


def disagreement(state: Path, seed: int, *, by_everything: bool) -> float | None:
    """What a student learned from 600 exchanges disagrees on of what it may answer from then on; None: it may nothing.

    By the test of the promise alone: what makes a confidence of its scores is the same for every student, and slow.
    """
    chance = random.Random(seed)
    exchanges = logged(requests(chance, 600), chance)
    made: list[ByHeart] = []

    def remembered(
        texts: Sequence[str], answers: NDArray[np.int64], space: AnswerSpace, *, progress: Progress
    ) -> ByHeart:
        made.append(by_heart(texts, answers, space, progress=progress))
        return made[-1]

    kind = kind_of(state, remembered)
    dataset = dataset_of(exchanges, POLICY) if by_everything else kind.dataset(exchanges)
    kind.prepare(dataset, exchanges, silent)
    (student,) = made
    predicted = {row.id: student.predict(row.text) for row in dataset.rows}
    scored = Scored.of(dataset.rows, predicted, student.answers)
    threshold = Promise(ALPHA, POLICY.certainty, seed=seed).threshold(scored.scores, scored.agreed)
    if threshold is None:
        return None
    lowest = min(max(threshold, 0.0), MOST_SURE)
    return 0.5 - SLOPE * (lowest + MOST_SURE) / 2  # of what it wasn't taught, uniform from there on


def broken(state: Path, *, by_everything: bool, seeds: int) -> tuple[int, int]:
    """Of how many seeds something may be answered, and of how many of those the promise is broken."""
    shares = [disagreement(state, seed, by_everything=by_everything) for seed in range(seeds)]
    passed = [share for share in shares if share is not None]
    return len(passed), sum(share > ALPHA for share in passed)


def test_the_promise_holds_for_what_is_judged_by_the_other_part(tmp_path: Path) -> None:
    passed, failed = broken(tmp_path, by_everything=False, seeds=SEEDS)
    assert passed > SEEDS / 2, "else it says nothing"
    assert failed <= binom.ppf(0.999, SEEDS, 1 - POLICY.certainty)


def test_it_breaks_where_what_trained_the_student_judges_it_too(tmp_path: Path) -> None:
    passed, failed = broken(tmp_path, by_everything=True, seeds=20)
    assert passed == failed == 20


def test_a_release_names_what_trained_it_and_judges_by_the_rest(tmp_path: Path) -> None:
    chance = random.Random(1)
    exchanges = logged(requests(chance, 600), chance)
    kind = kind_of(tmp_path, by_words, LENIENT)
    dataset = kind.dataset(exchanges)
    past, dataset = kind.prepare(dataset, exchanges, silent)
    look = kind.look(dataset, past, number=1, seed=1, stakes=None, progress=silent)
    assert look.candidate is not None
    assert isinstance(look.candidate, PastRelease)
    judged = {row.id for row in dataset.rows}
    assert look.candidate.taught == {one.id for one in exchanges} - judged
    assert set(look.candidate.held_out) == judged
    assert dataset.left_out["kept for training"] == len(look.candidate.taught)
    assert sum(period.exchanges for period in dataset.traffic.values()) == len(judged)
    remarks = kind.remarks(dataset, look)
    assert (remarks["train_share"], remarks["trained_on"]) == (0.5, len(look.candidate.taught))

    store = ReleaseStore(tmp_path)
    name = store.write("intents", look.candidate.files(), {"student": "encoder", **remarks})
    read = read_past(store, "intents", name)
    assert read.taught == look.candidate.taught
    assert [read.redo(row) for row in dataset.rows] == [look.candidate.redo(row) for row in dataset.rows]

    # Back to a linear student: what trained the encoder can't say what that would have made of it.
    later = [dataclasses.replace(one, release=name) for one in logged(requests(chance, 50), chance)]
    linear = LinearKind(store, POLICY.model_copy(update={"student": StudentChoice()}))
    assert len(linear.dataset(exchanges).rows) == 600, "as long as it has met no traffic"
    both = linear.dataset([*exchanges, *later])
    assert {row.id for row in both.rows} == judged | {one.id for one in later if judges(one.id)}
    ready, _ = linear.prepare(both, exchanges, silent)
    assert propensity_of(both, ready).max() <= 1


def test_forgetting_reaches_what_trained_a_release(tmp_path: Path, write_log: Any) -> None:
    chance = random.Random(1)
    exchanges = [
        dataclasses.replace(one, tenant="theirs" if number % 10 == 0 else "ours")
        for number, one in enumerate(logged(requests(chance, 600), chance))
    ]
    state = write_log(exchanges)
    kind = kind_of(state, by_words, LENIENT)
    past, dataset = kind.prepare(kind.dataset(exchanges), exchanges, silent)
    look = kind.look(dataset, past, number=1, seed=1, stakes=None, progress=silent)
    assert isinstance(look.candidate, PastRelease)
    store = ReleaseStore(state)
    name = store.write("intents", look.candidate.files(), {"student": "encoder", "created": 2_000_000.0})
    erased = forget(state, Whose(tenant="theirs"), noticed_within_s=0.0)
    assert erased.tasks["intents"].releases == {name: 60}
    theirs = {one.id for one in exchanges if one.tenant == "theirs"}
    assert read_past(store, "intents", name).taught == look.candidate.taught - theirs


def test_what_is_erased_while_it_is_learned_trains_nothing(tmp_path: Path) -> None:
    chance = random.Random(1)
    exchanges = logged(requests(chance, 100), chance)

    def erasing(
        texts: Sequence[str], answers: NDArray[np.int64], space: AnswerSpace, *, progress: Progress
    ) -> ByHeart:
        erase_answers(tmp_path, "intents", {exchanges[0].id}, Disk())
        return by_heart(texts, answers, space, progress=progress)

    kind = kind_of(tmp_path, erasing)
    with pytest.raises(ErasedMeanwhile, match="something was erased"):
        kind.prepare(kind.dataset(exchanges), exchanges, silent)


def test_what_it_takes_is_measured_of_texts_it_reads_for_the_first_time(tmp_path: Path) -> None:
    chance = random.Random(1)
    often = requests(chance, 30)
    exchanges = logged([pair for pair in often for _ in range(10)], chance)
    kind = kind_of(tmp_path)
    _, dataset = kind.prepare(kind.dataset(exchanges), exchanges, silent)
    assert len(kind.given(exchanges)) == len({row.text for row in dataset.rows}) <= 30
    assert len(dataset.rows) > 100


def test_what_it_cant_read_is_never_accepted(tmp_path: Path) -> None:
    chance = random.Random(1)
    exchanges = logged(requests(chance, 600), chance)
    kind = kind_of(tmp_path, short_sighted, LENIENT)
    past, dataset = kind.prepare(kind.dataset(exchanges), exchanges, silent)
    look = kind.look(dataset, past, number=1, seed=1, stakes=None, progress=silent)
    assert isinstance(look.candidate, PastRelease)
    long = [row for row in dataset.rows if row.text.startswith("pin")]
    assert kind.remarks(dataset, look)["refused"] == len(long) > 50
    assert not any(look.candidate.accepts_row(row) for row in long)
    assert look.spread is not None
    assert look.spread.cuts[0] > 0, (
        "a gateway follows the confidence of what is read, and so must what it is compared with"
    )
    assert any(look.candidate.accepts_row(row) for row in dataset.rows)


def test_one_answer_is_nothing_to_learn(tmp_path: Path) -> None:
    chance = random.Random(1)
    exchanges = logged([(text, "lost") for text, _ in requests(chance, 50)], chance)
    kind = kind_of(tmp_path)
    with pytest.raises(StudentSilent, match="hold 1 different answers a student could give"):
        kind.prepare(kind.dataset(exchanges), exchanges, silent)


def judges(id: str) -> bool:
    return place_of("intents", id) >= 0.5


def by_words(
    texts: Sequence[str], answers: NDArray[np.int64], space: AnswerSpace, *, progress: Progress
) -> LinearStudent:
    counted = TermCounts([text.rsplit(" ", 2)[0] for text in texts])
    return counted.fit(np.arange(len(texts)), answers, space.answers, space.tokens)


class ShortSighted(ByHeart):
    def predict(self, text: str) -> Prediction:
        if text.startswith("pin"):
            raise TextTooLong("too long by all means")
        return super().predict(text)


def short_sighted(
    texts: Sequence[str], answers: NDArray[np.int64], space: AnswerSpace, *, progress: Progress
) -> ShortSighted:
    return ShortSighted({}, space)
