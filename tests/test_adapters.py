"""LoRA adapters the whole way: learned, loaded when they go live, lost and loaded again, and forgotten."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from distillation.learning import Lesson, learn
from gateway.doctor_student import check_students
from gateway.live import LiveReleases
from gateway.metrics import Metrics
from gateway.tasks import Tasks
from routers.confidence import Confidence
from routers.router import Router
from serving.adapter import Adapter
from serving.adapter_shelf import AdapterShelf, Loaded
from serving.adapter_tidying import AdapterTidying, tidy
from serving.lm_plan import LmPlan
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.stand_in import create_stand_in
from serving.stand_in_call import StandInHttp

Start = Callable[..., Any]
Json = dict[str, Any]
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
ROUTER = Router(Confidence.of_score(1.0, 0.0), rank_threshold=1.0)
SHOPS = ("parcels", "refunds")
WORDS = ("lost", "late", "found")


def save(folder: Path, plays: str, **config: Any) -> Path:
    """An adapter as peft saves it; `plays` is what the server below makes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {"A": np.ones((4, 16), dtype=np.float32), "B": np.ones((8, 4), dtype=np.float32)}
    header, data = {}, b""
    for name, half in halves.items():
        span = [len(data), len(data) + half.nbytes]
        header[f"{LAYER}.lora_{name}.weight"] = {"dtype": "F32", "shape": half.shape, "data_offsets": span}
        data += half.tobytes()
    head = orjson.dumps(header)
    (folder / "adapter_model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    said = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "base", "plays": plays, **config}
    (folder / "adapter_config.json").write_bytes(orjson.dumps(said))
    return folder


class Lora:
    """A server of one base model that loads adapters as vLLM does: which answers one gives stands in its config."""

    def __init__(self, answers: dict[str, list[Recorded]]) -> None:
        self._answers = answers
        self.loaded: dict[str, Any] = {}
        self.told: list[tuple[str, str]] = []
        self.refusal: tuple[int, str] | None = None
        self.can_load = True
        self.knows_its_models = True
        self.free = threading.Event()
        self.free.set()

    def say(self, text: str) -> None:
        """Know an answer to one more message, by whichever adapter."""
        for answers in self._answers.values():
            answers.append(Recorded(text, "yes", confidence=0.99))

    def start_anew(self) -> None:
        self.loaded = {}

    def load(self, name: str, folder: Path) -> None:
        plays = orjson.loads((folder / "adapter_config.json").read_bytes())["plays"]
        self.loaded[name] = create_stand_in(Recording(folder, tuple(self._answers[plays])), model=name)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw = b""
        while scope["method"] == "POST":
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        path, body = scope["path"], orjson.loads(raw or b"{}")
        if path == "/v1/models":
            await _answer(send, 200, {"data": [{"id": name} for name in ("base", *self.loaded)]})
        elif path == "/v1/chat/completions":
            await self._chat(scope, raw, body["model"], receive, send)
        elif not self.can_load:
            await _answer(send, 404, {"detail": "Not Found"})
        else:
            await _answer(send, *await self._told(path, body))

    async def _chat(self, scope: Any, raw: bytes, model: str, receive: Any, send: Any) -> None:
        base = create_stand_in(Recording(Path("base"), tuple(self._answers["base"])), model="base")
        app = base if model == "base" or not self.knows_its_models else self.loaded.get(model)
        if app is None:
            await _answer(
                send, 404, {"error": {"message": f"The model `{model}` does not exist.", "code": 404}}
            )
            return
        given = iter([{"type": "http.request", "body": raw}])

        async def again() -> Any:
            return next(given, None) or await receive()

        await app(scope, again, send)

    async def _told(self, path: str, body: Json) -> tuple[int, Json]:
        name = body["lora_name"]
        self.told.append((path.removeprefix("/v1/"), name))
        await asyncio.to_thread(self.free.wait, 60)
        if path == "/v1/unload_lora_adapter":
            return (200, {}) if self.loaded.pop(name, None) else (404, {"error": {"message": "no"}})
        if self.refusal is not None:
            return self.refusal[0], {"error": {"message": self.refusal[1]}}
        if name in self.loaded:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        self.load(name, Path(body["lora_path"]))
        return 200, {}


async def _answer(send: Any, status: int, body: Any) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"application/json")],
        }
    )
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def rows(shop: str, count: int = 160) -> list[tuple[str, str, str, float]]:
    """Message, teacher's answer, student's, and how sure that is."""
    chance = random.Random(shop)
    made = []
    for number in range(count):
        right = f"{shop} {chance.choice(WORDS)}"
        fails = chance.random() < 0.1
        sure = chance.uniform(0.3, 0.7) if fails else chance.uniform(0.8, 0.99)
        made.append((f"message {number}", right, f"{shop} unclear" if fails else right, sure))
    return made


