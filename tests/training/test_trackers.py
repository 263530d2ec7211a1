"""Trackers: what they are told of a run, and that a resumed run goes on."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from forgetless.core.errors import RecipeError
from forgetless.core.files import read_jsonl
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.studies.run import run
from forgetless.training.forgetting import ForgettingCallback
from forgetless.training.loop import train
from forgetless.training.trackers import Trackers
from tests.tiny import tokenizer
from tests.training.test_interruption import ROWS, STEPS, TOKENIZER, model, settings, signals

pytest_plugins = ["tests.tiny_fixtures"]
pytestmark = pytest.mark.usefixtures("interruptible")


def fit(folder: Path, tracker: str, on_step: Any = None, **more: Any) -> Any:
    given = settings(report_to=[tracker])
    return train(model(), TOKENIZER, ROWS, given, folder, on_step=on_step, **more)


# ---- TensorBoard, the real one -------------------------------------------------------------------


def test_tensorboard_has_the_loss_the_penalty_and_the_probes_of_the_whole_run(
    tmp_path: Path,
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "study" / "pissa-1"
    old = tmp_path / "old.txt"
    old.write_text("what was known before " * 3)  # a line end is no word of this model

    def attempt(on_step: Any = None) -> None:
        probes = ForgettingCallback(old, every=6, tokenizer=tokenizer())
        more = {"probes": probes, "penalties": [{"kind": "l2_start", "weight": 0.1}]}
        fit(folder, "tensorboard", on_step, **more)

    with pytest.raises(KeyboardInterrupt):
        attempt(signals(7, 2))
    attempt()
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()

    def curve(name: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(name)}

    lines = read_jsonl(folder / "log.jsonl")
    written = {line["step"]: line for line in lines if "loss" in line}
    assert curve("train/loss") == pytest.approx({s: line["loss"] for s, line in written.items()})
    assert curve("train/penalty") == pytest.approx(
        {step: line["penalty"] for step, line in written.items()}
    )
    assert list(curve("train/forgetting/kl")) == [0, 6, STEPS]
    assert curve("train/forgetting/kl")[STEPS] > 0


# ---- those that are not installed for the tests: stand-ins with the calls that transformers makes


class Recorded(ModuleType):
    """A package that writes down how it is used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = "9.9.9"
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.run: Any = None


def _wandb() -> dict[str, ModuleType]:
    package, config = Recorded("wandb"), ModuleType("wandb.sdk.lib.config_util")
    config.ConfigError = ValueError  # type: ignore[attr-defined]

    def init(**given: Any) -> None:
        chosen = {key: value for key, value in os.environ.items() if key.startswith("WANDB_")}
        package.begun.append({**given, **chosen})
        package.run = SimpleNamespace(_label=lambda **_: None, summary={})

    def finish() -> None:
        package.run = None

    package.__dict__.update(init=init, finish=finish, config={}, log=package.logged.append)
    names = ("wandb.sdk", "wandb.sdk.lib")
    return {
        "wandb": package,
        **{name: ModuleType(name) for name in names},
        "wandb.sdk.lib.config_util": config,
    }


def _trackio() -> dict[str, ModuleType]:
    package = Recorded("trackio")
    space = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
    package.__dict__.update(
        init=lambda **given: package.begun.append(given),
        finish=lambda: None,
        config={},
        log=package.logged.append,
        context_vars=space,
    )
    return {"trackio": package}


def _mlflow() -> dict[str, ModuleType]:
    package = Recorded("mlflow")

    def start_run(**given: Any) -> None:
        name = os.environ.pop("MLFLOW_RUN_ID", f"id-{len(package.begun)}")
        experiment = os.environ["MLFLOW_EXPERIMENT_NAME"]
        package.begun.append({**given, "id": name, "experiment": experiment})
        package.run = SimpleNamespace(info=SimpleNamespace(run_id=name))

    def end_run() -> None:
        package.run = None

    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100)
    package.__dict__.update(
        utils=SimpleNamespace(validation=limits),
        start_run=start_run,
        end_run=end_run,
        active_run=lambda: package.run,
        is_tracking_uri_set=lambda: True,
        get_tracking_uri=lambda: "here",
        set_experiment=lambda name: None,
        log_params=lambda values, **_: None,
        log_metrics=lambda metrics, step, **_: package.logged.append({**metrics, "step": step}),
    )
    return {"mlflow": package}


@pytest.fixture
def package(request: pytest.FixtureRequest) -> Iterator[Recorded]:
    """The stand-in of a tracker, which nothing else sees."""
    modules = {"wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}[request.param]()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield modules[request.param]  # type: ignore[misc]


BEGINNINGS: dict[str, list[dict[str, str]]] = {
    "wandb": [
        {
            "project": "study",
            "name": "pissa-1",
            "WANDB_PROJECT": "study",
            "WANDB_RUN_ID": "pissa-1",
            "WANDB_RESUME": "allow",
        }
    ]
    * 2,
    "trackio": [{"project": "study", "name": "pissa-1", "resume": "allow"}] * 2,
    "mlflow": [{"run_name": "pissa-1", "id": "id-0", "experiment": "study"}] * 2,
}


@pytest.mark.parametrize("package", BEGINNINGS, indirect=True)
def test_a_run_has_the_name_of_its_folder_and_goes_on_when_resumed(
    package: Recorded, tmp_path: Path
) -> None:
    name, folder = package.__name__, tmp_path / "study" / "pissa-1"
    environment = dict(os.environ)
    with pytest.raises(KeyboardInterrupt):
        fit(folder, name, signals(7, 2))
    assert package.run is None
    fit(folder, name)
    assert dict(os.environ) == environment
    assert package.run is None
    found = [
        {key: value for key, value in begun.items() if key in BEGINNINGS[name][0]}
        for begun in package.begun
    ]
    assert found == BEGINNINGS[name]
    losses = [
        value
        for values in package.logged
        for key, value in values.items()
        if key.endswith("loss") and key != "train_loss"
    ]
    assert losses == [line["loss"] for line in read_jsonl(folder / "log.jsonl")]


def test_what_the_user_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with Trackers(["wandb"], tmp_path / "study" / "run", None).named():
        assert os.environ["WANDB_PROJECT"] == "mine"
        assert os.environ["WANDB_RUN_ID"] == "run"
    assert os.environ["WANDB_PROJECT"] == "mine"
    assert "WANDB_RUN_ID" not in os.environ


# ---- recipes -------------------------------------------------------------------------------------


def test_a_missing_package_is_named_before_any_weight_is_loaded(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    recipe = Recipe.parse(tiny_recipe, {"training.report_to": ["wandb"]})
    with pytest.raises(RecipeError) as caught:
        run(recipe, tmp_path)
    assert caught.value.problems == [
        "training.report_to: 'wandb' is not installed; pip install wandb, or leave it out: the "
        "run's log.jsonl has the same numbers"
    ]
    assert not list(tmp_path.iterdir())


def test_trackers_decide_no_weight(tiny_recipe: dict[str, Any]) -> None:
    recipe = Recipe.parse(tiny_recipe)
    assert run_id(recipe.override({"training.report_to": ["mlflow"]})) == run_id(recipe)
