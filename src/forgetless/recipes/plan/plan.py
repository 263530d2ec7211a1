"""From a base, its data and wishes to a recipe, its reasons and its costs."""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from forgetless.core.errors import RecipeError, UserError, unknown
from forgetless.data.examples import load_examples
from forgetless.data.settings import DataSettings
from forgetless.data.texts import SELF
from forgetless.methods import find
from forgetless.models.load import has_weights
from forgetless.models.quantised import unpacked_dtype
from forgetless.models.targets import target_layers
from forgetless.models.weights import weight_shape
from forgetless.recipes.checking import check
from forgetless.recipes.memory import (
    RunMemory,
    StepMemory,
    around_step,
    statistics_matrices,
    statistics_needs,
    step_memory,
)
from forgetless.recipes.plan.advice import (
    GOALS,
    OWN,
    REPLAYED,
    RULE,
    Advice,
    Base,
    Rows,
    Wishes,
    advise,
    batch_advice,
)
from forgetless.recipes.plan.speed import matmul_speed
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.passes import matrix_bytes
from forgetless.tasks.kl import OWN_TEXTS
from forgetless.training.checkpoints import KEPT_CHECKPOINTS
from forgetless.training.schedules import epoch_steps

HELD_OUT = 0.1
"""The share of the data that is held out where nobody names held-out examples."""

ENOUGH_TO_SHARE = 50
"""Examples from which a share of them is held out."""

NO_WEIGHTS = "The base's folder holds no weights yet: put them there before the run."


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
        advice: every advised setting with its reason.
        memory: at the peak of each stage.
        seconds: the least that the training takes on this machine, by the operations of its matrix
            products; measuring is not counted.
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
    seconds: float
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
                "training_seconds_at_least": self.seconds,
                "tokens": self.tokens,
            },
            "data": {"examples": self.examples, "kind": self.kind},
            "notes": self.notes,
        }


def plan(base: str, data: str, wishes: Wishes | None = None) -> Plan:
    """The advised recipe for a base and its training data. No weight is loaded.

    A folder needs no weights for this.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: what is wrong with the base, the data or the wishes, or how much memory the
            least run would need where that is more than there is.
    """
    wishes = wishes or Wishes()
    if wishes.goal not in GOALS:
        raise unknown("goal", wishes.goal, GOALS)
    if wishes.method is not None and find(wishes.method).factors is None and wishes.quantise:
        raise UserError(f"method {wishes.method!r} trains the weights, and packed ones cannot be")
    for path in filter(None, (wishes.keep, None if wishes.share else wishes.test)):
        load_examples(path)
    if wishes.test is None and len(load_examples(data, limit=ENOUGH_TO_SHARE)) == ENOUGH_TO_SHARE:
        wishes = replace(wishes, test=str(HELD_OUT))
    found = Base.find(base)
    trained_on = DataSettings(train=data, validation=wishes.share)
    rows = Rows.of(trained_on.sources[0][0], found)
    advice = advise(found, rows, wishes)
    values = {each.key: each.value for each in advice}
    all_rows, epochs = len(rows.lengths), values["training.epochs"]
    if wishes.keep is not None:  # rows of an epoch, replayed ones included
        all_rows = math.ceil(all_rows / (1 - REPLAYED))
    packed = 1.0 if rows.is_text else rows.examples / len(rows.lengths)
    batch = batch_advice(all_rows, epochs, packed)
    settings = _settings(base, data, wishes, values)
    recipe, memory, about_memory = Fitting(found, rows, wishes, settings, batch.value).fitted()
    is_whole = has_weights(base)  # without weights, check would find that
    if problems := check(recipe) if is_whole else []:
        raise RecipeError("the planned recipe", problems)
    notes, advice = _notes(is_whole, wishes), [*advice, batch, *about_memory]
    return _costed(recipe, found, rows, all_rows, memory, advice=advice, notes=notes)


