"""`student` of `[[task]]`: which student a task gets, and which keys each kind has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import AwareDatetime, Field, field_validator, model_validator

from serving.section import Section, check_url, check_variable
from serving.sight import Sees
from serving.teacher_settings import Price

_MOST_CHECKPOINTS = 16
_OF_EVERY_STUDENT = {"kind", "skip", "skip_at_most", "usd_per_hour"}
_OF_SERVED_STUDENTS = {"base_url", "model", "api_key_env", "timeout_s", "trained_until"}
_OF_FINE_TUNED_STUDENTS = {"base", "precision", "train_share"}
_OF_ONE_STUDENT: Mapping[str, set[str]] = {
    "linear": {"sees", "features", "embedder"},
    "encoder": {"sees", *_OF_FINE_TUNED_STUDENTS, *_OF_SERVED_STUDENTS},
    "lm": {
        "adapter",
        "hedge",
        "checkpoints",
        "commit_tokens",
        "hold_back_s",
        "max_tokens",
        "top_logprobs",
        "samples",
        "price",
        *_OF_SERVED_STUDENTS,
    },
}
"""Which keys a kind of student has."""


class StudentChoice(Section):
    """Which student a task gets. It acts with the next release: what is live keeps what it was tested with."""

    kind: Literal["linear", "encoder", "lm"] = "linear"
    sees: Sees = Field(
        "message", description="of `linear` and `encoder`: what of a conversation the student sees"
    )
    features: Literal["tfidf", "embedding"] = Field("tfidf", description="of `linear`: what it is fitted to")
    embedder: Path | None = Field(
        None, description="of `linear` over embeddings: the folder of a sentence encoder"
    )
    base: Path | None = Field(
        None, description="of `encoder`: the folder of the Hugging Face encoder to fine-tune"
    )
    precision: Literal["fp32", "int8"] = Field(
        "fp32", description="of `encoder`, fine-tuned: int8 is smaller and faster, and a student of its own"
    )
    train_share: float = Field(
        0.6,
        ge=0.1,
        le=0.9,
        description="of `encoder`, fine-tuned: the share of exchanges that trains it; the others judge it, for ever",
    )
    hedge: bool = Field(
        False, description="of `lm`: whether the teacher starts beside it where an escalation is foreseen"
    )
    base_url: str | None = Field(
        None,
        description="of `lm`: an OpenAI-compatible server; of `encoder`: a vLLM with a classifier; absent: "
        "those of `student.vllm`",
    )
    model: str | None = Field(None, description="of `lm` and `encoder`: the model's name there")
    adapter: Path | None = Field(
        None,
        description="of `lm`: the folder of a LoRA adapter (peft) that makes `model` this task's student",
    )
    api_key_env: str | None = Field(
        None,
        description="of `lm` and `encoder`: the environment variable that holds the server's key, if it wants one",
    )
    usd_per_hour: float | None = Field(
        None, ge=0, description="price of what it runs on; absent: as for all students; acts at once"
    )
    price: Price | None = Field(
        None, description="of `lm`: what a provider bills, in place of a price by the hour; acts at once"
    )
    skip: Literal["auto", "never"] = Field(
        "auto",
        description="whether requests foreseen to be escalated skip the student, where that pays",
    )
    skip_at_most: float = Field(
        0.02, gt=0, le=0.2, description="the share of what the student would answer that skipping may lose"
    )
    checkpoints: list[int] = Field(
        default=[8, 24, 64], description="of `lm`: numbers of tokens at which a hopeless answer is given up"
    )
    commit_tokens: int = Field(64, ge=1, description="of `lm`: where a streamed answer is judged")
    hold_back_s: float = Field(
        1.0, gt=0, description="of `lm`: how long a streamed request waits for that at most"
    )
    timeout_s: float = Field(
        30.0, gt=0, description="of `lm` and `encoder`: deadline of an answer, and of every silence"
    )
    max_tokens: int = Field(1024, ge=1, description="of `lm`: bound of an answer; the client's may be lower")
    top_logprobs: int = Field(5, ge=0, le=20, description="of `lm`: alternatives to ask for of each token")
    samples: int = Field(
        0,
        ge=0,
        le=20,
        description="of `lm`: more answers to draw for each, to tell how sure it is without log-probabilities",
    )
    trained_until: AwareDatetime | None = Field(
        None,
        description="of `lm` and `encoder`: what was logged until then, the model may have been trained on",
    )

    @field_validator("base_url")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        return None if value is None else check_url(value)

    @field_validator("api_key_env")
    @classmethod
    def _is_the_name_of_a_variable(cls, value: str | None) -> str | None:
        return None if value is None else check_variable(value, "STUDENT_API_KEY")

    @field_validator("checkpoints")
    @classmethod
    def _are_counts(cls, value: list[int]) -> list[int]:
        if len(value) > _MOST_CHECKPOINTS or not all(tokens >= 1 for tokens in value):
            raise ValueError(f"should be at most {_MOST_CHECKPOINTS} numbers of tokens, each at least 1")
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.served:
            if not self.model:
                or_base = "; or base, the folder of one to fine-tune" if self.kind == "encoder" else ""
                raise ValueError(
                    f'a student of kind "{self.kind}" needs model, its name where it is served, and base_url, which '
                    f"says where, unless student.vllm does{or_base}"
                )
            if self.base_url is None and self.api_key_env is not None:
                raise ValueError("api_key_env is the key of base_url: name that, too")
        if self.kind == "encoder":
            foreign = self.model_fields_set & (
                _OF_FINE_TUNED_STUDENTS if self.served else _OF_SERVED_STUDENTS
            )
            if foreign:
                raise ValueError(
                    "an encoder is fine-tuned here (base) or served elsewhere (model, base_url): "
                    f"{', '.join(sorted(foreign))} is for the other"
                )
        if self.price is not None and self.usd_per_hour is not None:
            raise ValueError(
                "a student is paid by its tokens (price) or by the hour (usd_per_hour), not both"
            )
        foreign = self.model_fields_set - _OF_EVERY_STUDENT - _OF_ONE_STUDENT[self.kind]
        if foreign == {"sees"}:
            raise ValueError(
                f'a student of kind "{self.kind}" has no sees: a language model sees the whole request'
            )
        if foreign:
            others = [f'"{kind}"' for kind, own in _OF_ONE_STUDENT.items() if foreign <= own]
            raise ValueError(
                f'a student of kind "{self.kind}" has no {", ".join(sorted(foreign))}: '
                f"that is for students of kind {' or '.join(others)}"
            )
        if (self.features == "embedding") != (self.embedder is not None):
            raise ValueError(
                'features = "embedding" and embedder, the folder of a sentence encoder, need each other'
            )
        return self

    @property
    def served(self) -> bool:
        """Whether its model is given, and served elsewhere."""
        return self.kind != "linear" and self.base is None
