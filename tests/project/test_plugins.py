"""What others add: an installed package, a module beside the recipe, an object in Python."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

import forgetless as fl
from forgetless.core.errors import UserError
from forgetless.core.method import Factors, Method
from forgetless.data.examples import load_examples
from forgetless.data.modality import load_processor
from forgetless.methods import METHODS, find
from forgetless.models.load import load_model
from forgetless.recipes.checking import check
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.tasks import make_task
from forgetless.testing import check_method, check_penalty, check_task
from forgetless.training.loop import train
from forgetless.training.penalties import Penalty, make_penalty
from forgetless.training.settings import TrainingSettings

pytest_plugins = ["tests.tiny_fixtures", "tests.quick_python"]

ROOT = Path(__file__).parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]


# ---- an installed package ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, python: str) -> Run:
    """A Python with the example package installed into a folder; it runs module and words."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "examples" / "plugin", folder / "source")  # building writes beside it
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    pip += ["--no-index", "--target", str(folder / "site"), str(folder / "source")]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    paths = [str(folder / "site"), str(Path(fl.__file__).parents[1])]

    def run(*words: str, at: Path = folder) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, "-m", *words],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            cwd=at,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_example_package_passes_its_contract_suite(installed: Run) -> None:
    done = installed("pytest", "-q", "-p", "no:cacheprovider", "source/tests")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "3 passed" in done.stdout


