"""An encoder as one file that ONNX Runtime serves: a script for the Python that has torch and transformers.

    python -P onnx_export.py JOB

It imports nothing of ours, since it runs where none of it need be installed. JOB is a JSON file:

- `base`: the folder of a Hugging Face encoder; `out`: the folder to write `model.onnx` and `tokenizer.json` into
- `gives`: `embedding` (the mean over the tokens of the last layer, as a unit vector; Reimers & Gurevych, 2019) or
  `logits`: of its classification head, or of the one that `encoder_training.py` has written beside it
  (`head.safetensors`, linear over that mean as it is)
- `precision`: `fp32`, or `int8`: weights of 8 bits, a scale per channel, activations quantised as they come
- `longest` text in tokens, absent: what the folder says; `threads`

It says on standard output, a JSON object a line, how far it is (`progress`), and what it came to (`done`), why it can't
be (`error`), or which module there isn't (`missing`). What it writes has been compared with torch on a few texts, alone
and together. The graph takes `input_ids`, `attention_mask` and, where the model knows more than one, `token_type_ids`,
int64[n, tokens], and gives float32[n, k]. The file's metadata says what serving has to know: `understudy.gives`,
`.precision`, `.longest` and `.pad_id`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TEXTS = (
    "where is my card",
    "I was charged twice for the same thing last week, and nobody answers the phone: please call me back.",
    "ok",
    "Überweisung nach Zürich, 1.234,56 CHF – 急いでください 😀",
)
TOLERANCE = 1e-3
"""An export that is further than this from torch, in parts of the largest number, isn't the same model."""
LEAST_INT8_FIT = 0.9
"""The least correlation of what 8 bits give with what 32 gave."""

_HEAD = "head.safetensors"
_OPSET = 17
_MOST_TOKENS = 8192
_LENGTHS = {"sentence_bert_config.json": "max_seq_length", "tokenizer_config.json": "model_max_length"}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

Json = dict[str, Any]


class Unfit(Exception):
    """What is to be exported won't do; the message is for a person."""


