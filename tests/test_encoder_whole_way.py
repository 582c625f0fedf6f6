"""An encoder as student, the whole way: a log, `understudy learn` that fine-tunes it, a gateway that serves it."""

from __future__ import annotations

import csv
import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillation.past import read_past
from distillation.split import place_of
from loadtest.stack import command, environment
from serving.forgetting import Whose, forget
from serving.releases import ReleaseStore

Make = Callable[..., Any]
PARCELS = Path(__file__).parents[1] / "examples" / "parcels.csv"
ALPHA = 0.25
WIDE, DEEP, PLACES = 256, 2, 48


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    """Messages to a parcel service, and what the teacher says of each."""
    with PARCELS.open(newline="") as file:
        return [(row["text"], row["teacher"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def base(rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers that knows nothing, and a tokenizer that knows the words of these messages."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=1000, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([text for text, _ in rows], trainer)
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": WIDE,
        "num_hidden_layers": DEEP,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDE,
        "max_position_embeddings": PLACES,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors(tiny_bert(tokenizer.get_vocab_size())))
    return folder


def tiny_bert(vocabulary: int) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Its weights: drawn, but for norms and biases."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocabulary, WIDE),
        "embeddings.position_embeddings.weight": (PLACES, WIDE),
        "embeddings.token_type_embeddings.weight": (2, WIDE),
        "embeddings.LayerNorm.weight": (WIDE,),
        "embeddings.LayerNorm.bias": (WIDE,),
    }
    for layer in range(DEEP):
        inner = {
            "attention.self.query": (WIDE, WIDE),
            "attention.self.key": (WIDE, WIDE),
            "attention.self.value": (WIDE, WIDE),
            "attention.output.dense": (WIDE, WIDE),
            "attention.output.LayerNorm": (WIDE,),
            "intermediate.dense": (2 * WIDE, WIDE),
            "output.dense": (WIDE, 2 * WIDE),
            "output.LayerNorm": (WIDE,),
        }
        for name, shape in inner.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
    chance = np.random.default_rng(0)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("bias"):
            weights[name] = np.zeros(shape, dtype=np.float32)
        elif "LayerNorm" in name:
            weights[name] = np.ones(shape, dtype=np.float32)
        else:
            scale = 1.0 if "word" in name else 0.05
            weights[name] = chance.normal(0, scale, shape).astype(np.float32)
    return weights


def safetensors(weights: dict[str, np.ndarray[Any, np.dtype[np.float32]]]) -> bytes:
    """Arrays as such a file: the length of a header, the header in JSON, the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    numbers = b""
    for name, array in weights.items():
        data = array.tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [len(numbers), len(numbers) + len(data)],
        }
        numbers += data
    described = json.dumps(header).encode()
    return struct.pack("<Q", len(described)) + described + numbers


@pytest.mark.timeout(600)
def test_from_a_log_to_answers_of_an_encoder(
    rows: list[tuple[str, str]],
    base: Path,
    torch_python: Path,
    write_log: Make,
    exchanges: Make,
    stand_in: Make,
    gateway: Make,
    eventually: Make,
    tmp_path: Path,
) -> None:
    pytest.importorskip("onnxruntime")
    logged = exchanges(rows, tenant="t")
    state = write_log(logged)
    understudy = commands(tmp_path, state, base, torch_python)

    said = understudy("learn", "--task", "intents").stdout
    assert said.startswith("intents: released: r0001 is live: answers about "), said
    assert not (state / "tasks" / "intents" / "training").exists()
    release = ReleaseStore(state).read("intents", "r0001")
    trained = {one.id for one in logged if place_of("intents", one.id) < 0.6}
    assert release.card["student"] == "encoder"
    assert release.card["base"] == "tiny"
    assert release.card["labels"] == len(logged) - len(trained)
    assert release.card["learning"]["core_s"] > 5, "what the scripts took is part of it"
    past = read_past(ReleaseStore(state), "intents", "r0001")
    assert past.taught == trained

    # What is served is what was judged, by the very numbers.
    too_long = "where is my parcel " * PLACES
    answers = {**dict(rows), too_long: "where_is_my_parcel"}
    task = {"name": "intents", "match": {"model": "intents"}, "max_disagreement": ALPHA}
    running = gateway(stand_in(answers, model="big").url, task=[task])
    eventually(lambda: running.metric("understudy_release_info", task="intents", release="r0001") == 1)
    answered = 0
    with running.client() as client:
        for text, _ in rows[:40]:
            raw = client.chat.completions.with_raw_response.create(
                model="intents", messages=[{"role": "user", "content": text}]
            )
            rank, key = past.rank(text)
            accepted = past.router.judge(rank, key).accepted
            route = raw.headers["x-understudy-route"]
            assert (route == "student") is accepted, (text, raw.headers["x-understudy-reason"])
            assert raw.parse().choices[0].message.content == (key if accepted else answers[text])
            answered += accepted
        long = client.chat.completions.with_raw_response.create(
            model="intents", messages=[{"role": "user", "content": too_long}]
        )
        assert long.headers["x-understudy-route"] == "teacher"
        assert long.headers["x-understudy-reason"] == "unsupported:length"
    assert answered > 5

    evaluated = json.loads(understudy("evaluate", "intents", "--json").stdout)
    assert evaluated["student"] == "encoder"
    assert evaluated["left_out"]["kept for training"] >= len(trained)
    (summary,) = json.loads(understudy("tasks", "--json").stdout)["tasks"]
    assert summary["release"] == "r0001"
    forgotten = forget(state, Whose(tenant="t"), dry_run=True)
    assert forgotten.tasks["intents"].releases["r0001"] == len(logged)
    assert understudy("rollback", "intents").stdout == "intents: the teacher alone is live (generation 2)\n"


def commands(folder: Path, state: Path, base: Path, python: Path) -> Callable[..., Any]:
    """Run `understudy` as an operator does, on a file."""
    config = folder / "understudy.toml"
    config.write_text(
        f'state_dir = "{state}"\n[teacher]\ntrainable = true\n[learning]\npython = "{python}"\n'
        f'[[task]]\nname = "intents"\nmatch = {{ model = "intents" }}\nmax_disagreement = {ALPHA}\n'
        f'student = {{ kind = "encoder", base = "{base}", skip = "never" }}\n'
    )

    def run(name: str, *arguments: str) -> Any:
        done = subprocess.run(
            command(name, *arguments, "--config", str(config)),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run
