from __future__ import annotations

import socket
from pathlib import Path

import pytest
from rich.console import Console

from loadtest.demo import Demo, example, run_demo
from serving.errors import ConfigError


def test_a_taken_port_is_named_with_another_one(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} can't be used .* --port {port + 1}"):
            run_demo(Demo(port, tmp_path / "state"), Console(quiet=True), stay=False)
    assert not (tmp_path / "state").exists()


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="isn't the folder of an earlier demo"):
        run_demo(Demo(port, mine), Console(quiet=True), stay=False)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_the_examples_are_found() -> None:
    assert example("parcels.csv").is_file()
    with pytest.raises(ConfigError, match=r"no-such\.csv is missing"):
        example("no-such.csv")