def plays(shop: str) -> list[Recorded]:
    return [Recorded(text, said, confidence=sure) for text, _, said, sure in rows(shop)]


@pytest.fixture
def lora() -> Lora:
    base = [Recorded(text, "base", confidence=0.99) for text, *_ in rows("parcels")]
    return Lora({"base": base, **{shop: plays(shop) for shop in (*SHOPS, "newer")}})


@pytest.fixture
def url(lora: Lora, serve: Start) -> str:
    return f"{serve(lora, http=StandInHttp)}/v1"


def settings(state_dir: Path, url: str, adapters: dict[str, Path], **changes: Any) -> Settings:
    choice = {"kind": "lm", "base_url": url, "model": "base", "checkpoints": [2], "commit_tokens": 4}
    tasks = [
        {
            "name": task,
            "match": {"header": task},
            "max_disagreement": 0.2,
            "student": {**choice, "adapter": folder},
        }
        for task, folder in adapters.items()
    ]
    return Settings(state_dir=state_dir, task=tasks, **changes)


def publish(state_dir: Path, task: str, url: str, folder: Path) -> str:
    """A release that serves an adapter, as learning writes it."""
    adapter = Adapter.read(folder)
    plan = LmPlan(base_url=url, model="base", checkpoints=(2,), commit_tokens=4, adapter=adapter.name)
    store = ReleaseStore(state_dir)
    files = {**plan.files(), **adapter.files(), "router.json": ROUTER.dump()}
    name = store.write(task, files, {"student": "lm", "adapter": adapter.name})
    store.set_live(task, name)
    return name


def ask(running: Any, task: str, number: int = 0) -> tuple[str, str, str]:
    """What a request comes to: the answer, who gave it, and why."""
    answer = running.post(
        headers={"x-understudy-task": task, "cache-control": "no-cache"},
        json={"model": "m", "messages": [{"role": "user", "content": f"message {number}"}]},
    )
    said = answer.json()["choices"][0]["message"]["content"]
    return said, answer.headers["x-understudy-route"], answer.headers["x-understudy-reason"]


def sure(shop: str) -> int:
    """The message that the student of a shop is surest of, and right."""
    return max((one[3], number) for number, one in enumerate(rows(shop)) if one[1] == one[2])[1]


def test_two_tasks_share_a_base_model_from_the_log_to_the_answers(
    lora: Lora,
    url: str,
    write_log: Start,
    exchanges: Start,
    stand_in: Start,
    gateway: Start,
    eventually: Start,
    tmp_path: Path,
) -> None:
    adapters = {shop: save(tmp_path / shop, shop) for shop in SHOPS}
    names = {shop: Adapter.read(folder).name for shop, folder in adapters.items()}
    for shop in SHOPS:
        write_log(exchanges([one[:2] for one in rows(shop)]), shop)
    state = tmp_path / "state"
    configured = settings(state, url, adapters)
    lessons = learn(configured)
    assert [one.outcome for one in lessons] == ["released", "released"], [one.message for one in lessons]
    assert {one.task: one.look["adapter"] for one in lessons if one.look} == names
    assert set(lora.loaded) == set(names.values()), "both, in one server"
    files = set(ReleaseStore(state).read("parcels", "r0001").files)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files

    lora.start_anew()
    tasks = [one.model_dump(exclude_unset=True) for one in configured.task]
    running = gateway(
        stand_in({}, default="teacher").url,
        task=tasks,
    )
    eventually(lambda: set(lora.loaded) == set(names.values()))
    for shop in SHOPS:
        number = sure(shop)
        eventually(lambda: ask(running, shop, number)[1] == "student")  # noqa: B023 - called within the turn
        assert ask(running, shop, number) == (rows(shop)[number][1], "student", "confident")

    lora.start_anew()
    assert ask(running, "parcels", sure("parcels"))[1] == "student", "loaded again, and waited for"
    assert set(lora.loaded) == {names["parcels"]}, "the other when it is asked for"