def main(path: str) -> int:
    """Do the job; 0 once the files are written, 2 where they can't be and why was said."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries talk
            done = _export(json.loads(Path(path).read_text(encoding="utf-8")))
    except ImportError as error:
        _say(missing=error.name or str(error))
        return 2
    except Unfit as error:
        _say(error=str(error))
        return 2
    _say(done=done)
    return 0


def _end_with_parent() -> None:
    """The other end of standard input is held by whoever started this, and closes when that ends, however it ends."""
    while os.read(0, 1):
        pass
    os._exit(3)


def _say(**said: object) -> None:
    print(json.dumps(said), file=sys.__stdout__, flush=True)


def _export(job: Json) -> Json:
    import tokenizers

    folder, out = Path(job["base"]), Path(job["out"])
    _say(progress={"stage": "loading"})
    tokenizer = _tokenizer(folder, tokenizers)
    # What takes seconds to import comes behind what takes none to find out.
    import numpy
    import onnx
    import onnxruntime
    import torch
    import transformers

    torch.set_num_threads(int(job.get("threads", 1)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    head = _head(folder) if job["gives"] == "logits" else None
    model = _load(folder, "embedding" if head is not None else job["gives"], transformers)
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise Unfit(
            f"{folder}: tokenizer.json knows {tokenizer.get_vocab_size()} tokens and the model "
            f"{model.config.vocab_size}: one of them is another model's"
        )
    if head is not None and head["weight"].shape[1:] != (model.config.hidden_size,):
        raise Unfit(f"{folder}: {_HEAD} isn't that of this model: one of them is another's")
    whole = _whole(model, job["gives"], head, torch)
    pad_id = model.config.pad_token_id or 0
    batches = [_batch([text], tokenizer, pad_id, numpy) for text in TEXTS]
    batches.append(_batch(TEXTS, tokenizer, pad_id, numpy))
    names = [
        name for name in _INPUTS if name != _INPUTS[2] or getattr(model.config, "type_vocab_size", 1) > 1
    ]

    def by_torch(batch: Json) -> Any:
        with torch.no_grad():
            return whole(*(torch.from_numpy(batch[name]) for name in names)).numpy()

    longest = _longest(folder, model.config, tokenizer, job.get("longest"), by_torch, numpy)
    _say(progress={"stage": "exporting"})
    out.mkdir(parents=True, exist_ok=True)
    written = out / "model.onnx"
    _trace(whole, {name: torch.from_numpy(batches[-1][name]) for name in names}, job["gives"], written, torch)
    _say(progress={"stage": "comparing"})
    batches.append(_repeated(longest, tokenizer, numpy))
    expected = list(_each(by_torch, batches))
    run = _runner(written, names, onnxruntime, int(job.get("threads", 1)))
    found = list(_each(run, batches))
    difference = max(float(abs(a - b).max()) for a, b in zip(expected, found, strict=True))
    largest = max(float(abs(one).max()) for one in expected)
    if not difference <= TOLERANCE * max(1.0, largest):
        raise Unfit(
            f"{folder}: what was exported gives other numbers than the model, by up to {difference:.2g}"
        )
    fit = 1.0
    if job["precision"] == "int8":
        _say(progress={"stage": "quantising"})
        fit = _quantise(written, model.config, expected, batches, names, numpy, onnxruntime)
    _say(progress={"stage": "writing"})
    _describe(
        written,
        {
            "gives": job["gives"],
            "precision": job["precision"],
            "longest": str(longest),
            "pad_id": str(pad_id),
        },
        onnx,
    )
    (out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return {
        "width": int(expected[0].shape[1]),
        "longest": longest,
        "precision": job["precision"],
        "difference": difference,
        "fit": fit,
        "bytes": written.stat().st_size,
    }


def _tokenizer(folder: Path, tokenizers: Any) -> Any:
    """What turns texts into the model's tokens, as serving will: from the one file."""
    if not folder.is_dir():
        raise Unfit(f"{folder} isn't a folder: name one that holds a Hugging Face model")
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise Unfit(
            f"{folder} has no {' and no '.join(missing)}: save model and (fast) tokenizer there again"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more specific
        raise Unfit(f"{folder}: tokenizer.json can't be read: {_line(error)}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _load(folder: Path, gives: str, transformers: Any) -> Any:
    kinds = {
        "embedding": transformers.AutoModel,
        "logits": transformers.AutoModelForSequenceClassification,
    }
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever its parsers raise
        raise Unfit(f"{folder}: config.json can't be read: {_line(error)}") from error
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if (
        getattr(config, "is_encoder_decoder", False)
        or getattr(config, "is_decoder", False)
        or (causal and not masked)
    ):
        raise Unfit(f"{folder} isn't an encoder: it holds a model of type {config.model_type}")
    said = ", ".join(getattr(config, "architectures", None) or ["nothing"])
    if gives == "logits" and "ForSequenceClassification" not in said:
        raise Unfit(f"{folder} has no classification head: its config.json says {said}")
    try:
        model, info = kinds[gives].from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # a file that broke off makes its readers raise whatever they like
        raise Unfit(f"{folder} can't be loaded as an encoder: {_line(error)}") from error
    # What a file lacks would be made up. A pooler has no part in an embedding that is a mean.
    lacking = sorted(name for name in info["missing_keys"] if gives == "logits" or "pooler" not in name)
    if lacking:
        raise Unfit(
            f"{folder}: the weights lack {lacking[0]} and {len(lacking) - 1} more: save the model there again"
        )
    return model.float().eval()


def _head(folder: Path) -> Any:
    """The linear head beside the model, `weight` [k, d] and `bias` [k]; None: there is none."""
    from safetensors.torch import load_file

    if not (folder / _HEAD).is_file():
        return None
    try:
        head = load_file(folder / _HEAD)
        if head["weight"].shape[:1] == head["bias"].shape and head["weight"].ndim == 2:
            return head
        said = f"weight {tuple(head['weight'].shape)}, bias {tuple(head['bias'].shape)}"
    except Exception as error:  # a damaged file makes its reader raise whatever it likes
        said = _line(error)
    raise Unfit(f"{folder}: {_HEAD} can't be read: {said}")


def _whole(model: Any, gives: str, head: Any, torch: Any) -> Any:
    """The graph to export: from tokens to float32[n, k]."""

    class Whole(torch.nn.Module):  # type: ignore[misc]  # torch is known to the interpreter that runs this only
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            if head is not None:
                self.register_buffer("weight", head["weight"].float())
                self.register_buffer("bias", head["bias"].float())

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            made = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
            if gives == "logits" and head is None:
                return made.logits
            weight = attention_mask.unsqueeze(-1).to(made.last_hidden_state.dtype)
            mean = (made.last_hidden_state * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
            if head is not None:
                return torch.nn.functional.linear(mean, self.weight, self.bias)
            return torch.nn.functional.normalize(mean, dim=1)

    return Whole().eval()


def _each(run: Callable[[Json], Any], batches: list[Json]) -> Iterator[Any]:
    """What a model gives for each batch. The longest takes a large one a while, so that each is said."""
    for number, batch in enumerate(batches, 1):
        yield run(batch)
        _say(progress={"stage": "comparing", "batch": number, "batches": len(batches)})


def _batch(texts: Any, tokenizer: Any, pad_id: int, numpy: Any) -> Json:
    encoded = [tokenizer.encode(text) for text in texts]
    shape = (len(encoded), max(len(one.ids) for one in encoded))
    batch = {name: numpy.zeros(shape, dtype=numpy.int64) for name in _INPUTS}
    batch["input_ids"][:] = pad_id
    for row, one in enumerate(encoded):
        for name, values in zip(_INPUTS, (one.ids, one.attention_mask, one.type_ids), strict=True):
            batch[name][row, : len(values)] = values
    return batch


def _repeated(tokens: int, tokenizer: Any, numpy: Any) -> Json:
    """A text of exactly so many tokens, of the sort that texts are made of."""
    ids = tokenizer.encode(TEXTS[0]).ids
    row = numpy.resize(numpy.asarray(ids[1:-1] or ids, dtype=numpy.int64), (1, tokens))
    return dict(zip(_INPUTS, (row, numpy.ones_like(row), numpy.zeros_like(row)), strict=True))


def _longest(
    folder: Path, config: Any, tokenizer: Any, wanted: int | None, by_torch: Callable[[Json], Any], numpy: Any
) -> int:
    """The longest text in tokens: what is wanted, or what the folder says; as far as the model has places for it."""
    said = [_MOST_TOKENS, getattr(config, "max_position_embeddings", None) or _MOST_TOKENS]
    if wanted is not None:
        said.append(int(wanted))
    else:
        for name, key in _LENGTHS.items():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                said.append(int(json.loads((folder / name).read_text(encoding="utf-8"))[key]))
    # Some models count places from behind their padding's.
    for longest in (min(said), min(said) - 1 - (config.pad_token_id or 0)):
        if longest >= 2:
            with contextlib.suppress(IndexError, RuntimeError):
                by_torch(_repeated(longest, tokenizer, numpy))
                return longest
    raise Unfit(f"{folder}: the model can't read a text of {min(said)} tokens, which it should be able to")


def _trace(whole: Any, example: Json, gives: str, path: Path, torch: Any) -> None:
    """Write the graph, with all its weights in the one file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The newer exporter (dynamo) takes six times as long; what this one traces is compared with torch below.
            torch.onnx.export(
                whole,
                tuple(example.values()),
                str(path),
                dynamo=False,
                opset_version=_OPSET,
                input_names=list(example),
                output_names=[gives],
                dynamic_axes={**{name: {0: "n", 1: "tokens"} for name in example}, gives: {0: "n"}},
            )
    except Exception as error:  # tracing can end in anything
        raise Unfit(f"torch {torch.__version__} can't export it: {_line(error)}") from error


def _runner(path: Path, names: list[str], onnxruntime: Any, threads: int) -> Callable[[Json], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library raises nothing more specific
        raise Unfit(
            f"ONNX Runtime {onnxruntime.__version__} can't load what was exported: {_line(error)}"
        ) from error
    return lambda batch: session.run(None, {name: batch[name] for name in names})[0]


def _quantise(
    path: Path,
    config: Any,
    expected: list[Any],
    batches: list[Json],
    names: list[str],
    numpy: Any,
    onnxruntime: Any,
) -> float:
    """Replace the file by one with weights of 8 bits; how well what it gives correlates with what 32 gave."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    full = path.with_name("full.onnx")
    path.rename(full)
    _fuse(full, config)
    _say(progress={"stage": "quantising what is fused"})
    quantize_dynamic(
        full,
        path,
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what comes out of fused operations
    )
    full.unlink()
    run = _runner(path, names, onnxruntime, 1)
    fits = [
        float(numpy.corrcoef(a.ravel(), run(batch).ravel())[0, 1])
        for a, batch in zip(expected, batches, strict=True)
        if a.size > 1
    ]
    fit = min(fits, default=1.0)
    if not fit >= LEAST_INT8_FIT:
        raise Unfit(
            f"8 bits are too few for this model (they fit what it gave by {fit:.2f} only): export it as fp32"
        )
    return fit


def _fuse(path: Path, config: Any) -> None:
    """Replace what ONNX Runtime has operations of its own for, where it finds it: a tenth faster in 8 bits.

    The model of 32 bits stays as it is: other execution providers than the CPU's know the standard's operations only.
    """
    from onnxruntime.transformers import optimizer

    with contextlib.suppress(Exception):  # it knows the usual ones; the others are as right without
        fused = optimizer.optimize_model(
            str(path),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=0,
        )
        fused.save_model_to_file(str(path))


def _describe(path: Path, said: dict[str, str], onnx: Any) -> None:
    model = onnx.load(str(path))
    for name, value in said.items():
        model.metadata_props.add(key=f"understudy.{name}", value=value)
    onnx.save(model, str(path))


def _line(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:300]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
