"""Prompts that are one template: found, told apart from other instructions, and named by a rule that holds."""

from __future__ import annotations

import dataclasses
import random
import re
import subprocess
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillation.prompts import MOST_PROMPTS, Prompt, Prompts
from distillation.templates import LEAST_PROMPTS, Template, find_templates
from loadtest.stack import command, environment
from serving.exchange import Exchange
from serving.fingerprint import mask
from serving.rules import Rules
from serving.settings import Settings

Make = Callable[..., Any]
FIRST = re.findall(
    r"\w+", "Anna Bob Carla David Eva Frank Greta Hans Ines Jan Karl Lena Mia Nils Olga Paul Rosa Sven"
)
LAST = re.findall(
    r"\w+", "Schmidt Meier Rossi Silva Novak Jensen Dubois Costa Weber Fischer Wagner Becker Koch Bauer"
)
CITIES = re.findall(
    r"\w+", "Berlin Rome Oslo Paris Madrid Vienna Prague Lisbon Athens Dublin Zurich Bern Turin Riga Kiev"
)
WORDS = re.findall(
    r"\S+",
    """likes asked about refunds last week and prefers email over phone because parcel was late twice in a row
    while travelling with two children to the sea, lives alone, runs a bakery, hates queues""",
)
ANSWER = "Answer with one label: delivery, refund or other."


def profile(draw: random.Random, answer: str = ANSWER) -> str:
    notes = " ".join(draw.choice(WORDS) for _ in range(draw.randint(6, 16)))
    who = f"{draw.choice(FIRST)} {draw.choice(LAST)} from {draw.choice(CITIES)}"
    who += f", since {draw.randint(1990, 2026)}"
    return f"You label messages for a parcel service.\nCustomer: {who}.\n{notes}.\n{answer}"


def prompt(
    text: str, *, model: str = "m", setting: str = "", task: str = "other", usd: float = 0.01
) -> Prompt:
    return Prompt(model, setting, text, tuple(mask(text).split()), Counter({task: 1}), usd)


def profiles(count: int, answer: str = ANSWER, seed: int = 1, **more: Any) -> list[Prompt]:
    draw = random.Random(seed)
    return [prompt(profile(draw, answer), **more) for _ in range(count)]


def pattern(template: Template) -> re.Pattern[str]:
    assert template.rule is not None
    (task,) = Settings(**tomllib.loads(template.rule)).task
    assert task.name == template.name
    assert task.match is not None and task.match.system is not None
    return re.compile(task.match.system)


def test_profiles_are_one_template() -> None:
    given_prompts = [
        *(prompt(one.text, task=f"auto-{number}") for number, one in enumerate(profiles(60))),
        *profiles(240, seed=2),
        *(prompt(f"Do something else, such as {word}") for word in WORDS),
    ]
    (found,) = find_templates(given_prompts)
    assert (found.prompts, found.requests) == (300, 300)
    assert found.cost_usd == pytest.approx(3.0)
    assert found.tasks["other"] == 240
    assert len(found.tasks) == 61
    matching = [bool(pattern(found).search(one.text)) for one in given_prompts]
    assert matching == [True] * 300 + [False] * len(WORDS)
    assert all("Customer" not in value for slots in found.slots for value in slots)


def test_other_instructions_are_other_tasks() -> None:
    """The same profile with one line of instructions that differs."""
    by_answer = {
        answer: profiles(size, answer, seed)
        for seed, (answer, size) in enumerate(
            {"Answer yes or no.": 240, "Answer in French.": 30, ANSWER: 60}.items()
        )
    }
    everything = [one for group in by_answer.values() for one in group]
    found = find_templates(everything)
    assert sorted(one.prompts for one in found) == [30, 60, 240]
    for one in found:
        (matched,) = {
            answer for answer, group in by_answer.items() for p in group if pattern(one).search(p.text)
        }
        assert len(by_answer[matched]) == one.prompts


@pytest.mark.parametrize(
    "texts",
    [
        [
            f"You label messages for a parcel service. Be brief. Answer {a}."
            for a in ("yes or no", "in French", "in one word")
        ],
        [f"You are {name}." for name in FIRST],
        [" ".join(random.Random(seed).sample(WORDS, 20)) for seed in range(60)],
        [one.text for one in profiles(LEAST_PROMPTS - 1)],
        ["Label the message. Be brief and kind, always."] * 50,
        [
            f"You are an expert. {line} Be brief and kind."
            for line in ("Summarise it.", "Translate it.", "Label it.", "Rate it.")
        ],
    ],
    ids=["variants", "short", "no template", "too few", "one prompt", "near-identical"],
)
def test_what_isnt_a_template(texts: list[str]) -> None:
    assert find_templates([prompt(text) for text in dict.fromkeys(texts)]) == []


