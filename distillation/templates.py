"""Prompts that are one template filled in anew: names, free text, retrieved context that the fingerprint can't mask.

Nothing is merged: two tasks taken for one spoil each other. What looks like one template is reported, with a rule to
paste that is tested to match its prompts and no others.

The words of a template are found by how often they come in the same company, as in mining patterns from event logs
(LogCluster: Vaarandi & Pihelgas, 2015). A word is constant if three neighbouring words it is one of stand in enough of
the prompts, and no word of them is one of many that stand in its place; what is between constant words is a slot. What
has few values ("Answer yes or no", "Answer in French") is taken for part of the instructions: it tells templates apart.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from distillation.prompts import Prompt
from serving.exchange import Json

LEAST_PROMPTS = 10
"""So many different prompts make a template."""
_LEAST_WORDS = 6
_COMMON_SHARE = 20  # what is in a twentieth of the prompts is common, or in three of a few
_LEAST_COMMON = 3
_MANY_VALUES = 8
_ALIKE = 0.5
_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 60
_PLACEHOLDER = re.compile(r"<(?:n|name|email|url)>")

_Runs = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Template:
    """A group of prompts that share a template.

    `tasks` counts their requests by the task they were logged under. `slots` shows what stands in the slots of a few
    of them. `rule` is what to paste into the configuration to make them one task, None if no rule tells them from
    other prompts.
    """

    name: str
    model: str
    prompts: int
    requests: int
    cost_usd: float
    tasks: dict[str, int]
    slots: list[list[str]]
    rule: str | None

    def to_json(self) -> Json:
        """The template as `--json` prints it."""
        return asdict(self)


def find_templates(prompts: Sequence[Prompt]) -> list[Template]:
    """The templates among the prompts, the most expensive first."""
    alike: dict[tuple[str, str], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        alike[prompt.model, prompt.setting].append(prompt)
    found = [
        _template(group, runs, prompts)
        for bucket in alike.values()
        for cluster in _clusters(bucket)
        for group, runs in _merged(_split(cluster))
    ]
    return sorted(found, key=lambda template: (-template.cost_usd, -template.requests, template.name))


def _clusters(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Prompts that have most of what is common in each of them in common. What is alone is left out."""
    if len(prompts) < LEAST_PROMPTS:
        return []
    constant = _common(prompts, LEAST_PROMPTS)
    members: dict[frozenset[int], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        members[frozenset(map(hash, _triples(prompt.words))) & constant].append(prompt)
    members.pop(frozenset(), None)
    clusters: dict[frozenset[int], list[Prompt]] = {}
    for common in sorted(members, key=lambda one: -len(members[one])):
        leader = next((one for one in clusters if len(one & common) >= _ALIKE * len(one | common)), common)
        clusters.setdefault(leader, []).extend(members[common])
    return [cluster for cluster in clusters.values() if len(cluster) >= LEAST_PROMPTS]


def _split(prompts: Sequence[Prompt]) -> list[tuple[list[Prompt], _Runs]]:
    """Groups of prompts that have the same constant words in the same order."""
    common = _common(prompts, max(_LEAST_COMMON, len(prompts) // _COMMON_SHARE))
    groups: dict[_Runs, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[_constant(prompt.words, common)].append(prompt)
    return [(group, runs) for runs, group in groups.items()]


def _common(prompts: Sequence[Prompt], least: int) -> frozenset[int]:
    """The shingles, as numbers, that are constant.

    They stand in `least` prompts, and each of their words is, between or beside the other two, the choice of an eighth
    of the prompts or more.
    """
    spread = Counter(shingle for prompt in prompts for shingle in set(map(hash, _triples(prompt.words))))
    common = {shingle for shingle, count in spread.items() if count >= least}
    places: dict[int, tuple[int, ...]] = {}
    for prompt in prompts:
        for triple in _triples(prompt.words):
            if hash(triple) in common and hash(triple) not in places:
                places[hash(triple)] = tuple(map(hash, _places(triple)))
    asked = {place for three in places.values() for place in three}
    chosen: Counter[int] = Counter()
    for prompt in prompts:
        for triple in set(_triples(prompt.words)):
            chosen.update(place for place in map(hash, _places(triple)) if place in asked)
    return frozenset(
        shingle
        for shingle, three in places.items()
        if all(spread[shingle] * _MANY_VALUES >= chosen[place] for place in three)
    )


def _places(triple: tuple[str, str, str]) -> list[tuple[int, str, str]]:
    """Where each word of three stands: between, before or behind which others."""
    first, second, third = triple
    return [(0, second, third), (1, first, third), (2, first, second)]


def _merged(groups: list[tuple[list[Prompt], _Runs]]) -> list[tuple[list[Prompt], _Runs]]:
    """The groups large enough, each with the smaller ones that fill a slot of its with something common."""
    kept: list[tuple[list[Prompt], _Runs]] = []
    left = sorted(groups, key=lambda group: (sum(map(len, group[1])), -len(group[0])))
    for prompts, runs in list(left):
        if len(prompts) < LEAST_PROMPTS or sum(map(len, runs)) < _LEAST_WORDS:
            continue
        if not any(runs is other for _, other in left):
            continue  # it is in another already
        pattern = re.compile(_regex(prompts, runs))
        inside = [
            other
            for other in left
            if other[1] is not runs
            and len(other[0]) <= len(prompts)
            and all(pattern.search(prompt.text) for prompt in other[0])
        ]
        taken = {id(other[1]) for other in inside} | {id(runs)}
        left = [other for other in left if id(other[1]) not in taken]
        kept.append((prompts + [prompt for other, _ in inside for prompt in other], runs))
    return kept


def _triples(words: Sequence[str]) -> Iterable[tuple[str, str, str]]:
    """Every three neighbouring words none of which was masked."""
    for triple in zip(words, words[1:], words[2:], strict=False):
        if not any("<" in word and _PLACEHOLDER.search(word) for word in triple):
            yield triple


def _constant(words: tuple[str, ...], common: frozenset[int]) -> _Runs:
    """The runs of words that common shingles cover."""
    runs = ([words[i] for i in places] for constant, places in _stretches(words, common) if constant)
    return tuple(tuple(run) for run in runs)


def _stretches(words: tuple[str, ...], common: frozenset[int]) -> Iterable[tuple[bool, list[int]]]:
    covered = [False] * len(words)
    for start in range(len(words) - 2):
        if hash(words[start : start + 3]) in common:
            covered[start : start + 3] = [True] * 3
    for constant, places in itertools.groupby(range(len(words)), key=covered.__getitem__):
        yield constant, list(places)


def _template(group: list[Prompt], runs: _Runs, prompts: Sequence[Prompt]) -> Template:
    tasks: Counter[str] = Counter()
    for prompt in group:
        tasks += prompt.tasks
    model = group[0].model
    name = f"template-{hashlib.sha256(repr((model, group[0].setting, runs)).encode()).hexdigest()[:8]}"
    regex = _regex(group, runs)
    pattern = re.compile(regex)
    inside = {id(prompt) for prompt in group}
    others = [prompt for prompt in prompts if prompt.model == model and id(prompt) not in inside]
    told_apart = all(pattern.search(prompt.text) for prompt in group) and not any(
        pattern.search(prompt.text) for prompt in others
    )
    return Template(
        name=name,
        model=model,
        prompts=len(group),
        requests=tasks.total(),
        cost_usd=sum(prompt.cost_usd for prompt in group),
        tasks=dict(tasks),
        slots=[_slots(prompt, runs) for prompt in group[:_EXAMPLES]],
        rule=_rule(name, model, regex) if told_apart else None,
    )


def _regex(group: Sequence[Prompt], runs: _Runs) -> str:
    r"""A regular expression for the system prompt: the constant words in their order, anything between them.

    Each step is atomic (`(?>…)`): no text, whoever wrote it, makes the search go back over what it has passed.
    """
    constant = [r"\s+".join(re.escape(word) for word in run) for run in runs]
    begins = all(prompt.words[: len(runs[0])] == runs[0] for prompt in group)
    ends = all(prompt.words[-len(runs[-1]) :] == runs[-1] for prompt in group)
    first = rf"\s*{constant[0]}" if begins else rf"(?>.*?{constant[0]})"
    steps = [rf"(?>.*?{step})" for step in constant[1:]]
    if ends and len(constant) > 1:
        steps[-1] = rf".*?{constant[-1]}\s*\Z"
    return rf"(?s)\A{first}{''.join(steps)}"


def _slots(prompt: Prompt, runs: _Runs) -> list[str]:
    """What a prompt has in its slots, cut short."""
    values: list[str] = []
    at = 0
    for run in (*runs, None):
        end = len(prompt.words) if run is None else _find(prompt.words, run, at)
        if end > at:
            value = " ".join(prompt.words[at:end])
            short = value[: _EXAMPLE_CHARACTERS - 1] + "…" if len(value) > _EXAMPLE_CHARACTERS else value
            values.append(short)
        at = end + len(run or ())
    return values


def _find(words: tuple[str, ...], run: tuple[str, ...], start: int) -> int:
    """Where a run stands in words that hold it."""
    return next(i for i in range(start, len(words)) if words[i : i + len(run)] == run)


def _rule(name: str, model: str, regex: str) -> str:
    quoted = f"'{regex}'" if "'" not in regex and regex.isprintable() else json.dumps(regex)
    return f'[[task]]\nname = "{name}"\nmatch = {{ model = {json.dumps(model)}, system = {quoted} }}\n'
