"""A recipe's learning rate, found by short trainings before the run: `forgetless run --find-lr`."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from forgetless.core.errors import RecipeError, UserError
from forgetless.core.files import folder_name, lock, read_json, remove, write_json
from forgetless.data.modality import modality_of
from forgetless.data.settings import DATA
from forgetless.data.texts import SELF
from forgetless.recipes.checking import check
from forgetless.recipes.identity import run_id
from forgetless.recipes.measuring import probed
from forgetless.recipes.recipe import Recipe
from forgetless.studies.folder import RunFolder
from forgetless.studies.out_of_memory import naming_what_takes_less
from forgetless.studies.run import torch_threads
from forgetless.studies.stages import Listener, Stages
from forgetless.training.launch import this_launch
from forgetless.training.probes import LIMIT
from forgetless.training.rates import Trial, Verdict, find_learning_rate, grid, judge, some_steps
from forgetless.training.schedules import total_steps


@dataclass(frozen=True)
class RateSearch:
    """What was tried, and what came of it.

    Attributes:
        recipe: the one that was given, at the highest stable rate.
        file: JSON with all of it.
    """

    recipe: Recipe
    steps: int
    trials: list[Trial]
    verdicts: list[Verdict]
    file: Path

    @property
    def rate(self) -> float:
        """The highest stable rate."""
        return self.recipe.training.learning_rate


def find_rate(
    recipe: Recipe,
    out: str | Path = "runs",
    study: str | None = None,
    *,
    rates: Sequence[float] | None = None,
    steps: int | None = None,
    threads: int | None = None,
    listen: Listener | None = None,
) -> RateSearch:
    """Train briefly at several rates and take the highest stable one, see `training.rates`.

    What was tried lies in the study's ``shared/rates``; the same call reads it from there, and one
    that was stopped is resumed.

    Args:
        recipe: the recipe, whose own rate is the centre of the rates where none are given.
        out: as for `forgetless.run`.
        study: as for `forgetless.run`.
        rates: at least two; None for six over two decades.
        steps: of a trial; None for a twentieth of the training, at least 20 and at most 100.
        threads: as for `forgetless.run`.
        listen: called with an `Event` for each stage and each step.

    Raises:
        RecipeError: everything that is wrong with the recipe, before any weight is loaded.
        UserError: no rate is stable, or the rates cannot be compared.
    """
    rates = sorted(set(rates or grid(recipe.training.learning_rate)))
    if len(rates) < 2 or rates[0] <= 0:
        raise UserError(f"give at least two rates, all above 0; got {rates}")
    if this_launch().processes > 1:
        raise UserError("the rate is found by one process; give training.learning_rate instead")
    if problems := check(recipe):
        raise RecipeError(recipe.name or "recipe", problems)
    # All that decides the weights but the rate itself, and what is tried and measured.
    decides = [run_id(_at(recipe, 1.0)), rates, steps, _kept_texts(recipe)]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:10]
    folder = Path(out) / folder_name(study or recipe.name or "single")
    file, work = folder / "shared" / "rates" / f"{key}.json", RunFolder(folder / f"rates-{key}")
    with lock(file.with_suffix(".lock")):
        if not read_json(file, damaged_as_missing=True):
            stages = Stages(work, recipe, listen or (lambda event: None))
            with torch_threads(threads, recipe.base):
                write_json(file, _tried(stages, rates, steps), checked=True)
        found = read_json(file)
        trials = [Trial(**trial) for trial in found["trials"]]
        try:
            verdicts, rate = judge(trials, found["steps"])
            chosen = _at(recipe, rate)
            _hand_over(work, RunFolder(folder / run_id(chosen)))
        finally:
            remove(work.path)
    return RateSearch(chosen, found["steps"], trials, verdicts, file)


def _at(recipe: Recipe, rate: float) -> Recipe:
    training = recipe.training.model_copy(update={"learning_rate": rate})
    return recipe.model_copy(update={"training": training})


def _kept_texts(recipe: Recipe) -> list[Any]:
    """What to measure forgetting on, where the recipe has something that costs little."""
    if recipe.probes.forgetting:
        return probed(recipe).forgetting
    source, kind = recipe.calibration.source, modality_of(recipe.base).distance_task
    is_named = isinstance(source, str) and source not in (SELF, DATA, "auto")
    if recipe.adapter.method == "full" or not is_named:
        return []
    return [source] if kind == "kl" else [{"kind": kind, "path": source, "limit": LIMIT}]


def _tried(stages: Stages, rates: Sequence[float], steps: int | None) -> dict[str, Any]:
    """The trials, as JSON values."""
    recipe = stages.recipe
    stages.require_fitting_data()
    with naming_what_takes_less("statistics"):
        collected = stages.collect_statistics()
    if collected:
        stages.tell("find rate", f"statistics of {collected}")
    with naming_what_takes_less("start"):
        stages.start()
    trials = []
    with naming_what_takes_less("train"):
        model, rows = stages.to_train()
        steps = steps or some_steps(total_steps(rows, recipe.training))
        for trial in find_learning_rate(
            model,
            stages.processor,
            rows,
            recipe.training,
            stages.folder.path / "trials",
            rates=rates,
            steps=steps,
            seed=recipe.seed,
            penalties=recipe.penalties,
            forgetting=_kept_texts(recipe) if isinstance(model, PeftModel) else (),
        ):
            trials.append(asdict(trial))
            last = f"loss {trial.losses[-1]:.4g}" if trial.losses else "no loss"
            after = f"{last} after {len(trial.losses)} of {steps} steps"
            stages.tell("find rate", f"learning rate {trial.learning_rate:g}: {after}")
    return {"steps": steps, "trials": trials}


def _hand_over(work: RunFolder, run: RunFolder) -> None:
    """The run begins at the start of the trials, which need not be computed again."""
    with lock(run.lock):
        trained = run.native.exists() or run.model.exists()
        if work.start.exists() and not (trained or run.start.exists()):
            record = read_json(work.record)
            run.update(start=record["start"], statistics=record["statistics"])
            work.start.rename(run.start)
