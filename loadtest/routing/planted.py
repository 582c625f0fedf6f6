"""Everything STATISTICS.md names as going wrong, planted: how often the promise breaks with the rule off, and on.

Each life has a student that must not be released, or a release that went bad. The same life with a student that is
fine shows that the rule doesn't merely refuse everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from loadtest.routing.lives import ALPHA, DELTA, Bools, Floats, Rules, TableStudent, Task, breaks
from loadtest.routing.runner import Runner
from loadtest.routing.verdict import is_kept
from loadtest.routing.watches import likelihood_ratio, watch
from routers.logistic import fit_logistic
from routers.simulator import Message

LIVES = 200

Rng = np.random.Generator
Build = Callable[[Rng, bool], Task]
"""From the life's coins, and whether its student is fine, to the life."""


@dataclass(frozen=True, slots=True)
class Planted:
    """A rule, what happens where it is broken, and its life.

    `life` gives whether the promise broke (None: nothing was released), from a seed, whether the rule is kept, and
    whether the student is fine.
    """

    section: str
    failure: str
    life: Callable[[int, bool, bool], bool | None]


def _planted(section: str, failure: str, build: Build, without: Rules) -> Planted:
    def life(seed: int, kept: bool, fine: bool) -> bool | None:
        task = build(np.random.default_rng(seed), fine)
        return breaks(task, Rules() if kept else without, seed)

    return Planted(section, failure, life)


def _always(fine: bool) -> Callable[[TableStudent], bool]:
    """A student that disagrees as often at every threshold: whatever is released breaks the promise, or nothing."""
    return lambda release: not fine


def _of(disagrees: Bools, rng: Rng) -> tuple[list[Message], dict[str, tuple[str, float]]]:
    """Messages that never repeat, and a student whose scores say nothing."""
    scores = rng.random(len(disagrees))
    messages = [Message(str(number), "right") for number in range(len(disagrees))]
    said = {
        message.text: ("wrong" if wrong else "right", float(score))
        for message, wrong, score in zip(messages, disagrees, scores, strict=True)
    }
    return messages, said


def repeated_looks(rng: Rng, fine: bool) -> Task:
    """A student a hair above α, every request labelled; with the rule off it is tested every 10 labels."""
    messages, said = _of(rng.random(2000) < (0.03 if fine else ALPHA + 0.001), rng)
    return Task(messages=messages, said=said, breaks=_always(fine), learn_every=10)


def _sixty_answers(rng: Rng, fine: bool) -> Task:
    """600 labels of 60 answers; whatever the student answers, 13 % disagree."""
    answers = rng.integers(0, 60, 600)
    disagrees = rng.random(600) < (0.03 if fine else ALPHA + 0.03)
    messages = [Message(f"{answer} {number}", str(answer)) for number, answer in enumerate(answers)]
    said = {
        message.text: ("wrong" if wrong else message.teacher, 0.0)
        for message, wrong in zip(messages, disagrees, strict=True)
    }
    return Task(messages=messages, said=said, breaks=_always(fine), learn_every=600, scorer=_by_answer)


def _by_answer(fitted: Sequence[str], agreed: Bools, texts: Sequence[str]) -> Floats:
    """How often the answer's labels agreed: as much as a forest remembers. Ties are broken by the text."""
    known = np.array([int(text.split()[0]) for text in fitted])
    count = np.bincount(known, minlength=60)
    share = (np.bincount(known, weights=agreed, minlength=60) + 1.0) / (count + 2.0)
    return np.array([share[int(a)] + 1e-9 * int(n) for a, n in (text.split() for text in texts)])


def _features(texts: Sequence[str]) -> NDArray[np.float64]:
    """Fifteen numbers of a text that mean nothing."""
    return np.array([np.random.default_rng(int(text)).normal(size=15) for text in texts])


def fitted_logistic(rng: Rng, fine: bool) -> Task:
    """500 labels, and a logistic regression on fifteen signals that mean nothing."""
    messages, said = _of(rng.random(500) < (0.03 if fine else ALPHA + 0.005), rng)
    return Task(messages=messages, said=said, breaks=_always(fine), learn_every=500, scorer=_by_logistic)


