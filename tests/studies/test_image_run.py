"""A recipe on an image classifier goes the same way as one on a language model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import forgetless as fl
from forgetless.core.errors import UserError
from forgetless.core.files import read_jsonl
from forgetless.core.settings import with_overrides
from forgetless.data.modality import load_processor, modality_of
from forgetless.methods import METHODS
from forgetless.models.load import load_model
from forgetless.models.pocket import image_base_path
from forgetless.recipes.checking import check
from forgetless.recipes.identity import run_id
from forgetless.recipes.plan.advice import Base
from forgetless.recipes.recipe import Recipe
from forgetless.studies.run import run
from forgetless.tasks import make_task
from forgetless.training.penalties import make_penalty
from tests.classifiers import check_start, check_stopped
from tests.images import save_classifier, save_images

pytest_plugins = ["tests.tiny_fixtures"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and the images of its three classes for training, keeping and testing."""
    folder = tmp_path_factory.mktemp("world")
    save_classifier(folder / "base")
    save_images(folder / "train", {"bars": 8, "dots": 8})
    save_images(folder / "keep", {"wedge": 12}, seed=1)
    save_images(folder / "new", {"bars": 8, "dots": 8}, seed=3)
    save_images(folder / "test", {"bars": 6, "dots": 6, "wedge": 6}, seed=2)
    return folder


def recipe_of(world: Path, method: str = "lora_null_v1", **changes: Any) -> Recipe:
    content = {
        "base": str(world / "base"),
        "adapter": {"method": method, "rank": 2, "alpha": 2},
        "calibration": {"source": str(world / "keep"), "samples": 12, "batch_size": 4},
        "data": {"train": str(world / "train")},
        "training": {"learning_rate": 1e-2, "steps": 6, "batch_size": 4, "log_every": 1},
        "tasks": {
            "learning": [{"kind": "image_accuracy", "name": "new", "path": str(world / "new")}],
            "forgetting": [{"kind": "image_accuracy", "name": "old", "path": str(world / "test")}],
        },
    }
    return Recipe.parse(with_overrides(content, changes))


@pytest.mark.filterwarnings("ignore:.*saw fewer tokens")
@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_every_start_is_the_base_bit_for_bit(method: str, world: Path) -> None:
    check_start(method, world / "base", world / "keep", world / "train")


@pytest.mark.filterwarnings("ignore:.*saw fewer tokens")
def test_a_run_on_images_has_all_its_stages(world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world)
    assert check(recipe) == []
    done = run(recipe, tmp_path)
    assert done.record["start"] == {"equals_base": True, "probe_tokens": 4}
    rows = {row["task"]: row for row in done.scores}
    assert all(row["step0_score"] == row["base_score"] for row in rows.values())
    assert rows["new"]["score"] > rows["new"]["base_score"]
    assert done.record["training"]["tokens"] == 6 * 4
    items = read_jsonl(done.folder / "items" / "final" / "old.jsonl")
    assert [item["expected"] for item in items[:3]] == ["bars", "dots", "wedge"]

    base = load_model(str(world / "base"))
    probe = modality_of(base).probe(base)
    ours = fl.load(load_model(str(world / "base")), done.folder / "native")
    theirs = PeftModel.from_pretrained(base, done.folder / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(**probe).logits, ours(**probe).logits, atol=1e-5)
    card = (done.folder / "adapter" / "README.md").read_text()
    assert "import AutoModelForImageClassification, AutoImageProcessor" in card
    assert "accuracy" in Path(fl.report(done.folder.parent)).read_text()


