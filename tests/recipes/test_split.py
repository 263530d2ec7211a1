"""Tasks made of the classes of one data set: their orders, names, and the runs that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgetless.core.errors import RecipeError
from forgetless.recipes.sequence import SequenceRecipe
from forgetless.recipes.split import Split, name_of, shuffled
from tests.images import CLASSES, save_classifier, save_images

LETTERS = [f"letter {letter}" for letter in "AEFHKLTXYZ"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that knows three classes, and images of ten letters."""
    folder = tmp_path_factory.mktemp("world")
    save_classifier(folder / "base")
    save_images(folder / "known", dict.fromkeys(CLASSES, 2))
    save_images(folder / "train", dict.fromkeys(LETTERS, 2), seed=1)
    save_images(folder / "test", dict.fromkeys(LETTERS, 2), seed=2)
    return folder


def definition_of(world: Path, **split: Any) -> dict[str, Any]:
    """Letters, five tasks of two."""
    measure = {"kind": "image_accuracy", "path": str(world / "test")}
    known = {**measure, "name": "known", "path": str(world / "known")}
    return {
        "name": "letters",
        "recipe": {
            "base": str(world / "base"),
            "adapter": {"method": "lora", "rank": 2, "alpha": 2, "head": "new"},
            "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-2},
            "tasks": {"forgetting": [known]},
        },
        "split": {"data": str(world / "train"), "measure": measure, "tasks": 5, **split},
    }


@pytest.mark.parametrize("seed", [0, 1, 1993])
def test_a_seed_s_order_is_that_of_the_reference_implementations(seed: int) -> None:
    numbers = np.arange(100)
    state = np.random.RandomState(seed)
    state.shuffle(numbers)  # as iCaRL does
    assert shuffled([str(i) for i in range(100)], seed) == tuple(map(str, numbers))


def test_the_order_of_1993_begins_as_everybody_s() -> None:
    first = shuffled([str(i) for i in range(100)], 1993)[:10]
    assert first == ("68", "56", "78", "8", "23", "84", "90", "65", "74", "76")


def test_the_classes_of_a_data_set_become_tasks_named_by_them(world: Path) -> None:
    definition = definition_of(world) | {"orders": [1993]}
    (chain,), recipes = SequenceRecipe.parse(definition).chains()
    order = [LETTERS[i] for i in np.random.RandomState(1993).permutation(10)]
    pairs = [sorted(order[i : i + 2]) for i in range(0, 10, 2)]
    assert chain.order == "seed 1993"
    assert list(chain.tasks) == [", ".join(pair) for pair in pairs]
    second = list(recipes.values())[1]
    assert second.data.train == f"{world / 'train'}#{','.join(pairs[1])}"
    (asked,) = second.tasks.learning
    assert asked["path"] == f"{world / 'test'}#{','.join(pairs[1])}"
    assert asked["name"] == "-".join(pairs[1]).replace(" ", "-")
    assert len(second.tasks.forgetting) == 5
    assert {tuple(recipe.adapter.head) for recipe in recipes.values()} == {tuple(LETTERS)}
    assert second.sequence is not None
    assert second.sequence.classes == pairs[1]


def test_orders_with_the_same_classes_in_a_task_share_its_runs(world: Path) -> None:
    a, b, c, d = LETTERS[:2], LETTERS[2:4], LETTERS[4:6], LETTERS[6:8]
    rest = LETTERS[8:]
    definition = definition_of(world) | {
        "orders": {
            "one": [*a, *b, *c, *d, *rest],
            "two": [*a[::-1], *b[::-1], *d, *c, *rest],
            "mixed": [a[0], b[0], a[1], b[1], *c, *d, *rest],
        },
        "arms": [{"name": "lora"}, {"name": "separate", "between": "separate"}],
    }
    chains, recipes = SequenceRecipe.parse(definition).chains()
    one, two, mixed, separate, *_ = chains
    assert one.tasks[:2] == two.tasks[:2]
    assert one.runs[:2] == two.runs[:2]
    assert not {*one.runs[2:]} & {*two.runs}
    assert not {*mixed.runs} & {*one.runs}
    assert separate.runs[0] == one.runs[0]
    # Every order has all of its tasks measured, and no task of another order alone.
    for chain in (one, two, mixed):
        for run in chain.runs:
            specs = [*recipes[run].tasks.learning, *recipes[run].tasks.forgetting]
            asked = {spec["name"] for spec in specs} - {"known"}
            own = {task.replace(", ", "-").replace(" ", "-") for task in chain.tasks}
            assert own <= asked
            if chain is mixed and run in mixed.runs[:2]:
                assert asked == own


