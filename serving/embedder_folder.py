"""The folder of a sentence encoder that `student.embedder` names: what it should hold, without loading any of it.

Either an export, `model.onnx` (there, or in a folder `onnx`) and `tokenizer.json`; or what Hugging Face's libraries
save, `config.json`, `tokenizer.json` and the weights, of which an export is made. Many folders hold both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serving.engines import MODEL_FILE, TOKENIZER_FILE
from serving.errors import UnderstudyError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_EXPORTS = ("", "onnx")


class UnfitEmbedder(UnderstudyError):
    """What `student.embedder` names is no sentence encoder, or can't be made into one that is served."""


@dataclass(frozen=True, slots=True)
class EmbedderFolder:
    """What is there: the files of an export, if it holds one, and whether one could be made of the rest."""

    export: tuple[Path, Path] | None
    exportable: bool

    @classmethod
    def look_into(cls, folder: Path) -> EmbedderFolder:
        """Raises UnfitEmbedder, saying what to do, where there is neither."""
        if not folder.is_dir():
            raise UnfitEmbedder(
                f"student.embedder: there is no folder {folder}: name that of a sentence encoder, with config.json, "
                f"{TOKENIZER_FILE} and its weights in it, or with {MODEL_FILE} and {TOKENIZER_FILE}"
            )
        needed = ("config.json", TOKENIZER_FILE)
        missing = [name for name in needed if not (folder / name).is_file()]
        if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
            missing.append("weights (model.safetensors)")
        export = next((found for below in _EXPORTS if (found := _export(folder, folder / below))), None)
        if export is None and missing:
            raise UnfitEmbedder(
                f"student.embedder: {folder} holds no {MODEL_FILE} with {TOKENIZER_FILE}, and no "
                f"{', no '.join(missing)}: is it the folder of a sentence encoder, and whole?"
            )
        return cls(export, exportable=not missing)


def _export(folder: Path, place: Path) -> tuple[Path, Path] | None:
    """The model in `place`, with the tokenizer beside it or in the folder itself."""
    for tokenizer in (place / TOKENIZER_FILE, folder / TOKENIZER_FILE):
        if (place / MODEL_FILE).is_file() and tokenizer.is_file():
            return place / MODEL_FILE, tokenizer
    return None
