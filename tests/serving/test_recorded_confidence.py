"""The stand-in as a student: log-probabilities made from a recorded confidence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import RecordingError
from serving.recorded_confidence import token_logprobs
from serving.recording import Recorded, Recording, read_recording
from serving.stand_in import create_stand_in
from serving.stand_in_call import StandInHttp

Serve = Callable[..., str]


@given(
    st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=40),
    st.floats(min_value=1e-6, max_value=1.0),
    st.integers(min_value=0, max_value=20),
)
def test_the_tokens_geometric_mean_is_the_confidence(tokens: list[str], confidence: float, top: int) -> None:
    entries = token_logprobs(tokens, confidence, top=top)
    assert entries == token_logprobs(tokens, confidence, top=top), "the same in every run"
    assert [entry["token"] for entry in entries] == tokens
    logprobs = [entry["logprob"] for entry in entries]
    assert max(logprobs) <= 0
    assert math.exp(sum(logprobs) / len(logprobs)) == pytest.approx(confidence, rel=1e-9)
    for entry in entries:
        alternatives = [alternative["logprob"] for alternative in entry["top_logprobs"]]
        assert len(alternatives) <= top
        assert alternatives[:1] == [entry["logprob"]][:top]
        assert alternatives == sorted(alternatives, reverse=True)
        assert sum(map(math.exp, alternatives)) <= 1 + 1e-9


def test_a_column_confidence_plays_a_student_on_the_wire(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "student.csv"
    path.write_text("text,teacher,confidence\nWhere is it?,where_is_my_parcel,0.9\nWhat?,unclear,\n")
    url = serve(create_stand_in(read_recording(path)), http=StandInHttp)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        whole = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Where is it?"}], logprobs=True, top_logprobs=3
        )
        stream = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Where is it?"}],
            logprobs=True,
            top_logprobs=3,
            stream=True,
        )
        entries = [
            entry for chunk in stream if (told := chunk.choices[0].logprobs) for entry in told.content or ()
        ]
        unsure = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "What?"}], logprobs=True
        )
        unasked = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Where is it?"}]
        )
    whole_told = whole.choices[0].logprobs
    assert whole_told is not None
    assert whole_told.content == entries
    assert "".join(entry.token for entry in entries) == "where_is_my_parcel"
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(entries)
    assert unsure.choices[0].logprobs is None
    assert unasked.choices[0].logprobs is None


@pytest.mark.parametrize("confidence", ["0", "1.5", "-1", "nan", "sure"])
def test_a_confidence_is_a_probability(tmp_path: Path, confidence: str) -> None:
    path = tmp_path / "student.csv"
    path.write_text(f"text,teacher,confidence\na,b,{confidence}\n")
    with pytest.raises(RecordingError, match="column `confidence` must be a probability"):
        read_recording(path)


def test_tokens_come_at_a_rate_after_the_first(serve: Serve) -> None:
    rows = (Recorded("a", "x" * 40),)  # ten tokens
    app = create_stand_in(
        Recording(Path("rows.csv"), rows), latency_ms=100, latency_spread=0.0, tokens_per_s=50
    )
    url = serve(app, http=StandInHttp)
    asked = {"messages": [{"role": "user", "content": "a"}]}
    began = time.monotonic()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**asked, "stream": True}) as answer:
        arrived = [time.monotonic() - began for line in answer.iter_lines() if line.startswith("data: {")]
    assert len(arrived) == 12
    assert arrived[0] >= 0.09
    assert arrived[-1] >= 0.09 + 11 * 0.02
    began = time.monotonic()
    httpx.post(f"{url}/v1/chat/completions", json=asked)
    assert time.monotonic() - began >= 0.09 + 11 * 0.02
