"""The configuration: read once, checked whole, passed down.

`load_settings` reads a TOML file and then the environment (`UNDERSTUDY_<SECTION>__<KEY>`; lists as JSON), which wins.
Every section refuses keys it doesn't know and names the nearest right one.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from serving.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about the keys it knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(Section):
    """Where the gateway listens and what it lets in."""

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    workers: int = Field(1, ge=1, le=64)
    max_body_bytes: int = Field(20 * 1024 * 1024, ge=1024, description="a larger request body is refused with 413")
    max_tasks: int = Field(200, ge=1, description="unseen prompts become tasks by themselves up to this many")
    api_keys: list[SecretStr] = Field(default=[], description="the gateway's own keys, plain or as sha256:<hex>")


class Price(Section):
    """USD per million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cached_input: float | None = Field(None, ge=0)


class TeacherSettings(Section):
    """The expensive model: any OpenAI-compatible base URL."""

    base_url: str = Field("https://api.openai.com/v1", pattern=r"^https?://")
    model: str | None = Field(None, description="sent instead of the client's model; absent: the client's own")
    api_key_env: str = Field("OPENAI_API_KEY", description="the environment variable that holds the teacher's key")
    trainable: bool = Field(False, description="whether the provider's terms let you train on its answers")
    timeout_s: float = Field(600.0, gt=0, description="deadline of one request, retries included")
    max_retries: int = Field(2, ge=0, le=10)
    price: Price | None = Field(None, description="overrides the price list of genai-prices")


class StudentSettings(Section):
    """What running students costs."""

    usd_per_hour: float = Field(0.05, ge=0, description="price of the machine (one core) a student answers on")


class LogSettings(Section):
    """The event log."""

    durability: Literal["fsync", "relaxed"] = "fsync"
    segment_bytes: int = Field(64 * 1024 * 1024, ge=4096, description="a segment is sealed at this size")


class LearningSettings(Section):
    """When the gateway learns by itself."""

    interval_s: float = Field(60.0, ge=0, description="how often to see whether a look is due; 0: never by itself")


class StudentChoice(Section):
    """Which student a task gets."""

    kind: Literal["linear"] = "linear"


class AgreementChoice(Section):
    """How two answers of a task are compared."""

    kind: Literal["exact", "json", "numeric"] = "exact"
    tolerance: float = Field(0.0, ge=0, description="of `numeric`: the largest relative difference that still agrees")


class Match(Section):
    """Which requests belong to a task; every given condition must hold."""

    header: str | None = Field(None, description="value of x-understudy-task (the task's own name always matches)")
    model: str | None = Field(None, description="the client's model, or an alias of yours")
    metadata: dict[str, str] = Field(default={}, description="entries of the request's `metadata`")
    system: str | None = Field(None, description="a regular expression searched for in the system prompt")


class TaskPolicy(Section):
    """How one task is learned and served; `[task_defaults]` sets it for every task, discovered ones included."""

    student: StudentChoice = StudentChoice()
    agreement: AgreementChoice = AgreementChoice()
    max_disagreement: float = Field(0.05, gt=0, lt=1)
    certainty: float = Field(0.9, gt=0, lt=1)
    audit_rate: float | None = Field(None, gt=0, le=1, description="absent: 5 %, then 2 % (STATISTICS.md §2)")
    always_escalate: list[str] = Field(default=[], description="student answers that always go to the teacher")
    on_teacher_failure: Literal["error", "student"] = "error"


class TaskSettings(TaskPolicy):
    """One task with settings of its own; what it leaves out comes from `[task_defaults]`."""

    name: Name
    match: Match | None = None


class Settings(BaseSettings):
    """The whole configuration. Everything is optional but the teacher's key."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="UNDERSTUDY_", env_nested_delimiter="__", env_ignore_empty=True
    )

    state_dir: Path = Path("state")
    server: ServerSettings = ServerSettings()
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    log: LogSettings = LogSettings()
    learning: LearningSettings = LearningSettings()
    task_defaults: TaskPolicy = TaskPolicy()
    task: list[TaskSettings] = []

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file (which comes in as init arguments); nothing else is read."""
        return env_settings, init_settings

    def for_task(self, name: str) -> TaskSettings:
        """The settings of one task: its own, else the defaults under its name."""
        own: dict[str, Any] = {"name": name}
        for task in self.task:
            if task.name == name:
                own = task.model_dump(exclude_unset=True)
        return TaskSettings(**{**self.task_defaults.model_dump(exclude_unset=True), **own})

    def teacher_key(self) -> SecretStr | None:
        """The teacher's key from the environment, or None: then the client's own key is forwarded."""
        value = os.environ.get(self.teacher.api_key_env, "")
        return SecretStr(value) if value else None
