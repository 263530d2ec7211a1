"""A share of the training data is held out, measured, and never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.files import read_json
from forgetless.data.examples import load_examples
from forgetless.recipes.checking import check
from forgetless.recipes.identity import run_id
from forgetless.recipes.measuring import probed, tasked
from forgetless.recipes.plan.advice import Wishes
from forgetless.recipes.plan.plan import plan
from forgetless.recipes.recipe import Recipe
from forgetless.studies.folder import RunFolder
from forgetless.studies.run import run
from forgetless.studies.stages import Stages

pytest_plugins = ["tests.tiny_fixtures"]


def recipe(given: dict[str, Any], **changes: Any) -> Recipe:
    return Recipe.parse(given, {"data.validation": 0.25, "tasks.forgetting": [], **changes})


def test_a_run_measures_what_it_held_out(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    asked = recipe(tiny_recipe)
    assert check(asked) == []
    path = tiny_recipe["data"]["train"]
    held = load_examples(f"{path}#held=0.25")
    done = run(asked, tmp_path)
    score = read_json(done.folder / "scores" / "final" / "validation.json")
    assert (score["metric"], score["n"], score["kind"]) == ("loss", len(held), "learning")
    rows = Stages(RunFolder(tmp_path / "x"), asked, lambda event: None).rows
    assert len(rows) == len(load_examples(path)) - len(held)


def test_a_repair_is_chosen_by_what_was_held_out(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    repair = {"strength": [0.1, 1.0], "keep": tiny_recipe["calibration"]["source"]}
    done = run(recipe(tiny_recipe, repair=repair, **{"tasks.learning": []}), tmp_path)
    told = read_json(done.folder / "aftercare.json")
    final = read_json(done.folder / "scores" / "final" / "validation.json")
    assert told["points"]["trained"]["loss"] == pytest.approx(final["value"], rel=1e-6)
    for label in ("repair-0.1", "repair-1"):
        here = read_json(done.folder / "points" / label / "scores" / "final" / "validation.json")
        assert told["points"][label]["loss"] == pytest.approx(here["value"], rel=1e-6)


def test_a_repair_reads_its_rows_by_their_names(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    rows = [
        {"q": r["prompt"], "a": r["completion"]}
        for r in load_examples(tiny_recipe["data"]["train"])
    ]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "data.train": str(tmp_path / "new.jsonl"),
        "data.columns": {"prompt": "q", "completion": "a"},
        "repair": {"strength": [0.1], "keep": tiny_recipe["calibration"]["source"]},
        "tasks.learning": [],
    }
    done = run(recipe(tiny_recipe, **changes), tmp_path / "runs")
    assert read_json(done.folder / "scores" / "final" / "validation.json")["n"] > 0
    assert "aftercare" in done.record["seconds"]


def test_it_is_what_a_task_and_a_probe_read_that_name_it(tiny_recipe: dict[str, Any]) -> None:
    held = f"{tiny_recipe['data']['train']}#held=0.25"
    tasks = [{"kind": "perplexity", "name": "new", "path": "validation", "limit": 2}]
    asked = recipe(tiny_recipe, **{"tasks.learning": tasks})
    assert tasked(asked).learning == [{**tasks[0], "path": held}]
    probes = recipe(tiny_recipe, **{"tasks": {}, "probes.learning": ["validation"]})
    assert probed(probes).learning == [held]
    assert tasked(probes).learning == []
    assert check(asked) == check(probes) == []
    none = recipe(tiny_recipe, **{"data.validation": None, "tasks.learning": tasks})
    assert "no such file: validation" in check(none)[0]


def test_the_id_is_of_the_rows_that_are_trained_on(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    whole, part = recipe(tiny_recipe, **{"data.validation": None}), recipe(tiny_recipe)
    assert run_id(whole) != run_id(part)
    renamed = tmp_path / "same.json"
    rows = [{"q": r["prompt"], "a": r["completion"]} for r in load_examples(part.data.train)]
    renamed.write_text(json.dumps(rows))
    columns = {"prompt": "q", "completion": "a"}
    same = recipe(tiny_recipe, **{"data.train": str(renamed), "data.columns": columns})
    assert run_id(same) == run_id(part)
    other = recipe(tiny_recipe, **{"data.validation": 0.5})
    assert run_id(other) != run_id(part)


def test_a_sequence_has_data_of_its_own(tiny_recipe: dict[str, Any]) -> None:
    for changes in ({}, {"data.validation": None, "data.columns": {"prompt": "prompt"}}):
        problems = check(recipe(tiny_recipe, **changes, sequence={"between": "continue"}))
        assert any("each task of a sequence has data of its own" in line for line in problems)


@pytest.mark.parametrize("keep", [False, True])
def test_a_plan_holds_out_a_share(
    tiny_recipe: dict[str, Any], tiny_files: Path, keep: bool
) -> None:
    kept = str(tiny_files / "old.txt") if keep else None
    made = plan(tiny_recipe["base"], tiny_recipe["data"]["train"], Wishes(test="0.25", keep=kept))
    assert made.recipe.data.validation == 0.25
    assert made.examples == len(load_examples(f"{tiny_recipe['data']['train']}#rest=0.25"))
    assert [task["name"] for task in tasked(made.recipe).learning] == ["validation"]
    assert not any("Nothing measures what is learned" in note for note in made.notes)
