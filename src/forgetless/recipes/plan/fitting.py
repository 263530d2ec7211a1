"""How large a batch may be, whether layers are recomputed, and what statistics may hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from forgetless.core.errors import UserError
from forgetless.methods import find
from forgetless.models.load import target_layers
from forgetless.models.weights import weight_shape
from forgetless.recipes.memory import RunMemory, StepMemory, around_step, step_memory
from forgetless.recipes.plan.advice import OWN, RULE, Advice, Wishes
from forgetless.recipes.plan.subject import Base, Rows
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.passes import matrix_bytes

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
        memory = around_step(self.base.model, recipe, step)
        target = limit or max(step.total, LITTLE)
        if memory.statistics > target:
            budget = self._statistics_budget(recipe, target - memory.statistics + memory.matrices)
            recipe = recipe.override({budget.key: budget.value})
            memory = around_step(self.base.model, recipe, step)
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
        model = deepcopy(self.base.model)
        if recipe.dtype != "auto":
            model = model.to(getattr(torch, recipe.dtype))
        rows, replayed = self.rows, self.wishes.keep is not None
        return recipe, step_memory(
            model,
            recipe.adapter,
            recipe.training,
            length=rows.max_length if replayed else max(rows.lengths),
            masked=rows.several or replayed,
        )

    def _statistics_budget(self, recipe: Recipe, room: int) -> Advice:
        """For statistics that would not fit, or take more than training."""
        gradient = "gradient" in find(recipe.adapter.method).needs
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
