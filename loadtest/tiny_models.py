r"""Tiny models for tests and benchmarks, made from nothing: a language model, an adapter for it, a classifier.

    python -P loadtest/tiny_models.py lm --cache .cache/models \
        --rows examples/parcels.csv --prompt examples/system_prompt.txt
    python -P loadtest/tiny_models.py adapter --cache .cache/models --base FOLDER --rows other.csv --prompt other.txt
    python -P loadtest/tiny_models.py classifier --cache .cache/models --rows examples/parcels.csv

Prints the model's folder, in Hugging Face's form; one that is there already is not made again. No weights are fetched:
tokenizer and weights are trained on the rows of a CSV file with the columns `text` and `teacher`, so that the models
really do the example's task, about as well as a student does: wrong now and then, and mostly unsure where they are.
A language model may learn several tasks: `--rows` and `--prompt` are given in pairs, as often as there are tasks.

It runs by its path in an environment with torch and transformers (`make install-vllm`) and imports nothing of ours;
our own programs ask for a model by `trained`.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PAD, _END, _SYSTEM, _USER, _ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
_PROMPT_CHARACTERS = 48
_TEMPLATE = f"""\
{{%- for message in messages -%}}
{{%- if message['role'] == 'system' -%}}
{_SYSTEM}{{{{ message['content'][:{_PROMPT_CHARACTERS}] }}}}{_END}
{{%- elif message['role'] == 'assistant' -%}}
{_ASSISTANT}{{{{ message['content'] }}}}{_END}
{{%- else -%}}
{_USER}{{{{ message['content'] }}}}{_END}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{_ASSISTANT}{{%- endif -%}}
"""
"""How a request reads to the model. Of a system prompt only the beginning: enough to know the task by."""
_WINDOW = 1024
_IGNORED = -100  # torch's cross_entropy leaves such labels out
_FORGOTTEN = 0.1  # of the words it reads, so that it doesn't lean on any one
_CARD = "trained.json"


class NotTrained(Exception):
    """A model couldn't be made; says why."""


@dataclass(frozen=True)
class Recipe:
    """What a model is made from. Two recipes with the same key make the same model.

    `rows` are CSV files with the columns `text` and `teacher`, `prompts` the system prompts of each (a language
    model's). `held_out` of the first file's rows, at random, are kept from training and measure it. `base` is the
    language model that an adapter is for.
    """

    kind: str
    rows: tuple[Path, ...]
    prompts: tuple[Path, ...] = ()
    base: Path | None = None
    held_out: int = 200
    seed: int = 1
    steps: int = 200
    batch: int = 32
    width: int = 128
    layers: int = 3
    vocabulary: int = 1500

    def key(self) -> str:
        """A name made of everything that decides what comes out: this file, the rows and the options.

        Raises NotTrained for a file that can't be read.
        """
        digest = hashlib.sha256(Path(__file__).read_bytes())
        for path in (*self.rows, *self.prompts):
            try:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
            except OSError as error:
                raise NotTrained(f"{path} can't be read: {error.strerror}") from error
        digest.update(self.base.name.encode() if self.base else b"")
        options = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        digest.update(json.dumps(options, sort_keys=True).encode())
        return f"{self.kind}-{digest.hexdigest()[:16]}"

    def arguments(self) -> list[str]:
        """The same as a command line."""
        words = [self.kind]
        for name, value in vars(self).items():
            if isinstance(value, int):
                words += [f"--{name.replace('_', '-')}", str(value)]
        for path in self.rows:
            words += ["--rows", str(path)]
        for path in self.prompts:
            words += ["--prompt", str(path)]
        return words if self.base is None else [*words, "--base", str(self.base)]


def trained(recipe: Recipe, cache: Path, *, python: Path, timeout_s: float = 900.0) -> Path:
    """The model's folder below `cache`, made by `python` if it isn't there yet. Raises NotTrained."""
    folder = cache / recipe.key()
    if (folder / _CARD).is_file():
        return folder
    command = [str(python), "-P", __file__, *recipe.arguments(), "--cache", str(cache)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(  # noqa: S603 - our own script
        command, env=offline, capture_output=True, text=True, timeout=timeout_s
    )
    if done.returncode != 0:
        raise NotTrained(f"no {recipe.kind} came of {' '.join(command)}:\n{done.stderr[-2000:]}")
    return folder


def made(recipe: Recipe, cache: Path) -> Path:
    """Make the model in this process unless it is there; of several that ask at once, one makes it."""
    folder = cache / recipe.key()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{recipe.key()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _CARD).is_file():
            unfinished = cache / f".{recipe.key()}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            card = {"lm": _lm, "adapter": _adapter, "classifier": _classifier}[recipe.kind](
                recipe, unfinished
            )
            (unfinished / _CARD).write_text(json.dumps({"kind": recipe.kind} | card, indent=1))
            unfinished.rename(folder)
    return folder


