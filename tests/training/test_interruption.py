"""Ctrl-C and SIGTERM: the step is finished and saved, and the same call ends as if undisturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

from forgetless.adapters.attachment import attach
from forgetless.core.files import read_jsonl
from forgetless.studies.folder import run_folders
from forgetless.studies.stages import Event
from forgetless.studies.study import study
from forgetless.training import checkpoints
from forgetless.training.loop import TrainingResult, train
from forgetless.training.settings import TrainingSettings
from tests.families import FAMILIES, VOCAB
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures", "tests.quick_python"]


pytestmark = pytest.mark.usefixtures("interruptible")

TOKENIZER: Any = SimpleNamespace(pad_token_id=0)
STEPS = 12


def model() -> Any:
    return attach(FAMILIES["llama"].model(), "pissa", rank=4, alpha=4, dropout=0.1)


def rows() -> datasets.Dataset:
    drawn = torch.randint(3, VOCAB, (40, 9), generator=torch.Generator().manual_seed(0)).tolist()
    return datasets.Dataset.from_dict({"input_ids": drawn, "labels": drawn})


ROWS = rows()


def settings(**changes: Any) -> TrainingSettings:
    given = {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "log_every": 5}
    return TrainingSettings(**given | changes)


def fit(trained: Any, folder: Path, on_step: Any = None, **changes: Any) -> TrainingResult:
    return train(trained, TOKENIZER, ROWS, settings(**changes), folder, on_step=on_step)


def signals(step: int, *numbers: int) -> Callable[[int, int], None]:
    """Sends them to this very process after a step."""

    def send(done: int, steps: int) -> None:
        for number in numbers if done == step else ():
            os.kill(os.getpid(), number)
            time.sleep(0.001)  # pending signals arrive at the next instruction, in any order

    return send


def lines(folder: Path) -> list[dict[str, float]]:
    found = read_jsonl(folder / "log.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


# ---- in a plain call -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TrainingResult, Path]:
    """A model, how its undisturbed training ended, and the folder of that."""
    trained, folder = model(), tmp_path_factory.mktemp("whole")
    return trained, fit(trained, folder), folder


@pytest.mark.parametrize(
    ("step", "number"),
    [(7, signal.SIGINT), (5, signal.SIGTERM), (STEPS, signal.SIGINT)],
)
def test_the_step_is_saved_and_the_same_call_ends_as_if_undisturbed(
    step: int, number: signal.Signals, whole: tuple[Any, TrainingResult, Path], tmp_path: Path
) -> None:
    undisturbed, result, folder = whole
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step}, where it is saved"):
        fit(model(), tmp_path / "cut", signals(step, number))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    newest = checkpoints.newest(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    assert checkpoints.step_of(newest) == step

    again = model()
    found = fit(again, tmp_path / "cut")
    assert found.resumed_from == step
    assert found.final_loss == result.final_loss
    assert lines(tmp_path / "cut") == lines(folder)
    for name, weight in undisturbed.named_parameters():
        assert torch.equal(weight, again.get_parameter(name)), name


def test_several_interruptions_between_two_lines_of_the_log(tmp_path: Path) -> None:
    rare = {"log_every": 20, "gradient_accumulation": 2}
    fit(model(), tmp_path / "whole", **rare)
    for step in (3, 4, 9):
        with pytest.raises(KeyboardInterrupt):
            fit(model(), tmp_path / "cut", signals(step, signal.SIGINT), **rare)
    fit(model(), tmp_path / "cut", **rare)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    seconds = [line["seconds"] for line in read_jsonl(tmp_path / "cut" / "log.jsonl")]
    assert seconds == sorted(seconds)


def test_a_second_ctrl_c_ends_at_once_and_a_launchers_sigterm_does_not(tmp_path: Path) -> None:
    impatient = signals(3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(model(), tmp_path / "twice", impatient)
    assert checkpoints.newest(tmp_path / "twice" / "checkpoints") is None
    with pytest.raises(KeyboardInterrupt):
        fit(model(), tmp_path / "once", signals(3, signal.SIGINT, signal.SIGTERM, signal.SIGTERM))
    newest = checkpoints.newest(tmp_path / "once" / "checkpoints")
    assert newest is not None


def test_a_handler_that_somebody_chose_stays(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        fit(model(), tmp_path, signals(3, signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_a_thread_trains_without_signals(tmp_path: Path) -> None:
    done: list[TrainingResult] = []
    thread = threading.Thread(target=lambda: done.append(fit(model(), tmp_path, steps=2)))
    thread.start()
    thread.join()
    assert done[0].steps == 2


# ---- on the command line -------------------------------------------------------------------------


def stopped_while_training(
    python: str, number: signal.Signals, folder: Path, *arguments: str
) -> str:
    """What a command says that gets a signal some steps after its run's training began."""
    process = subprocess.Popen(
        [python, "-m", "forgetless", *arguments, "--out", str(folder.parent)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 240
        while not any(log.read_text().count("\n") > 2 for log in folder.glob("*/log.jsonl")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said
    return said


def test_ctrl_c_in_a_run_says_how_to_go_on(
    tiny_base: Path, tiny_files: Path, tmp_path: Path, python: str
) -> None:
    recipe = recipe_of(
        tiny_base, tiny_files, **{"training.steps": 5000, "training.checkpoint_every": 5000}
    )
    file = tmp_path / "long one.yaml"
    file.write_text(json.dumps(recipe))
    study_folder = tmp_path / "runs" / "long-one"
    said = stopped_while_training(python, signal.SIGINT, study_folder, "train", str(file))
    *_, last = said.strip().splitlines()
    assert last == (
        f"stopped; to go on: python -m forgetless train '{file}' --out {tmp_path / 'runs'}"
    )
    (folder,) = run_folders(study_folder)
    newest = checkpoints.newest(folder.checkpoints)
    assert newest is not None
    assert checkpoints.step_of(newest) == read_jsonl(folder.log)[-1]["step"]


def test_a_stopped_study_lets_its_workers_finish_their_steps(
    tiny_base: Path,
    tiny_files: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    python: str,
) -> None:
    monkeypatch.setattr(sys, "executable", python)  # of the workers
    changes = {"training.steps": 120, "training.checkpoint_every": 5000, "tasks": {}}
    definition = {"name": "s", "recipe": recipe_of(tiny_base, tiny_files, **changes)}

    def stop(event: Event) -> None:
        if event.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        study(definition, tmp_path / "cut", workers=2, listen=stop)
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "stopped" not in said  # that is for the command to say, and once

    (again,), (undisturbed,) = (study(definition, tmp_path / out).runs for out in ("cut", "whole"))
    assert 1 <= again.record["training"]["resumed_from"] < 120
    assert lines(again.folder) == lines(undisturbed.folder)
