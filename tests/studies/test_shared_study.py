"""Studies and sequences that several calls do at once: each run done once, and none is lost."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.files import lock, write_json
from forgetless.recipes.recipe import Recipe
from forgetless.scores.files import PHASES
from forgetless.studies import study as studies
from forgetless.studies.folder import RunFolder, planned
from forgetless.studies.sequence import sequence
from forgetless.studies.study import study
from forgetless.studies.trials import Beat
from tests import postgres
from tests.killing import FORKSERVER, draws
from tests.sequences import definition_of

pytest_plugins = ["tests.tiny_fixtures", "tests.postgres"]

BEAT = Beat(interval=1, grace=3, poll=0.1)
DO = {"study": study, "sequence": sequence}


def stand_in(run: RunFolder, **_: Any) -> None:
    """Takes the place of training; fails where a run is trained twice or too early."""
    # A call that comes later may just go through it once more.
    assert run.before is None or (run.before.path / "trained").exists()
    run.update(status="running", requested=False)
    if not (run.path / "trained").exists():
        time.sleep(0.3)
        (run.path / "trained").open("x").close()
    recipe = Recipe.load(run.recipe)
    tasks = {"sums": "learning", "prose": "forgetting"}
    for place, task in enumerate(tasks):
        value = recipe.training.learning_rate + place + recipe.seed
        for phase in PHASES:
            score = {"value": value, "metric": "share", "higher_is_better": True, "n": 10}
            write_json(run.scores(phase, task), score)
    run.update(status="done", tasks=tasks)


def call(kind: str, definition: dict[str, Any], out: Path, url: str | None) -> None:
    """What a command does, but for training."""
    patch = pytest.MonkeyPatch()
    patch.setattr(studies, "execute_run", stand_in)
    patch.setattr(studies, "Beat", lambda: BEAT)
    done = DO[kind](definition, out, storage=url)
    assert [run.record.get("reason") for run in done.failed] == []


def begin(*arguments: Any) -> BaseProcess:
    process = FORKSERVER.Process(target=call, args=arguments)
    process.start()
    return process


def disturbed(
    kind: str, definition: dict[str, Any], out: Path, server: postgres.Server | None
) -> None:
    """Four calls at once: one is killed, one stopped beyond its heartbeat, the server restarted.

    Each when so many of the twelve runs are trained: none of the calls can have ended by then.
    """
    draw = draws()
    url = server.new_database() if server else None
    calls = [begin(kind, definition, out, url) for _ in range(4)]
    killed, stopped, *others = calls
    while not list(out.glob("*/*/run.json")):
        time.sleep(0.02)

    def wait_for(trained: int) -> None:
        while len(list(out.glob("*/*/trained"))) < trained:
            assert all(call.is_alive() for call in (stopped, *others))
            time.sleep(0.02)

    wait_for(draw.randint(0, 3))
    killed.kill()
    wait_for(draw.randint(3, 6))
    os.kill(stopped.pid or 0, signal.SIGSTOP)
    time.sleep(draw.uniform(0, 1))
    if server:
        server.stop()
        time.sleep(draw.uniform(0, 1))
        server.start()
    time.sleep(BEAT.grace + BEAT.interval)
    os.kill(stopped.pid or 0, signal.SIGCONT)
    for process in (killed, stopped, *others):
        process.join()
    assert [process.exitcode for process in (stopped, *others)] == [0, 0, 0]


def definition(kind: str, recipe: dict[str, Any], base: Path, files: Path) -> dict[str, Any]:
    """Twelve runs; of the sequence six begin where others ended."""
    if kind == "study":
        return {"name": "s", "recipe": recipe, "axes": {"seed": list(range(12))}}
    names = ["two", "three", "four"]
    content = {**definition_of(base, files), "seeds": [0, 1], "name": "s"}
    return {**content, "orders": [[one, other] for one in names for other in names if one < other]}


def require_the_same(one: Path, other: Path) -> None:
    for name in ("results.csv", "sequence.json"):
        paths = [folder / "s" / "report" / name for folder in (one, other)]
        assert paths[0].exists() == paths[1].exists()
        if paths[0].exists():
            assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(("kind", "storage"), [("study", "journal"), ("sequence", "postgresql")])
def test_killed_stopped_and_with_the_database_restarted(
    kind: str,
    storage: str,
    tiny_recipe: dict[str, Any],
    tiny_base: Path,
    tiny_files: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    server = request.getfixturevalue("server") if storage == "postgresql" else None
    content = definition(kind, tiny_recipe, tiny_base, tiny_files)
    whole = begin(kind, content, tmp_path / "whole", None)
    whole.join()
    assert whole.exitcode == 0
    disturbed(kind, content, tmp_path / "cut", server)
    require_the_same(tmp_path / "whole", tmp_path / "cut")


def test_five_calls_at_once_on_an_empty_database(
    server: postgres.Server, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    content = {"name": "s", "recipe": tiny_recipe, "axes": {"seed": list(range(10))}}
    url = server.new_database()
    calls = [begin("study", content, tmp_path, url) for _ in range(5)]
    for process in calls:
        process.join()
    assert [process.exitcode for process in calls] == [0] * 5


def test_folders_of_one_name_in_one_database_have_runs_of_their_own(
    server: postgres.Server, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    content = {"name": "s", "recipe": tiny_recipe, "axes": {"seed": [0, 1]}}
    url = server.new_database()
    calls = [begin("study", content, tmp_path / name, url) for name in ("one", "other")]
    for process in calls:
        process.join()
    assert [process.exitcode for process in calls] == [0, 0]
    require_the_same(tmp_path / "one", tmp_path / "other")


def test_what_a_definition_leaves_out_is_not_done(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that was stopped has asked for runs that the next one no longer has."""

    def stop(run: RunFolder, **_: Any) -> None:
        raise KeyboardInterrupt

    content = {"name": "s", "recipe": tiny_recipe, "axes": {"seed": [0, 1, 2]}}
    monkeypatch.setattr(studies, "execute_run", stop)
    with pytest.raises(KeyboardInterrupt):
        study(content, tmp_path)
    began: list[str] = []

    def note(run: RunFolder, **how: Any) -> None:
        began.append(run.path.name)
        stand_in(run, **how)

    monkeypatch.setattr(studies, "execute_run", note)
    study({**content, "axes": {"seed": [2]}}, tmp_path)
    assert began == [run.path.name for run in planned(tmp_path / "s")]


def test_a_run_in_other_hands_is_the_last_to_be_waited_for(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"name": "s", "recipe": tiny_recipe, "axes": {"seed": [0, 1, 2]}}
    began: list[str] = []

    def note(run: RunFolder, **how: Any) -> None:
        began.append(run.path.name)
        stand_in(run, **how)
        if len(began) == 2:
            held.__exit__(None, None, None)

    monkeypatch.setattr(studies, "execute_run", stand_in)
    first, *others = [run.run_id for run in study(content, tmp_path).runs]
    monkeypatch.setattr(studies, "execute_run", note)
    RunFolder(tmp_path / "s" / first).update(status="running")
    held = lock(RunFolder(tmp_path / "s" / first).lock)
    held.__enter__()
    assert study(content, tmp_path).failed == []
    assert began == [*others, first]


def test_a_run_that_another_call_goes_through_again_has_not_failed(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "execute_run", stand_in)
    done = study({"name": "s", "recipe": tiny_recipe, "axes": {"seed": [0, 1]}}, tmp_path)
    run = RunFolder(done.runs[0].folder)
    run.update(status="running")
    assert [failed.folder for failed in done.failed] == [run.path]  # its process died
    with lock(run.lock):
        assert done.failed == []