def test_models_tools_and_formats_are_kept_apart() -> None:
    one, two = profiles(40, seed=1, model="a"), profiles(40, seed=2, model="b")
    found = find_templates([*one, *two])
    assert [(template.model, template.prompts) for template in found] == [("a", 40), ("b", 40)] or [
        (template.model, template.prompts) for template in found
    ] == [("b", 40), ("a", 40)]
    with_tools = profiles(40, seed=3, model="a", setting="tools")
    found = find_templates([*one, *with_tools])
    assert [template.prompts for template in found] == [40, 40]
    assert [template.rule for template in found] == [None, None], "a rule on the prompt alone would mix them"


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.text(st.sampled_from("ab .*+?()[]{}|\\^$'\"\n<>é0"), min_size=1, max_size=12),
        min_size=1,
        max_size=4,
    ),
    st.integers(LEAST_PROMPTS, 20),
    st.integers(0, 2**20),
)
def test_a_rule_matches_its_prompts_and_no_others(constant: list[str], count: int, seed: int) -> None:
    draw = random.Random(seed)
    slots = [" ".join(draw.choice(WORDS) for _ in range(6)) + f" {draw.random()}x" for _ in range(count)]
    texts = [
        f"You always label these {slot} ".join(["", *constant]) + " and that is all of it" for slot in slots
    ]
    texts += ["You always label these things and that is all of it", "You always label", "unrelated"]
    given_prompts = [prompt(text) for text in texts]
    for template in find_templates(given_prompts):
        if template.rule is not None:
            matching = [one for one in given_prompts if pattern(template).search(one.text)]
            assert len(matching) == template.prompts


def test_no_text_holds_a_rule_up() -> None:
    (found,) = find_templates(profiles(100))
    rule = pattern(found)
    pieces = [
        "You label messages for a parcel service.\nCustomer: ",
        "Customer: since ",
        f"\n{ANSWER} x",
        " ",
        "a",
    ]
    began = time.perf_counter()
    for piece in pieces:
        rule.search(pieces[0] + piece * (200_000 // len(piece)))
    assert time.perf_counter() - began < 2


def test_gathering_is_bounded(exchanges: Make) -> None:
    one: Exchange = exchanges([("hello", "x")])[0]

    def made(number: int) -> Exchange:
        text = "".join(chr(97 + int(digit)) for digit in str(number))
        request = {"model": "m", "messages": [{"role": "system", "content": text}]}
        return dataclasses.replace(one, request=request)

    prompts = Prompts(Rules(Settings()))
    prompts.add("other", ((made(number), 0.0) for number in range(MOST_PROMPTS + 100)))
    assert len(prompts.all()) == MOST_PROMPTS


def understudy(config: Path, *options: str) -> str:
    done = subprocess.run(
        command("tasks", "--config", str(config), *options),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_300_customers_are_one_row_and_after_the_rule_one_task(
    stand_in: Make, gateway: Make, tmp_path: Path
) -> None:
    teacher = stand_in({}, default="delivery").url
    draw = random.Random(7)
    texts = [profile(draw) for _ in range(300)]

    def send(running: Any, texts: list[str]) -> set[str]:
        user = {"role": "user", "content": "hello"}
        with httpx.Client(base_url=running.url, verify=False) as client:
            answers = [
                client.post(
                    "/v1/chat/completions",
                    json={"model": "gpt-4o", "messages": [{"role": "system", "content": text}, user]},
                )
                for text in texts
            ]
        assert {answer.status_code for answer in answers} == {200}
        return {answer.headers["x-understudy-task"] for answer in answers}

    fast = {"log": {"durability": "relaxed"}}
    running = gateway(teacher, **fast)
    assert len(send(running, texts)) == 101, "a hundred places, and other"
    config = tmp_path / "understudy.toml"
    config.write_text(f'state_dir = "{running.state_dir}"\n')
    (template,) = orjson.loads(understudy(config, "--json"))["templates"]
    assert template["requests"] == template["prompts"] == 300
    said = understudy(config)
    rows = [line for line in said.splitlines() if re.match(r"(auto-|other|template-)[0-9a-f]* +\d", line)]
    assert len(rows) == 1 and rows[0].startswith(template["name"])
    rule = said[said.index("[[task]]") :]
    assert rule.strip() == template["rule"].strip()

    config.write_text(config.read_text() + rule)
    assert "template" not in understudy(config, "--json").partition('"templates"')[2]
    assert "300 requests of 101 tasks, not shown, are from before a rule named them" in understudy(config)
    named = tomllib.loads(rule)["task"]
    assert send(gateway(teacher, task=named, **fast), [profile(draw) for _ in range(20)]) == {
        template["name"]
    }