def test_tasks_may_have_other_numbers_of_classes_and_several_measures(world: Path) -> None:
    measures = [
        {"kind": "image_accuracy", "path": str(world / "test"), "limit": 8},
        {"kind": "neighbours", "path": str(world / "test")},
    ]
    split = definition_of(world, tasks=[7, 3], measure=measures)["split"]
    found = Split.model_validate(split).orders([])
    assert list(map(len, found["order 1"])) == [7, 3]
    definition = SequenceRecipe.parse(definition_of(world, tasks=[7, 3], measure=measures))
    first, second = definition.all_tasks
    assert first["name"].startswith("letter A, letter E and 5 more (")
    assert second["name"] == ", ".join(LETTERS[7:])
    names = [[spec["name"] for spec in task["measure"]] for task in (first, second)]
    assert all(name == f"{file}-neighbours" for file, name in names[1:])
    assert definition.classes[first["name"]] == LETTERS[:7]


def test_names_of_many_classes_are_short_and_of_their_own() -> None:
    names = {name_of((*(f"class {n}" for n in range(20)), last)) for last in ("x", "y")}
    assert len(names) == 2
    assert max(map(len, names)) < 60


def test_numbers_are_counted_by_their_size_and_classes_may_be_named(tmp_path: Path) -> None:
    save_images(tmp_path / "images", {str(n): 2 for n in (2, 10, 1, 9)})
    measure = {"kind": "image_accuracy", "path": str(tmp_path / "images")}
    split = {"data": str(tmp_path / "images"), "measure": measure, "tasks": 2}
    assert Split.model_validate(split).names == ("1", "2", "9", "10")
    some = Split.model_validate({**split, "tasks": 1, "classes": [10, 9]})
    assert some.orders([[9, 10]]) == {"order 1": (("10", "9"),)}


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"tasks": 3}, {}, "10 classes do not make 3 tasks of as many each; say how many each has, "
     "such as tasks: [4, 3, 3]"),
    ({"tasks": 20}, {}, "10 classes do not make 20 tasks of as many each; take fewer tasks"),
    ({"tasks": [5, 4]}, {}, "tasks [5, 4] have 9 classes, not 10"),
    ({"tasks": 10}, {}, "has the class 'letter A' alone; nothing tells it from others"),
    ({"classes": ["letter A", "letter B"], "tasks": 1}, {}, "has no class 'letter B'"),
    ({"classes": ["letter A", "letter A"], "tasks": 1}, {}, "'letter A' is named twice"),
    ({"classes": ["a,b", "c"], "tasks": 1}, {}, "the class 'a,b' has a comma"),
    ({"data": "no-such-folder"}, {}, "split: no such file: no-such-folder"),
    ({"data": "pocket:problems"}, {}, "pocket:problems has no classes to make tasks of"),
    ({"measure": {"kind": "image_accuracy"}}, {}, "needs its kind and the path"),
    ({}, {"orders": [[*LETTERS[:9], "letter B"]]}, "order 1 has 'letter B', and the classes are"),
    ({}, {"orders": {"mine": LETTERS[:8]}}, "mine must have each of the classes"),
    ({}, {"tasks": [{"name": "a", "data": "x", "measure": "kl"}]}, "give either tasks, or a split"),
    ({"seed": 1993}, {}, "split.seed: unknown key"),
]  # fmt: skip


@pytest.mark.parametrize(("split", "changes", "message"), MISTAKES, ids=lambda v: str(v)[:40])
def test_what_cannot_be_split_is_named(
    world: Path, split: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as error:
        SequenceRecipe.parse(definition_of(world, **split) | changes).chains()
    assert message in str(error.value)
