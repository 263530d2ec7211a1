"""The rooms of the package: what lies in it, and what one room may take from another."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "forgetless"


def rooms() -> set[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    assert not contract.get("ignore_imports")
    return set(contract["layers"]) - {"__main__", "testing"}


def test_the_package_holds_its_thirteen_rooms_and_nothing_else() -> None:
    assert len(rooms()) == 13
    files = {"__init__.py", "__main__.py", "testing.py", "py.typed", "__pycache__"}
    assert {path.name for path in PACKAGE.iterdir()} | {"__pycache__"} == rooms() | files


def test_no_private_name_is_taken_from_another_room() -> None:
    assert list(private_imports()) == []


def private_imports() -> Iterator[str]:
    """Names with a leading underscore that a file takes from another package."""
    for file in PACKAGE.rglob("*.py"):
        package = ".".join(file.parent.relative_to(PACKAGE.parent).parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "forgetless"
            ):
                continue
            home = (node.module or "").rpartition(".")[0]
            for name in node.names:
                if name.name.startswith("_") and name.name != "__version__" and home != package:
                    yield f"{file.relative_to(PACKAGE)}:{node.lineno} takes {name.name}"


def test_only_the_modality_is_asked_for_a_tokenizer() -> None:
    """Data, models and tasks are of a modality; everything else is of none."""
    of_text = {"batches", "chat", "encoding", "language", "tokens"}
    taken = []
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] in ("data", "models", "tasks"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [name.name for name in node.names if "okenizer" in name.name]
                if names or node.module.removeprefix("forgetless.data.") in of_text:
                    taken.append(f"{file.relative_to(PACKAGE)} imports {node.module} {names}")
    assert taken == []
