"""Trials that processes share: each done once and none lost, whatever happens to a worker."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import pytest

from forgetless.core.errors import UserError
from forgetless.core.files import lock
from forgetless.studies import trials as scheduler
from forgetless.studies.trials import MOST_RETRIES, REASON, Beat, Direction, open_trials, work
from tests import postgres
from tests.killing import FORKSERVER

pytest_plugins = ["tests.tiny_fixtures", "tests.postgres"]

BEAT = Beat(interval=1, grace=3, poll=0.1)
VALUES: dict[str, Direction] = {"learned": "maximize", "forgotten": "minimize"}


@pytest.fixture(params=["journal", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """An empty storage; a test may ask for SQLite too."""
    if request.param == "journal":
        return None
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'trials.db'}"
    server: postgres.Server = request.getfixturevalue("server")
    return server.new_database()


def opened(url: str | None, folder: Path) -> Any:
    (trials,) = open_trials(url, folder, ["t"], VALUES, {"a": 1}, BEAT)
    return trials


def take_part(url: str | None, folder: Path, budget: int, seconds: float, shared: Path) -> None:
    """A worker whose trials are short: each has a folder of its own, like a run."""

    def do(trial: Any) -> tuple[float, float]:
        x = trial.suggest_float("x", 0.0, 1.0)
        with lock(shared / "runs" / f"{x}.lock"):
            done = shared / "runs" / f"{x}.done"
            if not done.exists():
                time.sleep(seconds)
                with (shared / "log").open("a") as log:
                    log.write(f"{x}\n")
                done.touch()
        return x, x

    work(opened(url, folder), do, folder, BEAT, budget=budget)


def begin(*arguments: Any) -> BaseProcess:
    process = FORKSERVER.Process(target=take_part, args=arguments)
    process.start()
    return process


def wait_for(count: int, shared: Path) -> None:
    """Wait until so many trials are done."""
    log = shared / "log"
    while not log.exists() or len(log.read_text().splitlines()) < count:
        time.sleep(0.05)


def require_each_once(url: str | None, folder: Path, shared: Path, budget: int) -> None:
    every = opened(url, folder).get_trials()
    finished = [trial for trial in every if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(finished) == budget
    assert not [t for t in every if not t.state.is_finished()]
    executed = (shared / "log").read_text().split()
    assert len(executed) == len(set(executed))
    assert {str(trial.params["x"]) for trial in finished} == set(executed)


@pytest.mark.parametrize("url", ["journal", "sqlite", "postgresql"], indirect=True)
def test_workers_that_start_at_once_meet_the_budget_to_the_trial(
    url: str | None, tmp_path: Path
) -> None:
    workers = [begin(url, tmp_path, 9, 0.02, tmp_path) for _ in range(5)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 5
    require_each_once(url, tmp_path, tmp_path, 9)


def test_machines_that_share_nothing_but_an_empty_database_start_at_once(
    server: postgres.Server, tmp_path: Path
) -> None:
    url = server.new_database()
    workers = [begin(url, tmp_path / str(i), 9, 0.02, tmp_path) for i in range(5)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 5
    require_each_once(url, tmp_path, tmp_path, 9)


def test_one_killed_and_one_stopped_beyond_its_heartbeat(url: str | None, tmp_path: Path) -> None:
    workers = [begin(url, tmp_path, 16, 0.3, tmp_path) for _ in range(4)]
    wait_for(2, tmp_path)
    killed, stopped, *others = workers
    os.kill(killed.pid or 0, signal.SIGKILL)
    os.kill(stopped.pid or 0, signal.SIGSTOP)
    killed.join()
    time.sleep(BEAT.grace + BEAT.interval)
    os.kill(stopped.pid or 0, signal.SIGCONT)
    for worker in [stopped, *others]:
        worker.join()
        assert worker.exitcode == 0
    require_each_once(url, tmp_path, tmp_path, 16)


def test_a_machine_that_vanishes_is_known_by_its_heartbeat(
    server: postgres.Server, tmp_path: Path
) -> None:
    url = server.new_database()
    lost, other = (begin(url, tmp_path / name, 4, 0.5, tmp_path) for name in ("lost", "other"))
    wait_for(1, tmp_path)
    lost.kill()
    lost.join()
    other.join()
    assert other.exitcode == 0
    require_each_once(url, tmp_path / "other", tmp_path, 4)


def test_a_database_that_is_restarted_is_waited_for(
    server: postgres.Server, tmp_path: Path
) -> None:
    url = server.new_database()
    workers = [begin(url, tmp_path, 12, 0.3, tmp_path) for _ in range(2)]
    wait_for(3, tmp_path)
    server.stop()
    time.sleep(1)
    server.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    require_each_once(url, tmp_path, tmp_path, 12)


def test_the_heartbeats_of_a_trial_outlast_a_restart_of_the_database(
    server: postgres.Server, tmp_path: Path
) -> None:
    trials = opened(server.new_database(), tmp_path)

    def outlast(trial: Any) -> tuple[float, float]:
        server.stop()
        time.sleep(2 * BEAT.interval)
        server.start()
        time.sleep(BEAT.grace + BEAT.interval)
        stale: list[int] = trials._storage._get_stale_trial_ids(trials._study_id)
        return float(len(stale)), 0.0

    work(trials, outlast, tmp_path, BEAT, budget=1)
    assert trials.get_trials()[0].values == [0.0, 0.0]


def test_a_database_that_is_restarted_while_trials_are_opened_is_asked_again(
    url: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Any = vars(optuna.Study)["user_attrs"].fget
    failures = [optuna.exceptions.StorageInternalError("gone")]

    def fail_once(trials: optuna.Study) -> Any:
        if failures:
            raise failures.pop()
        return read(trials)

    monkeypatch.setattr(optuna.Study, "user_attrs", property(fail_once))
    assert opened(url, tmp_path).get_trials() == []
    assert not failures


def test_killed_at_any_moment_a_search_ends_with_all_of_its_trials(tmp_path: Path) -> None:
    kills = 0
    while True:
        worker = begin(None, tmp_path, 8, 0.1, tmp_path)
        worker.join(0.3 + 0.37 * kills if kills < 6 else None)
        if worker.exitcode is not None:
            assert worker.exitcode == 0
            break
        worker.kill()
        worker.join()
        kills += 1
    assert kills
    require_each_once(None, tmp_path, tmp_path, 8)


def test_a_trial_that_fails_by_itself_counts_and_says_why(url: str | None, tmp_path: Path) -> None:
    def fail(trial: Any) -> tuple[float, float]:
        raise RuntimeError(f"out of luck {trial.number}")

    trials = opened(url, tmp_path)
    work(trials, fail, tmp_path, BEAT, budget=2)
    reasons = [trial.user_attrs[REASON] for trial in trials.get_trials()]
    assert reasons == ["RuntimeError: out of luck 0", "RuntimeError: out of luck 1"]


def test_a_trial_that_the_storage_failed_is_done_again(url: str | None, tmp_path: Path) -> None:
    seen = []

    def do(trial: Any) -> tuple[float, float]:
        seen.append(trial.suggest_float("x", 0.0, 1.0))
        if len(seen) == 1:
            raise optuna.exceptions.StorageInternalError("the database went away")
        return 0.0, 0.0

    trials = opened(url, tmp_path)
    work(trials, do, tmp_path, BEAT, budget=1)
    assert len(seen) == 2
    assert len(set(seen)) == 1
    assert REASON not in trials.get_trials()[-1].user_attrs


def test_what_ctrl_c_interrupted_is_asked_for_again(url: str | None, tmp_path: Path) -> None:
    seen = []

    def do(trial: Any) -> tuple[float, float]:
        seen.append(trial.suggest_float("x", 0.0, 1.0))
        if len(seen) == 1:
            raise KeyboardInterrupt
        return 0.0, 0.0

    trials = opened(url, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        work(trials, do, tmp_path, BEAT, budget=2)
    work(trials, do, tmp_path, BEAT, budget=2)
    assert len(seen) == 3
    assert seen.count(seen[0]) == 2


def test_a_trial_whose_workers_die_again_and_again_is_given_up(tmp_path: Path) -> None:
    def die(trial: Any) -> tuple[float, float]:
        raise KeyboardInterrupt

    trials = opened(None, tmp_path)
    for _ in range(1 + MOST_RETRIES):
        with pytest.raises(KeyboardInterrupt):
            work(trials, die, tmp_path, BEAT, budget=1)
    work(trials, die, tmp_path, BEAT, budget=1)
    (trial,) = trials.get_trials()
    assert trial.user_attrs[REASON] == f"UserError: its process died {1 + MOST_RETRIES} times"
    assert list((tmp_path / "workers").iterdir()) == []


def test_a_worker_that_seemed_dead_and_is_not_reports(url: str | None, tmp_path: Path) -> None:
    began = []

    def do(trial: Any) -> tuple[float, float]:
        began.append(trial.number)
        trials._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.WAITING)
        return 1.0, 2.0

    trials = opened(url, tmp_path)
    work(trials, do, tmp_path, BEAT, budget=1)
    assert began == [0]
    assert [trial.values for trial in trials.get_trials()] == [[1.0, 2.0]]


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used")
def test_a_worker_that_dies_before_it_says_who_it_is_loses_nothing(
    url: str | None, tmp_path: Path
) -> None:
    opened(url, tmp_path).ask()  # and dies
    trials = opened(url, tmp_path)
    work(trials, lambda trial: (0.0, 0.0), tmp_path, BEAT, budget=2)
    finished = trials.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    assert [trial.number for trial in finished] == [0, 1]


def test_after_its_time_no_trial_is_begun(tmp_path: Path) -> None:
    trials = opened(None, tmp_path)
    work(trials, lambda trial: (0.0, 0.0), tmp_path, BEAT, budget=None, until=time.time() - 1)
    assert trials.get_trials() == []


def test_what_a_dead_worker_left_is_done_before_the_time_is_up(tmp_path: Path) -> None:
    def do(trial: Any) -> tuple[float, float]:
        time.sleep(0.1)
        return 0.0, 0.0

    trials, until = opened(None, tmp_path), time.time() + 20 * BEAT.poll
    trials.ask()  # and dies
    work(trials, do, tmp_path, BEAT, budget=None, until=until)
    assert trials.get_trials()[0].state == optuna.trial.TrialState.COMPLETE


def test_a_name_has_one_definition(url: str | None, tmp_path: Path) -> None:
    opened(url, tmp_path)
    with pytest.raises(UserError, match="begun with another a"):
        open_trials(url, tmp_path, ["t"], VALUES, {"a": 2}, BEAT)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("trials.db", "a storage is a URL such as"),
        ("nothing://here", "sqlalchemy.dialects:nothing"),
        ("postgresql://me:secret@127.0.0.1:1/none", "me:.*@127.0.0.1:1/none cannot be used: "),
    ],
)
def test_a_storage_that_cannot_be_used_is_named(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_OPENING_SECONDS", 0)
    with pytest.raises(UserError, match=message) as caught:
        opened(url, tmp_path)
    assert "secret" not in str(caught.value)
