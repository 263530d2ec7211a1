"""What a recipe measures: its tasks and probes, with what they take from its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forgetless.data.modality import modality_of
from forgetless.data.settings import VALIDATION
from forgetless.recipes.recipe import Recipe
from forgetless.tasks.settings import TaskSettings
from forgetless.training.settings import ProbeSettings

__all__ = ["probed", "tasked"]


def tasked(recipe: Recipe) -> TaskSettings:
    """The tasks; where a share of the data is held out and none reads it, one more does.

    A path that is 'validation' stands for the held-out share. The task more takes the base's own
    loss, or accuracy, on it.

    Raises:
        UserError: a share is held out, and the base is none.
    """
    held, given = recipe.data.held_out, recipe.tasks
    if held is None:
        return given
    found = {kind: _resolved(getattr(given, kind), held) for kind in ("learning", "forgetting")}
    if found == given.model_dump() and probed(recipe) == recipe.probes:
        kind = modality_of(recipe.base).loss_task
        head = {"head": "new"} if recipe.adapter.has_new_head else {}
        found["learning"] += [{"kind": kind, "name": VALIDATION, "path": held, **head}]
    return TaskSettings(**found)


def probed(recipe: Recipe) -> ProbeSettings:
    """What is measured on the way; 'validation' stands for the held-out share of the data."""
    held, given = recipe.data.held_out, recipe.probes
    if held is None:
        return given
    found = {kind: _resolved(getattr(given, kind), held) for kind in ("learning", "forgetting")}
    return given.model_copy(update=found)


def _resolved(specs: list[Any], held: str) -> list[Any]:
    """Specs of tasks or texts that read ``held`` where they say 'validation'."""

    def of(spec: Any) -> Any:
        if isinstance(spec, Mapping) and spec.get("path") == VALIDATION:
            return {**spec, "path": held}
        return held if spec == VALIDATION else spec

    return [of(spec) for spec in specs]
