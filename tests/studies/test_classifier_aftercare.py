"""Repair, dial and spectra of classifiers: the backbone is healed, the head stays as it learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import forgetless as fl
from forgetless.cli.commands.aftercare import Asked, adjust, look_into
from forgetless.core.files import read_json
from forgetless.core.settings import with_overrides
from forgetless.data.modality import load_processor
from forgetless.data.settings import CalibrationSettings
from forgetless.models.load import load_model
from forgetless.recipes.recipe import Recipe
from forgetless.studies.folder import RunFolder, aftercare_rows
from forgetless.studies.run import run
from forgetless.tasks import make_task
from tests.images import save_classifier, save_images
from tests.sentences import save_classifier as save_text_classifier
from tests.sentences import sentences, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*saw fewer tokens")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_classifier(folder / "images/base")
    save_images(folder / "images/new", {"bars": 10, "dots": 10})
    save_images(folder / "images/test", {"bars": 6, "dots": 6}, seed=2)
    save_images(folder / "images/rings", {"rings": 10, "lines": 10})
    save_images(folder / "images/rings-test", {"rings": 6, "lines": 6}, seed=2)
    save_images(folder / "images/keep", {"wedge": 10, "dots": 10}, seed=1)
    save_text_classifier(folder / "sentences/base")
    write_rows(folder / "sentences/new.jsonl", sentences(("sport", "trade"), 10))
    write_rows(folder / "sentences/test.jsonl", sentences(("sport", "trade"), 14)[20:])
    write_rows(folder / "sentences/keep.jsonl", sentences(("world", "trade"), 10))
    return folder


def recipe_of(world: Path, kind: str, **changes: Any) -> Recipe:
    folder = world / kind
    end, accuracy = ("", "image") if kind == "images" else (".jsonl", "sentence")
    new, keep, test = (f"{folder / name}{end}" for name in ("new", "keep", "test"))
    content = {
        "base": str(folder / "base"),
        "adapter": {"method": "lora", "rank": 2, "alpha": 2},
        "calibration": {"source": keep, "samples": 12, "batch_size": 4},
        "data": {"train": new},
        "training": {"learning_rate": 1e-2, "steps": 6, "batch_size": 4},
        "repair": {"strength": [0.1, 1]},
        "dial": {"scales": [0.5, 0.0]},
        "spectra": True,
        "tasks": {
            "learning": [{"kind": f"{accuracy}_accuracy", "name": "new", "path": test}],
            "forgetting": [{"kind": "class_kl", "path": keep}],
        },
    }
    return Recipe.parse(with_overrides(content, changes))


def new_head(world: Path) -> dict[str, Any]:
    rings = str(world / "images/rings")
    new = {"kind": "image_accuracy", "name": "new", "path": f"{rings}-test"}
    return {"adapter.head": "new", "data.train": rings, "tasks.learning": [new]}


def scores_of(folder: RunFolder) -> dict[tuple[str, str], float]:
    return {(row["setting"], row["task"]): row["score"] for row in aftercare_rows(folder)}


@pytest.mark.parametrize("kind", ["images", "sentences", "new head", "full"])
def test_every_setting_is_scored_and_the_repaired_adapter_is_what_was_scored(
    kind: str, world: Path, tmp_path: Path
) -> None:
    changes = new_head(world) if kind == "new head" else {}
    if kind == "full":
        changes = {"adapter.method": "full"}
    recipe = recipe_of(world, "sentences" if kind == "sentences" else "images", **changes)
    folder = RunFolder(run(recipe, tmp_path).folder)
    found = scores_of(folder)
    settings = ["trained", "repair-0.1", "repair-1", "dial-0.5", "dial-0"]
    assert list(dict.fromkeys(setting for setting, _ in found)) == settings
    kl = [found[setting, "class_kl"] for setting in settings]
    assert len(set(kl[:4])) == 4
    assert (kl[-1] == 0) == (kind != "full")  # whose own head was trained, and stays at any scale
    written = read_json(folder.aftercare)
    taken = written["repaired"]
    held = written["points"]
    assert held["repair-1"]["loss"] != held["trained"]["loss"]
    assert (held["repair-1"]["drift"] < 1) == (kind != "full")

    base, processor = load_model(recipe.base), load_processor(recipe.base)
    repaired: Any = folder.repaired
    model = load_model(str(repaired)) if kind == "full" else fl.load(base, repaired)
    reference = load_model(recipe.base)
    for spec in (*recipe.tasks.learning, *recipe.tasks.forgetting):
        task = make_task(spec)
        alone = task.evaluate(model, processor, reference=reference).value
        assert alone == pytest.approx(found[taken, task.name], abs=1e-6)
    layers = read_json(folder.spectra)["layers"]
    assert layers


def test_the_verbs_take_what_a_run_made_and_keep_its_new_head(world: Path, tmp_path: Path) -> None:
    changes = {**new_head(world), "repair": None, "dial": None, "spectra": False}
    recipe = recipe_of(world, "images", **changes)
    folder = run(recipe, tmp_path / "runs").folder
    calibration = CalibrationSettings(source="the text to keep", samples=12, batch_size=4)
    texts = str(world / "images/keep"), recipe.data.train
    asked = Asked(str(folder), None, *texts, strengths=[0.1, 1.0], calibration=calibration)
    found = adjust(asked, tmp_path / "healed")
    assert found.chosen is not None
    turned = Asked(str(folder), None, *texts, scales=[0.5], calibration=calibration)
    assert adjust(turned, tmp_path / "half").folder is not None
    trained = fl.load(load_model(recipe.base), folder / "adapter")
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    for name in ("healed", "half"):
        other: Any = fl.load(load_model(recipe.base), tmp_path / name)
        head = [k for k in other.state_dict() if ".new." in k and "modules_to_save" in k]
        assert head
        assert all(torch.equal(other.state_dict()[k], trained.state_dict()[k]) for k in head)
        assert not torch.equal(other(**pixels).logits, trained(**pixels).logits)
    half = fl.load(load_model(recipe.base), tmp_path / "half")
    with fl.dial(trained, 0.5):
        assert torch.allclose(half(**pixels).logits, trained(**pixels).logits, atol=1e-5)
    assert len(look_into(str(folder), None, *texts, calibration=calibration))
