"""From a base, its data and wishes to a recipe, its reasons and its costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    values = {each.key: each.value for each in advice}
    all_rows, epochs = len(rows.lengths), values["training.epochs"]
    if wishes.keep is not None:  # rows of an epoch, replayed ones included
        all_rows = math.ceil(all_rows / (1 - REPLAYED))
    batch = batch_advice(all_rows, epochs)
    settings = _settings(base, data, wishes, values)
    recipe, memory, about_memory = Fitting(found, rows, wishes, settings, batch.value).fitted()
    is_whole, step = has_weights(base), memory.step  # without weights, check would find that
    if problems := check(recipe) if is_whole else []:
        raise RecipeError("the planned recipe", problems)
    matrices = [
        statistics_matrices(found.model, recipe.adapter, need)
        for need in find(recipe.adapter.method).needs
    ]
    return Plan(
        recipe=recipe,
        advice=[*advice, batch, *about_memory],
        parameters=found.parameters,
        examples=rows.examples,
        kind=rows.kind,
        memory=memory,
        disk=Disk(
            checkpoints=KEPT_CHECKPOINTS * (4 * step.trained + step.optimizer),
            result=step.weights if recipe.adapter.method == "full" else 2 * step.adapter,
            statistics=sum(map(sum, matrices)),
        ),
        steps=epoch_steps(all_rows, recipe.training),
        tokens=round(sum(rows.lengths) * epochs),
        notes=_notes(is_whole, wishes),
    )


def _settings(base: str, data: str, wishes: Wishes, values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe but for what its memory decides."""
    found: dict[str, Any] = {
        "name": f"{Path(base).name}-{values['adapter.method']}",
        "base": base,
        "data": {"train": data},
        "tasks": {"learning": [], "forgetting": []},
    }
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if key != "data.train":
            (found.setdefault(section, {}) if section else found)[name] = value

    def task(kind: str, name: str, path: str) -> dict[str, Any]:
        return {"kind": kind, "name": name, "path": path, "limit": 100}

    if wishes.test is not None:
        found["tasks"]["learning"] = [task("perplexity", "new_task", wishes.test)]
    if wishes.keep is not None:
        found["data"]["train"] = [
            {"path": data, "weight": 1 - REPLAYED},
            {"path": wishes.keep, "weight": REPLAYED},
        ]
        found["calibration"] = {"source": wishes.keep}
        found["tasks"]["forgetting"] = [
            task("perplexity", "to_keep", wishes.keep),
            task("kl", "drift", wishes.keep),
        ]
    return found


def _notes(is_whole: bool, wishes: Wishes) -> list[str]:
    found = []
    if not is_whole:
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
