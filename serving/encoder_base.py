"""The folder of an encoder that is to be fine-tuned: whether everything is there, without loading any of it.

config.json             what the model is
tokenizer.json          what turns a text into its tokens, in the form that is served without transformers
model.safetensors       its weights; or pytorch_model.bin, or either in parts with an index
"""

from __future__ import annotations

import json
from pathlib import Path

from serving.errors import UnderstudyError
from serving.exchange import Json

_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_MOST_HEADER_BYTES = 100_000_000


class UnfitBase(UnderstudyError):
    """A folder doesn't hold an encoder that could be fine-tuned and served."""


def check_base(folder: Path) -> None:
    """Raise UnfitBase, for a person, where the folder can't be what `student.base` should name."""
    if not folder.is_dir():
        raise UnfitBase(
            f"student.base: there is no folder {folder}: name that of a Hugging Face encoder, with config.json, "
            "tokenizer.json and model.safetensors in it"
        )
    config = _json(folder / "config.json")
    _json(folder / "tokenizer.json")
    if config.get("is_encoder_decoder") or config.get("is_decoder"):
        raise UnfitBase(
            f"student.base: {folder} holds a {config.get('model_type')}, which writes text: name an encoder"
        )
    weights = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not weights:
        raise UnfitBase(
            f"student.base: {folder} holds no weights: there is none of {', '.join(_WEIGHTS[:2])}"
        )
    if weights[0].suffix == ".safetensors" and not _is_whole(weights[0]):
        raise UnfitBase(f"student.base: {weights[0]} isn't whole: copy or download it again")


def _json(path: Path) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnfitBase(f"student.base: {path} can't be read ({error.strerror})") from error
    except ValueError as error:
        raise UnfitBase(f"student.base: {path} isn't JSON: copy or download it again") from error
    if not isinstance(content, dict):
        raise UnfitBase(f"student.base: {path} holds {str(content)[:40]!r} where an object is needed")
    return content


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes of length, the header, then the numbers."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MOST_HEADER_BYTES):
            return False
        try:
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            return size == 8 + length + max(ends, default=0)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            return False
