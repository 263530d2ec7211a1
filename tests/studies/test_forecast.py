"""The forecast before a training: what two texts share, by hand, on a base and by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from forgetless.adapters.settings import AdapterSettings
from forgetless.cli import main
from forgetless.core.errors import UserError
from forgetless.data.settings import CalibrationSettings, DataSettings
from forgetless.models.load import load_model, load_tokenizer
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.moments import LayerStatistics, Statistics
from forgetless.studies.forecast import forecast, shared_energies
from forgetless.studies.inputs import Collecting
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures"]


def diagonal(**layers: list[float]) -> Statistics:
    moments = {name: torch.diag(torch.tensor(v).double()) for name, v in layers.items()}
    return Statistics({name: LayerStatistics(C, 100) for name, C in moments.items()})


def test_shares_by_hand() -> None:
    keep = diagonal(a=[6.0, 3.0, 1.0, 0.0], b=[0.0, 0.0, 0.0, 1.0])
    task = diagonal(a=[1.0, 2.0, 4.0, 1.0], b=[1.0, 1.0, 1.0, 0.0])
    found = shared_energies(keep, task)
    # The first two directions hold 90 % of a's energy to keep, and 3 / 8 of the task's.
    assert found == {("a",): pytest.approx(3 / 8), ("b",): pytest.approx(0)}


def test_layers_that_read_the_same_input_are_one_entry_and_unknown_ones_none() -> None:
    C = torch.eye(3).double()
    keep = Statistics({n: LayerStatistics(C, 9) for n in ("q", "k")} | dict(diagonal(o=[1.0, 0.0])))
    task = Statistics({n: LayerStatistics(2 * C, 9) for n in ("q", "k")})
    assert shared_energies(keep, task) == {("q", "k"): pytest.approx(1)}


def test_the_same_text_shares_nine_tenths_or_more(tiny_base: Path, tiny_files: Path) -> None:
    def shares(source: str) -> list[float]:
        recipe = recipe_of(tiny_base, tiny_files, **{"calibration.source": source})
        return list(forecast(Recipe.parse(recipe)).values())

    same, other = shares("data"), shares(str(tiny_files / "old.txt"))
    assert len(same) == len(other) == 2 * 4  # q, k and v read one input, gate and up another
    assert all(0.9 <= share < 1 for share in same)
    assert sum(other) < sum(same)


def test_on_the_pocket_base_facts_share_more_with_facts_than_problems_do() -> None:
    base, words = load_model("pocket"), load_tokenizer("pocket")
    how = CalibrationSettings(source="pocket:knowledge", samples=64, max_length=64)
    layers = AdapterSettings(target_modules=["down_proj"])

    def moments(need: str, data: str) -> Any:
        collecting = Collecting(layers, how, DataSettings(train=data, max_length=64))
        return collecting.collect(need, base, words)

    keep = moments("second_moment", "pocket:problems")

    def mean(data: str) -> float:
        found = shared_energies(keep, moments("task_moment", data))
        return sum(found.values()) / len(found)

    assert mean("pocket:problems") < mean("pocket:knowledge") - 0.1


def test_the_command_prints_it_by_block_where_it_is_asked_for(
    tiny_base: Path, tiny_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(tiny_base), "--data", str(tiny_files / "train.jsonl")]
    arguments += ["--keep", str(tiny_files / "old.txt")]

    def said(*more: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *more])
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert "Forecast" not in said()
    text = said("--forecast")
    assert "q_proj, k_proj, v_proj" in text
    assert text.index("mean") < text.index("Forecast: share")
    by_layer = json.loads(said("--forecast", "--json"))["shared_energy"]
    assert len(by_layer) == 14
    assert all(0 < share <= 1 for share in by_layer.values())
    assert "shared_energy" not in json.loads(said("--json"))


def test_what_it_needs_is_said(
    tiny_base: Path, tiny_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", str(tiny_base), "--data", str(tiny_files / "train.jsonl"), "--forecast"])
    assert "--keep" in capsys.readouterr().err
    for file in tiny_base.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    recipe = Recipe.parse(recipe_of(tmp_path, tiny_files))
    with pytest.raises(UserError, match="holds no weights yet"):
        forecast(recipe)
