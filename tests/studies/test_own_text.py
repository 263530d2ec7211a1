"""What the base writes itself is measured where nobody has text to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import forgetless as fl
from forgetless.cli import main
from forgetless.core.errors import UserError
from forgetless.core.files import read_json, read_jsonl
from forgetless.models.load import load_model
from forgetless.recipes.checking import check
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.studies.folder import RunFolder
from forgetless.studies.run import run
from forgetless.tasks import make_task

pytest_plugins = ["tests.tiny_fixtures"]

OWN = {"kind": "kl", "name": "drift", "path": "self", "limit": 6, "max_length": 12}


def recipe(given: dict[str, Any], **changes: Any) -> Recipe:
    return Recipe.parse(given, {"tasks.learning": [], "tasks.forgetting": [OWN], **changes})


def test_two_seeds_of_a_study_are_measured_on_the_same_text(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    items = []
    for seed in (0, 1):
        asked = recipe(tiny_recipe, seed=seed)
        assert check(asked) == []
        done = run(asked, tmp_path)
        assert read_json(done.folder / "scores" / "base" / "drift.json")["value"] == 0
        items.append(read_jsonl(done.folder / "items" / "final" / "drift.jsonl"))
    first, second = ([item["prompt"] for item in of_run] for of_run in items)
    assert first == second
    assert [item["score"] for item in items[0]] != [item["score"] for item in items[1]]
    (file,) = (done.folder.parent / "shared" / "own").glob("*/*.jsonl")
    assert len(read_jsonl(file)) == len(first)


def test_probes_read_it_too_and_a_budget_on_it_decides_the_run(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"probes.forgetting": ["self"], "probes.max_kl": 10.0}
    asked = recipe(tiny_recipe, **changes)
    assert check(asked) == []
    assert run_id(asked) != run_id(recipe(tiny_recipe))
    lines = read_jsonl(run(asked, tmp_path).folder / "log.jsonl")
    drift = [line["probe"] for line in lines if "probe" in line]
    assert drift[0]["forgetting/kl"] == 0 < drift[-1]["forgetting/kl"]


def test_only_the_distance_to_the_base_reads_it(tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="kl alone reads"):
        make_task({"kind": "perplexity", "path": "self"})
    problems = check(recipe(tiny_recipe, **{"tasks.learning": [{**OWN, "kind": "perplexity"}]}))
    assert any("kl alone reads" in problem for problem in problems)


def test_an_adapter_of_anybody_is_measured_without_any_text(tiny_base: Path) -> None:
    model = fl.attach(load_model(str(tiny_base)), "lora", rank=2, alpha=2)
    result = fl.evaluate(model, OWN)["drift"]
    assert (result.value, result.n) == (0, 6)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    assert fl.evaluate(model, OWN)["drift"].value > 0


def test_eval_asks_it_by_name(tiny_base: Path, tmp_path: Path) -> None:
    model = fl.attach(load_model(str(tiny_base)), "lora", rank=2, alpha=2)
    fl.save(model, tmp_path / "adapter")
    out = tmp_path / "scores.json"
    words = ["eval", str(tiny_base), "--adapter", str(tmp_path / "adapter"), "--tasks", "kl:self"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--limit", "4", "--cache", str(tmp_path / "cache"), "--out", str(out)])
    assert ended.value.code == 0
    assert next(iter(read_json(out).values()))["kl"]["value"] == 0


def test_a_repaired_run_says_which_adapter_to_ship(
    tiny_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repair = {"strength": [0.3, 1.0], "max_drop": 0.5, "keep": "self"}
    asked = recipe(tiny_recipe, **{"adapter.method": "lora", "repair": repair})
    file = tmp_path / "asked.yaml"
    file.write_text(asked.to_yaml())
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file), "--out", str(tmp_path / "runs")])
    assert ended.value.code == 0
    (folder,) = map(RunFolder, (tmp_path / "runs").glob("*/lora-*"))
    said = capsys.readouterr().out
    assert folder.taken in ("repair-0.3", "repair-1")
    assert folder.shipped == folder.repaired
    assert "this one to ship" in said
    assert f'"{folder.repaired}")' in said
    card = (folder.repaired / "README.md").read_text()
    assert "by texts that the base wrote" in card
    repaired = read_json(folder.point(folder.taken).scores("final", "drift"))["value"]
    assert f"| kl | 0 | {repaired:.4g} |" in card