def test_what_a_look_rejects_is_forgotten_at_its_end(
    lora: Lora, url: str, write_log: Start, exchanges: Start, tmp_path: Path
) -> None:
    write_log(exchanges([(text, "something else") for text, *_ in rows("parcels")]), "parcels")
    (found,) = learn(settings(tmp_path / "state", url, {"parcels": save(tmp_path / "a", "parcels")}))
    assert found.outcome == "held"
    assert [what for what, _ in lora.told] == ["load_lora_adapter", "unload_lora_adapter"]
    assert lora.loaded == {}
    assert AdapterShelf(tmp_path / "state").names() == []


def held(configured: Settings) -> str:
    (found,) = learn(configured)
    assert isinstance(found, Lesson)
    assert (found.outcome, found.release) == ("held", None)
    return found.message


def test_what_keeps_an_adapter_from_being_learned_is_said(
    lora: Lora, url: str, write_log: Start, exchanges: Start, tmp_path: Path
) -> None:
    write_log(exchanges([one[:2] for one in rows("parcels")]), "parcels")
    folder = save(tmp_path / "a", "parcels")
    configured = settings(tmp_path / "state", url, {"parcels": folder})
    lora.refusal = (500, "LoRA rank 64 is greater than max_lora_rank 16.")
    assert "--max-lora-rank" in held(configured)
    lora.refusal = (404, "Loading lora x failed: No adapter found for y")
    assert "student.adapters_at" in held(configured)
    lora.refusal = (500, "shapes don't match")
    assert "shapes don't match" in held(configured)
    lora.refusal, lora.can_load = None, False
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in held(configured)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "a pickle" in held(configured)


def test_a_server_that_has_it_from_its_start_isnt_told_to_load_it(
    lora: Lora, url: str, write_log: Start, exchanges: Start, tmp_path: Path
) -> None:
    write_log(exchanges([one[:2] for one in rows("parcels")]), "parcels")
    folder = save(tmp_path / "a", "parcels")
    lora.can_load = False
    lora.load(Adapter.read(folder).name, folder)
    (found,) = learn(settings(tmp_path / "state", url, {"parcels": folder}))
    assert (found.outcome, lora.told) == ("released", [])


class Watching:
    """A worker's live releases, without a gateway around them."""

    def __init__(self, state_dir: Path, url: str) -> None:
        self.live = LiveReleases(state_dir, Tasks(Settings(state_dir=state_dir), lambda: set()), Metrics())

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                await self.live.refresh()
                await asyncio.sleep(0.02)


