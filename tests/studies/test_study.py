"""Studies: what runs they come to, workers, failures, and kill -9 at any moment."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.errors import RecipeError, UserError
from forgetless.core.files import lock
from forgetless.recipes.study import StudyRecipe
from forgetless.studies import study as studies
from forgetless.studies.folder import RunFolder
from forgetless.studies.run import prepare
from forgetless.studies.stages import Event
from forgetless.studies.study import Study, study
from forgetless.studies.trials import MOST_RETRIES, Beat
from tests.killing import FORKSERVER, killed_until_done, results, study_of

pytest_plugins = ["tests.tiny_fixtures", "tests.quick_python"]

psutil = pytest.importorskip("psutil")  # comes with accelerate


def arms_of(definition: dict[str, Any]) -> list[str | None]:
    return [recipe.name for recipe in StudyRecipe.parse(definition).recipes().values()]


# ---- the definition ------------------------------------------------------------------------------


def test_axes_are_combined_and_seeds_belong_to_one_arm(tiny_recipe: dict[str, Any]) -> None:
    axes = {"adapter.method": ["lora", "pissa"], "training.learning_rate": [1e-3, 0.01]}
    definition = {"name": "s", "recipe": tiny_recipe, "axes": {**axes, "seed": [0, 1]}}
    recipes = list(StudyRecipe.parse(definition).recipes().values())
    assert [(r.adapter.method, r.training.learning_rate, r.seed) for r in recipes] == [
        (method, rate, seed)
        for method in ("lora", "pissa")
        for rate in (1e-3, 0.01)
        for seed in (0, 1)
    ]
    assert [r.name for r in recipes[:3]] == ["lora learning_rate=0.001"] * 2 + [
        "lora learning_rate=0.01"
    ]


def test_arms_have_axes_of_their_own(tiny_recipe: dict[str, Any]) -> None:
    arms = [
        {"name": "gentle", "adapter.method": "lora", "training.weight_decay": 0.3},
        {"adapter.method": "pissa", "axes": {"training.learning_rate": [0.1, 0.2]}},
    ]
    definition = {"name": "s", "recipe": tiny_recipe, "arms": arms, "axes": {"seed": [3]}}
    assert arms_of(definition) == [
        "gentle",
        "pissa learning_rate=0.1",
        "pissa learning_rate=0.2",
    ]


def test_an_arm_without_a_run_of_its_own_is_told(tiny_recipe: dict[str, Any]) -> None:
    arms = [{"name": "plain"}, {"name": "repaired", "repair": {"strength": [0.3]}}]
    definition = {"name": "s", "recipe": tiny_recipe, "arms": arms, "axes": {"seed": [0, 1]}}
    with pytest.warns(UserWarning, match="arm 'repaired' trains the same weights as 'plain'"):
        assert len(StudyRecipe.parse(definition).recipes()) == 2


def test_combinations_of_the_same_weights_are_one_run(tiny_recipe: dict[str, Any]) -> None:
    axes = {"adapter.method": ["full", "lora"], "adapter.rank": [1, 2]}
    definition = {"name": "s", "recipe": tiny_recipe, "axes": axes}
    assert arms_of(definition) == ["full rank=1", "lora rank=1", "lora rank=2"]


def test_a_recipe_may_lie_in_a_file_beside_the_study(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(json.dumps(tiny_recipe))
    (tmp_path / "rates.yaml").write_text("recipe: base.yaml\naxes: {training.steps: [1, 2]}")
    definition = StudyRecipe.load(tmp_path / "rates.yaml", {"seed": 5})
    assert definition.name == "rates"
    assert [recipe.seed for recipe in definition.recipes().values()] == [5, 5]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"axis": {}}, "axis: unknown key; did you mean 'axes'?"),
    ({"axes": {"seed": 3}}, "axes.seed: must be a list, got 3"),
    ({"axes": {"seed": []}}, "axes.seed: List should have at least 1 item"),
    ({"axes": {"sed": [3]}}, "sed: unknown key; did you mean 'seed'?"),
    ({"axes": {"adapter.metod": ["lora"]}}, "adapter.metod: unknown key; did you mean 'method'?"),
    ({"axes": {"adapter.method": ["lora", "pisa"]}}, "did you mean 'pissa'?"),
    ({"arms": [{"name": 3}]}, "the name of arm 1 must be text, got 3"),
    ({"arms": [{}, {"axes": {"seed": 3}}]}, "the axes of arm 2 must be lists of values"),
    ({"arms": ["lora"]}, "arms.0: must be a mapping of keys to values, got 'lora'"),
    ({"name": "a/b"}, "name: "),
    ({"recipe": 3}, "recipe: must be a mapping"),
    ({"axes": {"adapter.rank": [1, 99]}}, "(in rank=99)"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda value: str(value)[:50])
def test_mistakes_are_named(
    tiny_recipe: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        StudyRecipe.parse({"name": "s", "recipe": tiny_recipe, **changes}).recipes()
    assert any(message in problem for problem in caught.value.problems), caught.value.problems


def test_a_problem_of_all_arms_is_said_once(tiny_recipe: dict[str, Any]) -> None:
    recipe = {**tiny_recipe, "data": {"train": "absent.jsonl"}}
    with pytest.raises(RecipeError) as caught:
        StudyRecipe.parse({"name": "s", "recipe": recipe, "axes": {"seed": [0, 1, 2]}}).recipes()
    (problem,) = caught.value.problems
    assert "absent.jsonl" in problem
    assert "(in" not in problem


def test_a_recipe_is_not_a_study(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(tiny_recipe))
    with pytest.raises(UserError, match="is a recipe, not a study"):
        StudyRecipe.load(tmp_path / "recipe.yaml")


# ---- running -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(
    tiny_base: Path, tiny_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Study]:
    """A study and its undisturbed run."""
    definition = study_of(tiny_base, tiny_files)
    return definition, study(definition, tmp_path_factory.mktemp("whole"))


def test_a_study_writes_its_definition_and_its_results(
    whole: tuple[dict[str, Any], Study],
) -> None:
    definition, done = whole
    assert done.failed == []
    assert [run.status for run in done.runs] == ["done"] * 4
    rows = results(done.folder)
    assert len(rows) == 4 * 3
    assert [row["method"] for row in rows[::3]] == ["full", "lora", "lora_null_v1", "lora_null_v2"]
    assert StudyRecipe.load(done.folder / "study.yaml") == StudyRecipe.parse(definition)


@pytest.fixture
def quick_workers(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are processes that begin with the libraries loaded."""
    monkeypatch.setattr(sys, "executable", python)