def plan_recipe(recipe: Recipe, memory: int | None = None) -> Plan:
    """What a recipe will cost as it stands, without advice. No weight is loaded.

    The recipe is one of a run on a causal language model, whose folder needs no weights; `memory`
    are the bytes that the run may take.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: what is wrong with the base or the data, or how much memory the run takes where
            that is more.
    """
    found = Base.find(recipe.base, recipe.attn_implementation)
    rows = Rows.asked(recipe, found)
    weights = [weight for _, weight in recipe.data.sources]
    all_rows = round(len(rows.lengths) * sum(weights) / weights[0])
    cost = around_step(as_loaded(found, recipe), recipe, _step(recipe, found, rows))
    if memory is not None and cost.peak > memory:
        raise UserError(
            f"{show_bytes(memory)} is too little: the run takes {show_bytes(cost.peak)}, the base "
            f"alone {show_bytes(cost.step.weights)}; try a smaller training.batch_size or "
            "data.max_length, training.gradient_checkpointing: true, calibration.memory_budget, or "
            "quantise: nf4"
        )
    notes = []
    if memory is not None:
        notes.append(f"It fits: at most {show_bytes(cost.peak)} of {show_bytes(memory)}.")
    if not has_weights(recipe.base):
        notes.append(NO_WEIGHTS)
    return _costed(recipe, found, rows, all_rows, cost, advice=[], notes=notes)


def _costed(
    recipe: Recipe,
    base: Base,
    rows: Rows,
    all_rows: int,
    memory: RunMemory,
    *,
    advice: list[Advice],
    notes: list[str],
) -> Plan:
    step, training = memory.step, recipe.training
    steps, tokens = training.steps, sum(rows.lengths)
    if steps is None:
        epochs = training.epochs or (training.tokens or 0) / tokens
        steps = max(1, epoch_steps(all_rows, training.model_copy(update={"epochs": epochs})))
    else:
        epochs = steps * training.batch_size * training.gradient_accumulation / all_rows
    matrices = [
        statistics_matrices(base.model, recipe.adapter, need) for need in statistics_needs(recipe)
    ]
    speed = matmul_speed(torch.bfloat16 if training.precision == "bf16" else torch.float32)
    return Plan(
        recipe=recipe,
        advice=advice,
        parameters=base.parameters,
        examples=rows.examples,
        kind=rows.kind,
        memory=memory,
        disk=Disk(
            checkpoints=KEPT_CHECKPOINTS * (4 * step.trained + step.optimizer),
            result=step.weights if recipe.adapter.method == "full" else 2 * step.adapter,
            statistics=sum(map(sum, matrices)),
        ),
        steps=steps,
        seconds=steps * training.gradient_accumulation * step.operations / speed,
        tokens=round(tokens * epochs),
        notes=notes,
    )


def as_loaded(base: Base, recipe: Recipe) -> Any:
    """A copy of the base's shapes in the number format that the recipe loads them in."""
    model, dtype = deepcopy(base.model), unpacked_dtype(recipe.dtype, recipe.quantise)
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