@pytest.mark.filterwarnings("ignore:.*saw fewer tokens")
@pytest.mark.parametrize(
    "changes",
    [
        {"adapter.method": "lora_ga"},
        {"adapter.method": "full"},
        {
            "adapter.method": "lora",
            "calibration.source": "data",
            "training.gradient_accumulation": 2,
        },
    ],
    ids=lambda changes: str(changes["adapter.method"]),
)
def test_a_stopped_run_comes_to_the_same_weights(
    changes: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(world, **{**changes, "training.checkpoint_every": 2})
    check_stopped(recipe, tmp_path)


def test_replay_and_penalties_read_images(world: Path, tmp_path: Path) -> None:
    sources = [{"path": str(world / name), "weight": 1.0} for name in ("train", "keep")]
    kept = {"weight": 0.5, "source": str(world / "keep"), "samples": 6, "batch_size": 3}
    penalties = [{"kind": "kl", **kept}, {"kind": "ewc", **kept}, {"kind": "l2_start", "weight": 1}]
    for method in ("lora", "full"):
        changes = {"data.train": sources, "penalties": penalties}
        recipe = recipe_of(world, method, **changes)
        assert check(recipe) == []
        log = read_jsonl(run(recipe, tmp_path).folder / "log.jsonl")
        assert all(line["penalty"] >= 0 for line in log if "penalty" in line)
        assert log[-1]["penalty"] > 0


def test_the_penalties_are_their_formulas(world: Path) -> None:
    model = load_model(str(world / "base"))
    reader, modality = load_processor(str(world / "base")), modality_of(model)
    settings = {"weight": 1.0, "source": str(world / "keep"), "samples": 4, "batch_size": 4}
    kl, ewc = make_penalty({"kind": "kl", **settings}), make_penalty({"kind": "ewc", **settings})
    for penalty in (kl, ewc):
        penalty.prepare(model, reader, 0)
        assert penalty(model, 0).item() == pytest.approx(0, abs=1e-6)
    (batch,) = modality.batches(str(world / "keep"), model, reader, samples=4, batch_size=4)
    before = model(**batch).logits.detach().log_softmax(-1)
    squares: dict[str, Any] = {}
    for row in range(4):
        model.zero_grad()
        model(**{name: value[row : row + 1] for name, value in batch.items()}).loss.backward()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                squares[name] = squares.get(name, 0) + weight.grad.square() / 4
    model.zero_grad()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
        after = model(**batch).logits.log_softmax(-1)
        expected = (before.exp() * (before - after)).sum(-1).mean()
        assert float(kl(model, 0)) == pytest.approx(float(expected), rel=1e-3)
        fisher = sum(float(square.sum()) for square in squares.values()) * 0.01**2 / 2
        assert float(ewc(model, 0)) == pytest.approx(fisher, rel=1e-2)


def test_probes_of_images_may_end_a_training(world: Path, tmp_path: Path) -> None:
    old = {"kind": "image_accuracy", "name": "old", "path": str(world / "keep")}
    probes = {"forgetting": [old], "every": 2}
    done = run(recipe_of(world, "lora", probes=probes), tmp_path)
    log = read_jsonl(done.folder / "log.jsonl")
    assert [line["step"] for line in log if "probe" in line] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.train": "pocket:problems"}, "data.train: .*kind 'prompt_completion'"),
        ({"data.train": "pocket:letters"}, "data.train: .*no class 'letter A'"),
        ({"data.train": "nowhere"}, "data.train: no such file"),
        ({"data.format": "text"}, "data.format: 'text' given"),
        ({"calibration.source": "auto"}, "calibration.source: .*says nothing by itself"),
        ({"calibration.source": "pocket:knowledge"}, "calibration.source: .*kind 'text'"),
        ({"tasks.forgetting": ["pocket_recall"]}, "tasks.forgetting.0: .*not for an image class"),
        ({"probes.forgetting": ["pocket:held"]}, "probes: task 'kl' is not for an image"),
    ],
)
def test_what_does_not_go_with_images_is_told_before(
    changes: dict[str, Any], words: str, world: Path
) -> None:
    problems = check(recipe_of(world, **changes))
    assert len(problems) == 1
    assert re.search(words, problems[0])


def test_images_do_not_go_with_a_language_model(world: Path, tiny_base: Path) -> None:
    problems = check(recipe_of(world, base=str(tiny_base)))
    assert [problem.split(":")[0] for problem in problems] == [
        "data.train",
        "calibration.source",
        "tasks.learning.0",
        "tasks.forgetting.0",
    ]
    with pytest.raises(UserError, match="plans are for causal language models"):
        Base.find(str(world / "base"))


def test_the_images_decide_the_run(world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world, "lora")
    again = save_images(tmp_path / "again", {"bars": 8, "dots": 8})
    other = save_images(tmp_path / "other", {"bars": 8, "dots": 8}, seed=5)
    assert run_id(recipe.override({"data.train": str(again)})) == run_id(recipe)
    assert run_id(recipe.override({"data.train": str(other)})) != run_id(recipe)
    named = recipe.override({"base": "pocket-vision", "data.train": "pocket:shapes"})
    assert run_id(named) == run_id(named.override({"base": str(image_base_path())}))
    assert make_task(named.tasks.learning[0]).modality == "images"