@pytest.mark.usefixtures("quick_workers")
def test_two_workers_give_the_same_numbers(
    whole: tuple[dict[str, Any], Study], tmp_path: Path
) -> None:
    definition, done = whole
    events: list[Event] = []
    again = study(definition, tmp_path, workers=2, listen=events.append)
    assert again.failed == []
    assert results(again.folder) == results(done.folder)
    assert {event.run_id for event in events if event.stage == "done"} == {
        run.run_id for run in again.runs
    }
    assert any(event.step == 6 for event in events)
    measured = [event for event in events if event.stage == "statistics" and event.message]
    assert len(measured) == 1


def test_a_failed_run_does_not_stop_the_others(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    rates = [1e30, 1e-3]
    recipe = {**tiny_recipe, "training": {**tiny_recipe["training"], "max_grad_norm": 1e30}}
    definition = {"name": "s", "recipe": recipe, "axes": {"training.learning_rate": rates}}
    done = study(definition, tmp_path)
    (failed,) = done.failed
    assert failed.record["reason"].startswith("DivergenceError: the loss became nan")
    assert [row["status"] for row in done.results()] == ["failed"] * 3 + ["done"] * 3
    assert [row["score"] is None for row in done.results()] == [True] * 3 + [False] * 3


@pytest.mark.usefixtures("quick_workers")
def test_the_run_of_a_worker_that_dies_is_resumed_by_another(
    whole: tuple[dict[str, Any], Study],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    killed: list[str] = []

    def kill_once(event: Event) -> None:
        if event.step == 2 and not killed:
            killed.append(event.run_id)
            (worker,) = _holders(tmp_path / "killed" / event.run_id)
            os.kill(worker, signal.SIGKILL)

    definition, done = whole
    again = study(definition, tmp_path, workers=2, listen=kill_once)
    assert len(killed) == 1
    assert again.failed == []
    assert "a worker was killed by signal 9" in caplog.text
    assert results(again.folder) == results(done.folder)


def test_a_run_whose_process_dies_again_and_again_is_given_up(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two runs one takes its process with it, each time; the calls are stopped for good."""
    recipe = {**tiny_recipe, "tasks": {"learning": [], "forgetting": []}}
    definition = {"name": "s", "recipe": recipe, "axes": {"seed": [0, 1]}}
    first, second = StudyRecipe.parse(definition).recipes()
    died: list[str] = []

    def die(run: RunFolder, **_: Any) -> None:
        run.update(status="running", requested=False)
        died.append(run.path.name)
        if run.path.name == first:
            raise SystemExit
        run.update(status="done")

    monkeypatch.setattr(studies, "execute_run", die)
    monkeypatch.setattr(studies, "Beat", lambda: Beat(poll=0.01))
    with pytest.raises(SystemExit):
        study(definition, tmp_path)
    how: dict[str, Any] = {"storage": None, "threads": 1, "listen": lambda event: None}
    while True:
        with suppress(SystemExit):
            studies.take_part(tmp_path / "s", **how)
            break
    found = {run.run_id: run for run in Study(tmp_path / "s").runs}
    assert died.count(first) == MOST_RETRIES
    assert died.count(second) == 1
    assert found[first].status == "failed"
    assert (
        "its process died 10 times; perhaps it ran out of memory" in found[first].record["reason"]
    )
    assert found[second].status == "done"
    monkeypatch.undo()
    assert study(definition, tmp_path).failed == []


def _holders(run: Path) -> list[int]:
    """The processes that have the lock file of a run open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it was closed meanwhile, or is somebody else's
            if os.readlink(link) == str(run / ".lock"):
                found.add(int(link.parts[2]))
    return sorted(found)


def test_a_run_in_other_hands_is_waited_for(
    whole: tuple[dict[str, Any], Study], tmp_path: Path
) -> None:
    definition, done = whole
    run_id, recipe = next(iter(StudyRecipe.parse(definition).recipes().items()))
    first = RunFolder(tmp_path / "killed" / run_id)
    prepare(first, recipe)
    held = threading.Event()
    others_done = threading.Semaphore(0)

    def hold_to_the_last() -> None:
        """What another process would do: a lock belongs to the opened file, not to the process."""
        with lock(first.lock):
            held.set()
            for _ in range(3):
                others_done.acquire(timeout=60)
            time.sleep(0.5)

    def listen(event: Event) -> None:
        if event.stage == "done":
            others_done.release()

    other = threading.Thread(target=hold_to_the_last)
    other.start()
    assert held.wait(60)
    again = study(definition, tmp_path, listen=listen)
    other.join()
    assert again.failed == []
    assert results(again.folder) == results(done.folder)


# ---- two calls at once ---------------------------------------------------------------------------


def _do_and_tell(definition: dict[str, Any], out: Path, events: Any) -> None:
    study(definition, out, listen=events.put)


def test_two_calls_on_one_folder_share_the_runs_and_end(
    whole: tuple[dict[str, Any], Study], tmp_path: Path
) -> None:
    definition, done = whole
    events = FORKSERVER.Queue()
    calls = [
        FORKSERVER.Process(target=_do_and_tell, args=(definition, tmp_path, events))
        for _ in range(2)
    ]
    for call in calls:
        call.start()
    told: list[Event] = []
    until = time.monotonic() + 300
    while time.monotonic() < until and (any(c.is_alive() for c in calls) or not events.empty()):
        with suppress(queue.Empty):
            told.append(events.get(timeout=0.5))
    ended = [call.exitcode for call in calls]
    for call in calls:
        call.kill()
        call.join()
    assert ended == [0, 0]
    trained = [event.run_id for event in told if event.stage == "train" and event.message]
    assert sorted(trained) == sorted(run.run_id for run in done.runs)
    assert results(tmp_path / "killed") == results(done.folder)


def test_another_definition_on_the_same_folder_takes_no_run_away(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = {**tiny_recipe, "tasks": {"learning": [], "forgetting": []}}
    first = {"name": "s", "recipe": recipe, "axes": {"seed": [0, 1]}}
    other = {"name": "s", "recipe": recipe, "axes": {"seed": [2]}}
    began: list[str] = []

    def start_the_other(event: Event) -> None:
        began.append(event.stage)
        if len(began) == 1:
            study(other, tmp_path)

    done = study(first, tmp_path, listen=start_the_other)
    assert [run.status for run in done.runs] == ["done"] * 3


# ---- damage --------------------------------------------------------------------------------------


def test_a_damaged_record_stops_its_run_alone(
    whole: tuple[dict[str, Any], Study], tmp_path: Path
) -> None:
    definition, done = whole
    shutil.copytree(done.folder, tmp_path / "killed")
    damaged = RunFolder(tmp_path / "killed" / done.runs[1].run_id)
    damaged.record.write_text('{"status": "do')
    (RunFolder(tmp_path / "killed" / done.runs[2].run_id).record).unlink()
    events: list[Event] = []
    again = study(definition, tmp_path, listen=events.append)
    (failed,) = again.failed
    assert failed.folder == damaged.path
    assert f"{damaged.record} is damaged" in failed.record["reason"]
    assert "delete it and repeat the command" in failed.record["reason"]
    assert [event.run_id for event in events if event.stage == "failed"] == [failed.run_id]
    undamaged = [row for row in results(done.folder) if row["run_id"] != failed.run_id]
    assert results(again.folder) == undamaged
    damaged.record.unlink()
    assert study(definition, tmp_path).failed == []
    assert results(again.folder) == results(done.folder)


@pytest.mark.parametrize("name", ["recipe.yaml", "../runs.json", "../study.yaml", "analysis.json"])
def test_other_damaged_files_are_written_anew(
    name: str, whole: tuple[dict[str, Any], Study], tmp_path: Path
) -> None:
    definition, done = whole
    shutil.copytree(done.folder, tmp_path / "killed")
    damaged = tmp_path / "killed" / done.runs[1].run_id / name
    damaged.write_bytes(b"\0: [")
    assert len(Study(tmp_path / "killed").results()) == (9 if name == "recipe.yaml" else 12)
    assert study(definition, tmp_path).failed == []
    assert results(tmp_path / "killed") == results(done.folder)


# ---- kill -9 -------------------------------------------------------------------------------------


def _do(definition: dict[str, Any], out: Path) -> None:
    study(definition, out)


def test_a_study_killed_at_random_moments_ends_with_the_same_numbers(
    whole: tuple[dict[str, Any], Study], tmp_path: Path
) -> None:
    definition, done = whole
    assert killed_until_done(_do, definition, tmp_path) > 0
    assert results(tmp_path / "killed") == results(done.folder)
    assert not list(tmp_path.rglob(".tmp-*"))


STUDY = """
import sys
python, *words = sys.argv[1:]
sys.executable = python  # of the workers
from forgetless.cli import main
main(["study", *words])
"""


def test_no_worker_outlives_a_killed_parent(
    tiny_base: Path, tiny_files: Path, tmp_path: Path, python: str
) -> None:
    file = tmp_path / "killed.yaml"
    file.write_text(json.dumps(study_of(tiny_base, tiny_files)))
    command = [python, "-c", STUDY, python, str(file), "--out", str(tmp_path), "--workers", "2"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    workers: list[Any] = []
    until = time.monotonic() + 120
    while len(workers) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        called = {"worker", str(tmp_path / "killed")}
        every = psutil.process_iter(["cmdline"])
        workers = [each for each in every if called <= {*(each.info["cmdline"] or [])}]
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert (len(gone), alive) == (2, [])
