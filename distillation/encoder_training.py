"""Fine-tuning an encoder with a classification head: a script for the Python that has torch and transformers.

    python -P encoder_training.py JOB

It imports nothing of ours, since it runs where none of it need be installed; `distillation/training_process.py` starts
it, and says how the two speak. JOB is a JSON file:

- `base`: the folder of a Hugging Face encoder; `out`: the folder to write, which isn't there yet
- `texts`, `answers` (places in `labels`) and `labels`: what there is to learn
- `epochs` at most, `batch`, `learning_rate` of the body, `head_learning_rate`, `seed`, `threads`
- `longest`: so many tokens of a text at most, as far as the model has places for them

The head is linear, over the mean of what the body makes of a text's tokens (Reimers & Gurevych, 2019). It is fitted to
the body as it is first, then both are tuned (linear probing, then fine-tuning: Kumar et al., 2022): a head that knows
nothing yet would teach the body nonsense, and epochs would go by until that is out again. A tenth of the texts is held
back to tell after which epoch it was best, the first fit included; by the loss at the temperature that suits them best
(Guo et al., 2017), since a confidence is fitted to the logits afterwards, whatever their scale. What words mean by
themselves, the body's largest table, isn't touched: a few thousand texts would only have it forget those that aren't in
them. Batches are of texts about as long as each other, since padding is most of the work otherwise.

It says how far it is every few seconds; only loading, and a step of the tuning, can't be cut into pieces.

OUT is a Hugging Face folder of the body, with `id2label` in its config and the tokenizer, and the head beside it:
`head.safetensors`, `weight` float32[k, d] and `bias` float32[k].
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HELD_BACK = 0.1
PATIENCE = 2
"""So many epochs in a row that are no better end it."""

_LEAST_HELD_BACK = 20
_PROBE_STEPS = 200
_PROBE_PENALTY = 1e-2
_WARM_UP = 0.1
_WEIGHT_DECAY = 0.01
_SAY_EVERY_S = 5.0
_TEMPERATURES = (0.25, 8.0, 41)
_READ_AT_ONCE = 256

Json = dict[str, Any]
Places = Any
"""int64[m]: which of the job's texts."""


class Unfit(Exception):
    """What is to be trained, or what it is to be trained on, won't do; the message is for a person."""


def main(path: str) -> int:
    """Do the job; 0 once the folder is written, 2 where it can't be and why was said."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries talk
            done = _train(json.loads(Path(path).read_text(encoding="utf-8")))
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


def _train(job: Json) -> Json:
    import tokenizers

    _say(progress={"stage": "loading"})
    tokenizer = _tokenizer(Path(job["base"]), tokenizers)
    # What takes seconds to import comes behind what takes none to find out.
    import numpy
    import torch
    import transformers

    began = time.monotonic()
    torch.set_num_threads(int(job["threads"]))
    torch.manual_seed(int(job["seed"]))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tuning = _Tuning(job, tokenizer, _load(job, transformers), numpy, torch)
    found = tuning.run()
    tuning.write(Path(job["out"]))
    return {**found, "seconds": time.monotonic() - began}


def _tokenizer(base: Path, tokenizers: Any) -> Any:
    """What turns texts into the model's tokens, as serving will: from the one file."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more specific
        raise Unfit(f"{base}: tokenizer.json can't be read: {_line(error)}") from error
    tokenizer.no_padding()
    return tokenizer


def _line(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:300]


def _load(job: Json, transformers: Any) -> Any:
    """The body of the base."""
    base = job["base"]
    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
        masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
        causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        writes = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False)
        if writes or (causal and not masked):
            raise Unfit(f"{base} isn't an encoder: it holds a model of type {config.model_type}")
        body, info = transformers.AutoModel.from_pretrained(
            base, config=config, local_files_only=True, output_loading_info=True
        )
    except Unfit:
        raise
    except Exception as error:  # a damaged folder makes their parsers raise whatever they like
        raise Unfit(f"{base} can't be loaded as an encoder: {_line(error)}") from error
    lacking = sorted(
        name for name in info["missing_keys"] if "pooler" not in name
    )  # which has no part in a mean
    if lacking:
        raise Unfit(
            f"{base}: its weights lack {lacking[0]} and {len(lacking) - 1} more: copy or download it again"
        )
    body.config.id2label = dict(enumerate(job["labels"]))
    body.config.label2id = {label: place for place, label in enumerate(job["labels"])}
    return body.float()


