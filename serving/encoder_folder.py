"""The folder of an encoder that `student.base` or `student.embedder` names: what is there, without loading any of it.

config.json             what the model is
tokenizer.json          what turns a text into its tokens, in the form that is served without transformers
model.safetensors       its weights; or pytorch_model.bin, or either in parts with an index
model.onnx              an export of a sentence encoder, here or in a folder `onnx`: needs no config.json and no weights
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from serving.engines import MODEL_FILE, TOKENIZER_FILE
from serving.errors import UnderstudyError
from serving.exchange import Json

CONFIG_FILE = "config.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""The files that hold weights, whole or in parts."""

_WHOLE_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_EXPORTS = ("", "onnx")
_MOST_HEADER_BYTES = 100_000_000


class UnfitEncoder(UnderstudyError):
    """A folder doesn't hold an encoder that could be fine-tuned, exported or served."""


@dataclass(frozen=True, slots=True)
class EmbedderFolder:
    """That of a sentence encoder: the files of an export, if it holds one; whether one can be made of the rest."""

    export: tuple[Path, Path] | None
    exportable: bool

    @classmethod
    def look_into(cls, folder: Path) -> EmbedderFolder:
        """Raises UnfitEncoder, saying what to do, where there is neither."""
        key = "student.embedder"
        if not folder.is_dir():
            raise UnfitEncoder(
                f"{key}: there is no folder {folder}: name that of a sentence encoder, with {CONFIG_FILE}, "
                f"{TOKENIZER_FILE} and its weights in it, or with {MODEL_FILE} and {TOKENIZER_FILE}"
            )
        export = next((found for below in _EXPORTS if (found := _export(folder, folder / below))), None)
        try:
            _check_model(folder, key)
        except UnfitEncoder as error:
            if export is None:
                raise UnfitEncoder(
                    f"{error}; nor is there an export, {MODEL_FILE} with {TOKENIZER_FILE}"
                ) from error
            return cls(export, exportable=False)
        return cls(export, exportable=True)


def check_base(folder: Path) -> None:
    """Raise UnfitEncoder, for a person, where the folder can't be what `student.base` should name."""
    key = "student.base"
    if not folder.is_dir():
        raise UnfitEncoder(
            f"{key}: there is no folder {folder}: name that of a Hugging Face encoder, with {CONFIG_FILE}, "
            f"{TOKENIZER_FILE} and model.safetensors in it"
        )
    _check_model(folder, key)


def _check_model(folder: Path, key: str) -> None:
    """Whether the folder holds an encoder as Hugging Face's libraries save it; raises UnfitEncoder where it doesn't."""
    config = _json(folder / CONFIG_FILE, key)
    _json(folder / TOKENIZER_FILE, key)
    if config.get("is_encoder_decoder") or config.get("is_decoder"):
        raise UnfitEncoder(
            f"{key}: {folder} holds a {config.get('model_type')}, which writes text: name an encoder"
        )
    weights = [folder / name for name in _WHOLE_WEIGHTS if (folder / name).is_file()]
    if not weights:
        raise UnfitEncoder(
            f"{key}: {folder} holds no weights: there is none of {', '.join(_WHOLE_WEIGHTS[:2])}"
        )
    if weights[0].suffix == ".safetensors" and not _is_whole(weights[0]):
        raise UnfitEncoder(f"{key}: {weights[0]} isn't whole: copy or download it again")


def _export(folder: Path, place: Path) -> tuple[Path, Path] | None:
    """The model in `place`, with the tokenizer beside it or in the folder itself."""
    for tokenizer in (place / TOKENIZER_FILE, folder / TOKENIZER_FILE):
        if (place / MODEL_FILE).is_file() and tokenizer.is_file():
            return place / MODEL_FILE, tokenizer
    return None


def _json(path: Path, key: str) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnfitEncoder(f"{key}: {path} can't be read ({error.strerror})") from error
    except ValueError as error:
        raise UnfitEncoder(f"{key}: {path} isn't JSON: copy or download it again") from error
    if not isinstance(content, dict):
        raise UnfitEncoder(f"{key}: {path} holds {str(content)[:40]!r} where an object is needed")
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
