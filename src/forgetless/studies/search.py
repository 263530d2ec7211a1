"""A search: trials that are runs, the front of what they learned and forgot, and what mattered.

<out>/<name>/search.yaml  runs.json       the definition; the runs that there are
<out>/<name>/trials.journal               the trials, where no database has them
<out>/<name>/<run id>/                    one run, which trials with the same settings share
<out>/<name>/report/search.json           all trials, the front, the importance; see `outcome`
<out>/<name>/report/front.csv             the front
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from collections.abc import Sequence as Listed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml

from forgetless.core.errors import RecipeError, UserError
from forgetless.core.files import lock, read_json, write_json, write_text
from forgetless.core.metrics import (
    forgetting,
    hypervolume,
    pareto_front,
)
from forgetless.recipes.checking import load_recipe
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.recipes.search import SearchRecipe
from forgetless.studies.folder import RunFolder, curve, results, write_csv, write_tables
from forgetless.studies.run import prepare
from forgetless.studies.sequence import mean_over
from forgetless.studies.share import Share
from forgetless.studies.stages import Listener
from forgetless.studies.study import Study
from forgetless.studies.trials import REASON, Beat, Direction, open_trials, pending, work
from forgetless.studies.workers import Workers, execute_run

if TYPE_CHECKING:
    from optuna import Study as Trials
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

FRONT = "front.csv"
OUTCOME = "search.json"
KINDS = "learning", "forgetting"


class Search(Study):
    """A search as it lies in its folder."""

    @property
    def outcome(self) -> dict[str, Any]:
        """All trials, the front, the hypervolume and the importance; see `outcome`."""
        return read_json(self.folder / "report" / OUTCOME)

    @property
    def front(self) -> list[dict[str, Any]]:
        """The settings that no other beats in both objectives, by ascending learning."""
        return list(self.outcome["front"])


def search(
    definition: SearchRecipe | Mapping[str, Any] | str | Path,
    out: str | Path = "runs",
    *,
    storage: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    processes: int = 1,
    on: Literal["ray"] | None = None,
    address: str | None = None,
    share: str | None = None,
    trials: int | None = None,
    hours: float | None = None,
    listen: Listener | None = None,
) -> Search:
    """Look for the settings that learn much and forget little.

    Each trial is a run, and trials with equal settings are one. A search that was stopped, by
    whatever means, is resumed by the same call; the same call in other processes, or on other
    machines with the same storage, takes part. What is on the front at the end is done with the
    further seeds of the definition, and so is what takes the place of what they refute.

    Args:
        definition: a `SearchRecipe`, the mapping that one is written as, or a YAML file.
        out: the folder that holds studies.
        storage: URL of a database, such as postgresql://user@host/database or sqlite:///search.db;
            None for a journal file in the search's folder.
        workers: as of `forgetless.study`.
        threads: likewise.
        processes: likewise.
        on: likewise.
        address: likewise.
        share: likewise.
        trials: instead of the definition's.
        hours: likewise.
        listen: called with the `Event`s of all runs.

    Returns:
        The search; look at ``.front`` and ``.outcome``.

    Raises:
        RecipeError: what is wrong with the definition, before anything is run.
        UserError: the storage cannot be used.
    """
    team = Workers(storage, workers, threads, processes, on, address, share)
    if not isinstance(definition, SearchRecipe):
        read = SearchRecipe.parse if isinstance(definition, Mapping) else SearchRecipe.load
        definition = read(definition)  # type: ignore[arg-type]
    given = {"trials": trials, "hours": hours}
    changed = {key: value for key, value in given.items() if value is not None}
    definition = SearchRecipe.parse({**definition.model_dump(), **changed})
    definition.check(team.checker())
    folder = Path(out) / definition.name
    doing = _Doing(definition, folder, team, listen or (lambda event: None))
    doing.ask_first()
    with lock(folder / ".lock"):
        content = definition.model_dump()
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        write_text(folder / "search.yaml", text)
    until = None if definition.hours is None else time.time() + 3600 * definition.hours
    team.work(take_part, folder, sys.maxsize, doing.listen, until=until)
    doing.write()
    return Search(folder)


def take_part(
    folder: Path,
    *,
    storage: str | None,
    threads: int | None,
    processes: int = 1,
    share: str | None = None,
    until: float | None,
    listen: Listener,
) -> None:
    """Do trials of the search in a folder until it ends: what a worker does."""
    definition = SearchRecipe.load(folder / "search.yaml")
    team = Workers(storage, None, threads, processes, None, None, share)
    _Doing(definition, folder, team, listen).work(until)


class _Doing:
    """A process that takes part in a search."""

    def __init__(
        self,
        definition: SearchRecipe,
        folder: Path,
        team: Workers,
        listen: Listener,
    ) -> None:
        self.definition, self.folder, self.team = definition, folder, team
        self.listen, self.beat = listen, Beat()
        self._checker = team.checker()
        self._store = Share(team.share, folder.name) if team.share else None
        names = definition.name, f"{definition.name}, further seeds"
        values: dict[str, Direction] = {"learned": "maximize", "forgotten": "minimize"}
        self.trials, self.further = open_trials(
            team.storage, folder, names, values, definition.meaning, self.beat
        )
        self.trials.sampler = _sampler(definition)

    def ask_first(self) -> None:
        """Ask for the first settings, once."""
        with lock(self.folder / ".trials.lock"):
            for values in self.definition.asked():
                self.trials.enqueue_trial(values, {"first": True}, skip_if_exists=True)

    def work(self, until: float | None) -> None:
        """Do trials to the end of the budget, and the further seeds of what is on the front."""
        budget = self.definition.trials
        work(self.trials, self._run, self.folder, self.beat, budget=budget, until=until)
        work(self.further, self._run, self.folder, self.beat, ask=self._ask_further_seeds)

    def _ask_further_seeds(self) -> bool:
        """Ask for what the front lacks, so that no lucky seed is on it; whether that was anything.

        As the mean over seeds moves a point, others come to the front.
        """
        with lock(self.folder / ".trials.lock"):
            if pending(self.further):
                return False
            asked = {_of(trial) for trial in self.further.get_trials(deepcopy=False)}
            points = self.points()
            missing = [
                (points[i].trial, seed)
                for i in _front(points)
                for seed in self.definition.replicate
                if (points[i].trial.number, seed) not in asked
            ]
            for trial, seed in missing:
                attributes = {"of": trial.number, "seed": seed}
                self.further.enqueue_trial(trial.params, user_attrs=attributes)
        return bool(missing)

    def _run(self, trial: Trial) -> tuple[float, float]:
        """Do the run of a trial, or find it done; the gain of learning and the forgetting."""
        arm, overrides = self.definition.draw(trial)
        changes = self.definition.recipe_of(arm, overrides)
        if "seed" in trial.user_attrs:
            changes["seed"] = trial.user_attrs["seed"]
        recipe = load_recipe(self.definition.recipe, changes, self._checker)
        if problems := self._checker.check(recipe):
            raise RecipeError(changes["name"], problems)
        run = RunFolder(self.folder / run_id(recipe))
        # Whoever seemed dead and is not, or does the same settings, is waited for.
        with lock(run.lock), self._uploaded(run) as listen:
            is_known = run.recipe.exists() and Recipe.load(run.recipe) == recipe
            if not (is_known and run.read().get("status") == "done"):
                prepare(run, recipe)
                team = self.team
                execute_run(run, threads=team.threads, processes=team.processes, listen=listen)
            tasks = self.definition.tasks(recipe)
            scores = {kind: _score(run, recipe, task) for kind, task in tasks.items()}
        trial.set_user_attr("run", run.path.name)
        trial.set_user_attr("scores", scores)
        return -_worse(scores["learning"]), _worse(scores["forgetting"])

    def _uploaded(self, run: RunFolder) -> AbstractContextManager[Listener]:
        return self._store.during(run, self.listen) if self._store else nullcontext(self.listen)

    # ------------------------------------------------------------------------ what came of it

    def points(self) -> list[Point]:
        """The finished trials in their order, those with equal settings once, with all seeds."""
        further: dict[int, dict[int | None, FrozenTrial]] = {}
        for trial in _finished(self.further):
            number, seed = _of(trial)
            further.setdefault(number, {})[seed] = trial
        found: dict[str, Point] = {}
        for trial in _finished(self.trials):
            arm, settings = self.definition.draw(trial)
            key = f"{arm} {sorted(settings.items())}"
            seeds = {None: trial, **further.get(trial.number, {})}
            found.setdefault(key, Point(trial, arm, settings, seeds))
        return list(found.values())

    def write(self) -> None:
        """Write search.json and front.csv, the tables of all runs, and which runs there are."""
        outcome = self._outcome()
        report = self.folder / "report"
        write_json(report / OUTCOME, outcome, checked=True)
        rows = [_front_row(point) for point in outcome["front"]]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        write_csv(report / FRONT, rows, columns)
        runs = dict.fromkeys(
            trial.user_attrs["run"] for t in (self.trials, self.further) for trial in _finished(t)
        )
        if self._store:
            self._store.fetch_all(RunFolder(self.folder / run) for run in runs)
        entries = [{"run_id": run} for run in runs if (self.folder / run).is_dir()]
        write_json(self.folder / "runs.json", {"runs": entries}, checked=True)
        write_tables(self.folder, results(self.folder), curve(self.folder))

    def _outcome(self) -> dict[str, Any]:
        points = self.points()
        front = _front(points)
        every = self.trials.get_trials(deepcopy=False)
        failed = {t.user_attrs[REASON] for t in every if REASON in t.user_attrs}
        known: Mapping[str, Any] = next((p.trial.user_attrs["scores"] for p in points), {})
        return {
            "name": self.definition.name,
            "objectives": {
                kind: {key: score[key] for key in _OF_TASKS} for kind, score in known.items()
            },
            "sampler": self.definition.sampler,
            "seeds": [None, *self.definition.replicate],
            "finished": len(_finished(self.trials)),
            "failed": sorted(failed),
            "trials": [self._described(point) for point in points],
            "front": [self._described(points[i]) for i in front],
            "hypervolume": _hypervolumes(points),
            "importance": {kind: _importance(self.trials, kind) for kind in KINDS},
        }

    def _described(self, point: Point) -> dict[str, Any]:
        """A point as plain JSON values."""
        learned, forgotten = point.means
        scores = [trial.user_attrs["scores"] for trial in point.seeds.values()]
        fixed = self.definition.all_arms()[point.arm].fixed
        return {
            "trial": point.trial.number,
            "arm": point.arm,
            "settings": point.settings,
            "chosen": {key: v for key, v in point.settings.items() if key not in fixed},
            "learned": learned,
            "forgotten": forgotten,
            **{kind: _mean([own[kind]["score"] for own in scores]) for kind in KINDS},
            "runs": [trial.user_attrs["run"] for trial in point.seeds.values()],
        }


_OF_TASKS = "task", "metric", "base", "higher_is_better"


@dataclass(frozen=True)
class Point:
    """The settings of a trial, with what came of them.

    Attributes:
        trial: the first with these settings.
        arm: its name.
        settings: dotted keys of the recipe.
        seeds: the finished trials by seed; None is the recipe's own.
    """

    trial: FrozenTrial
    arm: str
    settings: dict[str, Any]
    seeds: Mapping[int | None, FrozenTrial]

    @property
    def means(self) -> tuple[float, float]:
        """Gain of learning and forgetting, as means over the seeds."""
        values = np.array([trial.values for trial in self.seeds.values()], np.float64)
        learned, forgotten = values.mean(axis=0)
        return float(learned), float(forgotten)


def _of(trial: FrozenTrial) -> tuple[int, int]:
    """Of which trial this is the further seed, and which."""
    return trial.user_attrs["of"], trial.user_attrs["seed"]


def _finished(trials: Trials) -> list[FrozenTrial]:
    """The trials that have values."""
    from optuna.trial import TrialState

    return trials.get_trials(states=[TrialState.COMPLETE])


def _front(points: Listed[Point]) -> list[int]:
    """Positions of the points on the front of the means."""
    return pareto_front((learned, -forgotten) for learned, forgotten in (p.means for p in points))


def _sampler(definition: SearchRecipe) -> BaseSampler:
    from optuna.samplers import NSGAIISampler, TPESampler

    if definition.sampler == "tpe":
        # `group` models the settings of every arm apart; `constant_liar` counts the trials that
        # others are doing, so that two workers do not draw the same.
        return TPESampler(multivariate=True, group=True, constant_liar=True)
    # Of Optuna's 50 in a generation a short search would see the first, random one alone.
    return NSGAIISampler(population_size=min(50, max(8, (definition.trials or 200) // 4)))


def _score(run: RunFolder, recipe: Recipe, task: str) -> dict[str, Any]:
    """The score of a task, of the repaired adapter where there is one, and that of the base."""
    place = run
    if recipe.repair is not None and not recipe.is_repaired:
        taken = read_json(run.aftercare).get("repaired")
        place = run if taken is None else run.point(taken)
    final, base = read_json(place.scores("final", task)), read_json(run.scores("base", task))
    if final.get("value") is None or base.get("value") is None:
        raise UserError(f"{run.path.name} has no score of {task}, so it cannot be compared")
    return {
        "task": task,
        "score": final["value"],
        "base": base["value"],
        "metric": final["metric"],
        "higher_is_better": final["higher_is_better"],
    }


def _worse(score: Mapping[str, Any]) -> float:
    """By how much a task is worse than under the base."""
    return forgetting(score["score"], score["base"], score["higher_is_better"])


def _mean(values: Listed[float]) -> dict[str, Any]:
    """Mean over seeds with Student's 95 % interval, which one seed does not have."""
    found = mean_over(values)
    return {"value": found.pop("mean"), **found}