def test_its_method_runs_in_a_study_and_stands_in_the_report(
    installed: Run, tiny_recipe: dict[str, Any], tiny_files: Path, tmp_path: Path
) -> None:
    brief = {"kind": "brief", "path": str(tiny_files / "test.jsonl"), "max_new_tokens": 4}
    study = {
        "name": "quiet",
        "recipe": {
            **tiny_recipe,
            "adapter": {"rank": 2, "alpha": 4},
            "penalties": [{"kind": "l1_start", "weight": 0.001}],
            "tasks": {**tiny_recipe["tasks"], "learning": [brief]},
        },
        "arms": [{"adapter.method": "quiet_inputs"}, {"adapter.method": "lora"}],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    done = installed("forgetless", "study", "study.yaml", at=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "runs" / "quiet" / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"quiet_inputs", "lora"}
    assert "brief" in {row["task"] for row in rows}
    page = (tmp_path / "runs" / "quiet" / "report" / "index.html").read_text()
    assert "quiet_inputs" in page
    listed = installed("forgetless", "methods").stdout + installed("forgetless", "tasks").stdout
    assert "quiet_inputs" in listed
    assert "answers of a few words (share)" in listed


# ---- a module beside the recipe ------------------------------------------------------------------

MODULE = """
from dataclasses import dataclass
from typing import ClassVar
from forgetless import Factors, Method
from forgetless.tasks.perplexity import Perplexity

def halves(W, rank, scaling):
    return Factors(A=W[:rank] * 0.5, B=W.new_zeros(W.shape[0], rank))

HALVES = Method("halves", "A of the first rows of W, B = 0", "—", ("A", "B"), halves)

@dataclass(frozen=True)
class Surprise(Perplexity):
    kind = "surprise"
    name: str = "surprise"

@dataclass
class Size:
    weight: float
    files: ClassVar = ()
    def check(self, method): pass
    def prepare(self, model, processor, seed): pass
    def __call__(self, model, step):
        return sum((w ** 2).sum() for w in model.parameters() if w.requires_grad)

NUMBER = 3
"""


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working directory, by a name that no other test has imported."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ".")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield name
    sys.modules.pop(name, None)


def with_module(given: dict[str, Any], module: str) -> Recipe:
    path = given["data"]["train"]
    changes = {
        "adapter": {"method": f"{module}:HALVES", "rank": 2, "alpha": 4},
        "penalties": [{"kind": f"{module}:Size", "weight": 0.01}],
        "tasks": {"learning": [{"kind": f"{module}:Surprise", "path": path, "limit": 4}]},
    }
    return Recipe.parse({**given, **changes})


def test_a_recipe_names_methods_tasks_and_penalties_of_a_module(
    beside: str, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = with_module(tiny_recipe, beside)
    assert check(recipe) == []
    before = run_id(recipe)
    assert before.startswith("halves-")
    done = fl.run(recipe, tmp_path / "runs")
    assert (done.folder / "scores" / "final" / "surprise.json").is_file()
    assert f"{beside}:Size" in (done.folder / "adapter" / "README.md").read_text()
    with (tmp_path / f"{beside}.py").open("a") as file:
        file.write("# Another version.\n")
    assert run_id(recipe) != before


@pytest.mark.parametrize("kind", ["file", "package"])
def test_no_recipe_runs_code_of_the_working_directory_unasked(
    beside: str, kind: str, tiny_recipe: dict[str, Any], tmp_path: Path, python: str
) -> None:
    source = tmp_path / f"{beside}.py"
    if kind == "package":
        (tmp_path / beside).mkdir()
        source = source.rename(tmp_path / beside / "__init__.py")
    source.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + MODULE)
    recipe = tmp_path / "recipe.yaml"
    method = {"method": f"{beside}:HALVES", "rank": 2, "alpha": 4}
    recipe.write_text(yaml.safe_dump({**tiny_recipe, "adapter": method}))
    for asked in (False, True):
        paths = [str(Path(fl.__file__).parents[1]), *(["."] if asked else [])]
        done = subprocess.run(
            [python, "-m", "forgetless", "run", "recipe.yaml", "--check"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) == asked, done.stderr
        assert ("is not done unasked" in done.stdout + done.stderr) != asked
        assert (tmp_path / "ran").exists() == asked


@pytest.mark.parametrize(
    ("where", "name", "message"),
    [
        ("adapter.method", "{}:GONE", "has no attribute 'GONE'"),
        ("adapter.method", "{}:NUMBER", "it is a int"),
        ("adapter.method", "no_such_module:X", "No module named 'no_such_module'"),
        ("tasks.learning", "{}:HALVES", "it is no class over forgetless.tasks.Task"),
        ("tasks.learning", "{}:GONE", "has no attribute 'GONE'"),
        ("penalties", "{}:HALVES", "it is no dataclass"),
        ("penalties", "{}:Surprise", "it has no 'check'"),
    ],
)
def test_what_is_wrong_with_a_named_object_is_told_by_the_check(
    where: str, name: str, message: str, beside: str, tiny_recipe: dict[str, Any]
) -> None:
    named: Any = name.format(beside)
    if where != "adapter.method":
        named = [{"kind": named, "path": tiny_recipe["data"]["train"], "weight": 1.0}]
    problems = check(with_module(tiny_recipe, beside).override({where: named}))
    assert len(problems) == 1
    assert problems[0].startswith(where)
    assert message in problems[0]
    assert "write module:name" in problems[0]


# ---- objects in Python ---------------------------------------------------------------------------


@dataclass
class Pull:
    """Half of the squares of all trained weights, which is known."""

    weight: float
    files: ClassVar[Sequence[str]] = ()

    def check(self, method: str) -> None: ...

    def prepare(self, model: Any, processor: Any, seed: int) -> None: ...

    def __call__(self, model: Any, step: int) -> torch.Tensor:
        trained = [w for w in model.parameters() if w.requires_grad]
        return torch.stack([(w.square()).sum() for w in trained]).sum() / 2


def test_a_penalty_is_an_object_too(tiny_base: Path, tiny_files: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"learning_rate": 1e-2, "steps": 3, "batch_size": 4, "log_every": 1}
    moved = []
    penalties: Sequence[Penalty]
    for penalties in ([], [Pull(100.0)]):
        model = fl.attach(load_model(str(tiny_base)), "lora", rank=2)
        examples = load_examples(tiny_files / "train.jsonl")
        folder = tmp_path / str(len(penalties))
        processor = load_processor(str(tiny_base))
        train(model, processor, examples, TrainingSettings(**given), folder, penalties=penalties)
        named = model.named_parameters()
        moved.append(sum(w.detach().abs().sum().item() for n, w in named if "lora_A" in n))
    assert moved[1] < moved[0]
    own: Penalty = Pull(1.0)
    assert make_penalty(own) is own


# ---- the contract suite --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.factors is not None])
def test_every_method_of_ours_passes_the_contract_suite(name: str) -> None:
    check_method(METHODS[name])


def zeros(W: torch.Tensor, rank: int, scaling: float, *, size: float = 1.0) -> Factors:
    if not isinstance(size, float):
        raise ValueError(f"size must be a number, got {size!r}")
    return Factors(A=W[:rank] * size, B=W.new_zeros(W.shape[0], rank))


def broken(what: str) -> Callable[..., Factors]:
    """Factors with one thing wrong."""

    def factors(W: torch.Tensor, rank: int, scaling: float, *, size: float = 1.0) -> Factors:
        made = zeros(W, rank, scaling, size=size)
        if what == "shape":
            return replace(made, A=made.A.mT)
        if what == "finite":
            return replace(made, A=made.A / W.abs().sum())
        if what == "changed":
            W.mul_(2)
        if what == "random":
            return replace(made, A=torch.randn(rank, W.shape[1], dtype=W.dtype))
        return made

    return factors


def loose(W: torch.Tensor, rank: int, scaling: float, *, size: Any = 1.0) -> Factors:
    return zeros(W, rank, scaling)


def seeded(W: torch.Tensor, rank: int, scaling: float, *, generator: torch.Generator) -> Factors:
    return zeros(W, rank, scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": broken("shape")}, r"A and B of a \(6, 5\) weight at rank 1 must be"),
        ({"factors": broken("finite")}, "with a weight of zeros is not finite"),
        ({"factors": broken("random")}, "is another one each time, with the same seed"),
        ({"factors": loose}, "size='nonsense' is taken"),
        ({"factors": seeded}, "another seed gives the same start"),
        ({"factors": None}, "has no factors"),
        ({"name": "two words"}, "must be letters, digits"),
        ({"summary": "a\nb"}, "must be one line"),
        ({"trains": ()}, "must train A, B or both"),
    ],
)
def test_a_method_that_breaks_the_contract_is_told_how(
    changes: dict[str, Any], message: str
) -> None:
    good = Method("zeros", "rows of W and zeros", "—", ("A", "B"), zeros)
    check_method(good)
    with pytest.raises(AssertionError, match=message):
        check_method(replace(good, **changes))


def test_tasks_and_penalties_of_ours_pass_it(
    tiny_base: Path, tiny_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_model(str(tiny_base)), load_processor(str(tiny_base))
    old = str(tiny_files / "old.txt")
    for spec in ({"kind": "perplexity", "path": old}, {"kind": "kl", "path": old, "limit": 3}):
        assert check_task(spec, model, processor).n > 0
    adapted = fl.attach(load_model(str(tiny_base)), "lora", rank=2)
    check_penalty({"kind": "kl", "weight": 0.1, "source": old, "samples": 4}, adapted, processor)
    task = make_task({"kind": "perplexity", "path": old})
    value = iter([1.0, 2.0, 3.0])
    fixed = type(task).measure

    def measure(self: Any, *given: Any) -> Any:
        return replace(fixed(self, *given), value=next(value))

    monkeypatch.setattr(type(task), "measure", measure)
    with pytest.raises(AssertionError, match=r"the value is 1\.0, then 2\.0"):
        check_task(task, model, processor)


def test_an_unknown_name_is_still_told_with_what_there_is() -> None:
    with pytest.raises(UserError, match="unknown penalty 'l3'"):
        make_penalty({"kind": "l3", "weight": 1.0})
    with pytest.raises(ValueError, match="unknown method 'lorra'"):
        find("lorra")