def _lm(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """A Llama with full attention, its tokenizer and chat template."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    learned, held_out = _tasks(recipe)
    tokenizer = _tokenizer(learned, recipe, folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // 64,
        num_key_value_heads=recipe.width // 64,
        max_position_embeddings=_WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    _teach(model, tokenizer, learned, recipe, rate=2e-3)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    return _measured(model, tokenizer, held_out) | {"parameters": model.num_parameters()}


def _adapter(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """A LoRA adapter for `recipe.base`, which stays as it is."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if recipe.base is None:
        raise NotTrained("an adapter needs the folder of its language model: --base FOLDER")
    torch.manual_seed(recipe.seed)
    learned, held_out = _tasks(recipe)
    tokenizer = AutoTokenizer.from_pretrained(recipe.base, local_files_only=True)
    base = AutoModelForCausalLM.from_pretrained(recipe.base, local_files_only=True, dtype=torch.float32)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    _teach(model, tokenizer, learned, recipe, rate=4e-3)
    model.save_pretrained(folder)
    return _measured(model, tokenizer, held_out) | {"base": recipe.base.name}


def _classifier(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """A BERT of two layers with a head, whose labels are the answers in the order of the alphabet."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(recipe.seed)
    (learned,), (held_out,) = _split(recipe)
    labels = sorted({answer for _, answer in [*learned, *held_out]})
    tokenizer = _word_tokenizer([text for text, _ in learned], recipe, folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    model = BertForSequenceClassification(config)

    def loss(batch: Sequence[tuple[str, str]]) -> Any:
        inputs = tokenizer([text for text, _ in batch], padding=True, truncation=True, return_tensors="pt")
        inputs["input_ids"] = _forgetful(inputs["input_ids"], tokenizer.unk_token_id, keep=5)
        targets = torch.tensor([labels.index(answer) for _, answer in batch])
        return model(**inputs, labels=targets).loss

    _descend(model, learned, loss, recipe, rate=1e-3)
    model.eval()
    model.save_pretrained(folder)
    right = 0
    with torch.no_grad():
        for text, answer in held_out:
            best = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits.argmax()
            right += labels[int(best)] == answer
    return {"held_out": len(held_out), "right": right, "parameters": model.num_parameters()}


def _read(path: Path) -> list[tuple[str, str]]:
    """The (text, answer) of each row. Raises NotTrained."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(row["text"], row["teacher"]) for row in csv.DictReader(file)]
    except UnicodeDecodeError as error:
        raise NotTrained(f"{path} isn't UTF-8: {error}") from error
    except KeyError as missing:
        raise NotTrained(f"{path} has no column {missing}; it needs text and teacher") from missing
    if not rows:
        raise NotTrained(f"{path} has no rows")
    return rows


def _split(recipe: Recipe) -> tuple[list[list[tuple[str, str]]], list[list[tuple[str, str]]]]:
    """Each file's rows to learn from, and those kept from it: some of the first file's, none of the others'."""
    chance = random.Random(recipe.seed)
    learned, held_out = [], []
    for number, path in enumerate(recipe.rows):
        rows = _read(path)
        chance.shuffle(rows)
        kept = min(recipe.held_out, len(rows) // 2) if number == 0 else 0
        held_out.append(rows[:kept])
        learned.append(rows[kept:])
    return learned, held_out


def _tasks(recipe: Recipe) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """The same as (system prompt, text, answer), of all files together."""
    if len(recipe.prompts) != len(recipe.rows):
        raise NotTrained(
            f"{len(recipe.rows)} files of rows and {len(recipe.prompts)} prompts: give them in pairs"
        )
    prompts = [path.read_text(encoding="utf-8").strip() for path in recipe.prompts]
    learned, held_out = (
        [(prompt, *row) for prompt, rows in zip(prompts, files, strict=True) for row in rows]
        for files in _split(recipe)
    )
    return learned, held_out


def _tokenizer(rows: Sequence[tuple[str, str, str]], recipe: Recipe, folder: Path) -> Any:
    """Byte-level BPE learned from the rows: whatever a client sends can be read."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = (part for prompt, text, answer in rows for part in (prompt[:_PROMPT_CHARACTERS], text, answer))
    special = [_PAD, _END, _SYSTEM, _USER, _ASSISTANT]
    bpe.train_from_iterator(
        texts, vocab_size=recipe.vocabulary, min_frequency=2, special_tokens=special, show_progress=False
    )
    bpe.save(str(folder / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token=_PAD,
        eos_token=_END,
        additional_special_tokens=[_SYSTEM, _USER, _ASSISTANT],
        model_max_length=_WINDOW,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def _word_tokenizer(texts: Sequence[str], recipe: Recipe, folder: Path) -> Any:
    """BERT's WordPiece, learned from the texts."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(texts, vocab_size=recipe.vocabulary, min_frequency=2, show_progress=False)
    pieces.save(str(folder / "tokenizer.json"))
    tokenizer = BertTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), model_max_length=256)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _messages(prompt: str, text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": prompt}, {"role": "user", "content": text}]


def _teach(
    model: Any, tokenizer: Any, rows: Sequence[tuple[str, str, str]], recipe: Recipe, *, rate: float
) -> None:
    """Learn to answer: the loss is that of the answer's tokens, its end among them."""
    import torch

    read: dict[tuple[str, str, str], tuple[list[int], list[int]]] = {}
    for prompt, text, answer in rows:
        asked = tokenizer.apply_chat_template(
            _messages(prompt, text), add_generation_prompt=True, tokenize=False
        )
        read[prompt, text, answer] = (
            tokenizer(asked, add_special_tokens=False)["input_ids"],
            tokenizer(answer + _END, add_special_tokens=False)["input_ids"],
        )

    def loss(batch: Sequence[tuple[str, str, str]]) -> Any:
        longest = max(len(asked) + len(answer) for asked, answer in map(read.__getitem__, batch))
        tokens = torch.full((len(batch), longest), tokenizer.pad_token_id)
        targets = torch.full((len(batch), longest), _IGNORED)
        for number, row in enumerate(batch):
            asked, answer = read[row]
            kept = _forgetful(torch.tensor(asked), tokenizer.pad_token_id, keep=5)
            end = len(asked) + len(answer)
            tokens[number, :end] = torch.cat([kept, torch.tensor(answer)])
            targets[number, len(asked) : end] = torch.tensor(answer)
        # Padded on the right, and attention looks left: a mask would change nothing.
        logits = model(input_ids=tokens).logits[:, :-1]
        targets = targets[:, 1:]
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=_IGNORED, reduction="none"
        )
        # Every answer counts the same: a long one would else drown a label.
        return (each.sum(1) / (targets != _IGNORED).sum(1)).mean()

    _descend(model, rows, loss, recipe, rate=rate)
    model.eval()


def _forgetful(tokens: Any, instead: int, *, keep: int) -> Any:
    """The tokens, some of them replaced; none below `keep`, which are the special ones."""
    import torch

    forgotten = (torch.rand(tokens.shape) < _FORGOTTEN) & (tokens >= keep)
    return tokens.masked_fill(forgotten, instead)


def _descend(model: Any, rows: Sequence[Any], loss: Any, recipe: Recipe, *, rate: float) -> None:
    """AdamW over `recipe.steps` batches, its rate rising over a tenth of them and then falling to nothing."""
    import torch

    weights = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.1, betas=(0.9, 0.98))
    warm = max(1, recipe.steps // 10)
    model.train()
    for step, batch in zip(range(recipe.steps), _batches(rows, recipe), strict=False):
        falling = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm) * falling
        value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} of {recipe.steps}, loss {value.item():.3f}", file=sys.stderr)