def _by_logistic(fitted: Sequence[str], agreed: Bools, texts: Sequence[str]) -> Floats:
    if agreed.all() or not agreed.any():
        return _features(texts)[:, 0]
    model = fit_logistic(_features(fitted), agreed.astype(np.int64), inverse_penalty=1.0)
    scores: Floats = _features(texts) @ (model.weights[:, 1] - model.weights[:, 0])
    return scores


def tilted_sample(rng: Rng, fine: bool) -> Task:
    """90 % of the traffic is one answer, on which 13 % disagree; a balanced sample of ten answers hardly sees it."""
    answers = np.where(rng.random(3000) < 0.9, 0, rng.integers(1, 10, 3000))
    disagrees = rng.random(3000) < np.where(answers == 0, 0.03 if fine else 0.13, 0.02)
    scores = rng.random(3000)
    messages = [Message(str(number), str(answer)) for number, answer in enumerate(answers)]
    said = {
        message.text: ("wrong" if wrong else message.teacher, float(score))
        for message, wrong, score in zip(messages, disagrees, scores, strict=True)
    }
    return Task(messages=messages, said=said, breaks=_always(fine), learn_every=3000)


def missing_audits(rng: Rng, fine: bool) -> Task:
    """Everything is answered and audited at 30 %; the teacher times out on 70 % of what the student gets wrong."""
    messages, said = _of(rng.random(2000) < (0.03 if fine else 0.14), rng)
    return Task(
        messages=messages,
        said=said,
        breaks=_always(fine),
        learn_every=50,
        first_look=2000,
        audit_rate=0.3,
        earlier=TableStudent.above(-1.0, said),
        missing=lambda message: 0.7 if said[message.text][0] == "wrong" else 0.0,
    )


def cache_replays(rng: Rng, fine: bool) -> Task:
    """3,000 texts that repeat as Zipf says, each right or wrong for good, the thirty most frequent wrong more often."""
    weights = 1.0 / np.arange(1, 3001) ** 1.1
    weights /= weights.sum()
    wrong = rng.random(3000) < (0.02 if fine else np.where(np.arange(3000) < 30, 0.25, 0.05))
    scores = rng.random(3000)
    drawn = rng.choice(3000, size=3000, p=weights)
    said = {str(text): ("wrong" if wrong[text] else "right", float(scores[text])) for text in range(3000)}

    def broken(release: TableStudent) -> bool:
        accepted = scores >= release.router.rank_threshold
        return float(weights[accepted & wrong].sum()) > ALPHA * float(weights[accepted].sum())

    return Task(
        messages=[Message(str(text), "right") for text in drawn],
        said=said,
        breaks=broken,
        learn_every=3000,
    )


def _second_release(rng: Rng, fine: bool) -> Task:
    """The next student has learned what an earlier release escalated: it disagrees on 2 % there, on 21 % elsewhere."""
    accepted = rng.random(2000) < 0.5
    disagrees = rng.random(2000) < np.where(accepted, 0.03 if fine else 0.21, 0.02)
    messages, said = _of(disagrees, rng)
    before = {message.text: ("right", float(sure)) for message, sure in zip(messages, accepted, strict=True)}
    return Task(
        messages=messages,
        said=said,
        breaks=_always(fine),
        learn_every=100,
        first_look=2000,
        audit_rate=0.15,
        earlier=TableStudent.above(0.5, before),
    )


def content_coin(rng: Rng, fine: bool) -> Task:
    """200 texts; two of them, 15 % of the traffic, are always wrong. A coin that is a hash may never audit them."""
    texts = np.where(rng.random(2000) < 0.15, rng.integers(0, 2, 2000), rng.integers(2, 200, 2000))
    said = {
        str(text): ("wrong" if text < 2 and not fine else "right", float(rng.random())) for text in range(200)
    }

    def broken(release: TableStudent) -> bool:
        sure = np.array([said[str(text)][1] >= release.router.rank_threshold for text in range(200)])
        traffic = np.concatenate([np.full(2, 0.15 / 2), np.full(198, 0.85 / 198)])
        return not fine and float(traffic[:2][sure[:2]].sum()) > ALPHA * float(traffic[sure].sum())

    return Task(
        messages=[Message(str(text), "right") for text in texts],
        said=said,
        breaks=broken,
        learn_every=2000,
        audit_rate=0.15,
        only_audits=True,
    )


