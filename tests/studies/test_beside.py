"""A run that repairs and dials what it trained: points beside its weights, measured once."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from forgetless.adapters.dial import scale_folder
from forgetless.adapters.folders import load
from forgetless.adapters.repair import STRENGTHS, repair
from forgetless.core.errors import RecipeError
from forgetless.core.files import read_json
from forgetless.models.load import load_model, load_tokenizer
from forgetless.recipes.recipe import Recipe
from forgetless.studies.aftercare import Reading
from forgetless.studies.folder import RunFolder, aftercare_rows, run_folders
from forgetless.studies.run import run
from forgetless.studies.study import study
from forgetless.tasks import make_task
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures"]


def adjusted(tiny_base: Path, tiny_files: Path) -> dict[str, Any]:
    """A recipe of a run that is repaired, dialled and looked into."""
    changes: dict[str, Any] = {
        "repair": {"strength": [0.1, 1], "scales": [1.0, 0.5]},
        "dial": {"scales": [0.5, 0.0]},
        "spectra": True,
    }
    return recipe_of(tiny_base, tiny_files, **changes)


@pytest.fixture
def recipe(tiny_base: Path, tiny_files: Path) -> dict[str, Any]:
    return adjusted(tiny_base, tiny_files)


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study of `recipe`, which nobody changes."""
    return run(adjusted(tiny_base, tiny_files), tmp_path_factory.mktemp("finished")).folder.parent


@pytest.fixture
def folder(finished: Path, recipe: dict[str, Any], tmp_path: Path) -> RunFolder:
    """A copy of it, where a run of the recipe goes too."""
    shutil.copytree(finished, tmp_path / finished.name)
    return RunFolder(run(recipe, tmp_path).folder)


def scores(folder: RunFolder) -> dict[tuple[str, str], float]:
    return {(row["setting"], row["task"]): row["score"] for row in aftercare_rows(folder)}


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_every_setting_is_scored_as_what_it_is(
    method: str, recipe: dict[str, Any], finished: Path, tiny_files: Path, tmp_path: Path
) -> None:
    recipe["adapter"]["method"] = method
    if method == "full":
        finished = run(recipe, tmp_path).folder.parent
    (folder,) = run_folders(finished)
    found = scores(folder)
    settings = ["trained", "repair-0.1", "repair-0.1-dial-0.5", "repair-1", "repair-1-dial-0.5"]
    assert list(dict.fromkeys(s for s, _ in found)) == [*settings, "dial-0.5", "dial-0"]
    base = {task: read_json(folder.scores("base", task))["value"] for _, task in found}
    assert all(found["dial-0", task] == pytest.approx(value) for task, value in base.items())
    assert len({found[setting, "kl"] for setting in (*settings, "dial-0.5")}) == 6
    asked, tokenizer = Recipe.model_validate(recipe), load_tokenizer(recipe["base"])
    how = "all-linear", asked.calibration, asked.data, asked.seed
    trained: Any = load_model(str(folder.model)) if method == "full" else None
    if method != "full":
        trained = load(load_model(recipe["base"]), folder.native).merge_and_unload()
    keep = Reading(load_model(recipe["base"]), tokenizer, *how).keep(asked.text_to_keep, tmp_path)
    task = Reading(trained, tokenizer, *how).task(asked.data.train, tmp_path)
    weights: Any = folder.model
    if method != "full":
        weights = load(load_model(recipe["base"]), folder.native)
    assert keep.statistics is not None
    healed: Any = repair(
        weights, load_model(recipe["base"]), keep.statistics, task.statistics, strength=1
    )
    told = make_task({"kind": "perplexity", "name": "prose", "path": str(tiny_files / "old.txt")})
    alone = told.evaluate(healed, tokenizer).value
    assert found["repair-1", "prose"] == pytest.approx(alone, rel=1e-4)


def test_a_run_that_is_done_measures_nothing_again(
    recipe: dict[str, Any], folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder.aftercare.read_text(), folder.spectra.read_text())
    with monkeypatch.context() as patch:
        for name in ("Adjustable", "spectra"):
            patch.setattr(f"forgetless.studies.beside.{name}", None)
        assert run(recipe, tmp_path).folder == folder.path
    assert (folder.aftercare.read_text(), folder.spectra.read_text()) == before
    damaged = folder.point("repair-1").scores("final", "prose")
    was = damaged.read_text()
    damaged.unlink()
    run(recipe, tmp_path)
    again, then = json.loads(damaged.read_text()), json.loads(was)
    assert again["value"] == then["value"]


