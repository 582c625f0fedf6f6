"""The wheel in a clean environment: the locked dependencies and nothing of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"gateway", "routers", "serving", "distillation", "loadtest"}


@dataclass(frozen=True)
class Installed:
    """The wheel, and the environment it is installed in."""

    wheel: Path
    folder: Path
    elsewhere: Path

    def run(self, *command: str) -> str:
        """Run one of the environment's programs from a folder outside the checkout; give its output."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "UNDERSTUDY"))}
        program = str(self.folder / "bin" / command[0])
        done = subprocess.run(
            [program, *command[1:]],
            cwd=self.elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    work = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=100)
    (wheel,) = work.glob("*.whl")
    folder = work / "environment"
    venv.create(folder, with_pip=False)
    # The dependencies are those the tests run with, so that nothing is downloaded. What a `.pth` file names is
    # added as it is: the checkout's own `.pth` is not followed.
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin" / "python")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=100)
    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    return Installed(wheel, folder, elsewhere)


def test_the_wheel_holds_the_packages_and_nothing_else(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES | {"understudy.py"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    in_checkout = {
        f"{package}/{path.relative_to(ROOT / package)}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert in_checkout == {name for name in names if "/" in name and name.endswith(".py")}


def test_the_command_runs(installed: Installed) -> None:
    assert installed.run("understudy", "--version").startswith("understudy 0.")
    assert "--latency-ms" in installed.run("understudy", "stand-in", "--help")
    assert installed.run("understudy", "tasks").startswith("no tasks yet")


def test_every_module_is_imported_from_the_wheel(installed: Installed) -> None:
    code = """
import importlib, pkgutil, sys
for package in ("gateway", "routers", "serving", "distillation", "loadtest"):
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        print(importlib.import_module(f"{package}.{found.name}").__file__)
"""
    files = installed.run("python", "-W", "error", "-c", code).split()
    assert len(files) > 60
    assert all(Path(file).is_relative_to(installed.folder) for file in files)


def test_the_demo_finds_its_recording(installed: Installed) -> None:
    names = ["parcels.csv", "system_prompt.txt"]
    code = f"from loadtest.demo import example\nfor name in {names}: print(example(name))"
    files = [Path(line) for line in installed.run("python", "-c", code).splitlines()]
    assert all(file.is_relative_to(installed.folder) for file in files)
    assert [file.read_bytes() for file in files] == [
        (ROOT / "examples" / name).read_bytes() for name in names
    ]
