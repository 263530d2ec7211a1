"""The definition of sequences: orders, seeds, arms, and the runs that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forgetless.core.errors import RecipeError, UserError
from forgetless.recipes.sequence import SequenceRecipe
from tests.sequences import definition_of

pytest_plugins = ["tests.tiny_fixtures"]


@pytest.fixture
def definition(tiny_base: Path, tiny_files: Path) -> dict[str, Any]:
    """Three tasks of sums."""
    return definition_of(tiny_base, tiny_files)


def test_every_task_is_a_run_after_the_one_before_it(definition: dict[str, Any]) -> None:
    definition["tasks"][1]["training.steps"] = 1
    (chain,), recipes = SequenceRecipe.parse(definition).chains()
    assert chain.tasks == ("two", "three", "four")
    assert list(recipes) == list(chain.runs)
    assert [r.after for r in recipes.values()] == [None, *chain.runs[:2]]
    assert [Path(r.data.train).stem for r in recipes.values()] == ["two", "three", "four"]
    assert [r.training.steps for r in recipes.values()] == [2, 1, 2]
    assert [spec["name"] for spec in recipes[chain.runs[1]].tasks.learning] == ["sums-of-three"]
    forgetting = [spec["name"] for spec in recipes[chain.runs[1]].tasks.forgetting]
    assert forgetting == ["prose", "sums-of-two", "sums-of-four"]


def test_sequences_that_begin_alike_share_runs(definition: dict[str, Any]) -> None:
    definition |= {
        "orders": [["two", "three", "four"], ["two", "four"], ["two", "three"]],
        "seeds": [0, 7],
        "arms": [{"adapter.method": "lora"}, {"name": "slow", "training.learning_rate": 1e-4}],
    }
    chains, recipes = SequenceRecipe.parse(definition).chains()
    assert len(chains) == 2 * 3 * 2
    assert len(recipes) == 2 * 2 * 4
    first, second, third = (chain.runs for chain in chains[::2][:3])
    assert first[:2] == third
    assert first[0] == second[0]
    assert len({run for chain in chains for run in chain.runs}) == len(recipes)
    assert [(c.arm, c.order, c.seed) for c in chains[:3]] == [
        ("lora", "two > three > four", 0),
        ("lora", "two > three > four", 7),
        ("lora", "two > four", 0),
    ]


def test_a_seed_or_an_order_that_is_given_twice_counts_once(definition: dict[str, Any]) -> None:
    orders = {"there": ["two", "four"], "as well": ["two", "four"]}
    definition |= {"orders": orders, "seeds": [0, 0, 7]}
    chains, recipes = SequenceRecipe.parse(definition).chains()
    assert [(chain.order, chain.seed) for chain in chains] == [("there", 0), ("there", 7)]
    assert len(recipes) == 4


def test_arms_of_one_name_are_refused(definition: dict[str, Any]) -> None:
    definition["arms"] = [{"name": "a", "between": "stack"}, {"name": "a", "between": "merge"}]
    with pytest.raises(RecipeError) as refused:
        SequenceRecipe.parse(definition)
    assert refused.value.problems == ["two arms are named 'a'; give each a 'name' of its own"]


def test_an_earlier_task_decides_all_later_runs(definition: dict[str, Any]) -> None:
    (before,), _ = SequenceRecipe.parse(definition).chains()
    definition["tasks"][1]["training.learning_rate"] = 1e-4
    (after,), _ = SequenceRecipe.parse(definition).chains()
    assert [a == b for a, b in zip(before.runs, after.runs, strict=True)] == [True, False, False]


def test_orders_have_names_or_seeds(definition: dict[str, Any]) -> None:
    definition["orders"] = {"there": ["two", "three"], "back": ["three", "two"]}
    assert SequenceRecipe.parse(definition).all_orders() == {
        "there": ("two", "three"),
        "back": ("three", "two"),
    }
    definition["orders"] = [1993]
    # numpy.random.seed(1993); numpy.random.permutation(3), as iCaRL (Rebuffi et al. 2017) and most
    # work after it shuffle classes
    assert SequenceRecipe.parse(definition).all_orders() == {"seed 1993": ("two", "four", "three")}


def test_replay_is_a_buffer_of_every_earlier_task(definition: dict[str, Any]) -> None:
    definition |= {"replay": 0.25, "arms": [{"name": "some"}, {"name": "more", "replay": 0.5}]}
    _, recipes = SequenceRecipe.parse(definition).chains()
    # A first task replays nothing, so both arms begin with it.
    first, second, third, other, _ = (recipe.data for recipe in recipes.values())
    assert isinstance(first.train, str)
    assert [Path(path).stem for path, _ in third.sources] == ["four", "two", "three"]
    assert [weight for _, weight in third.sources] == [12, 3, 3]
    assert third.buffers == [None, 3, 3]
    assert second.buffers == [None, 3]
    assert other.buffers == [None, 6]


def test_penalties_on_earlier_data_and_apart_from_earlier_adapters(
    definition: dict[str, Any], tiny_files: Path
) -> None:
    ewc = [{"kind": "ewc", "weight": 1.0, "source": source} for source in ("x", "earlier")]
    ewc[0]["source"] = str(tiny_files / "old.txt")
    definition["arms"] = [
        {"penalties": ewc, "name": "ewc", "adapter.method": "lora"},
        {"between": "stack", "apart": 0.5, "name": "o", "adapter.method": "lora"},
    ]
    chains, recipes = SequenceRecipe.parse(definition).chains()
    penalties = [recipes[run].penalties for run in chains[0].runs]
    assert [[Path(p["source"]).stem for p in each] for each in penalties] == [
        ["old"],
        ["old", "two"],
        ["old", "two", "three"],
    ]
    sequences = [recipes[run].sequence for run in chains[1].runs]
    assert all(each is not None and each.apart == 0.5 for each in sequences)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"tasks": [{"name": "two", "data": "x"}]}, "task 1 needs measure"),
    ({"tasks": []}, "tasks: List should have at least 1 item"),
    ({"orders": [["two", "five"]]}, "order two > five has 'five', and the tasks are"),
    ({"orders": [["two", "two"]]}, "must name tasks, each once"),
    ({"between": "glue"}, "between: "),
    ({"seed": 3}, "seed: unknown key; did you mean 'seeds'?"),
    ({"arms": [{"adapter.metod": "lora"}]}, "adapter.metod: unknown key; did you mean 'method'?"),
    ({"arms": [{"between": "glue"}]}, "sequence.between: "),
    ({"apart": 0.5}, "sequence.apart: is for new adapters that train A"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda value: str(value)[:50])
def test_mistakes_are_named(
    definition: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as error:
        SequenceRecipe.parse(definition | changes).chains()
    assert message in str(error.value)


def test_two_tasks_of_one_name_and_what_is_no_sequence(
    definition: dict[str, Any], tmp_path: Path
) -> None:
    definition["tasks"][1]["name"] = "two"
    with pytest.raises(RecipeError, match="two tasks are named two"):
        SequenceRecipe.parse(definition)
    (tmp_path / "recipe.yaml").write_text("base: pocket")
    with pytest.raises(UserError, match="no 'recipe' and 'tasks', so it is no sequence"):
        SequenceRecipe.load(tmp_path / "recipe.yaml")