class _Tuning:
    """One fine-tuning, from a body that is loaded to body and head as they were best."""

    def __init__(self, job: Json, tokenizer: Any, body: Any, numpy: Any, torch: Any) -> None:
        self._numpy, self._torch = numpy, torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._body = body.to(self._device)
        self._head = torch.nn.Linear(body.config.hidden_size, len(job["labels"])).to(self._device)
        self._whole = torch.nn.ModuleList([self._body, self._head])
        self._random = numpy.random.default_rng(int(job["seed"]))
        self._batch, self._epochs = int(job["batch"]), int(job["epochs"])
        # Some models count places from behind their padding's: two of them may be no tokens'.
        places = (getattr(body.config, "max_position_embeddings", None) or 1_000_000) - 2
        tokenizer.enable_truncation(max(8, min(int(job["longest"]), places)))
        self._progress = _Progress(self._epochs)
        self._tokens = list(self._read(job["texts"], tokenizer))
        if max(map(max, self._tokens), default=0) >= body.config.vocab_size:
            raise Unfit(
                f"{job['base']}: tokenizer.json knows more tokens than the model: one of them is another's"
            )
        self._base = Path(job["base"])
        self._pad_id = body.config.pad_token_id or 0
        self._answers = torch.tensor(job["answers"], dtype=torch.int64)
        order = self._random.permutation(len(self._tokens))
        back = round(HELD_BACK * len(order))
        back = back if back >= _LEAST_HELD_BACK else 0  # too few to tell anything: all epochs are run
        self._held_back, self._training = order[:back], order[back:]
        steps = self._epochs * math.ceil(len(self._training) / self._batch)
        for parameter in body.get_input_embeddings().parameters():
            parameter.requires_grad_(False)
        self._optimiser = torch.optim.AdamW(
            [*_groups(body, job["learning_rate"]), *_groups(self._head, job["head_learning_rate"])]
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, _slope(steps))
        self._progress.steps = steps

    def run(self) -> Json:
        """Train; body and head are those of the best epoch then (0: the head alone was fitted). Says how it went."""
        self._probe()
        best_epoch, best, best_loss, best_agreed = 0, self._state(), math.inf, None
        if len(self._held_back):
            best_loss, best_agreed = self._measured(self._held_back)
        self._progress.begin()
        for epoch in range(1, self._epochs + 1):
            loss, agreed = self._epoch(epoch), None
            if not math.isfinite(loss):
                raise Unfit(f"the loss of epoch {epoch} isn't a number: take another base")
            if len(self._held_back):
                loss, agreed = self._measured(self._held_back)
            self._progress.say(epoch, loss, agreed)
            if not len(self._held_back) or loss < best_loss:
                best_epoch, best, best_loss, best_agreed = epoch, self._state(), loss, agreed
            elif epoch - best_epoch >= PATIENCE:
                break
        self._whole.load_state_dict(best)
        return {
            "epochs": best_epoch,
            "texts": len(self._training),
            "held_back": len(self._held_back),
            "agreed": best_agreed,
            "device": self._device,
        }

    def write(self, folder: Path) -> None:
        """Write body, head, and what turns texts into tokens."""
        from safetensors.torch import save_file

        _say(progress={"stage": "writing"})
        self._whole.eval().to("cpu")
        self._body.save_pretrained(folder, safe_serialization=True)
        (folder / "tokenizer.json").write_bytes((self._base / "tokenizer.json").read_bytes())
        head = {name: value.contiguous() for name, value in self._head.state_dict().items()}
        save_file(head, folder / "head.safetensors")

    def _state(self) -> Json:
        return {name: value.detach().cpu().clone() for name, value in self._whole.state_dict().items()}

    def _read(self, texts: list[str], tokenizer: Any) -> Iterator[list[int]]:
        """The tokens of each text."""
        for start in range(0, len(texts), _READ_AT_ONCE):
            self._progress.alive("reading the texts")
            for encoded in tokenizer.encode_batch(texts[start : start + _READ_AT_ONCE]):
                yield encoded.ids

    def _probe(self) -> None:
        """Fit the head to the body as it is: logistic regression, by L-BFGS."""
        torch = self._torch
        self._whole.eval()
        taken, right = [], []
        with torch.no_grad():
            for places in self._batches(self._training, shuffled=False):
                self._progress.alive("fitting its head")
                taken.append(self._features(places))
                right.append(self._answers[places].to(self._device))
        features, answers = torch.cat(taken), torch.cat(right)
        scale = float(features.std(dim=0).mean()) or 1.0  # so that the penalty means the same for every body
        features = features / scale
        torch.nn.init.zeros_(self._head.weight)
        torch.nn.init.zeros_(self._head.bias)
        fitting = torch.optim.LBFGS(
            self._head.parameters(), max_iter=_PROBE_STEPS, line_search_fn="strong_wolfe"
        )

        def loss() -> Any:
            self._progress.alive("fitting its head")
            fitting.zero_grad()
            penalty = _PROBE_PENALTY / 2 * (self._head.weight**2).sum()
            lost = torch.nn.functional.cross_entropy(self._head(features), answers) + penalty
            lost.backward()
            return lost

        fitting.step(loss)
        with torch.no_grad():
            self._head.weight /= scale

    def _epoch(self, epoch: int) -> float:
        """Go through the texts once; the mean loss."""
        self._whole.train()
        total, texts = 0.0, 0
        for places in self._batches(self._training, shuffled=True):
            losses = self._losses(places)
            self._optimiser.zero_grad(set_to_none=True)
            losses.mean().backward()
            self._torch.nn.utils.clip_grad_norm_(self._whole.parameters(), 1.0)
            self._optimiser.step()
            self._schedule.step()
            total, texts = total + float(losses.detach().sum()), texts + len(places)
            self._progress.step(epoch, total / texts)
        return total / texts

    def _measured(self, places: Places) -> tuple[float, float]:
        """The mean loss on texts, their logits scaled by what suits them best; the share answered as labelled."""
        torch = self._torch
        self._whole.eval()
        taken, answers = [], []
        with torch.no_grad():
            for some in self._batches(places, shuffled=False):
                self._progress.alive("measuring how good it is")
                taken.append(self._head(self._features(some)))
                answers.append(self._answers[some].to(self._device))
        logits, right = torch.cat(taken), torch.cat(answers)
        scaled = [
            float(torch.nn.functional.cross_entropy(logits / temperature, right))
            for temperature in self._numpy.geomspace(*_TEMPERATURES)
        ]
        return min(scaled), float((logits.argmax(dim=1) == right).float().mean())

    def _losses(self, places: Places) -> Any:
        right = self._answers[places].to(self._device)
        logits = self._head(self._features(places))
        return self._torch.nn.functional.cross_entropy(logits, right, reduction="none")

    def _features(self, places: Places) -> Any:
        """The mean over the tokens of each text, float32[m, d]."""
        texts = [self._tokens[place] for place in places]
        shape = (len(texts), max(map(len, texts)))
        ids = self._torch.full(shape, self._pad_id, dtype=self._torch.int64)
        mask = self._torch.zeros(shape, dtype=self._torch.int64)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = self._torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        last = self._body(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(last.dtype)
        return (last * weight).sum(1) / weight.sum(1).clamp(min=1e-9)

    def _batches(self, places: Places, *, shuffled: bool) -> Iterator[Places]:
        """Batches of texts about as long as each other; shuffled, which are together, and their order, changes."""
        lengths = self._numpy.array([len(self._tokens[place]) for place in places], dtype=float)
        if shuffled:
            lengths *= self._random.uniform(0.9, 1.1, len(lengths))
        by_length = places[self._numpy.argsort(lengths, kind="stable")]
        starts = range(0, len(places), self._batch)
        for start in self._random.permutation(starts) if shuffled else starts:
            yield by_length[start : start + self._batch]


def _groups(module: Any, rate: float) -> list[Json]:
    """Parameters that learn at a rate, by whether they decay: biases and norms don't."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in learning if p.ndim > 1], "lr": float(rate), "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in learning if p.ndim <= 1], "lr": float(rate), "weight_decay": 0.0},
    ]


def _slope(steps: int) -> Callable[[int], float]:
    """The learning rate as a share of its highest, by the step: up for a tenth of them, then down to 0."""
    warm = max(1, round(_WARM_UP * steps))
    return lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))


class _Progress:
    """Says how far it is: after every epoch, and now and then in between. `steps` is how many there are, once known."""

    def __init__(self, epochs: int) -> None:
        self.steps = 0
        self._epochs = epochs
        self._began = self._said = time.monotonic()
        self._done = 0

    def begin(self) -> None:
        """The first step begins."""
        self._began = self._said = time.monotonic()

    def alive(self, stage: str) -> None:
        """It is at something that isn't a step."""
        if time.monotonic() - self._said > _SAY_EVERY_S:
            self._said = time.monotonic()
            _say(progress={"stage": stage})

    def step(self, epoch: int, loss: float) -> None:
        """One more step is done."""
        self._done += 1
        if time.monotonic() - self._said > _SAY_EVERY_S:
            self.say(epoch, loss)

    def say(self, epoch: int, loss: float, agreed: float | None = None) -> None:
        """Say it now."""
        self._said = time.monotonic()
        left = (self._said - self._began) / self._done * (self.steps - self._done)
        said = {"epoch": epoch, "epochs": self._epochs, "loss": loss, "seconds_left": left}
        _say(progress={**said, **({} if agreed is None else {"agreed": agreed})})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
