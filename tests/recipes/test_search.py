"""The definition of a search: what may be chosen, how trials call it, and every mistake by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.errors import RecipeError, UserError
from forgetless.recipes.search import SearchRecipe

pytest_plugins = ["tests.tiny_fixtures"]

RATE = "training.learning_rate"
ARMS: list[dict[str, Any]] = [
    {"adapter.method": "lora", "space": {RATE: {"low": 1e-3, "high": 1e-1, "log": True}}},
    {"adapter.method": "pissa", "space": {RATE: {"low": 1e-4, "high": 1e-2, "log": True}}},
    {"name": "fixed", "adapter.method": "lora", RATE: 0.01},
]


class Drawn:
    """A trial that takes the last choice and the lowest number, and notes what it was asked."""

    def __init__(self, **given: Any) -> None:
        self.given = given
        self.asked: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        self.asked[name] = tuple(choices)
        return self.given.get(name, choices[-1])

    def suggest_int(self, name: str, low: int, high: int, **how: Any) -> int:
        self.asked[name] = low, high, how
        return low

    def suggest_float(self, name: str, low: float, high: float, **how: Any) -> float:
        self.asked[name] = low, high, how
        return low * 1.23456789


def search_of(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    space = {"adapter.rank": [1, 2]}
    return {"name": "s", "recipe": recipe, "arms": ARMS, "space": space, "trials": 5, **changes}


def test_a_trial_is_an_arm_with_its_own_and_the_common_settings(
    tiny_recipe: dict[str, Any],
) -> None:
    space = {
        "adapter.rank": {"low": 1, "high": 4},
        "training.weight_decay": {"low": 0.1, "high": 0.3, "step": 0.1},
        "adapter.target_modules": ["all-linear", ["q_proj", "v_proj"]],
    }
    search = SearchRecipe.parse(search_of(tiny_recipe, space=space))
    trial = Drawn(arm="pissa")
    arm, overrides = search.draw(trial)
    assert arm == "pissa"
    assert overrides == {
        "adapter.method": "pissa",
        RATE: 0.000123,
        "adapter.rank": 1,
        "training.weight_decay": 0.123,
        "adapter.target_modules": ["q_proj", "v_proj"],
    }
    assert trial.asked == {
        "arm": ("lora", "pissa", "fixed"),
        "adapter.rank": (1, 4, {"step": 1, "log": False}),
        "training.weight_decay": (0.1, 0.3, {"step": 0.1, "log": False}),
        "adapter.target_modules": ("all-linear", '["q_proj", "v_proj"]'),
        f"pissa: {RATE}": (1e-4, 1e-2, {"step": None, "log": True}),
    }
    named = search.recipe_of(arm, overrides)["name"]
    assert named.startswith("pissa rank=1 ")
    assert "method" not in named


def test_an_arms_own_space_takes_the_place_of_the_common_one(tiny_recipe: dict[str, Any]) -> None:
    search = SearchRecipe.parse(search_of(tiny_recipe, space={RATE: [0.5]}))
    dimensions = {name: arm.dimensions for name, arm in search.all_arms().items()}
    assert [d.name for d in dimensions["lora"]] == [f"lora: {RATE}"]
    assert [d.name for d in dimensions["fixed"]] == [RATE]


def test_first_settings_are_those_that_trials_will_have(tiny_recipe: dict[str, Any]) -> None:
    first = [{"arm": "lora", RATE: 0.01, "adapter.rank": 2}, {"arm": "fixed"}]
    search = SearchRecipe.parse(search_of(tiny_recipe, first=first))
    assert search.asked() == [
        {"arm": "lora", f"lora: {RATE}": 0.01, "adapter.rank": 2},
        {"arm": "fixed"},
    ]
    assert search.check() == {"learning": "sums", "forgetting": "prose"}


def test_without_arms_there_is_none_to_choose(tiny_recipe: dict[str, Any]) -> None:
    first = [{"adapter.rank": 2}]
    search = SearchRecipe.parse(search_of(tiny_recipe, arms=[], first=first))
    trial = Drawn()
    assert search.draw(trial) == ("s", {"adapter.rank": 2})
    assert list(trial.asked) == ["adapter.rank"]
    assert search.asked() == [{"adapter.rank": 2}]


def test_the_meaning_is_that_of_the_settings_alone(tiny_recipe: dict[str, Any]) -> None:
    one = SearchRecipe.parse(search_of(tiny_recipe))
    more = {"trials": 9, "replicate": [4], "sampler": "nsga2", "first": [{"arm": "fixed"}]}
    assert SearchRecipe.parse(search_of(tiny_recipe, **more)).meaning == one.meaning
    other = SearchRecipe.parse(search_of(tiny_recipe, space={"adapter.rank": [1]}))
    assert other.meaning != one.meaning
    assert json.loads(json.dumps(one.meaning)) == one.meaning


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"spaces": {}}, "spaces: unknown key; did you mean 'space'?"),
    ({"sampler": "random"}, "sampler: must be 'tpe' or 'nsga2'"),
    ({"trials": None}, "ends after so many 'trials' or 'hours'"),
    ({"trials": 1, "first": [{"arm": "lora"}, {"arm": "fixed"}]}, "2 first settings are more than"),
    ({"space": {"adapter.rank": 3}}, "space.adapter.rank: must be a list of choices or a range"),
    ({"space": {"adapter.rank": []}}, "space.adapter.rank: must be a list of choices or a range"),
    ({"space": {"adapter.rank": [1, 1]}}, "space.adapter.rank: a choice stands twice"),
    ({"space": {RATE: {"low": 1}}}, f"space.{RATE}.high: missing"),
    ({"space": {RATE: {"low": 1, "hihg": 2}}}, "hihg: unknown key; did you mean 'high'?"),
    ({"space": {RATE: {"low": 2, "high": 1}}}, f"space.{RATE}: low must be below high"),
    ({"space": {RATE: {"low": 0, "high": 1, "log": True}}}, "log needs a low above 0"),
    ({"space": {"adapter.rnak": [1, 2]}}, "adapter.rnak: unknown key; did you mean 'rank'?"),
    ({"space": {"adapter.rank": [1, 99]}}, "adapter.rank: rank must be in"),
    ({"space": {"seed": [1, 2]}}, "'replicate' takes further seeds"),
    ({"arms": [{"adapter.method": "lora", "space": 3}]}, "the space of arm lora must be a mapping"),
    ({"arms": [*ARMS, {"adapter.method": "lora"}]}, "two arms are named 'lora'"),
    ({"arms": [{"adapter.method": "pisa"}, *ARMS]}, "did you mean 'pissa'?"),
    ({"arms": [], "space": {}}, "there is nothing to choose"),
    ({"first": [{RATE: 0.1}]}, "first.0.arm: must be one of ['lora', 'pissa', 'fixed'], got None"),
    ({"first": [{"arm": "lora", RATE: 7.0}]}, f"first.0.{RATE}: must be in 0.001..0.1, got 7.0"),
    ({"first": [{"arm": "lora", "adapter.rank": 3}]}, "must be one of [1, 2], got 3"),
    ({"first": [{"arm": "fixed", RATE: 0.01}]}, f"unknown setting '{RATE}'"),
    ({"replicate": [0]}, "replicate: 0 is the seed of the trials"),
    ({"objectives": {"learning": "sum"}}, "unknown task 'sum'; did you mean 'sums'?"),
    ({"objectives": {"forgetting": "sums"}}, "objectives.forgetting: unknown task 'sums'"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda value: str(value)[:50])
def test_mistakes_are_named(
    tiny_recipe: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        SearchRecipe.parse(search_of(tiny_recipe, **changes)).check()
    assert any(message in problem for problem in caught.value.problems), caught.value.problems


def test_mistakes_of_all_kinds_are_told_together(tiny_recipe: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"space": {"seed": [3]}, "first": [{"arm": "none"}]}
    changes |= {"objectives": {"learning": "sum"}, "replicate": [0]}
    with pytest.raises(RecipeError) as caught:
        SearchRecipe.parse(search_of({**tiny_recipe, "seed": 0}, **changes)).check()
    assert len(caught.value.problems) == 3


def test_a_recipe_without_the_tasks_is_refused(tiny_recipe: dict[str, Any]) -> None:
    recipe = {**tiny_recipe, "tasks": {"learning": tiny_recipe["tasks"]["learning"]}}
    with pytest.raises(RecipeError, match=r"the recipe's tasks\.forgetting are empty"):
        SearchRecipe.parse(search_of(recipe)).check()


def test_another_definition_is_no_search(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(json.dumps({"recipe": tiny_recipe, "axes": {}}))
    with pytest.raises(UserError, match="it is no search"):
        SearchRecipe.load(tmp_path / "study.yaml")
