"""Before a training: how much of the new task's activations lies where those to keep lie."""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.core.errors import UserError
from forgetless.core.progress import counted
from forgetless.core.spectra import shared_energy
from forgetless.models.load import has_weights, load_model, load_tokenizer
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.moments import Statistics
from forgetless.studies.inputs import Collecting

MEMORY = "4GiB"
"""What the statistics take where the recipe does not say: of larger models in several passes."""


@dataclass(frozen=True)
class SharedInput:
    """What two texts share of the inputs of some layers.

    Attributes:
        layers: those that read these inputs.
        share: tr(Qᵀ T Q) / tr T, see `forgetless.core.spectra.shared_energy`.
    """

    layers: tuple[str, ...]
    share: float


def shared_inputs_of(keep: Statistics, task: Statistics) -> list[SharedInput]:
    """One entry for each input that both statistics have, in the model's order.

    Args:
        keep: activations of the base on text to keep.
        task: those on the new task's text.
    """
    groups = [group for group in keep.shared_inputs if group[0] in task]
    return [
        SharedInput(
            tuple(group),
            shared_energy(keep[group[0]].second_moment, task[group[0]].second_moment),
        )
        for group in counted(groups, "forecast", "inputs")
    ]


def forecast(recipe: Recipe) -> list[SharedInput]:
    """What a recipe's data shares with the text of its calibration; the base runs on both.

    Raises:
        UserError: the base's folder holds no weights; or as `Collecting.collect`.
    """
    if not has_weights(recipe.base):
        raise UserError(f"the forecast runs the base, and {recipe.base} holds no weights yet")
    collecting = Collecting.of(
        recipe.override({"calibration.memory_budget": recipe.calibration.memory_budget or MEMORY})
    )
    model, tokenizer = load_model(recipe.base, dtype=recipe.dtype), load_tokenizer(recipe.base)
    keep, task = (
        collecting.collect(need, model, tokenizer) for need in ("second_moment", "task_moment")
    )
    assert isinstance(keep, Statistics)
    assert isinstance(task, Statistics)
    return shared_inputs_of(keep, task)
