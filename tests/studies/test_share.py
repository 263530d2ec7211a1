"""Runs in an object store: machines that share no folder, only that and a database."""

from __future__ import annotations

import json
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.errors import UserError
from forgetless.core.files import write_json
from forgetless.studies import study as studies
from forgetless.studies.folder import RunFolder
from forgetless.studies.share import Share
from forgetless.studies.study import study
from forgetless.studies.trials import Beat
from forgetless.training.checkpoints import seal
from tests import postgres
from tests.killing import FORKSERVER, results
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures", "tests.postgres"]


@pytest.fixture
def here(tmp_path: Path) -> RunFolder:
    """A run with a sealed checkpoint, and one that is half written."""
    run = RunFolder(tmp_path / "here" / "r")
    write_json(run.record, {"status": "running"})
    run.log.write_text('{"step": 1}\n')
    for step in (1, 2):
        checkpoint = run.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_bytes(bytes(1000) + bytes([step]))
    seal(run.checkpoints / "checkpoint-1", {})
    (run.path / ".lock").touch()
    return run


@pytest.fixture
def there(tmp_path: Path) -> RunFolder:
    """Its folder on another machine."""
    return RunFolder(tmp_path / "there" / "r")


def files(run: RunFolder) -> dict[str, bytes]:
    """What is in a folder, but for what is for this machine alone."""
    found = [path for path in run.path.rglob("*") if path.is_file() and path.name[0] != "."]
    return {path.relative_to(run.path).as_posix(): path.read_bytes() for path in found}


def objects(store: Path) -> list[Path]:
    return sorted((store / "s" / "r" / "objects").iterdir())


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_what_is_whole_arrives_as_it_is(
    kind: str, here: RunFolder, there: RunFolder, tmp_path: Path
) -> None:
    share = Share(f"{kind}://{tmp_path / 'store'}", "s")
    share.put(here)
    assert share.record(there) == {"status": "running"}
    share.fetch(there)
    expected = files(here)
    expected.pop("checkpoints/checkpoint-2/weights")
    assert files(there) == expected


def test_what_is_gone_is_gone_everywhere(here: RunFolder, there: RunFolder, tmp_path: Path) -> None:
    store = tmp_path / "store"
    share = Share(f"file://{store}", "s")
    share.put(here)
    share.fetch(there)
    there.record.unlink()
    write_json(there.record, {"status": "done"})
    shutil.rmtree(there.checkpoints)
    share.put(there)
    assert len(objects(store)) == 2
    shutil.rmtree(here.checkpoints / "checkpoint-2")
    share.fetch(here)
    assert files(here) == files(there)
    assert (here.path / ".lock").exists()


def test_what_was_done_here_since_is_not_replaced_by_what_was_uploaded(
    here: RunFolder, tmp_path: Path
) -> None:
    share = Share(f"file://{tmp_path / 'store'}", "s")
    share.put(here)
    here.log.write_text("more\n")
    share.fetch(here)
    assert here.log.read_text() == "more\n"


