"""Reading the configuration, and saying to a person what is wrong with it.

`load_settings` reads a TOML file and then the environment (`UNDERSTUDY_<SECTION>__<KEY>`; lists as JSON). The
environment wins. Every section refuses keys it does not know; the nearest right one is named.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
import typing
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError

from serving.errors import ConfigError
from serving.settings import ENV_PREFIX, Settings

DEFAULT_FILE = Path("understudy.toml")

_KEYS_PLACE = "the key itself comes from the environment only: teacher.api_key_env names the variable"
_WORDS = {
    "list_type": 'should be a list, such as ["one", "two"]',
    "int_parsing": "should be a whole number",
    "float_parsing": "should be a number",
    "bool_parsing": "should be true or false",
    "dict_type": "should be a table, such as { one = 0.01 }",
    "timezone_aware": "should name its time zone, as in 2026-10-01T00:00:00Z",
}
"""What pydantic says of its parser, in words about the value."""
_SHARES = ("max_disagreement", "certainty", "audit_rate", "noise_rate", "skip_at_most")
"""Keys that are taken for percentages."""


def load_settings(path: Path | None = None) -> Settings:
    """Read the configuration file and the environment, which wins.

    `path` None means `understudy.toml` in the working directory if there is one, else the defaults. Raises
    ConfigError, whose message names everything that is wrong and never holds a secret.
    """
    file = path or DEFAULT_FILE
    return _validated(_read_toml(file, required=path is not None), file)


def _read_toml(file: Path, *, required: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise ConfigError(f"there is no configuration file {file}") from None
    except OSError as error:
        raise ConfigError(f"the configuration file {file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration file {file} isn't UTF-8 (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file {file} isn't TOML: {error}") from None


def _validated(data: dict[str, Any], file: Path) -> Settings:
    """Check `data`, read from `file`, and the environment together, or raise ConfigError."""
    lines = _unknown_variables()
    try:
        settings = Settings(**data)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False)
        lines += [_explain(item) for item in wrong if _variable(item["loc"])]
        written = [_explain(item) for item in wrong if not _variable(item["loc"])]
        if written:
            lines.append(f"{file}: {'; '.join(written)}" if data else "; ".join(written))
    except SettingsError:
        lines += _undecodable_variables()
    if lines:
        raise ConfigError("; ".join(lines))
    return settings


def _explain(error: ErrorDetails) -> str:
    """One line for one thing that pydantic found wrong: which key, which value, what is allowed."""
    loc = error["loc"]
    key = _dotted(loc)
    origin = _variable(loc)
    where = f"{key} (from {origin})" if origin else key
    if tuple(loc) == ("teacher", "api_key"):
        return "unknown key teacher.api_key: " + _KEYS_PLACE
    if error["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        inside = _dotted(loc[:-1])
        hint = (
            f"did you mean {_dotted((*loc[:-1], near[0]))}?"
            if near
            else f"{inside or 'the top level'} knows {', '.join(sorted(known))}"
        )
        return f"unknown key {where}: {hint}"
    if error["type"] == "missing":
        return f"{where} is missing"
    if tuple(loc) == ("task",) and error["type"] == "list_type":
        return "task is a list: write [[task]], in two pairs of brackets, for each task"
    message = _WORDS.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if tuple(loc) == ("task",) and message.startswith("task ") and not origin:
        return message  # it names task, key and value: all the other tasks would only hide it
    if loc[-1] in _SHARES and error["type"].startswith("less_than"):
        message += ", since it is a share: 5 % is 0.05"
    return f"{where} = {_shown(loc, error['input'])}: {message}"


def _shown(loc: Sequence[int | str], value: object) -> str:
    """Show the value as a person wrote it, unless it may be or hold a secret."""
    if {"api_keys", "api_key_env", "admin_key"} & set(loc) or tuple(loc[:2]) == ("cache", "url"):
        return "(hidden)"
    text = value.isoformat() if isinstance(value, datetime) else repr(value)
    if any(word in text for word in ("api_key", "admin_key", "redis")) or ("://" in text and "@" in text):
        return "(hidden)"
    return text if len(text) <= 80 else text[:77] + "..."


def _dotted(loc: Sequence[int | str]) -> str:
    """`("task", 0, "match", "model")` as a person would write it: `task[0].match.model`."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _variable(loc: Sequence[int | str]) -> str | None:
    """Name the environment variable that set this key (or the section or list around it), if one did."""
    names = {name.upper(): name for name in os.environ}
    for depth in range(len(loc), 0, -1):
        wanted = ENV_PREFIX + "__".join(str(part) for part in loc[:depth]).upper()
        if wanted in names:
            return names[wanted]
    return None


