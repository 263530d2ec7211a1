"""The README does what it says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest_plugins = ["tests.quick_python"]

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


BEFORE = """
import torch, forgetless as fl
from forgetless.tasks import make_task
torch.set_num_threads(1)
whole = fl.evaluate
fl.evaluate = lambda model, tasks, *more: whole(
    model, [make_task({"kind": kind, "limit": 150}) for kind in tasks], *more
)
"""


def test_the_python_example_runs_as_printed(tmp_path: Path, python: str) -> None:
    """All of it, but for the number of questions, of which some tell what is kept."""
    done = subprocess.run(
        [python, "-c", BEFORE + PYTHON[0]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kept = re.search(r"pocket_recall.*?([\d.]+) %", done.stdout)
    assert kept is not None
    assert float(kept[1]) >= 98
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_python_example_has_ten_lines_besides_its_imports() -> None:
    lines = [line for line in PYTHON[0].splitlines() if line]
    assert len([line for line in lines if not line.startswith(("import", "from"))]) <= 10


def test_the_method_shown_is_the_whole_file() -> None:
    file = ROOT / "src" / "forgetless" / "methods" / "milora.py"
    assert PYTHON[1] == file.read_text(encoding="utf-8")


def test_the_tree_names_every_module() -> None:
    tree = README.split("## The source")[1]
    package = ROOT / "src" / "forgetless"
    modules = {path.name for path in package.glob("*.py") if not path.name.startswith("_")}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    named = set(re.findall(r"^  (\S+)", tree, flags=re.MULTILINE))
    assert named == modules | folders


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_every_link_leads_to_a_file(target: str) -> None:
    assert (ROOT / target).is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make (\w+)", README))))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
