"""Models on ONNX Runtime: what they make of texts, and what isn't one."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from serving.closed_answers import TextTooLong
from serving.engines import Engines
from serving.errors import DamagedRelease
from serving.text_model import CHARACTERS_A_TOKEN, TextModel

Files = dict[str, bytes]
WORDS = {"lost": [3.0, 0.0, 1.0], "card": [1.0, 0.5, 0.0], "late": [0.0, 4.0, 0.0], "money": [0.0, 0.0, 5.0]}


def load(files: Files, **more: Any) -> TextModel:
    return TextModel(files["model.onnx"], files["tokenizer.json"], **more)


@pytest.fixture(scope="module")
def files(text_files: Callable[..., Files]) -> Files:
    return text_files(WORDS)


@pytest.fixture(scope="module")
def model(files: Files) -> TextModel:
    return load(files)


class TestReading:
    def test_what_the_graph_computes(self, model: TextModel) -> None:
        assert (model.width, model.longest, model.batches) == (3, 32, True)
        assert model.numbers("Lost card").tolist() == [2.0, 0.25, 0.5]
        assert model.numbers("what is this").tolist() == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize("text", ["", " ", "\x00", "😀", "\u0301" * 50, "card\ud800"[:4]])
    def test_odd_texts_are_read(self, model: TextModel, text: str) -> None:
        assert np.isfinite(model.numbers(text)).all()

    @settings(max_examples=100, deadline=None)
    @given(texts=st.lists(st.lists(st.sampled_from([*WORDS, "odd"]), max_size=32), min_size=1, max_size=12))
    def test_together_as_alone_in_any_order(self, model: TextModel, texts: list[list[str]]) -> None:
        tokens = [model.tokens(" ".join(text)) for text in texts]
        alone = np.vstack([model.read([one]) for one in tokens])
        order = random.Random(0).sample(range(len(tokens)), len(tokens))
        together = model.read([tokens[place] for place in order])
        np.testing.assert_allclose(together, alone[order], rtol=1e-5, atol=1e-6)

    def test_what_is_too_long_is_said(self, model: TextModel) -> None:
        assert model.numbers("card " * 32).tolist() == [1.0, 0.5, 0.0]
        with pytest.raises(TextTooLong, match="33 tokens; the student reads 32"):
            model.numbers("card " * 33)
        blank = " " * (32 * CHARACTERS_A_TOKEN)
        assert not model.too_long(blank)
        assert np.isfinite(model.numbers(blank)).all()
        with pytest.raises(TextTooLong, match="1025 characters"):
            model.numbers(blank + " ")

    def test_int8_reads_alone(self, text_files: Callable[..., Files]) -> None:
        assert not load(text_files(WORDS, precision="int8")).batches
        assert not load(text_files(WORDS, precision=None)).batches

    def test_without_metadata_the_tokenizer_says_how_long(self, text_files: Callable[..., Files]) -> None:
        files = text_files(WORDS, longest=None)
        with pytest.raises(DamagedRelease, match="'' of longest"):
            load(files)
        cut = {"max_length": 7, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        assert load(with_tokenizer(files, truncation=cut)).longest == 7


def with_tokenizer(files: Files, **changes: Any) -> Files:
    return {
        **files,
        "tokenizer.json": json.dumps({**json.loads(files["tokenizer.json"]), **changes}).encode(),
    }


def with_graph(files: Files, change: Callable[[Any], None]) -> Files:
    model = onnx.load_from_string(files["model.onnx"])
    change(model)
    return {**files, "model.onnx": model.SerializeToString()}


def renamed_input(model: Any) -> None:
    model.graph.input[0].name = "pixels"
    model.graph.node[0].input[1] = "pixels"


def another_output(model: Any) -> None:
    model.graph.output.append(helper.make_tensor_value_info("count", TensorProto.FLOAT, None))


def words_as_output(model: Any) -> None:
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.FLOAT, None))


def counts_as_output(model: Any) -> None:
    model.graph.node.append(helper.make_node("Cast", ["logits"], ["whole"], to=TensorProto.INT64))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("whole", TensorProto.INT64, None))


def an_operation_of_its_own(model: Any) -> None:
    model.graph.node[0].op_type = "Abracadabra"


def divided_by_nothing(model: Any) -> None:
    model.graph.node[-1].input[1] = "nothing"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0.0], dtype=np.float32), "nothing"))


def weights_elsewhere(model: Any) -> None:
    table = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(
        table, location="weights.bin", offset=0, length=len(table.raw_data)
    )
    table.ClearField("raw_data")


def metadata(name: str, value: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.metadata_props.add(key=f"understudy.{name}", value=value)

    return change


DAMAGE: dict[str, Callable[[Files], Files]] = {
    "no model": lambda f: {**f, "model.onnx": b""},
    "a page": lambda f: {**f, "model.onnx": b"<html>not found</html>"},
    "half a model": lambda f: {**f, "model.onnx": f["model.onnx"][: len(f["model.onnx"]) // 2]},
    "other inputs": lambda f: with_graph(f, renamed_input),
    "two outputs": lambda f: with_graph(f, another_output),
    "numbers of each token": lambda f: with_graph(f, words_as_output),
    "whole numbers": lambda f: with_graph(f, counts_as_output),
    "an operation of its own": lambda f: with_graph(f, an_operation_of_its_own),
    "not finite": lambda f: with_graph(f, divided_by_nothing),
    "weights in another file": lambda f: with_graph(f, weights_elsewhere),
    "longest is nothing": lambda f: with_graph(f, metadata("longest", "0")),
    "longest is words": lambda f: with_graph(f, metadata("longest", "many")),
    "longest is no end": lambda f: with_graph(f, metadata("longest", "9" * 30)),
    "padding is below": lambda f: with_graph(f, metadata("pad_id", "-1")),
    "no tokenizer": lambda f: {**f, "tokenizer.json": b""},
    "half a tokenizer": lambda f: {**f, "tokenizer.json": f["tokenizer.json"][:100]},
    "a tokenizer that isn't text": lambda f: {**f, "tokenizer.json": b"\xff\xfe"},
    "a list": lambda f: {**f, "tokenizer.json": b"[]"},
    "no words": lambda f: with_tokenizer(f, model={"type": "WordLevel", "vocab": {}, "unk_token": "[UNK]"}),
    "another model's words": lambda f: with_tokenizer(
        f, model={"type": "WordLevel", "vocab": {"[UNK]": 0, "far": 6}, "unk_token": "[UNK]"}
    ),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
    def test_damage_is_told(self, files: Files, damage: Callable[[Files], Files]) -> None:
        with pytest.raises(DamagedRelease) as raised:
            Engines().text_model(damage(files))
        assert "\n" not in str(raised.value)

    def test_no_file_but_the_releases_is_read(
        self, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "weights.bin").write_bytes(
            onnx.load_from_string(files["model.onnx"]).graph.initializer[0].raw_data
        )
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DamagedRelease):
            Engines().text_model(with_graph(files, weights_elsewhere))

    def test_nothing_is_written(self, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        load(files).numbers("card")
        assert list(tmp_path.iterdir()) == []

    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_any_flipped_byte_is_told_or_harmless(self, files: Files, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(files)))
        spoilt = bytearray(files[name])
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] ^= data.draw(st.integers(1, 255))
        try:
            loaded = load({**files, name: bytes(spoilt)})
        except DamagedRelease as error:
            assert "\n" not in str(error)
            return
        try:
            assert loaded.numbers("card").dtype == np.float32
        except InvalidArgument:  # that word alone leads out of a table: such a text goes to the teacher
            assert loaded.numbers("").dtype == np.float32


def test_a_model_doesnt_keep_the_bytes_it_was_made_of(text_files: Callable[..., dict[str, bytes]]) -> None:
    """A sentence encoder has 90 MB, which every worker would hold twice."""
    files = text_files({"word": [1.0]})
    before = sys.getrefcount(files["model.onnx"])
    model = Engines().text_model(files)
    after = sys.getrefcount(files["model.onnx"])
    assert model.numbers("word")[0] == pytest.approx(1.0)
    assert before == after
