"""Sequences: runs after runs, the matrix, and what a kill or a failure leaves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from forgetless.core.continual import continual_metrics
from forgetless.core.files import read_json
from forgetless.models.load import load_model
from forgetless.recipes.recipe import Recipe
from forgetless.studies.folder import RunFolder
from forgetless.studies.sequence import FORMULAS, Sequence, sequence
from forgetless.studies.stages import Event
from forgetless.training.loop import train
from tests.sequences import definition_of

pytest_plugins = ["tests.tiny_fixtures"]


@pytest.fixture(scope="module")
def done(tiny_base: Path, tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence:
    """Two orders that begin alike, by an anchored start."""
    definition = definition_of(tiny_base, tiny_files)
    definition["orders"] = [["two", "three", "four"], ["two", "four"]]
    return sequence(definition, tmp_path_factory.mktemp("runs"))


def test_a_run_begins_where_the_one_before_it_ended(done: Sequence) -> None:
    first, second, _ = (RunFolder(done.folder / r) for r in done.matrices["sequences"][0]["runs"])
    ended, began = (
        load_file(f / "adapter_model.safetensors") for f in (first.native, second.start)
    )
    assert any("lora_anchor" in name for name in ended)
    assert ended.keys() == began.keys()
    assert all(torch.equal(began[name], weight) for name, weight in ended.items())
    for task in ("prose", "sums-of-two"):
        assert read_json(second.scores("step0", task)) | {"kind": ""} == read_json(
            first.scores("final", task)
        ) | {"kind": ""}


def test_the_matrix_has_the_scores_of_every_run(done: Sequence) -> None:
    assert not done.failed
    assert len(done.runs) == 4  # "two" is learned once
    found = done.matrices
    assert read_json(done.folder / "report" / "sequence.json") == found
    first, second = found["sequences"]
    assert first["runs"][0] == second["runs"][0]
    R = np.array(first["R"])
    assert R.shape == (4, 4)
    for i, run_id in enumerate(first["runs"], start=1):
        run = RunFolder(done.folder / run_id)
        for j, task in enumerate(["prose", "sums-of-two", "sums-of-three", "sums-of-four"]):
            assert R[i, j] == read_json(run.scores("final", task))["value"]
            assert R[0, j] == read_json(run.scores("base", task))["value"]
    # Less perplexity is better, and metrics are of what is better when larger.
    expected = continual_metrics(-R[1:, 1:], -R[0, 1:], variants=True)
    assert {name: first["metrics"][name] for name in expected} == expected
    assert first["metrics"]["knowledge lost"] == R[3, 0] - R[0, 0]
    assert set(first["metrics"]) == set(FORMULAS)
    kept = first["lost"][3]  # the last task had no time to be lost
    assert kept == {"lost": 0.0, "most_after": None}
    two = -R[1:, 1]
    assert first["lost"][1]["lost"] == two.max() - two[-1]


def test_means_are_over_seeds_and_orders(done: Sequence) -> None:
    (arm,) = done.matrices["arms"]
    values = [each["metrics"]["ACC"] for each in done.matrices["sequences"]]
    assert arm["metrics"]["ACC"]["n"] == 2
    assert math.isclose(arm["metrics"]["ACC"]["mean"], sum(values) / 2)
    assert arm["metrics"]["ACC"]["low"] < min(values)
    assert list(arm["orders"]) == ["two > three > four", "two > four"]


def test_full_fine_tuning_goes_on_too_and_a_second_call_trains_nothing(
    tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    definition = definition_of(tiny_base, tiny_files, **{"adapter.method": "full"})
    definition["orders"] = [["two", "three"]]
    done = sequence(definition, tmp_path)
    assert not done.failed
    first, second = (run.folder for run in done.runs)
    model, before = (load_model(str(folder / "model")) for folder in (second, first))
    base = load_model(str(tiny_base))

    def distance(one: Any, other: Any) -> float:
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))

    assert 0 < distance(model, before) < distance(model, base)
    stages: list[Event] = []
    assert sequence(definition, tmp_path, listen=stages.append).matrices == done.matrices
    assert {event.stage for event in stages} == {"done"}


def test_what_comes_after_a_failed_run_fails_with_it(
    tiny_base: Path, tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_three(*args: Any, **kwargs: Any) -> Any:
        if "three" in Recipe.load(args[4] / "recipe.yaml").data.train:
            raise RuntimeError("no luck")
        return train(*args, **kwargs)

    monkeypatch.setattr("forgetless.studies.stages.train", fail_at_three)
    definition = definition_of(tiny_base, tiny_files, **{"adapter.method": "lora"})
    done = sequence(definition, tmp_path)
    assert [run.status for run in done.runs] == ["done", "failed", "failed"]
    assert "no luck" in done.failed[0].record["reason"]
    assert "is not trained; run it first" in done.failed[1].record["reason"]
    (found,) = done.matrices["sequences"]
    assert found["metrics"]["ACC"] is None
    assert found["R"][1][0] is not None
    monkeypatch.undo()
    assert not sequence(definition, tmp_path).failed
