"""What every section of the configuration is, and the checks that several of them make."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about the keys it knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_url(value: str) -> str:
    """Return `value`; raise ValueError unless it is a URL that HTTP can be spoken to."""
    if not re.match(r"https?://[^/?#]", value):
        raise ValueError("should begin with http:// or https://, then name a host")
    return value


def check_variable(value: str, such_as: str) -> str:
    """Return `value`; raise ValueError unless it may name a variable: a key itself may not stand there."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise ValueError(
            f"should be the name of the environment variable that holds the key, such as {such_as}, "
            "not the key itself"
        )
    return value
