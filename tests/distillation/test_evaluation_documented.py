"""Every field of an evaluation's JSON is documented, and the other way round."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distillation.evaluation import Evaluation
from distillation.judgement import Judgement
from routers.intervals import Share
from serving.releases import ReleaseStore

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def documented(first_column: str) -> list[str]:
    (table,) = re.findall(rf"^\| {first_column} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.M)
    return [line.split("`")[1] for line in table.splitlines()]


def fields(kind: type[Any], *leaves: type[Any], prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for one in dataclasses.fields(kind):
        given: Any = hints[one.name]
        inner, optional = given, False
        if isinstance(given, types.UnionType):
            optional = True
            inner = next(part for part in typing.get_args(given) if part is not types.NoneType)
        suffix = ""
        if typing.get_origin(inner) is list:
            inner, suffix = typing.get_args(inner)[0], "[]"
        if dataclasses.is_dataclass(inner) and inner not in leaves and isinstance(inner, type):
            if optional:
                yield prefix + one.name
            yield from fields(inner, *leaves, prefix=f"{prefix}{one.name}{suffix}.")
        else:
            yield prefix + one.name


def test_an_evaluation() -> None:
    assert documented("field") == ["schema", *fields(Evaluation, Share, Judgement)]


def test_a_judgement() -> None:
    assert documented("field of a judgement") == list(fields(Judgement, Share))


def test_a_share() -> None:
    assert ", ".join(f'"{one.name}"' for one in dataclasses.fields(Share)) in TEXT


def test_the_example_runs(
    tmp_path: Path, publish: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path / "state", "parcels", {"my card": "card", "the parcel": "parcel"})
    ReleaseStore(tmp_path / "state").rewrite("parcels", "r0001", {"held_out.json": b"{}"})
    path, file = tmp_path / "understudy.toml", tmp_path / "dev.csv"
    path.write_text(f'state_dir = "{tmp_path / "state"}"\n')
    file.write_text("text,teacher\nwhere is my card,card\n")
    (example,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    exec(example.replace("evaluation.log.", "evaluation.recording."), {"path": path, "file": file})
    assert "value=0.0" in capsys.readouterr().out