def _step(recipe: Recipe, base: Base, rows: Rows, replayed: bool = False) -> StepMemory:
    """The memory of a training step on the longest rows."""
    return step_memory(
        as_loaded(base, recipe),
        recipe.adapter,
        recipe.training,
        length=rows.max_length if replayed else max(rows.lengths),
        masked=rows.several or (replayed and recipe.data.pack is True),
        quantise=recipe.quantise,
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

    if wishes.share is not None:
        found["data"]["validation"] = wishes.share
    elif wishes.test is not None:
        found["tasks"]["learning"] = [task("perplexity", "new_task", wishes.test)]
    if wishes.keep is None:
        own = {"kind": "kl", "name": "drift", "path": SELF, "limit": OWN_TEXTS, "max_length": 128}
        found["tasks"]["forgetting"] = [own]
    else:
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
        found.append(NO_WEIGHTS)
    if wishes.test is None:
        found.append(
            f"Nothing measures what is learned: {ENOUGH_TO_SHARE} examples or more would be shared "
            "out; give held-out ones by --test FILE."
        )
    if wishes.keep is None:
        found.append(
            f"What is forgotten is measured as the distance to the base, on {OWN_TEXTS} texts that "
            "the base writes itself; --keep FILE names text of yours, which is replayed too."
        )
    else:
        found.append(
            "The text to keep is replayed and measured alike: for a fair measurement let "
            "tasks.forgetting name text that is not replayed."
        )
    return found


# ---- what fits into memory -----------------------------------------------------------------------

MOST_AT_ONCE = 8
"""Sequences of a forward pass from which a larger number gains little."""

MIB = 2**20

LITTLE = 2**30
"""Bytes that statistics may take in any case."""


@dataclass(frozen=True)
class Fitting:
    """Searches the settings that a run's memory decides.

    Attributes:
        base, rows, wishes: what the plan is for.
        settings: of the recipe, but for these.
        batch: sequences of an optimiser step.
    """

    base: Base
    rows: Rows
    wishes: Wishes
    settings: Mapping[str, Any]
    batch: int

    def fitted(self) -> tuple[Recipe, RunMemory, list[Advice]]:
        """The recipe, its memory, and why the settings are what they are.

        Raises:
            UserError: not even one sequence at a time fits, with all layers recomputed.
        """
        recipe, step = self._step()
        training, limit = recipe.training, self.wishes.memory
        within = "" if limit is None else f", within {show_bytes(limit)}"
        reasons = {
            "batch_size": f"sequences at a time{within}; the same update as {self.batch} at once",
            "gradient_accumulation": f"{self.batch} sequences a step",
            "gradient_checkpointing": "not needed; it would recompute each layer to save memory",
        }
        if training.gradient_checkpointing:
            reasons["gradient_checkpointing"] = (
                "recomputes each layer in the backward pass: without it not one sequence fits"
            )
        advice = [
            Advice(
                f"training.{key}",
                getattr(training, key),
                reason,
                RULE if key == "gradient_accumulation" else OWN,
            )
            for key, reason in reasons.items()
        ]
        memory = around_step(as_loaded(self.base, recipe), recipe, step)
        target = limit or max(step.total, LITTLE)
        if memory.statistics > target:
            budget = self._statistics_budget(recipe, target - memory.statistics + memory.matrices)
            recipe = recipe.override({budget.key: budget.value})
            memory = around_step(as_loaded(self.base, recipe), recipe, step)
            advice.append(budget)
        if limit is not None and memory.peak > limit:
            raise self._too_little(recipe, memory, limit)
        return recipe, memory, advice

    def _step(self) -> tuple[Recipe, StepMemory]:
        """The largest batch whose training step fits, without recomputing layers if that can be."""
        most, limit = min(self.batch, MOST_AT_ONCE), self.wishes.memory
        if limit is None:
            return self._tried(most, False)
        for recomputed in (False, True):
            found = self._tried(1, recomputed)
            if found[1].total > limit:
                continue
            size = most
            while size > 1:
                larger = self._tried(size, recomputed)
                if larger[1].total <= limit:
                    return larger
                size //= 2
            return found
        return found

    def _tried(self, size: int, recomputed: bool) -> tuple[Recipe, StepMemory]:
        """The recipe with batches of this size, and the memory of its training step."""
        changes = {
            "training.batch_size": size,
            "training.gradient_accumulation": self.batch // size,
            "training.gradient_checkpointing": recomputed,
        }
        recipe = Recipe.parse(self.settings, changes, source="the planned recipe")
        return recipe, _step(recipe, self.base, self.rows, self.wishes.keep is not None)

    def _statistics_budget(self, recipe: Recipe, room: int) -> Advice:
        """For statistics that would not fit, or take more than training."""
        gradient = "gradient" in statistics_needs(recipe)
        layers = target_layers(self.base.model, recipe.adapter.target_modules).values()
        shapes = [weight_shape(layer) for layer in layers]
        least = max(matrix_bytes((out if gradient else n, n)) for out, n in shapes)
        value = f"{max(math.ceil(least / MIB), room // MIB)}MiB"
        reason = "for the matrices held at a time; the base then runs in several passes"
        return Advice("calibration.memory_budget", value, reason, OWN)

    def _too_little(self, recipe: Recipe, memory: RunMemory, limit: int) -> UserError:
        stages = {
            "training": memory.step.total,
            "collecting statistics": memory.statistics,
            "computing the start": memory.start,
        }
        stage = max(stages, key=lambda name: stages[name])
        least = ", one sequence at a time and with every layer recomputed"
        way_out = "--method lora"
        if recipe.adapter.method == "lora":
            way_out = "a smaller --rank, shorter examples"
        if recipe.adapter.method != "full" and recipe.quantise is None:
            way_out = f"--quantise nf4, {way_out}"
        return UserError(
            f"--memory {show_bytes(limit)} is too little: {stage} with method "
            f"{recipe.adapter.method!r} takes {show_bytes(memory.peak)}"
            f"{least if stage == 'training' else ''}; give more, or try {way_out}, or a smaller "
            "base"
        )


def show_bytes(size: float) -> str:
    """Bytes in words, such as ``1.4 GB``."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            number = size / factor
            return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"
    return f"{size:.0f} B"
