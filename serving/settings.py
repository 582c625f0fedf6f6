"""The whole configuration: one section for each concept, and what only all of them together can say.

The section `[server]` stands in `serving/server_settings.py`, with the default of every key, its meaning and what it
may be, and so do the others; `[task_defaults]` is with `[[task]]`, and their student in `serving/student_choice.py`.
`serving/configuration.py` reads them. Settings are read once, checked whole and passed down.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from serving.cache_settings import CacheSettings
from serving.errors import ConfigError
from serving.learning_settings import LearningSettings
from serving.log_settings import LogSettings
from serving.observe_settings import ObserveSettings
from serving.server_settings import ServerSettings
from serving.student_settings import StudentSettings
from serving.task_settings import RESERVED_TASKS, TaskPolicy, TaskSettings, check_policy
from serving.teacher_settings import TeacherSettings

ENV_PREFIX = "UNDERSTUDY_"


class Settings(BaseSettings):
    """The whole configuration. Everything is optional but the teacher's key."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__", env_ignore_empty=True
    )

    state_dir: Path = Path("state")
    server: ServerSettings = ServerSettings()
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    cache: CacheSettings = CacheSettings()
    log: LogSettings = LogSettings()
    learning: LearningSettings = LearningSettings()
    observe: ObserveSettings = ObserveSettings()
    task_defaults: TaskPolicy = TaskPolicy()
    task: list[TaskSettings] = []

    @field_validator("task")
    @classmethod
    def _names_differ(cls, value: list[TaskSettings]) -> list[TaskSettings]:
        names = [task.name for task in value]
        for name in RESERVED_TASKS.intersection(names):
            raise ValueError(f"{name} is a name of our own (prompts beyond server.max_tasks go there)")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"should name every task once; {', '.join(twice)} is there more than once")
        return value

    @field_validator("task_defaults")
    @classmethod
    def _defaults_hold_named_answers_to_more(cls, value: TaskPolicy, info: ValidationInfo) -> TaskPolicy:
        check_policy(value)
        _check_served(value, info)
        return value

    @field_validator("task")
    @classmethod
    def _tasks_hold_named_answers_to_more(
        cls, value: list[TaskSettings], info: ValidationInfo
    ) -> list[TaskSettings]:
        defaults = info.data.get("task_defaults")
        if isinstance(defaults, TaskPolicy):  # else what is wrong with it is said
            for task in value:
                given = {**defaults.model_dump(exclude_unset=True), **task.model_dump(exclude_unset=True)}
                check_policy(TaskSettings(**given), f"task {task.name}: ")
                _check_served(TaskSettings(**given), info, f"task {task.name}: ")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over the file (which comes in as init arguments); nothing else is read."""
        return env_settings, init_settings

    def for_task(self, name: str) -> TaskSettings:
        """Return the settings of one task: its own, else the defaults under its name."""
        own: dict[str, Any] = {"name": name}
        for task in self.task:
            if task.name == name:
                own = task.model_dump(exclude_unset=True)
        return TaskSettings(**{**self.task_defaults.model_dump(exclude_unset=True), **own})

    def teacher_key(self) -> SecretStr | None:
        """Return the teacher's key from the environment, or None: then the client's own key is forwarded.

        Raises ConfigError for a key that can't stand in a header, without showing it.
        """
        value = os.environ.get(self.teacher.api_key_env, "").strip()
        if not (value.isascii() and value.isprintable()):
            raise ConfigError(
                f"the teacher's key in the environment variable {self.teacher.api_key_env} has characters "
                "that can't be sent (a line break, a letter with an accent, …): set it again"
            )
        return SecretStr(value) if value else None


def _check_served(policy: TaskPolicy, info: ValidationInfo, where: str = "") -> None:
    """Raise ValueError for a student that nobody serves."""
    student = info.data.get("student")
    if not isinstance(student, StudentSettings):
        return  # what is wrong with it is said
    if policy.student.served and policy.student.base_url is None and student.vllm is None:
        raise ValueError(
            f'{where}a student of kind "{policy.student.kind}" needs base_url, where it is served, or [student.vllm], '
            "which says that for all"
        )