def _front_row(point: Mapping[str, Any]) -> dict[str, Any]:
    row = {"trial": point["trial"], "arm": point["arm"], **point["settings"]}
    for kind in KINDS:
        row |= {kind: point[kind]["value"]}
        row |= {f"{kind}_{end}": point[kind][end] for end in ("low", "high")}
    return {**row, "seeds": point["learning"]["n"], "runs": " ".join(point["runs"])}


def _hypervolumes(points: Listed[Point]) -> list[float]:
    """After each trial, the share that its front has of the box of all trials.

    The box is from the worst to the best of either objective; one whose sides are 0 has none.
    """
    if not points:
        return []
    means = np.array([point.means for point in points]) * [1, -1]
    low, size = means.min(axis=0), np.ptp(means, axis=0)
    if not size.all():
        return []
    places = [(float(x), float(y)) for x, y in (means - low) / size]
    return [hypervolume(places[:count]) for count in range(1, len(places) + 1)]


def _importance(trials: Trials, kind: str) -> dict[str, float]:
    """How much each setting decides whether a trial is among the best quarter of an objective.

    The shares of PED-ANOVA add up to 1; none where there are too few trials to tell.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    place, sign = KINDS.index(kind), -1 if kind == "learning" else 1
    if len(_finished(trials)) < _FEWEST:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that low targets are good, which they are here
        found = get_param_importances(
            trials,
            evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25),
            target=lambda trial: sign * trial.values[place],
        )
    return {name: float(share) for name, share in found.items()}


_FEWEST = 20
"""Finished trials, of which a quarter are the five that PED-ANOVA asks for."""
