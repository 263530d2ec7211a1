"""Sequences: runs after runs, the matrix, and what a kill or a failure leaves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from forgetless.adapters.folders import load
from forgetless.adapters.layer import adapted_layers
from forgetless.adapters.plain import plain_lora
from forgetless.core.continual import continual_metrics
from forgetless.core.errors import RecipeError
from forgetless.core.files import read_json, read_jsonl, write_json, write_jsonl
from forgetless.models.load import load_model, load_tokenizer
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.moments import Statistics
from forgetless.studies.folder import RunFolder
from forgetless.studies.inputs import Collecting
from forgetless.studies.sequence import FORMULAS, Sequence, matrices, sequence
from forgetless.studies.stages import Event, Stages
from forgetless.tasks import make_task
from forgetless.training.loop import train
from tests.killing import killed_until_done
from tests.sequences import definition_of, scored

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
    for i, name in enumerate(first["runs"], start=1):
        run = RunFolder(done.folder / name)
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


def test_losses_and_scores_are_joined_along_a_sequence(done: Sequence) -> None:
    for each in done.matrices["sequences"]:
        course, runs = each["course"], [RunFolder(done.folder / run) for run in each["runs"]]
        assert course["ends"] == [2 * n for n in range(1, len(runs) + 1)]
        assert course["scores"] == [[2 * i, row] for i, row in enumerate(each["R"])]
        logged = [
            [2 * n + line["step"], line["loss"]]
            for n, run in enumerate(runs)
            for line in read_jsonl(run.log)
        ]
        assert course["loss"] == logged
        assert course["probes"] == {}


def test_probes_points_and_penalties_are_part_of_the_course(tmp_path: Path) -> None:
    scored(tmp_path, {"lora": [[1.0, 0.0, 0.1], [0.9, 0.8, 0.1], [0.5, 0.4, 0.9]]}, seeds=1)
    second = RunFolder(tmp_path / "lora-0-b")
    lines: list[dict[str, Any]] = [
        {"step": n, "loss": 1.0 + 0.5 / n, "penalty": 0.5 / n} for n in range(1, 200)
    ]
    write_jsonl(second.log, [*lines, {"step": 4, "probe": {"forgetting/facts": 0.7}}])
    second.update(training={"steps": 199})
    write_json(second.point(4).scores("final", "a"), {"value": 0.6})
    (found,) = matrices(tmp_path)["sequences"]
    course = found["course"]
    assert course["ends"] == [10, 209]
    assert course["probes"] == {"forgetting/facts": [[14, 0.7]]}
    assert course["scores"][2] == [14, [None, 0.6, None]]
    own = [point for point in course["loss"] if point[0] > 10]
    assert len(own) == 50
    assert own[-1][0] == 209
    assert {round(loss, 12) for _, loss in own} == {1.0}
    second.record.unlink()  # what is not trained is left out
    (found,) = matrices(tmp_path)["sequences"]
    assert found["course"]["ends"] == [10]


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


STACKED: dict[str, dict[str, Any]] = {
    "stack": {"between": "stack"},
    "merge": {"between": "merge", "adapter.method": "pissa"},
    "null": {"between": "stack", "adapter.method": "lora_null_v1"},
    "repair": {"adapter.method": "lora", "repair.strength": 0.1},
    "repaired-stack": {"between": "stack", "repair.strength": 0.1, "repair.task": None},
}
"""Arm -> what it changes; all but the others are anchored (PiSSA)."""


@pytest.fixture(scope="module")
def arms(tiny_base: Path, tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence:
    """Two tasks in every way to come from one to the other."""
    definition = definition_of(tiny_base, tiny_files)
    definition["orders"] = [["two", "three"]]
    definition["arms"] = [{"name": name, **changes} for name, changes in STACKED.items()]
    return sequence(definition, tmp_path_factory.mktemp("arms"))


def runs_of(arms: Sequence, arm: str) -> list[RunFolder]:
    (found,) = (each for each in arms.matrices["sequences"] if each["arm"] == arm)
    return [RunFolder(arms.folder / run) for run in found["runs"]]


@pytest.mark.parametrize("arm", STACKED)
def test_one_plain_adapter_on_the_untouched_base_gives_the_last_row(
    arms: Sequence, arm: str
) -> None:
    assert not arms.failed
    *_, last = runs_of(arms, arm)
    recipe = Recipe.load(last.recipe)
    model = PeftModel.from_pretrained(load_model(recipe.base), str(last.adapter))
    (found,) = (each for each in arms.matrices["sequences"] if each["arm"] == arm)
    for spec, score in zip(
        [*recipe.tasks.forgetting[:2], *recipe.tasks.learning],
        [found["R"][-1][0], found["R"][-1][1], found["R"][-1][2]],
        strict=True,
    ):
        task = make_task(spec)
        assert task.evaluate(model, load_tokenizer(recipe.base)).value == pytest.approx(score)


@pytest.mark.parametrize("arm", ["stack", "merge", "null", "repaired-stack"])
def test_earlier_adapters_stay_as_they_were_under_a_new_one(arms: Sequence, arm: str) -> None:
    first, second = runs_of(arms, arm)
    base = load_model(str(Recipe.load(first.recipe).base))
    before = plain_lora(load(base, first.native, adapter_name="before"), "before")
    after = load_file(second.native / "adapter_model.safetensors")
    for key, matrix in before.state.items():
        part = after[key][: len(matrix)] if "lora_A" in key else after[key][:, : matrix.shape[1]]
        assert torch.equal(part, matrix)
        assert part.shape != after[key].shape


def test_starts_of_one_seed_differ_from_task_to_task(arms: Sequence) -> None:
    first, second = runs_of(arms, "stack")
    assert Recipe.load(first.recipe).seed == Recipe.load(second.recipe).seed
    seeds = [read_json(run.start / "forgetless.json").get("seed") for run in (first, second)]
    assert seeds[0] != seeds[1]


def test_the_base_of_a_merge_is_the_sum(arms: Sequence) -> None:
    first, second = runs_of(arms, "merge")
    base = str(Recipe.load(first.recipe).base)
    summed = load(load_model(base), first.native).merge_and_unload()
    decomposed = load(load_model(base), second.start)
    for name, layer in adapted_layers(decomposed).items():
        A0, B0 = (layer.lora_anchor["default"].get_buffer(f"anchor_{f}") for f in "AB")
        W = summed.get_submodule(name).weight
        # PiSSA takes the largest singular value of what it starts from.
        largest = torch.linalg.matrix_norm(W, 2)
        assert torch.allclose(torch.linalg.matrix_norm(B0 @ A0 * 2.0, 2), largest, rtol=1e-4)


def text_and_inputs(first: RunFolder) -> tuple[Statistics, Statistics]:
    """What the first run of a sequence kept, and the inputs of its task."""
    stages = Stages(first, Recipe.load(first.recipe), lambda event: None)
    return Statistics.load(stages._inputs["second_moment"]), Statistics.load(first.inputs)


def test_what_is_to_be_kept_is_the_text_and_the_inputs_of_earlier_tasks(arms: Sequence) -> None:
    first, second = runs_of(arms, "null")
    recipe = Recipe.load(second.recipe)
    stages = Stages(second, recipe, lambda event: None)
    kept = Statistics.load(stages._inputs["second_moment"])
    text, inputs = text_and_inputs(first)
    both = Statistics.load(second.inputs)
    n, m = text.metadata["tokens"], inputs.metadata["tokens"]
    share = m / (n + m)
    for name in kept:
        expected = text[name].second_moment * (1 - share) + inputs[name].second_moment * share
        assert torch.allclose(kept[name].second_moment, expected)
    assert both.metadata["tokens"] > m
    # They are what the trained model reads on the data of the first task.
    recipe = Recipe.load(first.recipe)
    model = load(load_model(recipe.base), first.native)
    found = Collecting.of(recipe).collect(
        "task_moment", model, load_tokenizer(recipe.base), adapters_on=True
    )
    assert isinstance(found, Statistics)
    for name in inputs:
        assert torch.allclose(inputs[name].second_moment, found[name].second_moment)


@pytest.mark.parametrize(("weight", "most", "share"), [(2.0, 0.9, None), (1e6, 0.25, 0.25)])
def test_earlier_tasks_have_a_weight_and_a_bound(
    arms: Sequence, weight: float, most: float, share: float | None
) -> None:
    first, second = runs_of(arms, "null")
    changes = {"sequence.earlier": {"weight": weight, "most": most}}
    recipe = Recipe.load(second.recipe).override(changes)
    assert run_id(recipe) != second.path.name
    _, found = Stages(second, recipe, lambda event: None)._kept()
    if share is None:
        text, inputs = text_and_inputs(first)
        count = weight * inputs.metadata["tokens"]
        share = count / (count + text.metadata["tokens"])
    assert found == pytest.approx(share)


def test_a_repair_is_what_the_next_task_starts_from(arms: Sequence) -> None:
    first, second = runs_of(arms, "repair")
    assert not first.unrepaired.exists()
    told = read_json(first.record)["repair"]
    assert (told["strength"], told["earlier_share"]) == (0.1, 0.0)
    assert 0 < told["kept"] < 1
    assert read_json(second.record)["repair"]["earlier_share"] > 0
    repaired, start = (
        load_file(folder / "adapter_model.safetensors") for folder in (first.native, second.start)
    )
    assert all(torch.equal(start[key], matrix) for key, matrix in repaired.items())
    assert not first.aftercare.exists()


def _do(definition: dict[str, Any], out: Path) -> None:
    sequence(definition, out)


def test_a_sequence_killed_at_random_moments_ends_with_the_same_matrix(
    arms: Sequence, tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    definition = definition_of(tiny_base, tiny_files)
    definition |= {"orders": [["two", "three"]], "name": arms.folder.name}
    definition["arms"] = [{"name": "repaired-stack", **STACKED["repaired-stack"]}]
    assert killed_until_done(_do, definition, tmp_path) > 0
    (found,) = read_json(tmp_path / arms.folder.name / "report" / "sequence.json")["sequences"]
    (expected,) = (each for each in arms.matrices["sequences"] if each["arm"] == "repaired-stack")
    assert found == expected
    assert not list(tmp_path.rglob(".tmp-*"))


MISPLACED: list[tuple[dict[str, Any], str]] = [
    ({"between": "stack", "adapter.method": "full"}, "full has no adapter to stack"),
    ({"between": "merge", "adapter.use_dora": True}, "a DoRA is no sum"),
    ({"repair.strength": [0.1, 1.0]}, "repair.strength: one that the next task starts from"),
    ({"repair.strength": 0.1, "repair.keep": "self"}, "in a sequence it has a strength and a task"),
]


@pytest.mark.parametrize(("arm", "message"), MISPLACED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_in_a_sequence_is_named(
    tiny_base: Path, tiny_files: Path, tmp_path: Path, arm: dict[str, Any], message: str
) -> None:
    definition = definition_of(tiny_base, tiny_files) | {"arms": [arm]}
    with pytest.raises(RecipeError, match=message):
        sequence(definition, tmp_path)
