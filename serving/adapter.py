"""A LoRA adapter: what makes one base model the student of one task, as peft saves it.

Its name is made of its content, so that learning, every worker and every replica call the same adapter the same, and no
two that differ: loading it twice is loading it once, and nothing else is ever served under that name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from serving.errors import ConfigError, DamagedRelease
from serving.exchange import Json
from serving.tensor_file import Tensor, tensors_of

FOLDER = "adapter"
"""Where a release keeps it."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
NAME = re.compile(r"understudy-[0-9a-f]{12}")

_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_HALVES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that was read whole and found sound. `base` is the model it was trained on, as peft noted it."""

    name: str
    base: str | None
    rank: int
    config: bytes
    weights: bytes

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Read what peft has saved. Raises ConfigError, saying what to do, for anything but a whole adapter."""
        where = f"student.adapter = {str(folder)!r}"
        if not folder.is_dir():
            raise ConfigError(f"{where} is no folder: name the one that peft's save_pretrained wrote")
        if not (folder / WEIGHTS_FILE).exists():
            pickle = next((name for name in _PICKLES if (folder / name).exists()), None)
            if pickle is not None:
                raise ConfigError(
                    f"{where} has {pickle}, a pickle, which could run anything when it is loaded: save it again with "
                    f"safe_serialization=True, which writes {WEIGHTS_FILE}"
                )
        try:
            config = (folder / CONFIG_FILE).read_bytes()
            weights = (folder / WEIGHTS_FILE).read_bytes()
        except OSError as error:
            missing = Path(error.filename or folder).name
            raise ConfigError(
                f"{where}: {missing} can't be read ({error.strerror}); it needs {CONFIG_FILE} and {WEIGHTS_FILE}"
            ) from None
        try:
            return cls._of(config, weights)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}; save it again from where it was trained") from None

    @classmethod
    def of_release(cls, files: Mapping[str, bytes]) -> Adapter:
        """Read what `files` wrote. Raises DamagedRelease."""
        try:
            return cls._of(files[f"{FOLDER}/{CONFIG_FILE}"], files[f"{FOLDER}/{WEIGHTS_FILE}"])
        except KeyError as error:
            raise DamagedRelease(f"the student's adapter has no {error.args[0]}") from None
        except ValueError as error:
            raise DamagedRelease(f"the student's adapter can't be used: {error}") from None

    @classmethod
    def _of(cls, config: bytes, weights: bytes) -> Adapter:
        """Raises ValueError, saying what is wrong with it."""
        said = _config(config)
        rank = said.get("r")
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{CONFIG_FILE} says r = {rank!r}, where the rank should stand")
        try:
            tensors = tensors_of(weights)
        except ValueError as error:
            raise ValueError(f"{WEIGHTS_FILE}: {error}") from None
        _check_pairs(tensors)
        base = said.get("base_model_name_or_path")
        digest = hashlib.sha256(hashlib.sha256(config).digest() + hashlib.sha256(weights).digest())
        name = f"understudy-{digest.hexdigest()[:12]}"
        return cls(name, base if isinstance(base, str) else None, rank, config, weights)

    def files(self) -> dict[str, bytes]:
        """The adapter as files of a release; `of_release` reads them back."""
        return {f"{FOLDER}/{name}": data for name, data in self.content().items()}

    def content(self) -> dict[str, bytes]:
        """Its files as they lie in a folder of their own."""
        return {CONFIG_FILE: self.config, WEIGHTS_FILE: self.weights}


def _config(data: bytes) -> Json:
    try:
        said = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise ValueError(f"{CONFIG_FILE} is no JSON") from None
    if not isinstance(said, dict):
        raise ValueError(f"{CONFIG_FILE} is no JSON object")
    kind = said.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{CONFIG_FILE} says peft_type = {kind!r}, and only LORA can be served")
    return said


def _check_pairs(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless every layer has both of its halves, and they fit each other."""
    halves = [
        {name.removesuffix(half): tensor for name, tensor in tensors.items() if name.endswith(half)}
        for half in _HALVES
    ]
    down, up = halves
    if not down and not up:
        raise ValueError(f"{WEIGHTS_FILE} holds no lora_A and lora_B of any layer")
    for layer in down.keys() ^ up.keys():
        raise ValueError(f"{WEIGHTS_FILE} has one half only of {layer[:80]!r}")
    for layer, first in down.items():
        second = up[layer]
        if len(first.shape) != 2 or len(second.shape) != 2 or first.shape[0] != second.shape[1]:
            raise ValueError(
                f"{WEIGHTS_FILE}: the halves of {layer[:80]!r} don't fit each other: {first.shape} and {second.shape}"
            )
