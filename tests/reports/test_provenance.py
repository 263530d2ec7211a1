"""The commands that a report quotes make the very runs of which it tells."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from forgetless.core.files import folder_name, write_json, write_text
from forgetless.core.settings import parse_assignments
from forgetless.recipes.recipe import Recipe
from forgetless.reports import evidence, report
from forgetless.reports.evidence import read
from forgetless.reports.provenance import commands
from forgetless.studies.folder import RunFolder, results, run_folders

PLAIN = {
    "name": "mine",
    "base": "pocket",
    "data": {"train": "pocket:problems"},
    "adapter": {"method": "lora"},
    "training": {"learning_rate": 0.001, "steps": 300},
    "tasks": {"learning": ["pocket_problems"], "forgetting": ["pocket_recall"]},
}
CHANGES: list[dict[str, Any]] = [
    {},
    {"seed": 3, "training.learning_rate": 1e-05},
    {"name": "lora, r=4", "adapter.rank": 4, "adapter.target_modules": ["q_proj", "v_proj"]},
    {"name": "null", "adapter.method": "pissa", "adapter.options": {"niter": 4}},
    {"adapter.method": "full", "training.steps": None, "training.epochs": 0.5},
    {"data.train": 'it\'s "here".jsonl', "probes": {"forgetting": ["pocket:knowledge"]}},
    {"penalties": [{"kind": "l2", "weight": 0.1}], "data.pack": False},
]


def single_runs(folder: Path, changes: list[dict[str, Any]]) -> list[Recipe]:
    """Runs in one folder, as `forgetless run --study` leaves them."""
    recipes = [Recipe.parse(PLAIN, change) for change in changes]
    for number, recipe in enumerate(recipes):
        run = RunFolder(folder / f"run-{number}")
        write_text(run.recipe, recipe.to_yaml())
        write_json(run.record, {"status": "done"})
    return recipes


def done_again(command: str, recipe: Path) -> tuple[Recipe, str]:
    """What a quoted command would train, and the study's folder that it would use."""
    words = shlex.split(command)
    assert words[:3] == ["forgetless", "run", "recipe.yaml"]
    options = list(zip(words[3::2], words[4::2], strict=True))
    sets = [value for option, value in options if option == "--set"]
    made = Recipe.load(recipe, parse_assignments(sets))
    return made, dict(options).get("--study", folder_name(made.name or ""))


def quoted(page: str) -> list[str]:
    """The commands under "Do it again"."""
    part = page[page.index("Do it again") : page.index("from the end of this page")]
    lines = re.findall(r"<code>(.*?)\n</code>", part)
    return [html.unescape(re.sub(r"<[^>]+>", "", line)) for line in lines]


def folded(page: str, name: str) -> str:
    """What lies under a label at the end of the page."""
    found = re.search(rf"<summary>{re.escape(name)}</summary><pre>(.*?)</pre>", page, re.DOTALL)
    assert found is not None
    return html.unescape(found[1])


def test_the_commands_for_single_runs_make_all_of_them(tmp_path: Path) -> None:
    recipes = single_runs(tmp_path / "mine", CHANGES)
    page = report(tmp_path / "mine").read_text()
    first = tmp_path / "recipe.yaml"
    first.write_text(folded(page, "recipe.yaml"))
    again = [done_again(command, first) for command in quoted(page)]
    assert again == [(recipe, "mine") for recipe in recipes]
    assert f"<summary>{len(CHANGES) - 4} more</summary>" in page


def test_one_run_is_one_short_command(tmp_path: Path) -> None:
    single_runs(tmp_path / "mine", CHANGES[:1])
    assert commands(read(tmp_path / "mine")) == ["forgetless run recipe.yaml"]


def test_a_study_is_one_command_and_what_is_not_of_it_has_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    single_runs(folder, CHANGES[:3])
    in_study, also, other = (run.path.name for run in run_folders(folder))
    write_plan(folder, {"name": "mine"}, [in_study, also, other])
    assert quoted(report(folder).read_text()) == ["forgetless study study.yaml"]
    write_plan(folder, {"name": "mine"}, [in_study, also])
    page = report(folder).read_text()
    assert quoted(page) == [
        "forgetless study study.yaml",
        "forgetless run recipe.yaml --study mine",
    ]
    assert Recipe.parse(yaml.safe_load(folded(page, "recipe.yaml"))).name == "lora, r=4"
    assert folded(page, "study.yaml") == "name: mine\n"


def write_plan(folder: Path, study: Mapping[str, Any], runs: list[str]) -> None:
    """The files by which a folder is a study's."""
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    (folder / "runs.json").write_text(json.dumps({"runs": [{"run_id": name} for name in runs]}))


def test_a_row_and_a_run_are_looked_at_as_often_in_a_large_study_as_in_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: Counter[str] = Counter()

    class Row(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            looks[key] += 1
            return super().__getitem__(key)

    def is_same(one: RunFolder, other: object) -> bool:
        looks["folders"] += 1
        return isinstance(other, RunFolder) and one.path == other.path

    monkeypatch.setattr(evidence, "results", lambda folder: [Row(row) for row in results(folder)])
    monkeypatch.setattr(RunFolder, "__eq__", is_same)
    per_run = []
    for number in (3, 12):
        folder = tmp_path / f"{number}"
        single_runs(folder, [{"seed": seed} for seed in range(number)])
        tasks = {"pocket_problems": "learning", "pocket_recall": "forgetting"}
        for run in run_folders(folder):
            write_json(run.record, {"status": "done", "tasks": tasks})
        runs = [{"run_id": f"run-{seed}"} for seed in range(number)]
        write_json(folder / "runs.json", {"runs": runs})
        write_text(folder / "study.yaml", "name: mine\n")
        looks.clear()
        assert commands(read(folder)) == ["forgetless study study.yaml"]
        per_run.append({what: looks[what] / number for what in ("run_id", "folders")})
    assert per_run[0] == per_run[1]
