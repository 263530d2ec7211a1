"""Every recipe that is shipped is parsed, and the demonstration is the one that is written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from forgetless.adapters.settings import RepairSettings
from forgetless.cli import demo
from forgetless.core.files import load_yaml
from forgetless.methods import METHODS
from forgetless.recipes.recipe import Recipe
from forgetless.recipes.search import SearchRecipe
from forgetless.recipes.sequence import SequenceRecipe
from forgetless.recipes.study import StudyRecipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {"pocket-demo", "pocket-pilot", "own-model"} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_recipe_can_be_read(file: Path) -> None:
    content = load_yaml(file)
    if "recipe" not in content:
        Recipe.load(file)
        return
    if {"tasks", "split"} & content.keys():
        sequences = SequenceRecipe.load(file)
        assert sequences.name == file.stem
        for arm, changes in sequences.arm_changes():
            for order in sequences.all_orders().values():
                run = sequences.run_changes(order, changes, seed=0)
                assert Recipe.parse(sequences.recipe, run).adapter.method in METHODS, arm
        return
    if "space" in content:
        search = SearchRecipe.load(file)
        assert search.name == file.stem
        assert {arm.fixed["adapter.method"] for arm in search.all_arms().values()} <= set(METHODS)
        assert len(search.asked()) == len(search.first)
        return
    definition = StudyRecipe.load(file)
    assert definition.name == file.stem
    for arm, overrides in definition.combinations():
        assert Recipe.parse(definition.recipe, overrides).adapter.method in METHODS, arm


def test_the_template_shows_the_defaults() -> None:
    """What `own-model.yaml` does not mark with (*) is what a recipe without it would have."""
    marked = {
        *(
            "name",
            "base",
            "adapter.method",
            "data.train",
            "training.learning_rate",
            "training.epochs",
        ),
        *("training.batch_size", "training.gradient_accumulation"),
        *("tasks.learning", "tasks.forgetting"),
        *(f"repair.{key}" for key in RepairSettings.model_fields),
    }
    shown = Recipe.load(RECIPES / "own-model.yaml").model_dump()
    least = {"base": "x", "data": {"train": "x"}, "training": {"epochs": 1}}
    default = Recipe.parse(least).model_dump()
    for section, values in shown.items():
        settings = values if isinstance(values, dict) else {"": values}
        for key, value in settings.items():
            name = f"{section}.{key}".rstrip(".")
            if name not in marked:
                expected = default[section][key] if key else default[section]
                assert value == expected, name


def test_the_template_shows_every_setting() -> None:
    text = load_yaml(RECIPES / "own-model.yaml")
    for section, values in Recipe.load(RECIPES / "own-model.yaml").model_dump().items():
        if section not in ("tasks", "adapter") and isinstance(values, dict):
            assert set(values) - set(text[section]) <= {"steps", "tokens"}, section


DEMOS = {
    "pocket": (demo.definition, demo.RATES),
    "pocket-images": (demo.images_definition, demo.IMAGE_RATES),
}


@pytest.mark.parametrize("world", DEMOS)
def test_the_demo_is_the_recipe(world: str) -> None:
    definition, _ = DEMOS[world]
    assert StudyRecipe.load(RECIPES / f"{world}-demo.yaml") == StudyRecipe.parse(definition())


@pytest.mark.parametrize("world", DEMOS)
def test_the_demo_takes_its_rates_from_the_sweep(world: str) -> None:
    """Every method of a demonstration was swept, at the rate that it is run with."""
    swept = {
        (overrides["adapter.method"], overrides["training.learning_rate"])
        for _, overrides in StudyRecipe.load(RECIPES / f"{world}-pilot.yaml").combinations()
    }
    _, rates = DEMOS[world]
    assert set(rates.items()) <= swept