def _batches(rows: Sequence[Any], recipe: Recipe) -> Iterator[list[Any]]:
    """The rows again and again, each time in another order."""
    chance = random.Random(recipe.seed)
    waiting: list[Any] = []
    while True:
        while len(waiting) < recipe.batch:
            waiting += chance.sample(rows, len(rows))
        yield waiting[: recipe.batch]
        del waiting[: recipe.batch]


def _measured(model: Any, tokenizer: Any, rows: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """How many rows it answers right that it never saw, and how sure it is where it is right and where it isn't."""
    import torch

    sure: dict[bool, list[float]] = {True: [], False: []}
    for prompt, text, answer in rows:
        asked = tokenizer.apply_chat_template(
            _messages(prompt, text), add_generation_prompt=True, tokenize=False
        )
        inputs = tokenizer(asked, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=32, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        new = out.sequences[0, inputs["input_ids"].shape[1] :]
        steps = [step[0].log_softmax(0)[token].item() for step, token in zip(out.logits, new, strict=True)]
        said = tokenizer.decode(new, skip_special_tokens=True)
        sure[said == answer].append(math.exp(sum(steps)))
    mean = {known: sum(each) / len(each) if each else None for known, each in sure.items()}
    return {
        "held_out": len(rows),
        "right": len(sure[True]),
        "probability_if_right": mean[True],
        "probability_if_wrong": mean[False],
    }


def main(words: Sequence[str] | None = None) -> int:
    """Make what the command line asks for, and print its folder."""
    parser = argparse.ArgumentParser(description="Make a tiny model from nothing; prints its folder.")
    parser.add_argument("kind", choices=["lm", "adapter", "classifier"])
    parser.add_argument("--cache", type=Path, required=True, help="the folder that models are kept in")
    parser.add_argument("--rows", type=Path, action="append", required=True, help="CSV: text, teacher")
    parser.add_argument("--prompt", type=Path, action="append", default=[], help="the rows' system prompt")
    parser.add_argument("--base", type=Path, help="the language model an adapter is for")
    defaults: Mapping[str, Any] = {
        field: vars(Recipe)[field] for field in vars(Recipe) if isinstance(vars(Recipe)[field], int)
    }
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = vars(parser.parse_args(words))
    cache = given.pop("cache")
    recipe = Recipe(rows=tuple(given.pop("rows")), prompts=tuple(given.pop("prompt")), **given)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        print(made(recipe, cache))
    except NotTrained as error:
        print(f"tiny_models: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
