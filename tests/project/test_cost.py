"""What an addition costs: each is made in a copy of the package, in the files of CONTRIBUTING."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "forgetless"

METHOD = """
from forgetless.core.method import Factors, Method

def zeros(W, rank, scaling):
    return Factors(A=W.new_zeros(rank, W.shape[1]), B=W.new_zeros(W.shape[0], rank))

METHOD = Method("zeros", "nothing at all", "—", trains=("A", "B"), factors=zeros)
"""

TASK = '''
from dataclasses import dataclass

from forgetless.tasks.pocket_recall import PocketRecall

@dataclass(frozen=True)
class PocketRecallAgain(PocketRecall):
    """Facts of the pocket world, once more."""

    name: str = "pocket_recall_again"

TASK = PocketRecallAgain
'''

PENALTY = '''
from dataclasses import dataclass

from forgetless.training.penalties.penalty import Penalty

@dataclass
class Nothing(Penalty):
    """0 whatever the weights are."""

    def __call__(self, model, step):
        return next(model.parameters()).sum() * 0
'''

RECIPE = (
    "from forgetless.recipes.recipe import Recipe; from forgetless.recipes.identity import run_id;"
    "made = Recipe.parse({'base': 'pocket', 'data': {'train': 'pocket:problems'},"
    "'training': {'steps': 1}, 'adapter': {'method': 'lora'}});"
)


def add_line(file: Path, beside: str, line: str) -> None:
    """Put one line behind the only line that reads `beside`."""
    text = file.read_text(encoding="utf-8")
    assert text.count(beside) == 1
    file.write_text(text.replace(beside, f"{beside}{line}"), encoding="utf-8")


def run(folder: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def package(tmp_path: Path) -> Path:
    copy = tmp_path / "forgetless"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_a_method_costs_one_file_and_one_line(package: Path) -> None:
    (package / "methods" / "zeros.py").write_text(METHOD)
    add_line(package / "methods" / "__init__.py", '    "pissa",\n', '    "zeros",\n')
    code = (
        "import torch, forgetless as fl; from forgetless.methods.table import entries;"
        "start = fl.decompose(torch.eye(4), 2, 'zeros');"
        "print(start.starts_at_zero, 'zeros' in [entry.name for entry in entries()])"
    )
    assert run(package.parent, code).split() == ["True", "True"]


def test_a_task_costs_one_file_and_one_line(package: Path) -> None:
    (package / "tasks" / "pocket_recall_again.py").write_text(TASK)
    add_line(
        package / "tasks" / "__init__.py", '    "pocket_recall",\n', '    "pocket_recall_again",\n'
    )
    code = (
        "from forgetless.tasks import TASKS, make_task;"
        "print(make_task('pocket_recall_again').name, 'pocket_recall_again' in TASKS)"
    )
    assert run(package.parent, code).split() == ["pocket_recall_again", "True"]


def test_a_penalty_costs_one_file_and_one_line(package: Path) -> None:
    (package / "training" / "penalties" / "nothing.py").write_text(PENALTY)
    add_line(
        package / "training" / "penalties" / "__init__.py",
        '    "l2_start": "L2Start",\n',
        '    "nothing": "Nothing",\n',
    )
    code = RECIPE + (
        "from forgetless.recipes.checking import check;"
        "other = made.override({'penalties': [{'kind': 'nothing', 'weight': 1}]});"
        "print(check(other), run_id(other) != run_id(made))"
    )
    assert run(package.parent, code).split() == ["[]", "True"]


def test_a_training_setting_costs_one_field(package: Path) -> None:
    before = run(package.parent, RECIPE + "print(run_id(made))")
    add_line(
        package / "training" / "settings.py",
        "    compile: bool = False\n",
        "    nesterov: bool = False\n",
    )
    code = RECIPE + "print(run_id(made)); print(run_id(made.override({'training.nesterov': True})))"
    plain, changed = run(package.parent, code).splitlines()
    assert plain == before.strip()
    assert changed != plain
