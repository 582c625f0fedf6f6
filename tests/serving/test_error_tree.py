from __future__ import annotations

import ast
from pathlib import Path

from serving import errors

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gateway", "routers", "serving", "distillation", "loadtest")


def test_the_tree_names_every_error_there_is() -> None:
    parents: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    parents[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
    ours = {"UnderstudyError"}
    while more := {name for name, bases in parents.items() if ours & set(bases)} - ours:
        ours |= more
    drawn = set((errors.__doc__ or "").replace(",", " ").split())
    assert ours - drawn == set()
    assert {word for word in drawn if word.endswith("Error")} - ours == set()
