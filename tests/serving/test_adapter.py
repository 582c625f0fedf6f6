"""LoRA adapters: which folders are one, what they are called, and where servers find them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from serving.adapter import NAME, Adapter
from serving.adapter_shelf import AdapterShelf, Loaded
from serving.errors import ConfigError, DamagedRelease
from serving.lm_plan import LmPlan
from serving.tensor_file import Tensor, tensors_of

Json = dict[str, Any]
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "tiny", "target_modules": ["q_proj"]}


def tensor_file(tensors: dict[str, NDArray[np.float32]]) -> bytes:
    """A safetensors file, as its format is described."""
    header: Json = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    head = orjson.dumps(header)
    return len(head).to_bytes(8, "little") + head + b"".join(tensor.tobytes() for tensor in tensors.values())


def pair(rank: int = 4, *, up: int | None = None) -> dict[str, NDArray[np.float32]]:
    return {
        f"{LAYER}.lora_A.weight": np.ones((rank, 16), dtype=np.float32),
        f"{LAYER}.lora_B.weight": np.ones((8, rank if up is None else up), dtype=np.float32),
    }


def save(folder: Path, *, weights: bytes | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_bytes(orjson.dumps({**CONFIG, **config}))
    (folder / "adapter_model.safetensors").write_bytes(tensor_file(pair()) if weights is None else weights)
    return folder


class TestTensorFile:
    def test_it_tells_names_kinds_and_shapes(self) -> None:
        assert tensors_of(tensor_file(pair())) == {
            f"{LAYER}.lora_A.weight": Tensor("F32", (4, 16)),
            f"{LAYER}.lora_B.weight": Tensor("F32", (8, 4)),
        }

    @given(cut=st.integers(0, len(tensor_file(pair())) - 1))
    def test_no_beginning_of_one_passes(self, cut: int) -> None:
        with pytest.raises(ValueError, match="it "):
            tensors_of(tensor_file(pair())[:cut])

    @given(st.binary(max_size=200))
    def test_nothing_else_passes_nor_breaks_it(self, data: bytes) -> None:
        try:
            tensors_of(data)
        except ValueError:
            return
        assert data[8:9] == b"{", "only an empty header is a whole file that short"

    @pytest.mark.parametrize(
        "header",
        [
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
            {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
            {"a": 7},
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            [],
        ],
    )
    def test_a_header_that_lies_is_refused(self, header: Any) -> None:
        head = orjson.dumps(header)
        with pytest.raises(ValueError, match=r"'a'|overlap|no JSON object"):
            tensors_of(len(head).to_bytes(8, "little") + head + bytes(4))


class TestAdapter:
    def test_its_name_is_its_content(self, tmp_path: Path) -> None:
        first = Adapter.read(save(tmp_path / "a"))
        assert NAME.fullmatch(first.name)
        assert (first.base, first.rank) == ("tiny", 4)
        assert Adapter.read(save(tmp_path / "b")).name == first.name, "wherever it lies"
        assert Adapter.read(save(tmp_path / "c", lora_alpha=32)).name != first.name
        assert Adapter.of_release(first.files()) == first

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"peft_type": "IA3"}, "only LORA"),
            ({"r": 0}, "r = 0"),
            ({"weights": tensor_file(pair())[:-1]}, "its header speaks of"),
            ({"weights": b""}, "doesn't begin like"),
            ({"weights": tensor_file({})}, "no lora_A and lora_B"),
            ({"weights": tensor_file(dict(list(pair().items())[:1]))}, "one half only"),
            ({"weights": tensor_file(pair(up=3))}, "don't fit each other"),
        ],
    )
    def test_what_is_none_is_refused_in_a_sentence(
        self, tmp_path: Path, changes: dict[str, Any], said: str
    ) -> None:
        folder = save(tmp_path / "a", **changes)
        with pytest.raises(ConfigError, match=said) as caught:
            Adapter.read(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        files = {f"adapter/{path.name}": path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(DamagedRelease, match=said):
            Adapter.of_release(files)

    def test_a_pickle_is_never_read(self, tmp_path: Path) -> None:
        folder = save(tmp_path / "a")
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(ConfigError, match=r"adapter_model\.bin, a pickle"):
            Adapter.read(folder)

    def test_a_folder_without_its_files_says_which(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no folder"):
            Adapter.read(tmp_path / "none")
        folder = save(tmp_path / "a")
        (folder / "adapter_config.json").unlink()
        with pytest.raises(ConfigError, match=r"adapter_config\.json can't be read"):
            Adapter.read(folder)
        with pytest.raises(DamagedRelease, match="has no adapter/"):
            Adapter.of_release({})


class TestPlan:
    PLAN = LmPlan("http://x/v1", "base", adapter="understudy-0123456789ab")

    def test_a_plan_with_an_adapter_comes_back_and_is_asked_for_by_its_name(self) -> None:
        assert LmPlan.load(self.PLAN.files()) == self.PLAN
        assert self.PLAN.served_as == self.PLAN.adapter

    def test_versions_that_know_no_adapters_refuse_it(self) -> None:
        assert orjson.loads(self.PLAN.files()["student.json"])["schema"] == 2
        assert orjson.loads(LmPlan("http://x/v1", "base").files()["student.json"])["schema"] == 1

    def test_plans_from_before_there_were_adapters_are_read(self) -> None:
        written = orjson.loads(LmPlan("http://x/v1", "base").files()["student.json"])
        del written["adapter"]
        read = LmPlan.load({"student.json": orjson.dumps(written)})
        assert read.adapter is None
        assert read.served_as == "base"

    def test_a_name_that_leads_elsewhere_is_damage(self) -> None:
        written = orjson.loads(self.PLAN.files()["student.json"])
        with pytest.raises(DamagedRelease, match="adapter"):
            LmPlan.load({"student.json": orjson.dumps({**written, "adapter": "../../etc"})})


class TestShelf:
    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Adapter:
        return Adapter.read(save(tmp_path / "a"))

    def test_it_lies_there_whole_until_it_is_taken_away(self, tmp_path: Path, adapter: Adapter) -> None:
        shelf = AdapterShelf(tmp_path / "state")
        assert shelf.names() == []
        shelf.put(adapter)
        shelf.put(adapter)
        assert shelf.names() == [adapter.name]
        assert Adapter.read(Path(shelf.path(adapter.name))) == adapter
        shelf.remove(adapter.name)
        assert shelf.names() == []

    def test_what_was_damaged_there_is_put_right(self, tmp_path: Path, adapter: Adapter) -> None:
        shelf = AdapterShelf(tmp_path / "state")
        shelf.put(adapter)
        (Path(shelf.path(adapter.name)) / "adapter_model.safetensors").write_bytes(b"torn")
        shelf.put(adapter)
        assert Adapter.read(Path(shelf.path(adapter.name))) == adapter

    def test_it_remembers_who_was_told(self, tmp_path: Path, adapter: Adapter) -> None:
        shelf = AdapterShelf(tmp_path / "state")
        servers = [Loaded("http://a/v1", None), Loaded("http://b/v1", "KEY")]
        for server in [*servers, *servers]:
            shelf.note(adapter.name, server)
        with (tmp_path / "state" / "adapters" / f"{adapter.name}.servers").open("ab") as file:
            file.write(b'{"base_url":"http://to')
        assert shelf.servers(adapter.name) == servers

    def test_who_was_told_isnt_for_everybody(self, tmp_path: Path, adapter: Adapter) -> None:
        shelf = AdapterShelf(tmp_path / "state")
        shelf.note(adapter.name, Loaded("http://user:password@a/v1", None))
        noted = tmp_path / "state" / "adapters" / f"{adapter.name}.servers"
        assert noted.stat().st_mode & 0o007 == 0

    def test_a_server_may_see_it_elsewhere(self, tmp_path: Path, adapter: Adapter) -> None:
        shelf = AdapterShelf(tmp_path / "state", seen_at=Path("/mnt/adapters"))
        assert shelf.path(adapter.name) == f"/mnt/adapters/{adapter.name}"
        with pytest.raises(ValueError, match="no adapter"):
            shelf.path("../x")

    def test_nothing_is_taken_away_while_it_is_used(self, tmp_path: Path, adapter: Adapter) -> None:
        shelf = AdapterShelf(tmp_path / "state")
        with shelf.in_use(), shelf.in_use(), shelf.tidying() as alone:
            assert not alone
        with shelf.tidying() as alone:
            assert alone
            putting = threading.Thread(target=shelf.put, args=(adapter,))
            putting.start()
            putting.join(timeout=0.2)
            assert putting.is_alive(), "it waits"
        putting.join(timeout=20)
        assert shelf.names() == [adapter.name]

    def test_many_put_it_there_at_once(self, tmp_path: Path, adapter: Adapter) -> None:
        shelf = AdapterShelf(tmp_path / "state")
        failed: list[BaseException] = []

        def put() -> None:
            try:
                shelf.put(adapter)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=put) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(timeout=20)
        assert failed == []
        assert Adapter.read(Path(shelf.path(adapter.name))) == adapter
        assert [path.name for path in (tmp_path / "state" / "adapters").glob(".writing-*")] == []