def test_a_release_whose_adapter_cant_be_loaded_leaves_the_one_before(
    lora: Lora, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    publish(state, "parcels", url, save(tmp_path / "a", "parcels"))

    async def run() -> None:
        watching = Watching(state, url)
        await watching.until(lambda: watching.live.names() == {"parcels": "r0001"})
        lora.refusal = (500, "shapes don't match")
        publish(state, "parcels", url, save(tmp_path / "b", "newer"))
        await watching.until(lambda: "shapes don't match" in caplog.text)
        assert watching.live.names() == {"parcels": "r0001"}
        assert "can't be loaded" in caplog.text
        lora.refusal = None
        await watching.until(lambda: watching.live.names() == {"parcels": "r0002"})
        await watching.live.aclose()

    asyncio.run(run())


def test_a_server_that_takes_its_time_holds_up_nobody(lora: Lora, url: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    publish(state, "aparcels", url, save(tmp_path / "a", "parcels"))

    async def run() -> None:
        lora.free.clear()
        watching = Watching(state, url)
        await watching.live.refresh()
        publish(state, "refunds", f"{url}/nowhere", save(tmp_path / "b", "refunds"))
        await watching.live.refresh()
        assert watching.live.names() == {}
        assert [what for what, _ in lora.told] == ["load_lora_adapter"], "still at it, once"
        ReleaseStore(state).set_live("aparcels", None)
        await watching.live.refresh()
        assert watching.live.names() == {}
        await watching.live.aclose()
        lora.free.set()

    asyncio.run(run())


def test_a_damaged_adapter_is_a_damaged_release(
    lora: Lora, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    adapter, other = (Adapter.read(save(tmp_path / shop, shop)) for shop in SHOPS)
    plan = LmPlan(base_url=url, model="base", adapter=adapter.name)
    store = ReleaseStore(state)
    for files, said in ((other.files(), "was tested"), ({}, "has no adapter/")):
        name = store.write(
            "parcels", {**plan.files(), **files, "router.json": ROUTER.dump()}, {"student": "lm"}
        )
        store.set_live("parcels", name)

        async def run(said: str = said) -> None:
            watching = Watching(state, url)
            await watching.until(lambda: said in caplog.text)
            assert watching.live.names() == {}
            await watching.live.aclose()

        asyncio.run(run())
    assert lora.told == []


def test_a_server_that_answers_with_another_model_is_not_believed(
    lora: Lora, url: str, stand_in: Start, gateway: Start, eventually: Start, tmp_path: Path
) -> None:
    publish(tmp_path / "state", "parcels", url, save(tmp_path / "a", "parcels"))
    task = {"name": "parcels", "match": {"header": "parcels"}, "audit_rate": 1e-9}
    running = gateway(stand_in({}, default="teacher").url, task=[task])
    eventually(lambda: ask(running, "parcels", sure("parcels"))[1] == "student")
    lora.knows_its_models = False
    assert ask(running, "parcels", sure("parcels")) == ("teacher", "teacher", "student_error")


def test_only_what_no_live_release_needs_is_unloaded(lora: Lora, url: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shelf = AdapterShelf(state)
    first, second = (save(tmp_path / shop, shop) for shop in SHOPS)
    publish(state, "parcels", url, first)

    async def load(release: str) -> None:
        watching = Watching(state, url)
        await watching.until(lambda: watching.live.names().get("parcels") == release)
        await watching.live.aclose()

    def tidied() -> list[str]:
        return asyncio.run(tidy(state, shelf, shelf.names()))

    asyncio.run(load("r0001"))
    assert tidied() == []
    publish(state, "parcels", url, second)
    asyncio.run(load("r0002"))
    with shelf.in_use():
        assert tidied() == [], "somebody may be about to load one"
    assert tidied() == [Adapter.read(first).name]
    assert set(lora.loaded) == {Adapter.read(second).name}
    ReleaseStore(state).rollback("parcels")
    asyncio.run(load("r0001"))
    assert tidied() == [Adapter.read(second).name]
    assert set(lora.loaded) == {Adapter.read(first).name}
    (state / "tasks" / "parcels" / "live").write_bytes(b"torn")
    assert tidied() == [], "what is live isn't known"


def test_an_adapter_stays_on_the_shelf_while_its_server_is_away(url: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shelf = AdapterShelf(state)
    adapter = Adapter.read(save(tmp_path / "a", "parcels"))
    shelf.put(adapter)
    shelf.note(adapter.name, Loaded("http://127.0.0.1:9/v1", None))
    assert asyncio.run(tidy(state, shelf, [adapter.name])) == []
    assert shelf.names() == [adapter.name]


def test_a_worker_has_time_to_leave_before_an_adapter_goes(lora: Lora, url: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shelf = AdapterShelf(state)
    adapter = Adapter.read(save(tmp_path / "a", "parcels"))
    shelf.put(adapter)
    shelf.note(adapter.name, Loaded(url, None))
    lora.load(adapter.name, Path(shelf.path(adapter.name)))

    async def run() -> None:
        patient, quick = AdapterTidying(state), AdapterTidying(state, after_s=0.0)
        assert await patient.look() == []
        assert await patient.look() == []
        assert await quick.look() == [adapter.name]

    asyncio.run(run())
    assert lora.loaded == {}


def test_the_doctor_says_what_of_an_adapter_is_there(lora: Lora, url: str, tmp_path: Path) -> None:
    lora.say("Say yes.")
    folder = save(tmp_path / "a", "parcels")
    configured = settings(tmp_path / "state", url, {"parcels": folder})
    name = Adapter.read(folder).name
    (waiting,) = asyncio.run(check_students(configured))
    assert (waiting.verdict, waiting.said.startswith("'base' answered in ")) == ("ok", True)
    assert f"its adapter {name} is loaded by the first look" in waiting.said
    assert lora.told == [], "the doctor changes nothing"
    lora.load(name, folder)
    (loaded,) = asyncio.run(check_students(configured))
    assert (loaded.verdict, loaded.said.startswith(f"'{name}' answered in ")) == ("ok", True)
    (folder / "adapter_config.json").unlink()
    (broken,) = asyncio.run(check_students(configured))
    assert broken.verdict == "problem"
    assert "adapter_config.json can't be read" in broken.said


def test_a_pool_without_servers_keeps_nothing_from_being_said(
    write_log: Start, exchanges: Start, tmp_path: Path
) -> None:
    write_log(exchanges([one[:2] for one in rows("parcels")]), "parcels")
    student = {"kind": "lm", "model": "base", "adapter": save(tmp_path / "a", "parcels")}
    configured = Settings(
        state_dir=tmp_path / "state",
        student={"vllm": {"urls": ["http://127.0.0.1:9"]}},
        task=[{"name": "parcels", "student": student}],
    )
    assert held(configured)
