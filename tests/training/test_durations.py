"""One training measured at several durations: points of the learning-forgetting curve."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.errors import UserError
from forgetless.data.examples import load_examples
from forgetless.data.packing import IGNORED
from forgetless.data.tokens import tokenize
from forgetless.models.load import load_tokenizer
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.studies.folder import CURVE_COLUMNS, curve
from forgetless.studies.run import Run, run
from forgetless.studies.stages import Event
from forgetless.studies.study import study
from tests.studies.test_run import Stop, scores_of, worked

pytest_plugins = ["tests.tiny_fixtures"]

FLAT = {"training.schedule": "constant", "training.warmup_ratio": 0.0}


def measured(content: dict[str, Any], **changes: Any) -> Recipe:
    return Recipe.parse(content, {**FLAT, "training.measure_at": [0.5], **changes})


def curve_of(done: Run) -> dict[tuple[int, str], float]:
    rows = curve(done.folder.parent)
    return {(row["step"], row["task"]): row["score"] for row in rows}


@pytest.mark.parametrize("method", ["lora_null_v1", "full"])
def test_a_point_is_a_shorter_training_at_a_flat_rate(
    method: str, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = measured(tiny_recipe, **{"adapter.method": method})
    long = run(recipe, tmp_path, "long")
    short = run(recipe.override({"training.steps": 2, "training.measure_at": []}), tmp_path)
    points = curve_of(long)
    assert {step for step, _ in points} == {0, 2, 4}
    for task, score in scores_of(short).items():
        assert points[2, task] == score
    for row in long.scores:
        assert points[4, row["task"]] == row["score"]
        assert points[0, row["task"]] == row["base_score"]


def test_a_row_says_where_it_stands(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    done = run(measured(tiny_recipe), tmp_path, "one")
    rows = [row for row in curve(tmp_path / "one") if row["task"] == "sums"]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(row.keys() == set(CURVE_COLUMNS) for row in rows)
    tokens = [row["tokens"] for row in rows]
    assert tokens == [0, tokens[1], done.record["training"]["tokens"]]
    assert 0 < tokens[1] < tokens[2]
    assert {row["kind"] for row in rows} == {"learning"}


def test_a_stopped_run_has_the_points_of_an_undisturbed_one(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = measured(tiny_recipe, **{"training.checkpoint_every": 1})

    def stop(event: Event) -> None:
        if event.step == 3:
            raise Stop

    with pytest.raises(Stop):
        run(recipe, tmp_path, "stopped", listen=stop)
    again = run(recipe, tmp_path, "stopped")
    assert again.record["training"]["resumed_from"] is not None
    assert curve_of(again) == curve_of(run(recipe, tmp_path, "undisturbed"))


def test_a_new_task_is_measured_at_every_point(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = measured(tiny_recipe)
    run(recipe, tmp_path, "one")
    kept, *_ = recipe.tasks.forgetting
    events: list[Event] = []
    changed = recipe.override({"tasks.forgetting": [{**kept, "name": "again"}]})
    done = run(changed, tmp_path, "one", listen=events.append)
    assert worked(events) == ["base scores", "step 0", "evaluate"]
    assert all(curve_of(done)[step, "again"] is not None for step in (0, 2, 4))


def test_points_decide_which_run_it_is_and_none_leaves_its_id(tiny_recipe: dict[str, Any]) -> None:
    plain = Recipe.parse(tiny_recipe)
    assert run_id(plain) == run_id(plain.override({"training.measure_at": []}))
    assert run_id(plain) != run_id(plain.override({"training.measure_at": [0.5]}))


def test_a_study_writes_its_curve(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = measured(tiny_recipe).model_dump()
    definition = {"name": "s", "recipe": recipe, "arms": [{"adapter.method": "lora"}]}
    folder = study(definition, tmp_path).folder
    with (folder / "report" / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["task"] == "sums"] == ["0", "2", "4"]


# ---- prompts with answers as raw text ------------------------------------------------------------


def test_prompts_with_answers_can_be_learned_as_raw_text(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    path = tiny_recipe["data"]["train"]
    tokens = tokenize(load_examples(path, kind="text"), load_tokenizer(tiny_recipe["base"]))
    for row in tokens:  # all but the first token of each document
        assert row["labels"].count(IGNORED) == len(row["lengths"])
    recipe = Recipe.parse(tiny_recipe, {"data.format": "text"})
    assert run(recipe, tmp_path, "text").status == "done"
    assert run_id(recipe) != run_id(Recipe.parse(tiny_recipe))


def test_raw_text_cannot_be_learned_as_conversations() -> None:
    with pytest.raises(UserError, match="'messages' given, but pocket:knowledge is 'text'"):
        load_examples("pocket:knowledge", kind="messages")


def test_the_facts_of_the_pocket_world_can_be_replayed(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    sources = [
        {"path": tiny_recipe["data"]["train"], "weight": 0.5},
        {"path": "pocket:knowledge", "weight": 0.5},
    ]
    done = run(Recipe.parse(tiny_recipe, {"data.train": sources, "data.limit": 50}), tmp_path)
    assert done.status == "done"
