"""rsLoRA, DoRA, LoRA+ and ranks of single layers in a recipe and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forgetless.adapters.folders import load
from forgetless.adapters.layer import adapted_layers
from forgetless.cli import main
from forgetless.methods import METHODS
from forgetless.models.load import load_model
from forgetless.recipes.checking import check
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.studies.run import run

pytest_plugins = ["tests.tiny_fixtures"]

SWITCHES: dict[str, Any] = {
    "adapter.use_rslora": True,
    "adapter.use_dora": True,
    "adapter.rank_pattern": {"q_proj": 4},
    "adapter.alpha_pattern": {"q_proj": 8.0},
    "training.loraplus_ratio": 4.0,
    "training.betas": [0.8, 0.95],
    "training.eps": 1e-6,
}


def test_switches_that_are_off_leave_the_run_its_name(tiny_recipe: dict[str, Any]) -> None:
    plain = run_id(Recipe.parse(tiny_recipe))
    off = {"adapter.use_rslora": False, "adapter.rank_pattern": {}, "training.loraplus_ratio": 1.0}
    assert run_id(Recipe.parse(tiny_recipe, off)) == plain
    switches = SWITCHES | {"training.compile": True, "adapter.target_modules": "mlp"}
    changed = {run_id(Recipe.parse(tiny_recipe, {key: value})) for key, value in switches.items()}
    assert len(changed | {plain}) == len(switches) + 1


def test_a_run_uses_every_switch(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    changes = {"tasks.learning": [], "tasks.forgetting": [], "adapter.target_modules": "attention"}
    recipe = Recipe.parse(tiny_recipe, SWITCHES | changes)
    assert check(recipe) == []
    done = run(recipe, tmp_path, "study")
    model = load(load_model(recipe.base), done.folder / "native")
    for name, module in adapted_layers(model).items():
        rank, alpha = (4, 8) if name.endswith("q_proj") else (2, 4)
        assert module.r["default"] == rank
        assert module.scaling["default"] == alpha / rank**0.5
        assert module.lora_magnitude_vector["default"].weight.shape == (module.out_features,)
    exported = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())
    assert sorted(exported["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (exported["r"], exported["use_dora"], exported["use_rslora"]) == (8, True, False)
    record = json.loads((done.folder / "run.json").read_text())
    assert record["start"]["equals_base"] is True


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"adapter.rank_pattern": {"qproj": 2}},
            "adapter.rank_pattern 'qproj' matches no target layer",
        ),
        ({"adapter.rank_pattern": {"k_proj": 17}}, "adapter.rank: rank must be in 1..16"),
        (
            {"adapter.method": "mica", "training.loraplus_ratio": 4.0},
            "training.loraplus_ratio: 'mica' trains A alone",
        ),
        (
            {"adapter.method": "full", "training.loraplus_ratio": 4.0},
            "training.loraplus_ratio: 'full' trains W alone",
        ),
    ],
)
def test_a_switch_that_makes_no_sense_is_named_before_anything_is_loaded(
    tiny_recipe: dict[str, Any], changes: dict[str, Any], problem: str
) -> None:
    (found,) = check(Recipe.parse(tiny_recipe, changes))
    assert found.startswith(problem)


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_init_has_a_flag_for_each(tiny_base: Path, tmp_path: Path) -> None:
    flags = ["--rslora", "--dora", "--rank-pattern", "layers.0.*=3", "--alpha-pattern", "q_proj=6"]
    start = ["init", tiny_base, "--method", "pissa", "--rank", 4, "--out", tmp_path / "start"]
    assert command(*start, *flags, "--target-modules", "attention") == 0
    config = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
    assert config["use_rslora"] is config["use_dora"] is True
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"layers.0.*": 3}, {"q_proj": 6})
    model = load(load_model(str(tiny_base)), tmp_path / "start")
    assert {m.r["default"] for m in adapted_layers(model).values()} == {3, 4}
    assert all(".self_attn." in name for name in adapted_layers(model))


def test_init_refuses_a_layer_without_a_number(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["init", tiny_base, "--method", "pissa", "--out", tmp_path / "start"]
    assert command(*start, "--rank-pattern", "q_proj=high") == 2
    assert "rank_pattern.q_proj" in capsys.readouterr().err


def test_methods_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("methods", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == list(METHODS)