def _known_keys(loc: Sequence[int | str]) -> list[str]:
    """Return the keys of the section at `loc`, which is valid."""
    model: type[BaseModel] = Settings
    for part in loc:
        if isinstance(part, str):
            section = _section(model.model_fields[part].annotation)
            if section is None:
                return []
            model = section
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """Find the model inside `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in typing.get_args(annotation) if (found := _section(arg))), None)


def _unknown_variables() -> list[str]:
    """Name the variables that look like ours but name no section.

    Unknown keys of a known section are found by the model.
    """
    lines = []
    sections = list(Settings.model_fields)
    for name, value in sorted(os.environ.items()):
        if not name.upper().startswith(ENV_PREFIX):
            continue
        first, nested, rest = name[len(ENV_PREFIX) :].lower().partition("__")
        near = difflib.get_close_matches(first, sections, n=1, cutoff=0.5 if nested else 0.8)
        meant = None if nested else _with_two_underscores(first, value)
        if meant is not None:
            lines.append(f"unknown environment variable {name}: did you mean {meant}?")
        elif first not in sections and (nested or near):
            hint = (
                f"did you mean {ENV_PREFIX}{near[0].upper()}{nested}{rest.upper()}?"
                if near
                else (f"the sections are {', '.join(sections)}")
            )
            lines.append(f"unknown environment variable {name}: {hint}")
    return lines


def _with_two_underscores(rest: str, value: str) -> str | None:
    """Name the variable that `UNDERSTUDY_<rest>` was meant to be if one underscore parts section and key.

    Kubernetes sets such variables for services (`UNDERSTUDY_SERVER_PORT=tcp://10.0.0.1:80`): not meant for us.
    """
    if value.startswith(("tcp://", "udp://")):
        return None
    for section in Settings.model_fields:
        key = rest.removeprefix(f"{section}_")
        if key != rest and key in _known_keys((section,)):
            return f"{ENV_PREFIX}{section}__{key}".upper()
    return None


def _undecodable_variables() -> list[str]:
    """Name the variables of ours that set a list or a whole section and aren't JSON."""
    lines = []
    for name, value in sorted(os.environ.items()):
        path = name[len(ENV_PREFIX) :].lower().split("__")
        if not name.upper().startswith(ENV_PREFIX) or not value or not _holds_json(path):
            continue
        try:
            json.loads(value)
        except ValueError:
            lines.append(f'the environment variable {name} should be JSON, such as ["one", "two"] for a list')
    return lines or [f"an environment variable that begins with {ENV_PREFIX} should be JSON and isn't"]


def _holds_json(path: Sequence[str]) -> bool:
    """Say whether the key at `path` is a section, a list or a table, which a variable gives as JSON."""
    model: type[BaseModel] | None = Settings
    for part in path[:-1]:
        field = model.model_fields.get(part) if model else None
        model = _section(field.annotation) if field else None
    last = model.model_fields.get(path[-1]) if model else None
    if last is None:
        return False
    kinds = {last.annotation, typing.get_origin(last.annotation)}
    return bool(kinds & {list, dict}) or _section(last.annotation) is not None
