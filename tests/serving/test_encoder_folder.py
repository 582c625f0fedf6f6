from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.encoder_folder import UnfitEncoder, check_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that has all of it, as small as it gets."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return folder


def test_a_whole_folder_will_do(base: Path) -> None:
    check_base(base)


def test_so_will_one_with_weights_in_parts(base: Path) -> None:
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text("{}")
    check_base(base)


def cut(name: str, left: int) -> Callable[[Path], object]:
    return lambda base: (base / name).write_bytes((base / name).read_bytes()[:left])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda base: base.rename(base.with_name("elsewhere")), "there is no folder"),
        (lambda base: (base / "config.json").unlink(), r"config\.json can't be read \(No such file"),
        (lambda base: (base / "tokenizer.json").unlink(), r"tokenizer\.json can't be read \(No such file"),
        (cut("tokenizer.json", 5), r"tokenizer\.json isn't JSON: copy or download it again"),
        (lambda base: (base / "config.json").write_text("[]"), r"config\.json holds '\[\]' where an object"),
        (lambda base: (base / "config.json").write_bytes(b"\xff\xfe"), r"config\.json isn't JSON"),
        (
            lambda base: (base / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}'),
            "holds a t5, which writes text: name an encoder",
        ),
        (lambda base: (base / "model.safetensors").unlink(), r"holds no weights: there is none of model\.safetensors"),
        *((cut("model.safetensors", left), r"model\.safetensors isn't whole") for left in (0, 7, 8, 20, -1)),
        (lambda base: (base / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"), "isn't whole"),
        (lambda base: (base / "model.safetensors").write_bytes(bytes(16)), "isn't whole"),
    ],
)  # fmt: skip
def test_what_wont_do_is_told(base: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(base)
    with pytest.raises(UnfitEncoder, match=said):
        check_base(base)
