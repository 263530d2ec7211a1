"""A recipe on a text classifier goes the same way as one on a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import forgetless as fl
from forgetless.core.files import read_jsonl
from forgetless.core.settings import with_overrides
from forgetless.data.modality import load_processor, modality_of
from forgetless.methods import METHODS
from forgetless.models.load import load_model
from forgetless.recipes.checking import check
from forgetless.recipes.recipe import Recipe
from forgetless.studies.run import run
from forgetless.training.penalties import make_penalty
from tests.classifiers import check_start, check_stopped
from tests.images import save_classifier as save_image_classifier
from tests.images import save_images
from tests.sentences import CLASSES, save_classifier, sentences, write_rows

pytest_plugins = ["tests.tiny_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:.*saw fewer tokens")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, and sentences for training, keeping and testing."""
    folder = tmp_path_factory.mktemp("world")
    for family in ("bert", "llama"):
        save_classifier(folder / family, family)
    write_rows(folder / "train.jsonl", sentences(CLASSES[:2], 8))
    write_rows(folder / "keep.jsonl", sentences(CLASSES[2:], 12))
    write_rows(folder / "test.jsonl", sentences(CLASSES, 4))
    return folder


def recipe_of(world: Path, family: str, method: str = "lora_null_v1", **changes: Any) -> Recipe:
    train, keep, test = (str(world / f"{name}.jsonl") for name in ("train", "keep", "test"))
    content = {
        "base": str(world / family),
        "adapter": {"method": method, "rank": 2, "alpha": 2},
        "calibration": {"source": keep, "samples": 12, "batch_size": 4},
        "data": {"train": train, "max_length": 64},
        "training": {"learning_rate": 1e-2, "steps": 6, "batch_size": 4, "log_every": 1},
        "tasks": {
            "learning": [{"kind": "sentence_accuracy", "name": "new", "path": train}],
            "forgetting": [{"kind": "sentence_accuracy", "name": "old", "path": test}],
        },
    }
    return Recipe.parse(with_overrides(content, changes))


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_every_start_is_the_base_bit_for_bit(method: str, family: str, world: Path) -> None:
    check_start(method, world / family, world / "keep.jsonl", world / "train.jsonl")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_run_on_sentences_has_all_its_stages(family: str, world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world, family)
    assert check(recipe) == []
    done = run(recipe, tmp_path)
    assert done.record["start"]["equals_base"]
    rows = {row["task"]: row for row in done.scores}
    assert all(row["step0_score"] == row["base_score"] for row in rows.values())
    log = read_jsonl(done.folder / "log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"]
    items = read_jsonl(done.folder / "items" / "final" / "old.jsonl")
    assert [item["expected"] for item in items[:3]] == list(CLASSES)
    assert items[3]["prompt"] == "a match goal 1"

    base = load_model(str(world / family))
    probe = modality_of(base).probe(base)
    ours = fl.load(load_model(str(world / family)), done.folder / "native")
    theirs = PeftModel.from_pretrained(base, done.folder / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(**probe).logits, ours(**probe).logits, atol=1e-5)
    again = fl.evaluate(ours, recipe.tasks.learning[0], load_processor(str(world / family)))
    assert again["new"].value == rows["new"]["score"]
    card = (done.folder / "adapter" / "README.md").read_text()
    assert "import AutoModelForSequenceClassification, AutoTokenizer" in card


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_stopped_run_comes_to_the_same_weights(method: str, world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world, "llama", method, **{"training.checkpoint_every": 2})
    check_stopped(recipe, tmp_path)


def test_replay_and_penalties_read_sentences(world: Path, tmp_path: Path) -> None:
    rows = sentences(CLASSES, 3)
    several = str(write_rows(tmp_path / "several.jsonl", rows))
    sources = [{"path": str(world / "train.jsonl"), "weight": 1.0}, {"path": several, "weight": 1}]
    kept = {"weight": 0.5, "source": str(world / "keep.jsonl"), "samples": 6, "batch_size": 3}
    penalties = [{"kind": "kl", **kept}, {"kind": "ewc", **kept}]
    recipe = recipe_of(world, "bert", "lora", **{"data.train": sources, "penalties": penalties})
    assert check(recipe) == []
    log = read_jsonl(run(recipe, tmp_path / "runs").folder / "log.jsonl")
    assert log[-1]["penalty"] > 0


def test_the_kl_of_sentences_is_its_formula(world: Path) -> None:
    base, keep = str(world / "bert"), str(world / "keep.jsonl")
    model, reader = load_model(base), load_processor(base)
    kl = make_penalty({"kind": "kl", "weight": 1.0, "source": keep, "samples": 4, "batch_size": 4})
    kl.prepare(model, reader, 0)
    (batch,) = modality_of(model).batches(keep, model, reader, samples=4, batch_size=4)
    before = model(**batch).logits.detach().log_softmax(-1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
        after = model(**batch).logits.log_softmax(-1)
        expected = (before.exp() * (before - after)).sum(-1).mean()
        assert float(kl(model, 0)) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_accumulated_batches_are_one_of_their_size(
    family: str, world: Path, tmp_path: Path
) -> None:
    """The loss of a classifier is a mean over its batch, whatever its forward is given."""
    recipe = recipe_of(
        world, family, "lora", **{"training.steps": 2, "training.max_grad_norm": 1e6}
    )
    if family == "bert":  # without dropout, which differs from batch to batch
        still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        recipe = recipe.override({"base": str(save_classifier(tmp_path / "bert", **still))})
    if family == "vit":
        save_image_classifier(tmp_path / "vit")
        images = save_images(tmp_path / "images", {"bars": 8, "dots": 8})
        changes = {"base": str(tmp_path / "vit"), "data.train": str(images)}
        recipe = recipe.override({**changes, "tasks": {}})
    halves = {"training.batch_size": 2, "training.gradient_accumulation": 2}
    logs = [
        read_jsonl(run(made, tmp_path / "runs").folder / "log.jsonl")
        for made in (recipe, recipe.override(halves))
    ]
    whole, parts = ([line["loss"] for line in log if "loss" in line] for log in logs)
    assert parts == pytest.approx(whole, rel=1e-3)