def test_an_upload_that_is_cut_short_lists_nothing_new(
    here: RunFolder, there: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = Share(f"file://{tmp_path / 'store'}", "s")
    share.put(here)
    before = files(here)
    before.pop("checkpoints/checkpoint-2/weights")
    seal(here.checkpoints / "checkpoint-2", {})

    def die(*_: Any, **__: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(share._store, "pipe_file", die)
    with pytest.raises(OSError, match="no connection"):
        share.put(here)
    share.fetch(there)
    assert files(there) == before


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_an_object_that_is_not_what_was_uploaded_is_not_taken(
    damage: str,
    here: RunFolder,
    there: RunFolder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    share = Share(f"file://{tmp_path / 'store'}", "s")
    share.put(here)
    place = next(path for path in objects(tmp_path / "store") if path.stat().st_size > 1000)
    place.write_bytes(place.read_bytes()[:-1]) if damage == "cut" else place.unlink()
    share.fetch(there)
    assert files(there) == {}
    assert "r in the store is not taken" in caplog.text


def test_a_list_that_is_damaged_is_as_good_as_none(
    here: RunFolder, there: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    share = Share(f"file://{tmp_path / 'store'}", "s")
    share.put(here)
    listing = tmp_path / "store" / "s" / "r" / "run.json"
    content = json.loads(listing.read_text())
    listing.write_text(json.dumps({**content, "record": {"status": "done"}}))
    assert share.record(there) == {}
    listing.write_text(listing.read_text()[:-9])
    assert share.record(there) == {}


def test_what_a_store_needs_is_said(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    content = {"name": "s", "recipe": tiny_recipe}
    with pytest.raises(UserError, match=r"file:///store needs a database too.*--storage postgres"):
        study(content, tmp_path, share="file:///store")
    with pytest.raises(UserError, match=r"nothing://here cannot be used: .*pip install s3fs"):
        study(content, tmp_path, storage="sqlite:///a.db", share="nothing://here")


def call(definition: dict[str, Any], out: Path, url: str, share: str) -> None:
    """What a command does on a machine of its own."""
    patch = pytest.MonkeyPatch()
    patch.setattr(studies, "Beat", lambda: Beat(interval=1, grace=3, poll=0.1))
    assert study(definition, out, storage=url, share=share).failed == []


def begin(*arguments: Any) -> BaseProcess:
    process = FORKSERVER.Process(target=call, args=arguments)
    process.start()
    return process


def uploaded_steps(store: Path) -> dict[str, int]:
    """The step of the newest checkpoint in the store, by run."""
    found = {}
    for listing in store.glob("s/*/run.json"):
        names = json.loads(listing.read_text() or "{}").get("files", {})
        steps = [int(name.split("/")[1].split("-")[1]) for name in names if "checkpoint-" in name]
        found[listing.parent.name] = max(steps, default=0)
    return found


def test_a_run_goes_on_elsewhere_at_its_last_checkpoint(
    server: postgres.Server, tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    changes = {"training.steps": 120, "training.checkpoint_every": 10}
    recipe = recipe_of(tiny_base, tiny_files, **changes)
    definition = {"name": "s", "recipe": recipe, "axes": {"seed": [0, 1]}}
    whole = study(definition, tmp_path / "whole")
    store, url = tmp_path / "store", server.new_database()
    machines = [tmp_path / "lost", tmp_path / "other"]
    lost, other = (begin(definition, machine, url, f"file://{store}") for machine in machines)

    def by_lost() -> dict[str, int]:
        begun = {path.parent.name for path in machines[0].glob("s/*/checkpoints")}
        return {run_id: step for run_id, step in uploaded_steps(store).items() if run_id in begun}

    while not any(step >= 20 for step in by_lost().values()):
        time.sleep(0.02)
        assert lost.is_alive()
    lost.kill()
    lost.join()
    ((run_id, step),) = by_lost().items()
    shutil.rmtree(machines[0])
    other.join()
    assert other.exitcode == 0
    assert results(tmp_path / "other" / "s") == results(whole.folder)
    record = RunFolder(tmp_path / "other" / "s" / run_id).read()
    assert record["training"]["resumed_from"] == step
    # Whoever comes later finds everything done.
    late = study(definition, tmp_path / "late", storage=url, share=f"file://{store}")
    assert results(late.folder) == results(whole.folder)
    seconds = [run.record["seconds"]["train"] for run in late.runs]
    assert seconds == [
        RunFolder(tmp_path / "other" / "s" / run.run_id).read()["seconds"]["train"]
        for run in late.runs
    ]


def test_a_task_goes_on_from_what_another_machine_trained(
    server: postgres.Server, tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    from forgetless.studies.sequence import sequence
    from tests.sequences import definition_of

    content = {**definition_of(tiny_base, tiny_files), "seeds": [0], "name": "s"}
    whole = sequence(content, tmp_path / "whole")
    url, share = server.new_database(), f"file://{tmp_path / 'store'}"
    first, *_ = whole.runs
    one = RunFolder(tmp_path / "one" / "s" / first.run_id)
    sequence(content, tmp_path / "one", storage=url, share=share)
    assert one.read()["status"] == "done"
    done = sequence(content, tmp_path / "other", storage=url, share=share)
    assert done.matrices["sequences"] == whole.matrices["sequences"]
