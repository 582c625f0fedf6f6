"""How vLLM is started: its command line and its environment, from the settings."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from serving.child_environment import child_environment
from serving.errors import ConfigError
from serving.settings import Settings
from serving.student_settings import VllmSettings

_SERVER = "vllm.entrypoints.openai.api_server"
_HIDDEN = "…"
_SECRET = re.compile(r"token|key|secret|passw|credential")
_NO_SECRETS = ("tokens", "tokenizer")
"""Words of flags that count tokens, or say what makes them."""
_JSON_STRING = re.compile(r'("([^"\\]+)"\s*:\s*")((?:[^"\\]|\\.)+)"')
_LOOKS_LIKE_A_TOKEN = re.compile(r"\b(?:hf_|sk-|ghp_|glpat-)[\w-]{8,}|(?<=://)[^/@\s]+(?=@)")
_SHORTEST_SECRET = 4
"""What is shorter stands in too many lines that have nothing to do with it."""

INSTALL_VLLM = "install vLLM there (pip install vllm), or name the Python that has it: student.vllm.python"


def check_vllm(settings: Settings) -> None:
    """Raise ConfigError for a configuration that `serve --vllm` can't be run with."""
    vllm = settings.student.vllm
    if vllm is None:
        raise ConfigError(
            "--vllm needs a section [student.vllm] that says which model to serve, and as what: "
            'model = "…" (a folder, or a name vLLM knows)'
        )
    if vllm.urls:
        raise ConfigError(
            "--vllm starts a vLLM here, and student.vllm.urls names servers that others run: leave one of the two out"
        )


def not_there(vllm: VllmSettings) -> str | None:
    """What the settings name and isn't there, for a person: vLLM itself says it late, and at length."""
    if vllm.python is not None and shutil.which(vllm.python) is None:
        return (
            f"student.vllm.python: {vllm.python} isn't there, or can't be run: name the Python of the environment "
            "that vLLM is installed in"
        )
    model = vllm.model or ""
    if model.startswith(("/", ".", "~")) and not Path(model).exists():
        return f"student.vllm.model: there is no {model}: name the folder of a model, from / on"
    return None


def served_name(vllm: VllmSettings) -> str:
    """The name under which the model is asked for."""
    return vllm.served_model_name or vllm.model or ""


def command_of(vllm: VllmSettings, port: int) -> list[str]:
    """The command line of a server on `port`."""
    flags: list[tuple[str, object]] = [
        ("--model", vllm.model),
        ("--served-model-name", served_name(vllm)),
        ("--runner", vllm.runner),
        ("--host", vllm.host),
        ("--port", port),
        ("--gpu-memory-utilization", vllm.gpu_memory_utilization),
        ("--quantization", vllm.quantization),
        ("--tensor-parallel-size", vllm.tensor_parallel_size),
        ("--max-model-len", vllm.max_model_len),
        ("--max-loras", vllm.max_loras),
    ]
    command = [vllm.python or sys.executable, "-m", _SERVER, "--disable-uvicorn-access-log"]
    for flag, value in flags:
        if value is not None:
            command += [flag, str(value)]
    if vllm.enable_prefix_caching is not None:
        command.append(f"--{'' if vllm.enable_prefix_caching else 'no-'}enable-prefix-caching")
    if vllm.enable_lora:
        command.append("--enable-lora")
    return [*command, *vllm.args]


def without_secrets(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments as they may be shown, with … for what is nobody's business, and the values that this replaced.

    That is what follows a flag with token, key, secret, password or the like in its name, such strings within JSON, and
    whatever looks like a token.
    """
    shown: list[str] = []
    secrets: list[str] = []
    hides = False

    def hide(value: str) -> str:
        secrets.append(value)
        return _HIDDEN

    for argument in args:
        if argument.startswith("-"):
            flag, equals, value = argument.partition("=")
            hides = _names_secret(flag)
            shown.append(f"{flag}={hide(value)}" if equals and hides else _hidden_within(argument, hide))
        else:
            shown.append(hide(argument) if hides else _hidden_within(argument, hide))
    return shown, [secret for secret in secrets if len(secret) >= _SHORTEST_SECRET]


def _names_secret(name: str) -> bool:
    words = re.split(r"[-_.]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower())
    return any(_SECRET.search(word) and word not in _NO_SECRETS for word in words)


def _hidden_within(text: str, hide: Callable[[str], str]) -> str:
    text = _JSON_STRING.sub(
        lambda found: found[1] + hide(found[3]) + '"' if _names_secret(found[2]) else found[0], text
    )
    return _LOOKS_LIKE_A_TOKEN.sub(lambda found: hide(found[0]), text)


def environment_of(settings: Settings, vllm: VllmSettings, key: str) -> dict[str, str]:
    """Its environment: ours without our keys and settings, and with the key that it is to ask for.

    The key isn't on the command line, which everybody on the machine may read.
    """
    environment = child_environment(settings, own_python=vllm.python is None)
    # Nobody expects of a child that it imports what lies in the working directory (as `-P`, which Python 3.10 doesn't
    # know), reports to others, or colours a log; whoever does sets them otherwise.
    defaults: Mapping[str, str] = {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "NO_COLOR": "1",
    }
    environment = {**defaults, **environment, "VLLM_API_KEY": key}
    if vllm.enable_lora:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    return environment
