"""One run through its seven stages: what it writes, what it skips, what it does when killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from forgetless.adapters.folders import load
from forgetless.core.errors import RecipeError, UserError
from forgetless.core.files import lock, read_json, read_jsonl
from forgetless.core.settings import with_overrides
from forgetless.data.texts import self_text
from forgetless.models.load import load_model, load_tokenizer
from forgetless.recipes.recipe import Recipe
from forgetless.scores.files import PHASES
from forgetless.studies import material, stages
from forgetless.studies.folder import RunFolder, run_folders
from forgetless.studies.out_of_memory import TAKES_LESS
from forgetless.studies.run import Run, run
from forgetless.studies.stages import Event, Stages
from tests.tiny import recipe_of, save_base

pytest_plugins = ["tests.tiny_fixtures"]

ADAPTERS = ["lora", "pissa", "lora_null_v1", "lora_null_v2", "lora_null_zero"]


def scores_of(found: Run) -> dict[str, float]:
    return {row["task"]: row["score"] for row in found.scores}


def worked(events: list[Event]) -> list[str]:
    """The stages that had something to do."""
    return [event.stage for event in events if event.message and event.stage != "done"]


@pytest.fixture(scope="module")
def finished(
    tiny_base: Path, tiny_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """A finished run of each method, all in one study."""
    out = tmp_path_factory.mktemp("runs")
    return {
        method: run(recipe_of(tiny_base, tiny_files, **{"adapter.method": method}), out, "all")
        for method in [*ADAPTERS, "full"]
    }


# ---- what a run writes ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*ADAPTERS, "full"])
def test_a_finished_run_has_every_artefact(finished: dict[str, Run], method: str) -> None:
    folder = RunFolder(finished[method].folder)
    names = {path.name for path in folder.path.iterdir()}
    trained = {"model"} if method == "full" else {"native", "adapter"}
    assert names == {
        *("recipe.yaml", "run.json", "log.jsonl", "training.json", "analysis.json", ".lock"),
        *("scores", "items", *trained),
    }
    for phase in PHASES:
        for task in ("sums", "prose", "kl"):
            score = read_json(folder.scores(phase, task))
            assert score["kind"] == ("learning" if task == "sums" else "forgetting")
            assert len(read_jsonl(folder.items(phase, task))) == score["n"]
    record = finished[method].record
    assert record["status"] == "done"
    assert record["training"]["steps"] == 4
    assert record["versions"]["torch"] == torch.__version__
    assert {"started", "finished", "hardware", "seconds", "seed"} <= set(record)
    assert [line["step"] for line in read_jsonl(folder.log)] == [1, 2, 3, 4]


def test_training_learned_and_moved_the_weights(finished: dict[str, Run]) -> None:
    for method, found in finished.items():
        rows = {row["task"]: row for row in found.scores}
        assert rows["sums"]["score"] < rows["sums"]["base_score"], method
        assert rows["sums"]["step0_score"] == rows["sums"]["base_score"], method
        assert rows["kl"]["base_score"] == 0 < rows["kl"]["score"], method
        assert rows["sums"]["relative_update"] > 0, method


@pytest.mark.parametrize("method", ADAPTERS)
def test_step0_was_seen_to_be_the_base(finished: dict[str, Run], method: str) -> None:
    assert finished[method].record["start"] == {"equals_base": True, "probe_tokens": 128}


def test_statistics_are_recorded(finished: dict[str, Run]) -> None:
    recorded = finished["lora_null_v1"].record["statistics"]
    assert recorded["dtype"] == "float32"
    assert recorded["tokens"] > 0
    assert 0 < recorded["tail_energy"] < 2 / 32
    assert finished["pissa"].record["statistics"] is None


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_exported_adapter_is_the_scored_model(
    finished: dict[str, Run], tiny_base: Path, method: str
) -> None:
    tokens = torch.arange(5, 25)[None]
    folder = RunFolder(finished[method].folder)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), folder.adapter
    ).eval()
    native = load(load_model(str(tiny_base)), folder.native)
    with torch.no_grad():
        difference = plain(input_ids=tokens).logits - native(input_ids=tokens).logits
    assert difference.abs().max() < 1e-5
    assert finished[method].record["export"]["relative_error"] == 0.0


def test_the_update_of_full_fine_tuning_is_measured_against_the_base(
    finished: dict[str, Run], tiny_base: Path
) -> None:
    folder = RunFolder(finished["full"].folder)
    analysis = read_json(folder.analysis)
    name = "model.layers.0.self_attn.q_proj"
    before = load_model(str(tiny_base)).get_submodule(name).weight
    after = load_model(str(folder.model)).get_submodule(name).weight
    assert isinstance(before, torch.Tensor)
    assert isinstance(after, torch.Tensor)
    expected = ((after - before).norm() / before.norm()).item()
    assert analysis["layers"][name] == pytest.approx(expected, rel=1e-5)


def test_runs_of_a_study_share_base_scores_and_statistics(finished: dict[str, Run]) -> None:
    shared = finished["pissa"].folder.parent / "shared"
    assert len(list((shared / "scores").glob("*.json"))) == 3
    statistics = [path for path in (shared / "statistics").iterdir() if path.is_dir()]
    assert len(statistics) == 1


@pytest.mark.filterwarnings("ignore:.* do not fit max_length", "ignore:task .* were cut off")
def test_a_real_model_on_real_data_keeping_what_it_says_itself(
    shared_data: Path, tmp_path: Path
) -> None:
    """A pretrained Llama of 260 K weights learns word problems; its own stories are to be kept."""
    base = shared_data / "stories260K" / "hf"
    model, words = load_model(str(base)), load_tokenizer(str(base))
    stories = words.batch_decode(self_text(model, words, 8, 128, seed=7), skip_special_tokens=True)
    (tmp_path / "stories.txt").write_text("\n\n".join(stories))
    recipe = {
        "base": str(base),
        "adapter": {"method": "lora_null_v1", "rank": 8},
        "calibration": {"source": "self", "samples": 16, "max_length": 64},
        "data": {"train": str(shared_data / "gsm8k" / "train.jsonl"), "limit": 100},
        "training": {"learning_rate": 1e-3, "steps": 10, "batch_size": 4},
        "tasks": {
            "learning": [
                {
                    "kind": "perplexity",
                    "path": str(shared_data / "gsm8k" / "test.jsonl"),
                    "name": "gsm8k_loss",
                    "limit": 10,
                }
            ],
            "forgetting": [
                {"kind": "perplexity", "path": str(tmp_path / "stories.txt"), "name": "stories"}
            ],
        },
    }
    rows = {row["task"]: row for row in run(recipe, tmp_path / "runs").scores}
    assert rows["gsm8k_loss"]["score"] < rows["gsm8k_loss"]["base_score"] - 0.5
    assert rows["stories"]["base_score"] < 2.5  # it does know its stories
    assert rows["stories"]["score"] < 2 * rows["stories"]["base_score"]


# ---- what a run skips ----------------------------------------------------------------------------


@pytest.fixture
def done(finished: dict[str, Run], tmp_path: Path) -> Run:
    """A finished run that a test may change."""
    folder = finished["pissa"].folder
    shutil.copytree(folder, tmp_path / "mine" / folder.name)
    return Run(tmp_path / "mine" / folder.name)


def test_a_finished_run_does_nothing_again(tiny_recipe: dict[str, Any], done: Run) -> None:
    events: list[Event] = []
    again = run({**tiny_recipe, "name": "mine"}, done.folder.parents[1], listen=events.append)
    assert again == done
    assert worked(events) == []


def test_a_new_task_trains_nothing(tiny_recipe: dict[str, Any], done: Run) -> None:
    recipe = Recipe.parse(tiny_recipe)
    kept, *_ = recipe.tasks.forgetting
    task = {**kept, "name": "prose_again"}
    changed = recipe.override({"name": "mine", "tasks.forgetting": [kept, task]})
    before = scores_of(done)
    events: list[Event] = []
    again = run(changed, done.folder.parents[1], listen=events.append)
    assert worked(events) == ["base scores", "step 0", "evaluate"]
    assert scores_of(again)["prose_again"] == before["prose"]
    assert "kl" not in scores_of(again)


def test_replay_is_part_of_the_training(
    tiny_recipe: dict[str, Any], tiny_files: Path, tmp_path: Path
) -> None:
    sources = [
        {"path": str(tiny_files / "train.jsonl"), "weight": 0.75},
        {"path": str(tiny_files / "old.txt"), "weight": 0.25},
    ]
    recipe = Recipe.parse(tiny_recipe, {"data.train": sources, "training.steps": 8})
    done = run(recipe, tmp_path)
    assert done.record["status"] == "done"
    alone = run(recipe.override({"data.train": sources[0]["path"]}), tmp_path)
    assert scores_of(done)["prose"] < scores_of(alone)["prose"]


def test_a_changed_task_of_the_same_name_is_measured_again(
    tiny_recipe: dict[str, Any], done: Run
) -> None:
    recipe = Recipe.parse(tiny_recipe, {"name": "mine"})
    sums = {**recipe.tasks.learning[0], "limit": 3}
    events: list[Event] = []
    again = run(
        recipe.override({"tasks.learning": [sums]}), done.folder.parents[1], listen=events.append
    )
    assert worked(events) == ["base scores", "step 0", "evaluate"]
    (row,) = [row for row in again.scores if row["task"] == "sums"]
    assert row["n"] == 3


def test_another_export_rank_only_exports(tiny_recipe: dict[str, Any], done: Run) -> None:
    events: list[Event] = []
    recipe = Recipe.parse(tiny_recipe, {"name": "mine", "export.rank": "requested"})
    again = run(recipe, done.folder.parents[1], listen=events.append)
    assert worked(events) == ["export"]
    assert again.record["export"]["rank"] == 2
    assert again.record["export"]["relative_error"] > 0
    config = json.loads((again.folder / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2


def test_training_alone_measures_nothing_and_is_completed_later(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    events: list[Event] = []
    trained = run(tiny_recipe, tmp_path, evaluate=False, listen=events.append)
    assert worked(events) == ["start", "train", "export", "analyse"]
    assert not (trained.folder / "scores").exists()
    events.clear()
    measured = run(tiny_recipe, tmp_path, listen=events.append)
    assert worked(events) == ["base scores", "step 0", "evaluate"]
    assert measured.folder == trained.folder
    assert len(measured.scores) == 3


# ---- what a run does when it is stopped ----------------------------------------------------------

STOPS: dict[str, tuple[ModuleType, str, int]] = {
    "before the first base score": (material, "load_model", 1),
    "while the start is written": (stages, "save", 1),
    "before training": (stages, "train", 1),
    "while the result is written": (stages, "save", 2),
    "while it is exported": (stages, "export", 1),
    "before the analysis": (stages, "delta_weights", 1),
}


class Stop(BaseException):
    """Ends a run where it is, as a signal does; nothing of ours handles it."""


def stopping(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stop
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize("where", STOPS)
def test_a_stopped_run_goes_on_to_the_same_numbers(
    where: str, tiny_recipe: dict[str, Any], finished: dict[str, Run], tmp_path: Path
) -> None:
    module, name, call = STOPS[where]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, stopping(getattr(module, name), call))
        with pytest.raises(Stop):
            run(tiny_recipe, tmp_path, "all")
    (folder,) = run_folders(tmp_path / "all")
    assert read_json(folder.record)["status"] == "running"
    assert same_rows(run(tiny_recipe, tmp_path, "all"), finished["pissa"])
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("method", ["lora_null_v1", "full"])
@pytest.mark.parametrize("step", [1, 3])
def test_training_goes_on_from_its_checkpoint(
    method: str, step: int, tiny_recipe: dict[str, Any], finished: dict[str, Run], tmp_path: Path
) -> None:
    recipe = Recipe.parse(tiny_recipe, {"adapter.method": method, "adapter.dropout": 0.0})

    def stop(event: Event) -> None:
        if event.step == step:
            raise Stop

    with pytest.raises(Stop):
        run(recipe, tmp_path, "all", listen=stop)
    again = run(recipe, tmp_path, "all")
    assert again.record["training"]["resumed_from"] == (None if step == 1 else 2)
    assert same_rows(again, finished[method])
    losses = [line["loss"] for line in read_jsonl(RunFolder(again.folder).log)]
    undisturbed = read_jsonl(RunFolder(finished[method].folder).log)
    assert losses == [line["loss"] for line in undisturbed]


def test_who_waits_for_a_run_is_told_so(
    tiny_recipe: dict[str, Any], done: Run, caplog: pytest.LogCaptureFixture
) -> None:
    held = threading.Event()

    def hold() -> None:
        with lock(RunFolder(done.folder).lock):
            held.set()
            until = time.monotonic() + 60
            while "waiting for" not in caplog.text and time.monotonic() < until:
                time.sleep(0.05)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(60)
    again = run({**tiny_recipe, "name": "mine"}, done.folder.parents[1])
    other.join()
    assert again.status == "done"
    assert f"{done.folder}/.lock, which process {os.getpid()} on" in caplog.text


# ---- what a run does when a file is damaged ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scores/final/sums.json", b'{"value": 0.5'),
        ("scores/base/prose.json", b""),
        ("scores/step0/kl.json", b"[]"),
        ("items/final/kl.jsonl", b'{"id": "1"}\n{"id": '),
        ("items/base/prose.jsonl", b"\xff\xfe"),
        ("analysis.json", b"\0\0\0\0"),
        ("recipe.yaml", b"base: ["),
        ("run.json", None),
    ],
)
def test_what_is_damaged_is_made_again_and_nothing_is_trained(
    tiny_recipe: dict[str, Any], finished: dict[str, Run], done: Run, name: str, content: Any
) -> None:
    if content is None:
        (done.folder / name).unlink()
    else:
        (done.folder / name).write_bytes(content)
    events: list[Event] = []
    again = run({**tiny_recipe, "name": "mine"}, done.folder.parents[1], listen=events.append)
    assert "train" not in worked(events)
    ours, theirs = ([{**row, "study": ""} for row in r.scores] for r in (again, finished["pissa"]))
    assert [r | {"arm": ""} for r in ours] == [r | {"arm": ""} for r in theirs]
    assert again.record["training"] == finished["pissa"].record["training"]
    assert not RunFolder(again.folder).start.exists()


def flipped(content: bytes) -> bytes:
    return content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]


@pytest.mark.parametrize("damage", [flipped, lambda content: b"", None])
def test_a_damaged_export_is_made_again_and_damaged_weights_are_named(
    tiny_recipe: dict[str, Any], done: Run, damage: Any
) -> None:
    def harm(folder: str) -> tuple[Path, bytes]:
        file = done.folder / folder / "adapter_model.safetensors"
        content = file.read_bytes()
        file.unlink() if damage is None else file.write_bytes(damage(content))
        return file, content

    recipe, events = {**tiny_recipe, "name": "mine"}, list[Event]()
    file, content = harm("adapter")
    run(recipe, done.folder.parents[1], listen=events.append)
    assert "train" not in worked(events)
    assert any(f"{file} is damaged or gone" in event.message for event in events)
    assert file.read_bytes() == content

    file, _ = harm("native")
    with pytest.raises(UserError, match=rf"{file} is damaged or gone; delete {done.folder}, and"):
        run(recipe, done.folder.parents[1])


def test_a_damaged_record_is_named(tiny_recipe: dict[str, Any], done: Run) -> None:
    (done.folder / "run.json").write_text('{"status": "done", ')
    with pytest.raises(UserError, match=r"run\.json is damaged \(.*\): delete it and repeat"):
        run({**tiny_recipe, "name": "mine"}, done.folder.parents[1])
    assert done.status == "failed"
    assert done.exceeded is None
    assert done.scores == []


def same_rows(one: Run, other: Run) -> bool:
    """Whether two runs have the same numbers, times aside."""

    def numbers(found: Run) -> list[dict[str, Any]]:
        return [{**row, "train_seconds": None} for row in found.scores]

    return numbers(one) == numbers(other)


# ---- what a run does when something is wrong -----------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* do not fit max_length")
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data.max_length": 2}, "no example has a token to learn within max_length=2"),
        (
            {"data.format": "text", "data.max_length": 256},
            r"the longest example has \d+ tokens, but the model has 128 positions",
        ),
    ],
    ids=["too short", "too long"],
)
def test_data_that_cannot_be_trained_on_is_refused_before_anything_is_measured(
    tiny_base: Path, tiny_files: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        run(recipe_of(tiny_base, tiny_files, **changes), tmp_path)
    (record,) = tmp_path.rglob("run.json")
    assert "seconds" not in read_json(record)


def test_a_failed_run_keeps_the_reason_and_can_be_mended(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no room for 3 GB")

    monkeypatch.setattr(stages, "train", fail)
    events: list[Event] = []
    with pytest.raises(OSError, match="no room"):
        run(tiny_recipe, tmp_path, "s", listen=events.append)
    assert (events[-1].stage, events[-1].message) == ("failed", "OSError: no room for 3 GB")
    (folder,) = run_folders(tmp_path / "s")
    record = read_json(folder.record)
    assert (record["status"], record["reason"]) == ("failed", "OSError: no room for 3 GB")
    assert "OSError" in record["traceback"]
    monkeypatch.undo()
    mended = run(tiny_recipe, tmp_path, "s")
    assert (mended.status, mended.record["reason"]) == ("done", None)


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of "
    "which 1.19 GiB is free. If reserved but unallocated memory is large try setting ..."
)


@pytest.mark.parametrize(
    ("stage", "error", "reason", "help"),
    [
        (
            "collect_statistics",
            torch.OutOfMemoryError(CUDA),
            r"for 'statistics' \(CUDA .* of which 1.19 GiB is free\)",
            "set calibration.memory_budget",
        ),
        (
            "train",
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            r"for 'train' \(.*can't allocate memory: 9 bytes\)",
            "lower training.batch_size and raise training.gradient_accumulation",
        ),
        ("base_scores", MemoryError(), r"for 'base scores' \(MemoryError\)", "--batch-size 1"),
        ("export", MemoryError(), r"for 'export' \(MemoryError\)", "'forgetless plan'"),
    ],
)
def test_where_memory_runs_out_the_settings_that_take_less_are_named(
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: Exception,
    reason: str,
    help: str,
) -> None:
    def fail(self: Stages) -> None:
        raise error

    work = ("base_scores", "collect_statistics", "start", "step0", "train", "export")
    for before in work[: work.index(stage)]:
        monkeypatch.setattr(Stages, before, lambda self: None)
    monkeypatch.setattr(Stages, stage, fail)
    with pytest.raises(UserError, match=f"^no memory left {reason}: .*{help}.*") as told:
        run(tiny_recipe, tmp_path)
    (record,) = tmp_path.rglob("run.json")
    assert read_json(record)["reason"] == f"UserError: {told.value}"


def test_settings_that_take_less_memory_are_those_of_a_recipe(tiny_recipe: dict[str, Any]) -> None:
    named = " ".join(TAKES_LESS.values())
    for key in re.findall(r"(?:training|calibration|data)\.\w+", named):
        values = re.search(rf"{key}(?:: |, such as )(\w+)", named)
        Recipe.parse(tiny_recipe, {key: yaml.safe_load(values[1]) if values else 2})


def test_a_training_that_diverges_says_so(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.parse(
        tiny_recipe, {"training.learning_rate": 1e30, "training.max_grad_norm": 1e30}
    )
    with pytest.raises(UserError, match=r"nan|not a finite number"):
        run(recipe, tmp_path)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_rate_far_too_high_is_no_success(
    method: str, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The loss stays a number: the model says the same whatever it reads."""
    changes = {"adapter.method": method, "training.learning_rate": 1e3, "training.steps": 12}
    with pytest.raises(UserError, match=r"every gradient after step \d is 0 .*; lower training"):
        run(Recipe.parse(tiny_recipe, changes), tmp_path, evaluate=False)
    (folder,) = (RunFolder(file.parent) for file in tmp_path.rglob("run.json"))
    assert read_json(folder.record)["status"] == "failed"
    assert not any(path.exists() for path in (folder.native, folder.model, folder.adapter))
    kept = [load_file(file) for file in folder.checkpoints.glob("*/*model.safetensors")]
    assert len(kept) == 2
    assert all(tensor.isfinite().all() for state in kept for tensor in state.values())


