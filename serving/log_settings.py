"""`[log]`: what is written down, how safely, and for how long."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from serving.redaction import parse_kinds
from serving.section import Section


class LogSettings(Section):
    """The event log."""

    durability: Literal["fsync", "relaxed"] = "fsync"
    segment_bytes: int = Field(64 * 1024 * 1024, ge=4096, description="a segment is sealed at this size")
    redact: list[str] = Field(
        default=[], description="kinds of text that never reach the disk: built-in ones, or name:pattern"
    )
    retention_days: float | None = Field(
        None, gt=0, description="sealed segments whose newest event is older are removed; absent: never"
    )
    max_wait_s: float = Field(2.0, gt=0, description="an answer waits at most so long for a slow disk")
    max_waiting_bytes: int = Field(
        64 * 1024 * 1024, ge=4096, description="what waits for a slow disk beyond this is lost"
    )

    @field_validator("redact")
    @classmethod
    def _can_be_redacted(cls, value: list[str]) -> list[str]:
        parse_kinds(value)
        return value
