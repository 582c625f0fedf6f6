"""`[learning]`: when the gateway learns by itself, and with what."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from serving.section import Section


class LearningSettings(Section):
    """When the gateway learns by itself."""

    interval_s: float = Field(
        60.0, ge=0, description="how often to see whether a look is due; 0: never by itself"
    )
    python: Path | None = Field(
        None,
        description="the Python that has torch, to fine-tune encoders (the extra `train`); absent: the gateway's own",
    )
    threads: int = Field(1, ge=1, le=256, description="cores that fine-tuning may take")
    stall_timeout_s: float = Field(
        1800.0,
        gt=0,
        le=604800,
        description="seconds without a sign of progress after which a fine-tuning or export counts as hung and is "
        "ended; the gateway tries again after an hour",
    )
