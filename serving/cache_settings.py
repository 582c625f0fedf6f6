"""`[cache]`: whether and for how long an answer is given again, and to whom."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from serving.redis_url import RedisUrl
from serving.section import Section


class CacheSettings(Section):
    """The response cache: a first level in each process, and Redis behind it if there is a URL."""

    url: SecretStr | None = Field(
        None,
        description="redis://, rediss://, unix://, redis+cluster://, redis+sentinel://; absent: no Redis",
    )
    ttl_s: float = Field(3600.0, gt=0, le=31_536_000, description="how long an answer is kept, ±10 %")
    max_bytes: int = Field(64 * 1024 * 1024, ge=0, description="memory of the first level, per worker")
    max_entry_bytes: int = Field(1024 * 1024, ge=1024, description="a larger answer isn't cached")
    share: Literal["tenant", "task"] = "tenant"
    single_flight: Literal["process", "replicas"] = Field(
        "process", description="among whom identical concurrent requests are asked once"
    )
    lease_s: float = Field(
        10.0, gt=0, le=3600, description="how long others wait for the one that asks, without a sign of life"
    )

    @field_validator("url")
    @classmethod
    def _names_a_redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            RedisUrl.parse(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _replicas_meet_somewhere(self) -> Self:
        if self.single_flight == "replicas" and self.url is None:
            raise ValueError('single_flight = "replicas" needs the Redis in which they meet: set cache.url')
        return self
