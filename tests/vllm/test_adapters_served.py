"""LoRA adapters and structured answers on a real vLLM: one server is the student of two tasks at a time."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from distillation.learning import learn
from loadtest.tiny_models import Recipe, trained
from routers.meter import TokenMeter
from routers.schema_fit import fits
from serving.adapter import Adapter
from serving.adapter_loading import AdapterNotLoaded
from serving.adapter_shelf import AdapterShelf
from serving.adapter_tidying import tidy
from serving.engines import Engines
from serving.exchange import StudentAnswer
from serving.lm import LmStudent
from serving.lm_plan import LmPlan
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.student_server import StudentRefused

Start = Callable[..., Any]
Json = dict[str, Any]
STEPS = 150
LABELS = 160
FEW = 8
QUEUES = "Put the customer's message into a queue, as JSON."
CALLS = "Act on the customer's message by a tool."
DESKS = "Name the desk that takes the customer's message."


@dataclass(frozen=True)
class Adapters:
    """Two adapters for the tiny model: one that answers in JSON and by calling tools, and one that names desks."""

    forms: Path
    desks: Path
    rows: list[tuple[str, str]]


def queue(label: str) -> str:
    return json.dumps({"queue": label})


def call(label: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'move', 'arguments': {'queue': label}})}\n</tool_call>"


def desk(label: str, labels: list[str]) -> str:
    return f"desk {labels.index(label) % 4}"


@pytest.fixture(scope="session")
def adapters(
    vllm: Any, tiny_models: Any, torch_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Adapters:
    cache = Path(os.environ.get("UNDERSTUDY_MODELS", Path(__file__).parents[2] / ".cache" / "models"))
    with tiny_models.past.open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["teacher"]) for row in csv.DictReader(file)]
    folder = tmp_path_factory.mktemp("adapters")

    def task(name: str, prompt: str, answers: list[str]) -> tuple[Path, Path]:
        told, asked = folder / f"{name}.csv", folder / f"{name}.txt"
        asked.write_text(prompt, encoding="utf-8")
        with told.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "teacher"])
            writer.writerows((text, answer) for (text, _), answer in zip(rows, answers, strict=True))
        return told, asked

    json_, calls = (
        task("queues", QUEUES, [queue(label) for _, label in rows]),
        task("calls", CALLS, [call(label) for _, label in rows]),
    )
    named = task("desks", DESKS, desks(rows))
    recipes = (
        Recipe("adapter", (json_[0], calls[0]), (json_[1], calls[1]), base=vllm.folder, steps=STEPS),
        Recipe("adapter", (named[0],), (named[1],), base=vllm.folder, steps=STEPS),
    )
    with ThreadPoolExecutor() as both:
        made = list(both.map(lambda recipe: trained(recipe, cache, python=torch_python), recipes))
    return Adapters(made[0], made[1], rows)


def desks(rows: list[tuple[str, str]]) -> list[str]:
    labels = sorted({label for _, label in rows})
    return [desk(label, labels) for _, label in rows]


def asked(prompt: str, text: str, **more: Any) -> Json:
    said = [{"role": "system", "content": prompt}, {"role": "user", "content": text}]
    return {"model": "big", "messages": said, **more}


def listed(vllm: Any) -> set[str]:
    """The adapters that the server has."""
    models = httpx.get(f"{vllm.url}/v1/models", timeout=60).json()["data"]
    return {model["id"] for model in models} - {vllm.model}


def forget(vllm: Any, name: str) -> None:
    """What a server that is started anew has done."""
    vllm.post("/v1/unload_lora_adapter", {"lora_name": name}).raise_for_status()


@pytest.fixture
def tidied(vllm: Any, tmp_path: Path) -> Iterator[None]:
    """The server without adapters, whatever a test has left there."""
    yield
    for name in listed(vllm):
        forget(vllm, name)


@pytest.mark.timeout(1200)  # it waits for the adapters to be trained, too
def test_one_server_is_the_student_of_two_tasks(
    vllm: Any,
    adapters: Adapters,
    tidied: None,
    write_log: Start,
    exchanges: Start,
    stand_in: Start,
    gateway: Start,
    eventually: Start,
    tmp_path: Path,
) -> None:
    state = tmp_path / "state"
    rows = adapters.rows[:LABELS]
    folders = {"queues": adapters.forms, "desks": adapters.desks}
    names = {task: Adapter.read(folder).name for task, folder in folders.items()}
    prompts = {"queues": QUEUES, "desks": DESKS}
    right = {"queues": [queue(label) for _, label in rows], "desks": desks(adapters.rows)[:LABELS]}
    for task in folders:
        made = exchanges([(text, answer) for (text, _), answer in zip(rows, right[task], strict=True)])
        write_log(
            [
                dataclasses.replace(one, task=task, request=asked(prompts[task], text))
                for one, (text, _) in zip(made, rows, strict=True)
            ],
            task,
        )
    tasks = [
        {
            "name": task,
            "match": {"header": task},
            "max_disagreement": bound,
            "audit_rate": 1e-9,
            "student": {
                "kind": "lm",
                "base_url": f"{vllm.url}/v1",
                "model": vllm.model,
                "adapter": folders[task],
                "max_tokens": 60,
                "hold_back_s": 20.0,
            },
        }
        # Of so small a model an adapter makes no clever one: it is right about half of the time with JSON.
        for task, bound in (("queues", 0.75), ("desks", 0.4))
    ]
    assert listed(vllm) == set()
    lessons = learn(Settings(state_dir=state, task=tasks))
    assert [one.outcome for one in lessons] == ["released", "released"], [one.message for one in lessons]
    assert listed(vllm) == set(names.values())

    running = gateway(stand_in({}, default="teacher").url, task=tasks)

    def ask(task: str, text: str, **more: Any) -> tuple[str, str]:
        answer = running.post(
            json=asked(prompts[task], text, **more), headers={"x-understudy-task": task}, timeout=60
        )
        return answer.json()["choices"][0]["message"]["content"], answer.headers["x-understudy-route"]

    def served(task: str) -> str:
        """Whose answers the student of a task gives to the first messages, where it answers."""
        given = {said for said, route in (ask(task, text) for text, _ in rows[:FEW]) if route == "student"}
        (whose,) = {other for other, answers in right.items() if given & set(answers)}
        return whose

    assert served("queues") == "queues"
    assert served("desks") == "desks"

    forget(vllm, names["desks"])
    assert served("desks") == "desks", "loaded again when it was missed"
    assert listed(vllm) == set(names.values())
    errors = running.metric("understudy_upstream_errors_total", upstream="student")
    assert errors == 0, "and waited for"

    store = ReleaseStore(state)
    release = store.read("desks", "r0001")
    forms = Adapter.read(adapters.forms)
    plan = dataclasses.replace(LmPlan.load(release.files), adapter=forms.name)
    files = {**release.files, **plan.files(), **forms.files()}
    store.set_live("desks", store.write("desks", files, {**release.card, "adapter": forms.name}))
    eventually(lambda: running.metric("understudy_release_info", task="desks", release="r0002") == 1)
    shelf = AdapterShelf(state)
    assert asyncio.run(tidy(state, shelf, shelf.names())) == [names["desks"]]
    assert listed(vllm) == {names["queues"]}, "one adapter, which both tasks need now"
    store.rollback("desks")
    eventually(lambda: running.metric("understudy_release_info", task="desks", release="r0001") == 1)
    assert served("desks") == "desks"
    assert listed(vllm) == set(names.values())
    for task in folders:
        store.set_live(task, None)
    assert sorted(asyncio.run(tidy(state, shelf, shelf.names()))) == sorted(names.values())
    assert listed(vllm) == set()


def test_an_adapter_of_another_base_is_refused_and_harms_nothing(
    vllm: Any, adapters: Adapters, tmp_path: Path
) -> None:
    folder = tmp_path / "wide"
    shutil.copytree(adapters.desks, folder)
    wider(folder / "adapter_model.safetensors")
    adapter = Adapter.read(folder)
    shelf = AdapterShelf(tmp_path / "state")
    shelf.put(adapter)
    with pytest.raises(AdapterNotLoaded, match=r"didn't load the adapter .* must match"):
        asyncio.run(prepared(vllm, adapter, shelf))
    assert listed(vllm) == set()
    (folder / "adapter_config.json").write_bytes(
        orjson.dumps({**orjson.loads(adapter.config), "r": 64}),
    )
    shutil.copy(adapters.desks / "adapter_model.safetensors", folder)
    large = Adapter.read(folder)
    shelf.put(large)
    with pytest.raises(AdapterNotLoaded, match="--max-lora-rank"):
        asyncio.run(prepared(vllm, large, shelf))
    shelf.remove(large.name)
    with pytest.raises(AdapterNotLoaded, match=r"can't read that folder; .*student\.adapters_at"):
        asyncio.run(prepared(vllm, large, shelf))
    assert vllm.answers()


async def prepared(vllm: Any, adapter: Adapter, shelf: AdapterShelf, *requests: Json) -> list[StudentAnswer]:
    """The answers to requests of a student with this adapter, once the server has it."""
    plan = LmPlan(f"{vllm.url}/v1", vllm.model, adapter=adapter.name, max_tokens=120, timeout_s=120.0)
    student = LmStudent.of(plan, TokenMeter, Engines(adapters=shelf))
    try:
        await student.prepare()
        return [await student.answer(request) for request in requests]
    finally:
        await student.aclose()


def wider(path: Path) -> None:
    """Make the tensors of a file those of a model that is twice as wide."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body, made = orjson.loads(data[8 : 8 + length]), data[8 + length :], b""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begins, ends = entry["data_offsets"]
        rows, columns = entry["shape"]
        half = name.endswith("lora_A.weight")
        entry["shape"] = [rows, 2 * columns] if half else [2 * rows, columns]
        entry["data_offsets"] = [len(made), len(made) + 2 * (ends - begins)]
        made += 2 * body[begins:ends]
    head = orjson.dumps(header)
    path.write_bytes(len(head).to_bytes(8, "little") + head + made)


