"""What an addition costs: each is made in a copy of the package, in the files of CONTRIBUTING."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["tests.quick_python"]

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


@pytest.fixture
def run(python: str) -> Callable[[Path, str], str]:
    """What a piece of code prints, with the package of a folder."""

    def printed(folder: Path, code: str) -> str:
        done = subprocess.run(
            [python, "-c", code],
            env=os.environ | {"PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return printed


@pytest.fixture
def package(tmp_path: Path) -> Path:
    copy = tmp_path / "forgetless"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_a_method_costs_one_file_and_one_line(
    package: Path, run: Callable[[Path, str], str]
) -> None:
    (package / "methods" / "zeros.py").write_text(METHOD)
    add_line(package / "methods" / "__init__.py", '    "pissa",\n', '    "zeros",\n')
    code = (
        "import torch, forgetless as fl; from forgetless.methods.table import entries;"
        "start = fl.decompose(torch.eye(4), 2, 'zeros');"
        "print(start.starts_at_zero, 'zeros' in [entry.name for entry in entries()])"
    )
    assert run(package.parent, code).split() == ["True", "True"]


def test_a_task_costs_one_file_and_one_line(package: Path, run: Callable[[Path, str], str]) -> None:
    (package / "tasks" / "pocket_recall_again.py").write_text(TASK)
    add_line(
        package / "tasks" / "__init__.py", '    "pocket_recall",\n', '    "pocket_recall_again",\n'
    )
    code = (
        "from forgetless.tasks import TASKS, make_task;"
        "print(make_task('pocket_recall_again').name, 'pocket_recall_again' in TASKS)"
    )
    assert run(package.parent, code).split() == ["pocket_recall_again", "True"]


def test_a_penalty_costs_one_file_and_one_line(
    package: Path, run: Callable[[Path, str], str]
) -> None:
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


def test_a_training_setting_costs_one_field(package: Path, run: Callable[[Path, str], str]) -> None:
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


MODALITY = """
from dataclasses import replace

from forgetless.data.images import MODALITY as IMAGES
from forgetless.models.load import load_tokenizer

MODALITY = replace(IMAGES, processor_name="reader", load_processor=load_tokenizer)
"""


def test_a_modality_costs_a_line_and_a_file(
    package: Path, tmp_path: Path, run: Callable[[Path, str], str]
) -> None:
    """A task for it costs what every task costs."""
    base = tmp_path / "bert"
    base.mkdir()
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    (base / "config.json").write_text(json.dumps({**config, "hidden_size": 12, "vocab_size": 9}))
    (package / "data" / "phrases.py").write_text(MODALITY)
    line = (
        'HEADS = (Head("phrases", "a phrase classifier", '
        "transformers.AutoModelForSequenceClassification, AutoTokenizer, "
        "modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES), *HEADS)\n"
    )
    file = package / "models" / "load.py"
    text = file.read_text(encoding="utf-8")
    imports = "import transformers\nfrom transformers.models.auto import modeling_auto\n"
    head, mark, rest = text.partition("\n_WEIGHTS = (")
    file.write_text(f"{head}\n{imports}{line}{mark}{rest}", encoding="utf-8")
    code = (
        "from forgetless.data.modality import modality_of; from forgetless.models.load import *;"
        f"base = {str(base)!r};"
        "print(modality_of(base).processor_name, modality_of('pocket').processor_name)"
    )
    assert run(package.parent, code).split() == ["reader", "tokenizer"]
