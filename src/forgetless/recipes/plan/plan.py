"""From a base, its data and wishes to a recipe, its reasons and its costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forgetless.core.errors import RecipeError, unknown
from forgetless.data.examples import load_examples
from forgetless.methods import find
from forgetless.models.load import has_weights
from forgetless.recipes.checking import check
from forgetless.recipes.memory import RunMemory, statistics_matrices
from forgetless.recipes.plan.advice import GOALS, REPLAYED, Advice, Wishes, advise, batch_advice
from forgetless.recipes.plan.fitting import Fitting
from forgetless.recipes.plan.subject import Base, Rows
from forgetless.recipes.recipe import Recipe
from forgetless.training.checkpoints import KEPT_CHECKPOINTS
from forgetless.training.schedules import epoch_steps


@dataclass(frozen=True)
class Disk:
    """Bytes that a run leaves on the disk, by part.

    Attributes:
        checkpoints: the newest two; gone at the end.
        result: the trained adapter twice, lossless and as a plain LoRA; or the trained model.
        statistics: shared between the runs of a study.
    """

    checkpoints: int
    result: int
    statistics: int


@dataclass(frozen=True)
class Plan:
    """What is advised, and what it will cost.

    Attributes:
        recipe: ready to run.
        advice: every advised setting with its reason.
        parameters: of the base.
        examples: of the training data.
        kind: of the training data.
        memory: at the peak of each stage.
        disk: what is written.
        steps: optimiser steps.
        tokens: that are trained on, padding not counted.
        notes: what the user should know besides.
    """

    recipe: Recipe
    advice: list[Advice]
    parameters: int
    examples: int
    kind: str
    memory: RunMemory
    disk: Disk
    steps: int
    tokens: int
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs; memory and disk in bytes."""
        step = self.memory.step
        training = {**asdict(step), "total": step.total}
        trained = training.pop("trained")
        memory = {
            "peak": self.memory.peak,
            "statistics": self.memory.statistics,
            "start": self.memory.start,
            "training": training,
        }
        return {
            "recipe": self.recipe.model_dump(),
            "advice": [asdict(advice) for advice in self.advice],
            "cost": {
                "parameters": {"total": self.parameters, "trained": trained},
                "memory": memory,
                "disk": asdict(self.disk),
                "steps": self.steps,
                "tokens": self.tokens,
            },
            "data": {"examples": self.examples, "kind": self.kind},
            "notes": self.notes,
        }


def plan(base: str, data: str, wishes: Wishes | None = None) -> Plan:
    """The advised recipe for a base and its training data. No weight is loaded.

    Args:
        base: see `forgetless.models.resolve_base`; a folder needs no weights for this.
        data: see `forgetless.data.load_examples`.
        wishes: what the user wants.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: what is wrong with the base, the data or the wishes, or how much memory the
            least run would need where that is more than there is.
    """
    wishes = wishes or Wishes()
    if wishes.goal not in GOALS:
        raise unknown("goal", wishes.goal, GOALS)
    if wishes.method is not None:
        find(wishes.method)
    for path in filter(None, (wishes.keep, wishes.test)):
        load_examples(path)
    found = Base.find(base)
    rows = Rows.of(data, found)
    advice = advise(found, rows, wishes)
    total_rows = _all_rows(rows, wishes)
    batch = batch_advice(total_rows, _value(advice, "training.epochs"))
    fitting = Fitting(found, rows, wishes, _settings(base, data, wishes, advice), batch.value)
    recipe, memory, about_memory = fitting.fitted()
    _check(recipe, found)
    matrices = sum(
        sum(statistics_matrices(found.model, recipe.adapter, need))
        for need in find(recipe.adapter.method).needs
    )
    step = memory.step
    checkpoint = 4 * step.trained + step.optimizer
    result = step.weights if recipe.adapter.method == "full" else 2 * step.adapter
    return Plan(
        recipe=recipe,
        advice=[*advice, batch, *about_memory],
        parameters=found.parameters,
        examples=rows.examples,
        kind=rows.kind,
        memory=memory,
        disk=Disk(KEPT_CHECKPOINTS * checkpoint, result, matrices),
        steps=epoch_steps(total_rows, recipe.training),
        tokens=round(rows.tokens * _value(advice, "training.epochs")),
        notes=_notes(found, wishes),
    )


def _value(advice: Sequence[Advice], key: str) -> Any:
    return next(each.value for each in advice if each.key == key)


def _all_rows(rows: Rows, wishes: Wishes) -> int:
    """Rows of an epoch, replayed ones included."""
    new = len(rows.lengths)
    return new if wishes.keep is None else math.ceil(new / (1 - REPLAYED))


def _settings(base: str, data: str, wishes: Wishes, advice: Sequence[Advice]) -> dict[str, Any]:
    """The recipe but for what its memory decides."""
    found: dict[str, Any] = {
        "name": f"{Path(base).name}-{_value(advice, 'adapter.method')}",
        "base": base,
        "data": {"train": data},
        "tasks": {"learning": [], "forgetting": []},
    }
    for each in advice:
        section, _, key = each.key.rpartition(".")
        if each.key != "data.train":
            (found.setdefault(section, {}) if section else found)[key] = each.value
    if wishes.test is not None:
        found["tasks"]["learning"] = [_task("perplexity", "new_task", wishes.test)]
    if wishes.keep is not None:
        found["data"]["train"] = [
            {"path": data, "weight": 1 - REPLAYED},
            {"path": wishes.keep, "weight": REPLAYED},
        ]
        found["calibration"] = {"source": wishes.keep}
        found["tasks"]["forgetting"] = [
            _task("perplexity", "to_keep", wishes.keep),
            _task("kl", "drift", wishes.keep),
        ]
    return found


def _task(kind: str, name: str, path: str) -> dict[str, Any]:
    return {"kind": kind, "name": name, "path": path, "limit": 100}


def _check(recipe: Recipe, base: Base) -> None:
    """Raise what the recipe would be refused for; where there are no weights yet, that is one."""
    if problems := check(recipe) if has_weights(base.name) else []:
        raise RecipeError("the planned recipe", problems)


def _notes(base: Base, wishes: Wishes) -> list[str]:
    found = []
    if not has_weights(base.name):
        found.append("The base's folder holds no weights yet: put them there before the run.")
    if wishes.test is None:
        found.append("Nothing measures what is learned: give held-out examples by --test FILE.")
    if wishes.keep is None:
        found.append("Nothing measures what is forgotten: give text to keep by --keep FILE.")
    else:
        found.append(
            "The text to keep is replayed and measured alike: for a fair measurement let "
            "tasks.forgetting name text that is not replayed."
        )
    return found
