"""What tiny models are made from decides their name; that they are worth something, tests/vllm shows."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest import tiny_models
from loadtest.tiny_models import NotTrained, Recipe, trained


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "rows.csv").write_text("text,teacher\nwhere is it,where\nit broke,damaged\n")
    (tmp_path / "prompt.txt").write_text("Sort it.")
    return Recipe("lm", rows=(tmp_path / "rows.csv",), prompts=(tmp_path / "prompt.txt",))


def test_a_model_is_made_again_only_for_other_rows_or_options(recipe: Recipe, tmp_path: Path) -> None:
    known = recipe.key()
    assert recipe.key() == known
    others = {
        dataclasses.replace(recipe, seed=2).key(),
        dataclasses.replace(recipe, steps=7).key(),
        dataclasses.replace(recipe, kind="classifier").key(),
        dataclasses.replace(recipe, base=tmp_path / "lm-1").key(),
    }
    recipe.rows[0].write_text("text,teacher\nwhere is it,elsewhere\n")
    others.add(recipe.key())
    recipe.prompts[0].write_text("Sort them.")
    others.add(recipe.key())
    assert len(others | {known}) == 7


def test_a_model_that_is_there_needs_no_training(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / recipe.key()
    folder.mkdir(parents=True)
    (folder / "trained.json").write_text("{}")
    assert trained(recipe, tmp_path / "cache", python=Path("/nowhere/python")) == folder


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("text,label\na,b\n", "has no column 'teacher'"),
        ("text,teacher\n", "has no rows"),
        ("text,teacher\n\xff,b\n", "isn't UTF-8"),
    ],
)
def test_bad_rows_are_refused(recipe: Recipe, written: str, said: str) -> None:
    recipe.rows[0].write_text(written, encoding="latin-1")
    with pytest.raises(NotTrained, match=said):
        tiny_models._tasks(recipe)


def test_a_file_that_is_not_there_is_named(recipe: Recipe, tmp_path: Path) -> None:
    recipe.rows[0].unlink()
    with pytest.raises(NotTrained, match=r"rows\.csv can't be read: No such file"):
        trained(recipe, tmp_path / "cache", python=Path("/nowhere/python"))


def test_rows_and_prompts_come_in_pairs(recipe: Recipe) -> None:
    with pytest.raises(NotTrained, match="1 files of rows and 0 prompts"):
        tiny_models._tasks(dataclasses.replace(recipe, prompts=()))


def test_rows_kept_from_training_are_not_learned(recipe: Recipe) -> None:
    recipe.rows[0].write_text("text,teacher\n" + "".join(f"text {n},label\n" for n in range(50)))
    learned, held_out = tiny_models._tasks(dataclasses.replace(recipe, held_out=20))
    assert len(held_out) == 20
    assert {text for _, text, _ in learned}.isdisjoint(text for _, text, _ in held_out)
    assert len(learned) == 30


def test_an_environment_without_torch_is_named(recipe: Recipe, tmp_path: Path) -> None:
    # -S: nothing that is installed is found.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(NotTrained, match="No module named 'torch'"):
        trained(recipe, tmp_path / "cache", python=bare)
    assert not list((tmp_path / "cache").glob("lm-*")), "nothing half made is taken for a model"


def test_the_command_line_refuses_in_a_line(recipe: Recipe, tmp_path: Path) -> None:
    options = ["--cache", str(tmp_path / "cache"), "--rows", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-P", tiny_models.__file__, "lm", *options],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("tiny_models: ")
    assert done.stderr.count("\n") == 1