def test_problems_show_before_anything_is_written(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = Recipe.parse(tiny_recipe, {"adapter.rank": 99, "data.train": "absent.jsonl"})
    with pytest.raises(RecipeError) as caught:
        run(recipe, tmp_path)
    assert len(caught.value.problems) == 5
    assert list(tmp_path.iterdir()) == []


def test_a_changed_base_is_another_run(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    recipe = Recipe.parse(tiny_recipe, {"base": str(base), "training.steps": 1})
    first = run(recipe, tmp_path / "runs", "s")
    shutil.rmtree(base)
    save_base(base, seed=1)
    second = run(recipe, tmp_path / "runs", "s")
    assert first.folder != second.folder
    base_scores = [found.scores[0]["base_score"] for found in (first, second)]
    assert base_scores[0] != base_scores[1]


def test_threads_are_given_back(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[int] = []
    try:
        run(tiny_recipe, tmp_path, listen=lambda event: seen.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen[:-1]) == {1}


def test_how_long_it_takes_is_said_once_the_rate_is_known(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgetless.studies.stages.FIRST_MINUTE", 0.0)
    told: list[str] = []
    recipe = with_overrides(tiny_recipe, {"training.measure_at": [0.5]})
    run(recipe, tmp_path, listen=lambda event: told.append(event.message))
    (line,) = [line for line in told if "of training left" in line]
    wanted = r"about \d+ s of training left, and \d+ s of measuring if it takes as the base did"
    assert re.fullmatch(wanted, line)
