"""The image and the composition, as far as they can be held to the code without a Docker daemon."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel

from serving.configuration import load_settings
from serving.server_settings import ServerSettings
from serving.settings import ENV_PREFIX, Settings

Start = Callable[..., Any]
ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "deploy" / "container"
DOCKERFILE = (CONTAINER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((CONTAINER / "compose.yaml").read_text())
GATEWAY: dict[str, Any] = COMPOSE["services"]["gateway"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned(path: Path) -> dict[str, str]:
    """Every package of a lock file with its version and hashes. On which systems it is wanted may differ."""
    entries = re.split(r"^(?=\w)", path.read_text(), flags=re.M)[1:]
    return {entry.partition("==")[0]: re.sub(r" ;.* \\|\n +#.*", "", entry).strip() for entry in entries}


RUNTIME, EVERYTHING = pinned(CONTAINER / "requirements.lock"), pinned(ROOT / "requirements.lock")


def variables() -> dict[str, str]:
    """What the image sets."""
    (block,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", DOCKERFILE, re.M)
    return dict(re.findall(r"(\w+)=(\S+)", block))


def is_key(variable: str) -> bool:
    """Whether a variable sets a key of the configuration."""
    model: type[BaseModel] = Settings
    *sections, key = variable.removeprefix(ENV_PREFIX).lower().split("__")
    for section in sections:
        inner = model.model_fields[section].annotation
        assert isinstance(inner, type)
        model = inner
    return key in model.model_fields


def test_what_runs_is_pinned_as_what_is_tested() -> None:
    assert RUNTIME
    assert {name: EVERYTHING.get(name) for name in RUNTIME} == RUNTIME


def test_what_runs_is_all_there_and_no_more() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *extras["otel"], *extras["encoder"]]
    assert needed(asked) <= set(RUNTIME)
    tools = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependency-groups"]["dev"]}
    assert not (tools - needed(asked)) & set(RUNTIME)


def needed(asked: list[str]) -> set[str]:
    """The closure of requirements, by what is installed here."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in asked]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        for extra in requirement.extras or {""}:
            name = canonicalize_name(requirement.name)
            if f"{name}[{extra}]" in seen:
                continue
            seen.add(f"{name}[{extra}]")
            found.add(name)
            for text in metadata.requires(name) or []:
                inner = Requirement(text)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    waiting.append(inner)
    return found


def test_the_image_is_made_of_files_there_are_and_all_the_wheel_needs() -> None:
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.M)
        for source in line.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in copied)
    wheel = {name.strip("/") for name in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["include"]}
    forced = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    wheel |= {name.partition("/")[0] for name in forced}
    assert wheel <= copied
    ignored = (CONTAINER / "Dockerfile.dockerignore").read_text().split()
    assert {name.removeprefix("!") for name in ignored if name.startswith("!")} == copied


def test_the_image_sets_keys_there_are() -> None:
    ours = [name for name in variables() if name.startswith(ENV_PREFIX)]
    assert ours
    assert all(is_key(name) for name in ours)


def test_the_image_runs_as_nobody_in_particular_and_hears_signals() -> None:
    assert re.search(r"^USER \d{4,}$", DOCKERFILE, re.M), "by number, so that Kubernetes can tell"
    assert re.search(r"^STOPSIGNAL SIGTERM$", DOCKERFILE, re.M)
    # Not through a shell, which would keep the signal to itself.
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)
    (command,) = re.findall(r"^CMD (.*)$", DOCKERFILE, re.M)
    assert [*json.loads(entrypoint), *json.loads(command)] == ["understudy", "serve"]
    assert f"VOLUME {variables()['UNDERSTUDY_STATE_DIR']}\n" in DOCKERFILE


def test_the_health_check_tells_a_gateway_from_none(stand_in: Start, gateway: Start) -> None:
    (check,) = re.findall(r"^HEALTHCHECK .*CMD (.*)$", DOCKERFILE, re.M)
    running = gateway(stand_in({}).url)

    def exit_code(port: str) -> int:
        return subprocess.run(
            [sys.executable, *json.loads(check)[1:]],
            env={**os.environ, "UNDERSTUDY_SERVER__PORT": port},
            capture_output=True,
            timeout=60,
        ).returncode

    assert exit_code(running.url.rpartition(":")[2]) == 0
    assert exit_code("9") != 0


def test_the_composition_sets_keys_there_are_and_a_configuration_that_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in GATEWAY["environment"]:
        assert name == "OPENAI_API_KEY" or is_key(name)
    # As the composition and the image set it, with what a person fills in.
    filled = {
        "UNDERSTUDY_SERVER__API_KEYS": '["one"]',
        "UNDERSTUDY_SERVER__ADMIN_KEY": "two",
        "OPENAI_API_KEY": "k",
    }
    for name, value in {**variables(), **GATEWAY["environment"], **filled}.items():
        if name.startswith((ENV_PREFIX, "OPENAI")):
            monkeypatch.setenv(name, value)
    settings = load_settings(CONTAINER / "understudy.toml")
    assert settings.server.host == "0.0.0.0"
    assert settings.observe.log_format == "json"
    assert settings.cache.url is not None


def mounts() -> Iterator[tuple[str, str]]:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source, target = volume.split(":")[:2]
            yield source, target


def test_what_is_mounted_is_there() -> None:
    for source, _ in mounts():
        if source.startswith("."):
            assert (CONTAINER / source).exists(), source
        else:
            assert source in COMPOSE["volumes"]
    assert (CONTAINER / GATEWAY["build"]["context"] / GATEWAY["build"]["dockerfile"]).is_file()


def test_ports_and_names_fit_together() -> None:
    port = variables()["UNDERSTUDY_SERVER__PORT"]
    assert f"EXPOSE {port}\n" in DOCKERFILE
    assert GATEWAY["ports"] == [f"127.0.0.1:{port}:{port}"], "nobody from elsewhere, unless somebody says so"
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"gateway:{port}"]}]
    (secret,) = COMPOSE["services"]["prometheus"]["secrets"]
    assert secret["target"] == job["authorization"]["credentials_file"]
    assert secret["source"] in COMPOSE["secrets"]
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    provider = yaml.safe_load((provisioning / "dashboards" / "understudy.yaml").read_text())
    folder = provider["providers"][0]["options"]["path"]
    assert f"{folder}/understudy.json" in {target for _, target in mounts()}


def test_there_is_time_to_stop() -> None:
    assert int(GATEWAY["stop_grace_period"].removesuffix("s")) >= ServerSettings().grace_s + 15
