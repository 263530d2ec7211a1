"""Studies on a Ray cluster of two nodes: one is lost in the middle, and Ctrl-C ends all workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from forgetless.cli.app import app
from forgetless.core.errors import UserError
from forgetless.core.files import read_json
from forgetless.studies import study as studies
from forgetless.studies.folder import RunFolder
from forgetless.studies.stages import Event, Listener
from forgetless.studies.study import Study, study
from tests import postgres
from tests.killing import results
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures", "tests.quick_python", "tests.postgres"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without processors and two nodes with one each, in processes of their own."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'forgetless[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # 15 waits for all other tests
        found = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        for _ in range(2):
            found.add_node(num_cpus=1)
        yield found
    for node in found.list_all_nodes():
        found.remove_node(node, allow_graceful=False)


def definition_of(base: Path, files: Path, steps: int, checkpoint_every: int) -> dict[str, Any]:
    changes = {"training.steps": steps, "training.checkpoint_every": checkpoint_every}
    return {"name": "s", "recipe": recipe_of(base, files, **changes), "axes": {"seed": [0, 1]}}


@pytest.fixture(scope="module")
def whole(
    tiny_base: Path, tiny_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Study]:
    """A study and its undisturbed run."""
    definition = definition_of(tiny_base, tiny_files, 40, 5)
    return definition, study(definition, tmp_path_factory.mktemp("whole"))


def in_no_hurry(first: int, hurry: Path) -> Callable[..., None]:
    """Takes part, with a second after each step from the `first` on, until there is a file.

    Events come twice a second, and a training is to be stopped before its end.
    """

    def take_part(folder: Path, *, listen: Listener, **how: Any) -> None:
        from time import sleep

        from forgetless.studies import study as studies

        def wait(event: Event) -> None:
            listen(event)
            for _ in range(20 if event.step >= first else 0):
                if hurry.exists():
                    return
                sleep(0.05)

        studies.take_part(folder, listen=wait, **how)

    return take_part


def test_the_runs_of_a_node_that_is_lost_are_resumed_on_another(
    cluster: Any,
    whole: tuple[dict[str, Any], Study],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost: dict[str, int] = {}
    events: list[Event] = []

    def lose_a_node(event: Event) -> None:
        events.append(event)
        holder = RunFolder(tmp_path / "s" / event.run_id).path / ".lock.holder"
        if event.step >= 20 and not lost and holder.exists():
            cluster.remove_node(
                node_of(read_json(holder)["process"], cluster), allow_graceful=False
            )
            lost[event.run_id] = event.step
            (tmp_path / "hurry").touch()

    definition, undisturbed = whole
    monkeypatch.setattr(studies, "take_part", in_no_hurry(20, tmp_path / "hurry"))
    done = study(definition, tmp_path, **on(cluster), listen=lose_a_node)
    assert results(done.folder) == results(undisturbed.folder)
    ((run_id, step),) = lost.items()
    resumed = {run.run_id: run.record["training"].get("resumed_from") for run in done.runs}
    assert (resumed.pop(run_id) or 0) >= step - 5
    assert set(resumed.values()) == {None}
    assert {event.run_id for event in events if event.stage == "done"} == {run_id, *resumed}


def test_a_cluster_without_a_shared_disk_resumes_from_a_store(
    cluster: Any,
    whole: tuple[dict[str, Any], Study],
    server: postgres.Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_part = in_no_hurry(20, tmp_path / "hurry")

    def on_its_own_disk(folder: Path, runs: list[RunFolder], **how: Any) -> None:
        import ray

        from forgetless.studies import study as studies
        from forgetless.studies.trials import Beat

        pytest.MonkeyPatch().setattr(studies, "Beat", lambda: Beat(interval=1, grace=3, poll=0.1))
        own = folder.parent / ray.get_runtime_context().get_node_id() / folder.name
        take_part(own, runs=[RunFolder(own / run.path.name) for run in runs], **how)

    cluster.add_node(num_cpus=1)
    lost: dict[str, int] = {}

    def lose_a_node(event: Event) -> None:
        holders = list(tmp_path.glob(f"*/s/{event.run_id}/.lock.holder"))
        if event.step >= 20 and not lost and holders:
            process = read_json(holders[0])["process"]
            cluster.remove_node(node_of(process, cluster), allow_graceful=False)
            lost[event.run_id] = event.step
            (tmp_path / "hurry").touch()

    definition, undisturbed = whole
    monkeypatch.setattr(studies, "take_part", on_its_own_disk)
    places: dict[str, Any] = {
        "storage": server.new_database(),
        "share": f"file://{tmp_path / 'store'}",
    }
    done = study(definition, tmp_path, **on(cluster), **places, listen=lose_a_node)
    assert results(done.folder) == results(undisturbed.folder)
    ((run_id, step),) = lost.items()
    resumed = {run.run_id: run.record["training"].get("resumed_from") for run in done.runs}
    assert (resumed.pop(run_id) or 0) >= step - 10
    assert set(resumed.values()) == {None}


def on(cluster: Any) -> dict[str, Any]:
    return {"on": "ray", "address": cluster.address}


def node_of(process: int, cluster: Any) -> Any:
    """The node that a process belongs to."""
    above = {parent.pid for parent in psutil.Process(process).parents()}
    for node in cluster.worker_nodes:
        (raylet,) = node.all_processes["raylet"]
        if raylet.process.pid in above:
            return node
    raise AssertionError("no node has it")


def test_runs_that_ctrl_c_stops_are_resumed(
    cluster: Any,
    whole: tuple[dict[str, Any], Study],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(event: Event) -> None:
        if event.step >= 10:
            raise KeyboardInterrupt

    definition, undisturbed = whole
    with monkeypatch.context() as patch:
        patch.setattr(studies, "take_part", in_no_hurry(10, tmp_path / "hurry"))
        with pytest.raises(KeyboardInterrupt):
            study(definition, tmp_path, workers=1, **on(cluster), listen=stop)
    kept = {
        path.parents[1].name: int(path.name.partition("-")[2])
        for path in (tmp_path / "s").glob("*/checkpoints/checkpoint-*")
    }
    assert Study(tmp_path / "s").failed, "it was stopped before its end"
    assert kept, "and after a checkpoint"
    done = study(definition, tmp_path)
    assert results(done.folder) == results(undisturbed.folder)
    for run in done.runs:
        step = run.record["training"].get("resumed_from") or 0
        assert step >= kept.get(run.run_id, 0)


def test_what_is_wrong_on_the_nodes_is_said(
    cluster: Any, whole: tuple[dict[str, Any], Study], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"every worker on Ray failed.*a storage is a URL such as"):
        study(whole[0], tmp_path, storage="nothing", workers=1, **on(cluster))
    with pytest.raises(
        UserError, match="no node has 2 CPUs, which the 2 processes of a run ask for"
    ):
        study(whole[0], tmp_path, processes=2, **on(cluster))


def test_a_node_with_room_for_it_does_a_run_by_two_processes(
    cluster: Any,
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    python: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_quick_processes(*where: Any, **how: Any) -> None:
        import sys

        from forgetless.studies import study as studies

        sys.executable = python
        studies.take_part(*where, **how)

    monkeypatch.setattr(studies, "take_part", with_quick_processes)
    node = cluster.add_node(num_cpus=2)
    (run,) = study({"name": "s", "recipe": tiny_recipe}, tmp_path, processes=2, **on(cluster)).runs
    cluster.remove_node(node)
    assert run.status == "done"
    assert run.record["hardware"]["processes"] == 2


def test_without_ray_it_is_said_what_to_install(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'forgetless\[ray\]'"):
        study({"name": "s", "recipe": tiny_recipe}, tmp_path, on="ray")


# ---- the files for clusters ----------------------------------------------------------------------

CLUSTERS = Path(__file__).parents[2] / "recipes" / "clusters"


def script_of(name: str) -> str:
    """What a file lets run on the first node."""
    text = (CLUSTERS / name).read_text()
    if name == "slurm.sh":
        return text.replace('"$@"', "study /shared/my-question.yaml --out /shared/runs")
    content = yaml.safe_load(text)
    script: str = content["run"] if name == "skypilot.yaml" else content["spec"]["entrypoint"]
    return script


@pytest.mark.parametrize("name", sorted(path.name for path in CLUSTERS.iterdir()))
def test_the_files_for_clusters_start_a_study(
    name: str, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """With stand-ins for what a cluster has; the command that comes of it is a good one."""
    stand_ins = {
        "scontrol": "echo one; echo two",
        "srun": '"$@"',
        "ray": '[ "$1 $2 $3" = "symmetric-run --address one:6379" ]; '
        'while [ "$1" != -- ]; do shift; done; shift; "$@"',
        "forgetless": 'printf "%s\\n" "$@"',
    }
    for program, script in stand_ins.items():
        path = tmp_path / "bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\nset -e\n{script}\n")
        path.chmod(0o755)
    definition = {"name": "s", "recipe": tiny_recipe, "axes": {"seed": [0, 1, 2]}}
    (tmp_path / "my-question.yaml").write_text(yaml.safe_dump(definition))
    around = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "one,two",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "4",
        "SKYPILOT_NODE_IPS": "one\ntwo",
        "SKYPILOT_NUM_NODES": "2",
    }
    script = script_of(name).replace("/shared", str(tmp_path))
    done = subprocess.run(["bash", "-c", script], env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = CliRunner().invoke(app, [*done.stdout.splitlines(), "--check"])
    assert "no problems; 3 runs" in found.stdout