def drowned_drift(seed: int, kept: bool, fine: bool) -> bool | None:
    """After 5,000 audits with 3 % disagreement come 1,000 with 10 %, under α = 5 %: broken if nobody notices.

    None: withdrawn.
    """
    rng = np.random.default_rng(seed)
    stream = np.concatenate([rng.random(5000) < 0.03, rng.random(1000) < (0.03 if fine else 0.10)])
    seen = (watch if kept else likelihood_ratio)(stream)
    if seen is not None and (fine or seen <= 5000):
        return None
    return not fine and seen is None


PLANTED: dict[str, Planted] = {
    "looks": _planted("§3", "tested every 10 labels at the full δ", repeated_looks, Rules(looks=False)),
    "fitted: answers": _planted(
        "§3", "scored by answer, with the tested labels", _sixty_answers, Rules(crossed=False)
    ),
    "fitted: logistic": _planted(
        "§3", "a logistic model of the tested labels", fitted_logistic, Rules(crossed=False)
    ),
    "tilted": _planted("§2", "tested on a balanced sample", tilted_sample, Rules(own_traffic=False)),
    "missing": _planted("§2", "audits without an answer dropped", missing_audits, Rules(missing=False)),
    "replays": _planted("§1", "cache replays left out (Zipf)", cache_replays, Rules(replays=False)),
    "weights": _planted("§2", "all labels count alike", _second_release, Rules(weights=False)),
    "audits": _planted("§2", "tested on what was escalated", _second_release, Rules(audits=False)),
    "coin": _planted("§2", "the coin is a hash of the text", content_coin, Rules(random_coin=False)),
    "drift": Planted("§5", "a plain mixture of likelihood ratios watches", drowned_drift),
}


@dataclass(frozen=True, slots=True)
class Lived:
    """How many lives broke the promise, rule off and on; and of `tried` fine students how many went live, rule on."""

    off: int = 0
    on: int = 0
    fine: int = 0
    tried: int = 0

    def __add__(self, other: Lived) -> Lived:
        return Lived(
            self.off + other.off, self.on + other.on, self.fine + other.fine, self.tried + other.tried
        )


def live(name: str, seeds: Sequence[int]) -> Lived:
    """Live one planted failure's life with every seed, and with every fourth that of a fine student."""
    life = PLANTED[name].life
    fine = [seed for seed in seeds if seed % 4 == 0]
    return Lived(
        off=sum(life(seed, False, False) is True for seed in seeds),
        on=sum(life(seed, True, False) is True for seed in seeds),
        fine=sum(life(seed, True, True) is False for seed in fine),
        tried=len(fine),
    )


def tables(runner: Runner) -> Iterator[Table]:
    """Live every life and give the table."""
    lives = runner.scaled(LIVES)
    pieces = [
        (name, range(start, min(start + 20, lives))) for name in PLANTED for start in range(0, lives, 20)
    ]
    found = {name: Lived() for name in PLANTED}
    for (name, _), part in runner.each("planted", live, pieces):
        found[name] += part
    yield table_of(found, lives)


def table_of(found: dict[str, Lived], lives: int) -> Table:
    """A row for each planted failure."""
    table = Table(
        title=f"Planted failures: lives that break the promise (at most {DELTA:.0%} may), {lives} each",
        title_justify="left",
    )
    for name in ("", "what is broken", "rule off", "rule on", "", "a fine student is live, rule on"):
        table.add_column(name, justify="right" if name.startswith(("rule", "a fine")) else "left")
    for name, lived in found.items():
        table.add_row(
            PLANTED[name].section,
            PLANTED[name].failure,
            f"{lived.off / lives:.1%}",
            f"{lived.on / lives:.1%}",
            "kept" if is_kept(lived.on, lives, DELTA) else "BROKEN",
            f"{lived.fine / lived.tried:.0%}",
        )
    return table
