"""The tiny models do the demo's task, served by a real vLLM as any model is, and know something of their limits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import openai
import pytest

from serving.recording import Recorded, read_recording

EXAMPLES = Path(__file__).parents[2] / "examples"
SENT = 120


@pytest.fixture(scope="module")
def rows() -> tuple[Recorded, ...]:
    return read_recording(EXAMPLES / "parcels.csv").rows[:SENT]


def test_it_answers_the_demo_and_is_less_sure_where_it_errs(vllm: Any, rows: tuple[Recorded, ...]) -> None:
    prompt = (EXAMPLES / "system_prompt.txt").read_text(encoding="utf-8").strip()
    sure: dict[bool, list[float]] = {True: [], False: []}
    with openai.OpenAI(base_url=f"{vllm.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        for row in rows:
            answer = client.chat.completions.create(
                model=vllm.model,
                messages=[{"role": "system", "content": prompt}, {"role": "user", "content": row.text}],
                temperature=0,
                logprobs=True,
            )
            (choice,) = answer.choices
            assert choice.finish_reason == "stop"
            assert choice.logprobs is not None and choice.logprobs.content is not None
            probability = math.exp(sum(token.logprob for token in choice.logprobs.content))
            sure[choice.message.content == row.teacher].append(probability)
    assert len(sure[True]) > 0.75 * SENT
    assert sure[False], "a student that never errs leaves a gateway nothing to escalate"
    assert mean(sure[True]) > mean(sure[False]) + 0.1


def test_the_classifier_sorts_the_demos_messages(vllm_pooling: Any, rows: tuple[Recorded, ...]) -> None:
    labels = json.loads((vllm_pooling.folder / "config.json").read_text())["id2label"]
    body = {"model": vllm_pooling.model, "input": [row.text for row in rows]}
    sorted_as = vllm_pooling.post("/classify", body).json()["data"]
    assert len(sorted_as) == SENT
    assert all(math.isclose(sum(each["probs"]), 1, abs_tol=1e-3) for each in sorted_as)
    assert set(labels.values()) == {row.gold for row in read_recording(EXAMPLES / "parcels.csv").rows}
    right = sum(each["label"] == row.teacher for each, row in zip(sorted_as, rows, strict=True))
    assert right > 0.7 * SENT


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
