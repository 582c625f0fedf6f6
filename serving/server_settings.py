"""`[server]`: where the gateway listens, what it lets in, and whom."""

from __future__ import annotations

import re

from pydantic import Field, SecretStr, field_validator

from serving.section import Section


class ServerSettings(Section):
    """Where the gateway listens and what it lets in."""

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    workers: int = Field(1, ge=1, le=64)
    max_body_bytes: int = Field(
        20 * 1024 * 1024, ge=1024, description="a larger request body is refused with 413"
    )
    max_upload_bytes: int = Field(
        1024**3, ge=1024, description="the same for any other request, whose body isn't held"
    )
    receive_timeout_s: float = Field(
        30.0,
        gt=0,
        description="the head of a request comes within this time, its body brings 1 KiB a second over it",
    )
    grace_s: float = Field(
        30.0, ge=0, description="how long requests under way may take after the gateway was told to stop"
    )
    max_concurrency: int = Field(
        2000, ge=1, description="requests under way at once, in each worker; beyond, 429"
    )
    max_held_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1024,
        description="request bodies under way at once, in each worker; beyond, 429",
    )
    max_tasks: int = Field(200, ge=1, description="unseen prompts become tasks by themselves up to this many")
    pass_through: list[str] | None = Field(
        None,
        description="what is passed on besides chat completions: paths below /v1/, with all below them; absent: all",
    )
    api_keys: list[SecretStr] = Field(
        default=[], description="the gateway's own keys, plain or as sha256:<hex>"
    )
    admin_key: SecretStr | None = Field(
        None, description="the key for /metrics and the details of /readyz, plain or as sha256:<hex>"
    )

    @field_validator("pass_through")
    @classmethod
    def _are_paths(cls, value: list[str] | None) -> list[str] | None:
        for path in value or ():
            if not re.fullmatch(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*", path):
                raise ValueError(
                    f"should be paths below /v1/, such as embeddings or images/generations, not {path!r}"
                )
        return value

    @field_validator("api_keys")
    @classmethod
    def _can_be_sent(cls, value: list[SecretStr]) -> list[SecretStr]:
        for position, key in enumerate(value, start=1):
            _check_key(key, f"key {position} of {len(value)}")
        return value

    @field_validator("admin_key")
    @classmethod
    def _admin_key_can_be_sent(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _check_key(value, "the key")
        return value


def _check_key(key: SecretStr, which: str) -> None:
    """Raise ValueError, without showing it, for a key that no client could ever send."""
    text = key.get_secret_value()
    if not text or text != text.strip() or not (text.isascii() and text.isprintable()):
        raise ValueError(
            f"no client can send {which}: it is empty, has spaces around it or "
            "characters that can't stand in a header"
        )
    if text.startswith("sha256:") and not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", text):
        raise ValueError(
            f"{which} begins with sha256: and should go on with the 64 hex digits of the key's SHA-256"
        )
