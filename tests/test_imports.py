"""Which way imports go, what a process loads, and that importing does nothing."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gateway", "routers", "serving", "distillation", "loadtest")

PLANTED = {
    "layers": ("serving/disk.py", "routers.coin"),
    "over-http": ("loadtest/table.py", "gateway.names"),
    "learning": ("loadtest/table.py", "distillation.due"),
    "framework": ("serving/disk.py", "starlette"),
    "http-client": ("gateway/names.py", "aiohttp"),
    "fitting": ("distillation/due.py", "sklearn"),
    "ready": ("gateway/names.py", "routers.logistic"),
    "client-library": ("serving/layout.py", "openai"),
    "traces": ("gateway/names.py", "opentelemetry"),
    "plots": ("serving/layout.py", "matplotlib"),
    "heavy": ("serving/sse.py", "torch"),
}
"""For each contract of pyproject.toml an import that breaks it and no other."""


def _python(code: str, cwd: Path) -> str:
    """Run code in a process of its own, whose working directory is `cwd`; give what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `lint-imports` says about a copy of the code with every planted import."""
    copy = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for file, module in PLANTED.values():
        with (copy / file).open("a") as text:
            text.write(f"\nimport {module}\n")
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert command is not None
    # The installed checkout is importable too: the copy has to come first.
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    arguments = [command, "--no-logo", "--no-cache"]
    done = subprocess.run(arguments, cwd=copy, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("contract", PLANTED)
def test_a_broken_contract_is_found(broken: str, contract: str) -> None:
    file, module = PLANTED[contract]
    importer = file.removesuffix(".py").replace("/", ".")
    assert f"{importer} -> {module}" in broken


def test_every_contract_can_break(broken: str) -> None:
    assert f"Contracts: 0 kept, {len(PLANTED)} broken." in broken


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("understudy", (*PACKAGES[:2], *PACKAGES[3:], "numpy", "fastapi", "aiohttp")),
        (
            "gateway.server",
            (
                *("distillation", "loadtest", "sklearn", "scipy", "openai", "redis", "opentelemetry.sdk"),
                *("torch", "onnxruntime", "tokenizers"),
            ),
        ),
        ("serving.stand_in", ("gateway", "distillation", "loadtest", "aiohttp", "sklearn", "fastapi")),
        ("distillation.learning", ("gateway", "loadtest", "sklearn", "aiohttp", "fastapi")),
    ],
)
def test_a_process_loads_what_it_uses(module: str, unwanted: tuple[str, ...], tmp_path: Path) -> None:
    printed = _python(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))", tmp_path)
    loaded = set(json.loads(printed))
    assert module in loaded
    assert loaded.isdisjoint(unwanted)


def test_importing_a_module_does_nothing(tmp_path: Path) -> None:
    names = ["understudy"]
    for package in PACKAGES:
        names += [f"{package}.{found.name}" for found in pkgutil.iter_modules([str(ROOT / package)])]
    assert len(names) > 60
    code = f"""
import importlib, os, sys, threading
def environment():
    # scikit-learn sets two of OpenMP's.
    return {{key: value for key, value in os.environ.items() if not key.startswith("KMP_")}}
before = environment()
for name in {names!r}:
    importlib.import_module(name)
print(threading.active_count(), environment() == before)
"""
    assert _python(code, tmp_path).split() == ["1", "True"]
    assert list(tmp_path.iterdir()) == []
