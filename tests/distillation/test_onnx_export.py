"""From a Hugging Face folder to files that ONNX Runtime serves, by the Python that has torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.engines import Engines
from serving.text_model import TextModel

SCRIPT = Path(__file__).resolve().parents[2] / "distillation" / "onnx_export.py"
TEXTS = [
    "How do I locate my card?",
    "I was charged twice",
    "the exchange rate you used is wrong, isn't it? I compared it with what my bank says",
    "card",
    "",
]

TINY = """
import json, sys
from pathlib import Path
import torch, transformers
torch.manual_seed(0)
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "card", "lost", "where", "is", "my", "ok"]
tokenizer = {
    "version": "1.0", "added_tokens": [], "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "[UNK]"},
}
small = dict(vocab_size=10, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             pad_token_id=0)
makes = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**small, max_position_embeddings=24, num_labels=3)),
    "roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**{**small, "pad_token_id": 1}, max_position_embeddings=20, type_vocab_size=1)),
    "llama": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(**small, num_key_value_heads=2, max_position_embeddings=24)),
}
for name, make in makes.items():
    folder = Path(sys.argv[1]) / name
    make().eval().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
"""

BY_TORCH = """
import json, sys
import torch, transformers
base, texts = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
tokenizer = transformers.AutoTokenizer.from_pretrained(base)
model = transformers.AutoModel.from_pretrained(base).eval()
with torch.no_grad():
    given = tokenizer(texts, padding=True, return_tensors="pt")
    states = model(**given).last_hidden_state
    mask = given["attention_mask"].unsqueeze(-1)
    mean = (states * mask).sum(1) / mask.sum(1)
print(json.dumps((mean / mean.norm(dim=1, keepdim=True)).tolist()))
"""

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
Export = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def export(torch_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export a folder; gives the last thing said, the folder written as `out`, and the `stages` it went through."""

    def run(base: Path, **job: Any) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("export")
        job = {
            "base": str(base),
            "out": str(folder / "out"),
            "gives": "embedding",
            "precision": "fp32",
            **job,
        }
        (folder / "job.json").write_text(json.dumps(job))
        command = [str(torch_python), "-P", str(SCRIPT), str(folder / "job.json")]
        # Its standard input stays open as long as it runs: that is how it knows that somebody waits for it.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        ) as child:
            assert child.stdout is not None
            said = [json.loads(line) for line in child.stdout]
            code = child.wait(timeout=100)
        assert all(set(one) == {"progress"} for one in said[:-1])
        assert code == (0 if "done" in said[-1] else 2)
        return {**said[-1], "out": folder / "out", "stages": [one["progress"]["stage"] for one in said[:-1]]}

    return run


@pytest.fixture(scope="module")
def tiny(torch_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of small models of several kinds, with weights of chance."""
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run(
        [torch_python, "-c", TINY, str(folder)], check=True, env=ENVIRONMENT, timeout=100, capture_output=True
    )
    return folder


def load(folder: Path) -> TextModel:
    return Engines().text_model({path.name: path.read_bytes() for path in folder.iterdir()})


@pytest.fixture(scope="module")
def full(export: Export, minilm: Path) -> dict[str, Any]:
    return export(minilm)


class TestMiniLM:
    def test_it_embeds_as_torch_does(self, full: dict[str, Any], minilm: Path, torch_python: Path) -> None:
        assert full["done"]["longest"] == 256
        assert {path.name for path in full["out"].iterdir()} == {"model.onnx", "tokenizer.json"}
        model = load(full["out"])
        assert (model.width, model.longest, model.batches) == (384, 256, True)
        told = subprocess.run(
            [torch_python, "-c", BY_TORCH, str(minilm), json.dumps(TEXTS)],
            check=True,
            env=ENVIRONMENT,
            capture_output=True,
            timeout=100,
        )
        torch_says = np.array(json.loads(told.stdout))
        alone = np.vstack([model.numbers(text) for text in TEXTS])
        together = model.read([model.tokens(text) for text in TEXTS])
        np.testing.assert_allclose(alone, torch_says, atol=1e-4)
        np.testing.assert_allclose(together, torch_says, atol=1e-4)

    def test_int8_is_nearly_the_same_in_a_quarter_of_the_space(
        self, full: dict[str, Any], export: Export, minilm: Path
    ) -> None:
        small = export(minilm, precision="int8")
        # Each of its longer steps is said, so that one that hangs can be told from one that is slow.
        assert list(dict.fromkeys(small["stages"])) == [
            "loading", "exporting", "comparing", "quantising", "quantising what is fused", "writing"
        ]  # fmt: skip
        assert small["stages"].count("comparing") > 10
        assert small["done"]["bytes"] < 0.3 * full["done"]["bytes"]
        ours, theirs = load(small["out"]), load(full["out"])
        assert not ours.batches
        likeness = [float(ours.numbers(text) @ theirs.numbers(text)) for text in TEXTS[:4]]
        assert min(likeness) > 0.9
        assert max(likeness) < 0.99999  # another model, not the same


class TestKinds:
    def test_a_classifier_gives_logits(self, export: Export, tiny: Path) -> None:
        made = export(tiny / "bert", gives="logits")
        assert (made["done"]["width"], made["done"]["longest"]) == (3, 24)
        assert load(made["out"]).numbers("where is my card").shape == (3,)

    def test_where_places_are_counted_from_behind_the_padding(self, export: Export, tiny: Path) -> None:
        made = export(tiny / "roberta")
        assert made["done"]["longest"] == 18
        model = load(made["out"])
        np.testing.assert_allclose(
            model.read([model.tokens("card"), model.tokens("where is my card")])[0],
            model.numbers("card"),
            atol=1e-5,
        )


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def half_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:100])


def half_the_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def another_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{number}": 10 + number for number in range(10)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("kind", "gives", "spoil", "said"),
    [
        ("bert", "embedding", no_folder, "isn't a folder"),
        ("bert", "embedding", no_tokenizer, "has no tokenizer.json"),
        ("bert", "embedding", half_a_tokenizer, "tokenizer.json can't be read"),
        ("bert", "embedding", another_tokenizer, "knows 20 tokens and the model 10"),
        ("bert", "logits", half_the_weights, "can't be loaded as an encoder"),
        ("roberta", "logits", None, "has no classification head: its config.json says RobertaModel"),
        ("llama", "embedding", None, "isn't an encoder: it holds a model of type llama"),
    ],
)
def test_what_wont_do_is_told(
    export: Export,
    tiny: Path,
    tmp_path: Path,
    kind: str,
    gives: str,
    spoil: Callable[[Path], None] | None,
    said: str,
) -> None:
    base = tmp_path / kind
    shutil.copytree(tiny / kind, base)
    if spoil is not None:
        spoil(base)
    made = export(base, gives=gives)
    assert said in made["error"]
    assert "\n" not in made["error"]
    assert not made["out"].exists()


def test_it_ends_with_whoever_started_it(torch_python: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "slow.json")
    with subprocess.Popen(
        [torch_python, "-P", str(SCRIPT), str(tmp_path / "slow.json")], stdin=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(timeout=60) == 3
