"""Workers and the processes of a run: which GPUs they see, and several that do one run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.errors import RecipeError, UserError
from forgetless.core.files import read_json
from forgetless.studies.stages import Event
from forgetless.studies.study import study
from forgetless.studies.workers import run_workers

pytest_plugins = ["tests.tiny_fixtures", "tests.quick_python"]

# ---- GPUs ----------------------------------------------------------------------------------------


def seen_by_workers(
    visible: str | None, count: int, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """CUDA_VISIBLE_DEVICES of three workers, where a machine has so many and these are visible."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    events: list[Event] = []
    event = '{"run_id": "%s", "name": "", "stage": ""}'
    command = ["sh", "-c", f"printf '{event}' \"${{CUDA_VISIBLE_DEVICES-unset}}\""]
    run_workers(command, 3, events.append, gpus=gpus)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    return [event.run_id for event in events]


@pytest.mark.parametrize(
    ("visible", "count", "dealt"),
    [
        (None, 2, ["0", "0", "1"]),
        (None, 8, ["0", "1", "2"]),
        ("7, 3", 2, ["3", "7", "7"]),
        ("GPU-8f2a,GPU-11c0,GPU-77d4", 3, ["GPU-11c0", "GPU-77d4", "GPU-8f2a"]),
        ("MIG-a,MIG-b,", 1, ["MIG-a", "MIG-a", "MIG-b"]),  # as CUDA counts them
        ("0,1,-1,2", 2, ["0", "0", "1"]),
        ("3", 1, ["3", "3", "3"]),
        ("0,1", 1, ["0,1", "0,1", "0,1"]),  # there is no second one
        ("", 0, ["", "", ""]),
        (None, 1, ["unset", "unset", "unset"]),
        (None, 0, ["unset", "unset", "unset"]),
    ],
)
def test_workers_take_the_visible_gpus_in_turn(
    visible: str | None, count: int, dealt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(seen_by_workers(visible, count, 1, monkeypatch)) == dealt


@pytest.mark.parametrize(
    ("visible", "count", "dealt"),
    [
        (None, 4, ["0,1", "0,1", "2,3"]),
        (None, 8, ["0,1", "2,3", "4,5"]),
        ("7,3,5", 3, ["3,5", "5,7", "7,3"]),  # of an odd number one is shared
        ("7,3", 2, ["7,3", "7,3", "7,3"]),
        (None, 0, ["unset", "unset", "unset"]),
    ],
)
def test_a_worker_whose_runs_have_two_processes_sees_two_gpus(
    visible: str | None, count: int, dealt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(seen_by_workers(visible, count, 2, monkeypatch)) == dealt


# ---- several processes of a run ------------------------------------------------------------------


def test_two_processes_do_each_run_together(
    tiny_recipe: dict[str, Any], tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    definition = {"name": "s", "recipe": tiny_recipe}
    alone = study(definition, tmp_path / "alone")
    events: list[Event] = []
    together = study(definition, tmp_path / "together", processes=2, listen=events.append)
    (one,), (two,) = alone.runs, together.runs
    assert two.record["hardware"]["processes"] == 2
    assert any(event.step == event.steps > 0 for event in events)
    for score in sorted((one.folder / "scores").rglob("*.json")):
        found = read_json(two.folder / score.relative_to(one.folder))
        assert found["value"] == pytest.approx(read_json(score)["value"], abs=1e-4)


def test_what_they_fail_of_is_the_reason_of_the_run(
    tiny_recipe: dict[str, Any], tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    diverging = {**tiny_recipe["training"], "max_grad_norm": 1e30, "learning_rate": 1e30}
    recipe = {**tiny_recipe, "training": diverging}
    (failed,) = study({"name": "s", "recipe": recipe}, tmp_path, processes=2).failed
    assert "the loss became nan" in failed.record["reason"]


def test_what_two_processes_cannot_do_is_said_before_anything_is_run(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**tiny_recipe, "training": {**tiny_recipe["training"], "batch_size": 3}}
    with pytest.raises(RecipeError, match="cannot be shared equally by 2"):
        study({"name": "s", "recipe": recipe}, tmp_path, processes=2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="each on a GPU of its own, and this machine has 1"):
        study({"name": "s", "recipe": tiny_recipe}, tmp_path, processes=2)
    with pytest.raises(UserError, match="processes must be at least 1, got 0"):
        study({"name": "s", "recipe": tiny_recipe}, tmp_path, processes=0)
    assert list(tmp_path.iterdir()) == []