def test_another_text_to_keep_measures_all_anew_and_trains_nothing(
    recipe: dict[str, Any], folder: RunFolder, tiny_files: Path, tmp_path: Path
) -> None:
    weights, before = folder.native.stat().st_mtime_ns, scores(folder)
    recipe["repair"]["keep"] = str(tiny_files / "test.jsonl")
    assert run(recipe, tmp_path).folder == folder.path
    assert folder.native.stat().st_mtime_ns == weights
    after = scores(folder)
    assert before["dial-0.5", "prose"] == after["dial-0.5", "prose"]
    assert before["repair-1", "prose"] != after["repair-1", "prose"]


def test_auto_takes_one_and_scores_that_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["repair"] = {"strength": "auto", "max_drop": 1e9}
    folder = RunFolder(run(recipe, tmp_path).folder)
    known = read_json(folder.aftercare)
    points = known["points"]
    assert {f"repair-{s:g}" for s in STRENGTHS} | {"trained", "dial-0", "dial-0.5"} == set(points)
    repairs = {label: p for label, p in points.items() if p["scale"] == 1}
    assert known["repaired"] == min(repairs, key=lambda label: repairs[label]["drift"])
    assert known["scored"] == [known["repaired"], "dial-0.5", "dial-0"]
    alone = PeftModel.from_pretrained(load_model(recipe["base"]), folder.repaired)
    assert alone.peft_config["default"].r == 4  # twice the anchored start's
    old, new = (
        load_file(folder.adapter / "adapter_model.safetensors"),
        load_file(folder.repaired / "adapter_model.safetensors"),
    )
    assert old.keys() == new.keys()
    assert not all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_a_repair_that_only_turns_is_written_too(
    method: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe |= {"repair": {"strength": 0, "scales": [0.5]}, "dial": None, "spectra": False}
    recipe["adapter"]["method"] = method
    folder = RunFolder(run(recipe, tmp_path).folder)
    name = "model" if method == "full" else "adapter_model"
    before, after = (
        load_file(where / f"{name}.safetensors")
        for where in (folder.model if method == "full" else folder.adapter, folder.repaired)
    )
    for key, weight in after.items():
        if ".lora_" in key:
            assert torch.equal(weight, before[key] * (0.5 if ".lora_B." in key else 1))
    assert any(not torch.equal(weight, before[key]) for key, weight in after.items())


def test_a_budget_that_nothing_meets_leaves_the_points(
    recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe["repair"] = {"strength": "auto", "max_kl": 0.0, "max_drop": 0.0}
    done = run(recipe, tmp_path)
    assert done.status == "done"
    known = read_json(RunFolder(done.folder).aftercare)
    assert known["repaired"] is None
    assert len(known["points"]) == len(STRENGTHS) + 3
    assert "no repair is taken" in caplog.text


def test_runs_of_a_study_read_each_text_once_and_have_their_table(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["repair"]["strength"] = 0.3
    axes = {"adapter.method": ["lora", "pissa"]}
    studied = study({"name": "both", "recipe": recipe, "axes": axes}, tmp_path)
    folder = Path(studied.folder)
    assert len(list(folder.glob("shared/aftercare/*/held.jsonl"))) == 2
    with (folder / "report" / "aftercare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"lora", "pissa"}
    taken = {(row["run_id"], row["setting"]) for row in rows if row["taken"] == "True"}
    assert len(taken) == 2
    assert {row["strength"] for row in rows} == {"0.0", "0.3"}
    assert len(rows) == 2 * 3 * len({row["setting"] for row in rows})


COMPARATORS: list[dict[str, Any]] = [
    {"kind": "hard_projection", "energy": 0.9},
    {"kind": "oplora", "directions": 4},
    {"kind": "dare", "drop": 0.5},
    {"kind": "intruders", "keep": 0.0, "threshold": 0.9},
]


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_comparators_are_points_like_the_others(
    method: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    other = RunFolder(run({**recipe, "seed": 1, "repair": None}, tmp_path / "other").folder)
    added = [*COMPARATORS, {"kind": "ties", "adapters": [str(other.adapter)]}]
    recipe = {**recipe, "repair": {"strength": 1}, "dial": {"scales": [0.5]}, "comparators": added}
    recipe["adapter"]["method"] = method
    folder = RunFolder(run(recipe, tmp_path).folder)
    known, found = read_json(folder.aftercare), scores(folder)
    labels = [wanted.label for wanted in Recipe.parse(recipe).comparators]
    assert labels[:4] == [
        "hard_projection-0.9", "oplora-4", "dare-0.5-0", "intruders-0.0-10-0.9",
    ]  # fmt: skip
    assert labels[4] == f"ties-{other.path.name}-adapter-0.2"
    assert known["scored"] == ["repair-1", "dial-0.5", *labels]
    assert known["repaired"] == "repair-1"
    assert len({found[label, "kl"] for label in ("trained", *known["scored"])}) == 8
    for label in labels:
        assert {row["strength"] for row in aftercare_rows(folder) if row["setting"] == label} == {
            None
        }
        assert known["points"][label]["kl"] > 0
        assert folder.point(label).items("final", "prose").is_file()
    # What the text to keep fills is no longer read: least of all settings is disturbed.
    drifts = {label: point["kept_by_moments"] for label, point in known["points"].items()}
    assert drifts[labels[0]] < 0.5 * drifts["trained"]
    lost = known["points"][labels[3]]["lost_at_rank"]
    assert (lost is None) if method == "full" else (lost > 0)
    before = folder.aftercare.read_text()
    assert run(recipe, tmp_path).folder == folder.path
    assert folder.aftercare.read_text() == before


def test_another_adapter_to_merge_with_measures_anew(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    other = RunFolder(run({**recipe, "seed": 1, "repair": None}, tmp_path / "other").folder)
    added = [{"kind": "ties", "adapters": [str(other.adapter)]}]
    recipe = {**recipe, "repair": None, "dial": None, "spectra": False, "comparators": added}
    folder = RunFolder(run(recipe, tmp_path).folder)
    before = scores(folder)
    scale_folder(other.adapter, -1.0)
    run(recipe, tmp_path)
    label = read_json(folder.aftercare)["scored"][0]
    assert scores(folder)[label, "kl"] != before[label, "kl"]


@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_the_residual_is_scored_on_request(
    method: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = {**recipe, "repair": None, "dial": None, "residual": True, "spectra": False}
    recipe["adapter"]["method"] = method
    folder = RunFolder(run(recipe, tmp_path).folder)
    found = scores(folder)
    base = read_json(folder.scores("base", "prose"))["value"]
    assert (found["residual", "prose"] == pytest.approx(base)) == (method == "lora")
    assert read_json(folder.aftercare)["scored"] == ["residual"]


def test_spectra_of_a_run(finished: Path) -> None:
    (folder,) = run_folders(finished)
    found = read_json(folder.spectra)
    assert len(found["layers"]) == 14
    assert found["modules"]["q_proj"]["activations_rank_effective"] > 1
    assert found["overall"]["rotation"] > 0
    assert 0 < found["overall"]["shared_energy"] < 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"repair": {"strength": -1}}, "repair.strength: must be 'auto', a number from 0"),
        ({"repair": {"strenght": 1}}, "did you mean 'strength'"),
        ({"repair": {"keep": "nowhere.txt"}}, "repair.keep: "),
        ({"repair": {"task": "nowhere.jsonl"}}, "repair.task: "),
        ({"repair": {}, "calibration.source": "data"}, "names no single text to keep"),
        ({"repair": {}, "adapter.use_dora": True}, "a DoRA adapter has no A to repair"),
        ({"residual": True, "adapter.method": "mica"}, "a start of 'mica' is not kept"),
        ({"dial": {"scales": []}}, "dial.scales: "),
        ({"comparators": [{"kind": "dar"}]}, "comparators.0: "),
        ({"comparators": [{"kind": "dare", "drop": 1}]}, "comparators.0.dare.drop: "),
        ({"comparators": [{"kind": "dare", "dropp": 0}]}, "did you mean 'drop'?"),
        ({"comparators": [{"kind": "ties"}]}, "comparators.0.ties.adapters: "),
        ({"comparators": [{"kind": "dare"}] * 2}, "comparators.1: asked for twice"),
        (
            {"comparators": [{"kind": "oplora", "directions": 17}]},
            "comparators.0.directions: must be at most 16",
        ),
        (
            {"comparators": [{"kind": "ties", "adapters": ["nowhere"]}]},
            "comparators.0.adapters: nowhere is no adapter",
        ),
    ],
)
def test_mistakes_are_told_before_any_weight_is_loaded(
    changes: dict[str, Any], said: str, tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as raised:
        run(recipe_of(tiny_base, tiny_files, **changes), tmp_path)
    assert said in str(raised.value)
    assert not list(tmp_path.rglob("run.json"))


def test_the_aftercare_does_not_change_the_run_id(recipe: dict[str, Any]) -> None:
    from forgetless.recipes.identity import run_id

    plain = {k: v for k, v in recipe.items() if k not in ("repair", "dial", "spectra")}
    recipe["comparators"] = COMPARATORS
    assert run_id(Recipe.parse(recipe)) == run_id(Recipe.parse(plain))