def test_answers_in_a_form_are_in_it_and_scored_by_their_tokens(
    vllm: Any, adapters: Adapters, tidied: None, tmp_path: Path
) -> None:
    adapter = Adapter.read(adapters.forms)
    shelf = AdapterShelf(tmp_path / "state")
    shelf.put(adapter)
    labels = sorted({label for _, label in adapters.rows})
    schema = {
        "type": "object",
        "properties": {"queue": {"type": "string", "enum": labels}},
        "required": ["queue"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "queue", "schema": schema, "strict": True}}
    tools = [{"type": "function", "function": {"name": "move", "parameters": schema, "strict": True}}]
    text = adapters.rows[0][0]
    named = {"type": "function", "function": {"name": "move"}}
    refused = vllm.post("/v1/chat/completions", {**asked(CALLS, text, tools=tools), "model": vllm.model})
    calls = [
        asked(CALLS, text, tools=tools, tool_choice=named),
        asked(CALLS, text, tools=tools, tool_choice="required", parallel_tool_calls=False),
    ]
    if refused.status_code == 400:
        calls = []  # a server that was named, without --tool-call-parser
    whole, *called = asyncio.run(
        prepared(vllm, adapter, shelf, asked(QUEUES, text, response_format=form), *calls)
    )
    assert fits(orjson.loads(whole.choices[0]["message"]["content"]), schema)
    for answer in called:
        (call,) = answer.choices[0]["message"]["tool_calls"]
        assert (call["function"]["name"], call["type"]) == ("move", "function")
        assert fits(orjson.loads(call["function"]["arguments"]), schema)
    for answer in (whole, *called):
        assert math.isfinite(answer.score)
        assert (answer.signals["valid"], answer.signals["truncated"]) == (1.0, 0.0)
        assert answer.model == adapter.name


def test_a_feature_that_the_server_refuses_is_found_out_by_asking(vllm: Any) -> None:
    async def ask() -> tuple[str | None, str | None]:
        student = LmStudent.of(LmPlan(f"{vllm.url}/v1", vllm.model, timeout_s=120.0), TokenMeter)
        broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
        long = asked(DESKS, "parcel " * 5000)
        try:
            for request in (asked(DESKS, "Hello", response_format=broken), long):
                with pytest.raises(StudentRefused, match="status 400"):
                    await student.answer(request)
            seen = student.record.seen
            answer = await student.answer(asked(DESKS, "Hello"))
            assert answer.complete and seen.logprobs is None
            seen = student.record.seen
            assert (seen.logprobs, seen.alternatives, seen.usage, seen.streamed) == (True, 5, True, True)
            assert seen.model == vllm.model
            return student.unsupported(long), student.unsupported(
                asked(DESKS, "Hello", response_format=broken)
            )
        finally:
            await student.aclose()

    assert asyncio.run(ask()) == (None, None), "neither names what it is about"
