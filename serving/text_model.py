"""A model that makes numbers of texts: ONNX Runtime and a tokenizer, an extra that no other module imports.

Two files of a release: `model.onnx`, the whole graph with its weights, and `tokenizer.json`. `distillation.onnx_export`
writes them. The graph takes `input_ids`, `attention_mask` and, if it likes, `token_type_ids`, int64[n, tokens], and
gives float32[n, k]: logits, or an embedding. What else there is to know stands in its metadata: `understudy.longest`
(tokens of a text at most), `.precision` (`fp32`, `int8`) and `.pad_id`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from serving.closed_answers import TextTooLong
from serving.errors import ConfigError, DamagedRelease
from serving.execution_providers import CPU, check_there, only_on_cpu, options_of

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

CHARACTERS_A_TOKEN = 32
"""A text with more characters than this for each token of the longest is too long, however it would be split."""

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_MOST_TOKENS = 1_000_000
_SEVERE = 3


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as the model reads it."""

    ids: list[int]
    types: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class TextModel:
    """A model and its tokenizer, loaded. Safe to use from several threads.

    `width` is k, `providers` are what it runs on, `runtime` is the version of ONNX Runtime. `batches`: whether several
    texts may be read together; what an int8 model makes of a text depends on those beside it, so that it reads one at a
    time, as it was calibrated. The `numbers` of so many texts as it should `remember` are kept. Raises
    DamagedRelease for files that hold no such model, and ConfigError where one that is sound can't be run on these
    providers.
    """

    def __init__(
        self,
        model: bytes,
        tokenizer: bytes,
        *,
        providers: Sequence[str] = (CPU,),
        threads: int = 1,
        remember: int = 0,
    ) -> None:
        # Only where it is asked to: what remembers holds itself, and goes when the garbage is collected.
        self._remembered = lru_cache(remember)(self._read_one) if remember else None
        self.providers = tuple(providers)
        self.runtime = str(onnxruntime.__version__)
        check_installed(providers)
        if not only_on_cpu(providers):
            # Only ONNX Runtime's own kernels say what a model lacks: OpenVINO's read zeros for a token it doesn't know.
            TextModel(model, tokenizer, threads=threads)
        self._tokenizer = _read_tokenizer(tokenizer)
        try:
            self._session = _read_model(model, providers, threads)
            self._inputs, said = _described(self._session)
            self.longest = _number(said, "longest", _truncation(tokenizer), least=1)
            self._pad_id = _number(said, "pad_id", 0, least=0)
            self.batches = said.get("understudy.precision") == "fp32"
            self.width = self._try_out()
        except DamagedRelease as error:
            if only_on_cpu(providers):
                raise
            raise ConfigError(
                f"a model that runs on {CPU} doesn't on {', '.join(providers)} (see to what that needs, or change "
                f"student.onnx.providers): {error}"
            ) from error

    def too_long(self, text: str) -> bool:
        """Whether a text is too long by its characters alone, which says so without splitting it."""
        return len(text) > CHARACTERS_A_TOKEN * self.longest

    def tokens(self, text: str) -> Tokens:
        """A text as the model reads it. Raises TextTooLong."""
        if self.too_long(text):
            raise TextTooLong(
                f"the text has {len(text)} characters; the student reads {self.longest} tokens, "
                f"and {CHARACTERS_A_TOKEN * self.longest} characters, at most"
            )
        encoded = self._tokenizer.encode(text)
        if len(encoded.ids) > self.longest:
            raise TextTooLong(
                f"the text has {len(encoded.ids)} tokens; the student reads {self.longest} at most"
            )
        return Tokens(encoded.ids, encoded.type_ids)

    def read(self, texts: Sequence[Tokens]) -> Floats:
        """The numbers of each text, float32[n, k], read together. Raises what ONNX Runtime raises."""
        shape = (len(texts), max(1, *map(len, texts)))  # even of nothing there is something to read
        ids: Ints = np.full(shape, self._pad_id, dtype=np.int64)
        mask: Ints = np.zeros(shape, dtype=np.int64)
        types: Ints = np.zeros(shape, dtype=np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text.ids
            mask[row, : len(text)] = 1
            types[row, : len(text)] = text.types
        given = dict(zip(_INPUTS, (ids, mask, types), strict=True))
        (numbers,) = self._session.run(None, {name: given[name] for name in self._inputs})
        read: Floats = numbers
        return read

    def numbers(self, text: str) -> Floats:
        """The numbers of one text, float32[k]: the same as are served. To be read only. Raises TextTooLong."""
        return self._read_one(text) if self._remembered is None else self._remembered(text)

    def _read_one(self, text: str) -> Floats:
        one: Floats = self.read([self.tokens(text)])[0]
        one.flags.writeable = False
        return one

    def _try_out(self) -> int:
        """Read something, as long as it may get and with the highest token there is; gives k. Raises DamagedRelease."""
        last = max(self._tokenizer.get_vocab().values())
        tokens = self.longest
        # A model that takes fewer places, or knows fewer tokens, says so here rather than on the request path.
        texts = [Tokens([last] * tokens, [0] * tokens), Tokens([last], [0])]
        try:
            widths = {self._checked(self.read([text]), 1) for text in texts}
            widths.add(self._checked(self.read(texts[1:] * 2), 2))
        except DamagedRelease:
            raise
        except Exception as error:  # the library raises nothing more specific
            raise DamagedRelease(
                f"the model can't read texts of {tokens} tokens, of which there are {last + 1}, as its tokenizer makes "
                f"them: {_line(error)}"
            ) from error
        if len(widths) > 1:
            raise DamagedRelease(f"the model gives another number of numbers each time: {sorted(widths)}")
        return widths.pop()

    def _checked(self, numbers: object, texts: int) -> int:
        if not isinstance(numbers, np.ndarray) or numbers.dtype != np.float32:
            raise DamagedRelease("the model gives something else than numbers of 32 bits")
        if numbers.ndim != 2 or numbers.shape[0] != texts or numbers.shape[1] == 0:
            raise DamagedRelease(f"the model gives an array of shape {numbers.shape} for {texts} texts")
        if not np.isfinite(numbers).all():
            raise DamagedRelease("the model gives numbers that aren't finite")
        return int(numbers.shape[1])


def check_installed(providers: Sequence[str]) -> None:
    """See that this build of ONNX Runtime has these. Raises ConfigError."""
    check_there(providers, there=onnxruntime.get_available_providers(), known=onnxruntime.get_all_providers())


def _read_tokenizer(data: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing more specific
        raise DamagedRelease(f"tokenizer.json can't be read: {_line(error)}") from error
    # What is too long is said, not cut; what is padded, and how far, is ours to say.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.get_vocab_size() == 0:
        raise DamagedRelease("tokenizer.json knows no tokens")
    return tokenizer


@contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """The path of a file with these bytes, in memory where the system can: a session keeps bytes that it was given."""
    in_memory = sys.platform == "linux"
    with os.fdopen(os.memfd_create("model"), "wb") if in_memory else tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}" if in_memory else file.name


def _read_model(data: bytes, providers: Sequence[str], threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.enable_mem_pattern = False  # texts differ in length: a plan for each would be kept
    options.log_severity_level = _SEVERE
    # Weights that a graph says are elsewhere would be read from wherever this process happens to run.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    try:
        with _as_file(data) as path:
            session = onnxruntime.InferenceSession(
                path,
                options,
                providers=[(name, options_of(name, threads)) for name in providers],
                enable_fallback=0,
            )
    except Exception as error:  # the library raises nothing more specific
        raise DamagedRelease(
            f"ONNX Runtime {onnxruntime.__version__} can't load model.onnx: {_line(error)}"
        ) from error
    silent = [name for name in providers if name not in session.get_providers()]
    if silent:
        raise ConfigError(
            f"ONNX Runtime could not start {', '.join(silent)} (its libraries or its device are missing) and would use "
            f"{', '.join(session.get_providers())}: see to that, or change student.onnx.providers"
        )
    return session


def _described(session: onnxruntime.InferenceSession) -> tuple[list[str], dict[str, str]]:
    """The names of what it wants, and what its metadata says. Raises DamagedRelease for another kind of model."""
    try:
        said = dict(session.get_modelmeta().custom_metadata_map)
    except UnicodeDecodeError as error:
        raise DamagedRelease(f"the metadata of model.onnx can't be read: {error}") from error
    names = [given.name for given in session.get_inputs()]
    types = {given.type for given in session.get_inputs()}
    if not set(_INPUTS[:2]) <= set(names) <= set(_INPUTS) or types != {"tensor(int64)"}:
        raise DamagedRelease(
            f"model.onnx wants {', '.join(names) or 'nothing'} ({', '.join(sorted(types))}); "
            f"it should want int64 {', '.join(_INPUTS[:2])} and may want {_INPUTS[2]}"
        )
    outputs = [made.name for made in session.get_outputs()]
    if len(outputs) != 1:
        raise DamagedRelease(
            f"model.onnx gives {', '.join(outputs)}; it should give one thing: numbers of each text"
        )
    return names, said


def _truncation(tokenizer: bytes) -> int | None:
    truncation = Tokenizer.from_buffer(tokenizer).truncation
    return None if truncation is None else int(truncation["max_length"])


def _number(said: Mapping[str, str], name: str, otherwise: int | None, *, least: int) -> int:
    value = said.get(f"understudy.{name}", "" if otherwise is None else str(otherwise))
    if not (value.isascii() and value.isdigit() and least <= int(value) <= _MOST_TOKENS):
        raise DamagedRelease(
            f"model.onnx says {value!r} of {name} in its metadata, which should be a number from {least} on"
        )
    return int(value)


def _line(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:300]
