"""Before a training: how much of the new task's activations lies where those to keep lie."""

from forgetless.core.errors import UserError
from forgetless.core.progress import counted
from forgetless.core.spectra import shared_energy
from forgetless.data.modality import load_processor
from forgetless.models.load import has_weights, load_model
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.moments import Statistics
from forgetless.studies.inputs import Collecting

MEMORY = "4GiB"
"""What the statistics take where the recipe does not say: of larger models in several passes."""


def shared_energies(keep: Statistics, task: Statistics) -> dict[tuple[str, ...], float]:
    """tr(Qᵀ T Q) / tr T of every input that two statistics have, by the layers that read it.

    See `forgetless.core.spectra.shared_energy`.
    """
    groups = [tuple(group) for group in keep.shared_inputs if group[0] in task]
    return {
        group: shared_energy(keep[group[0]].second_moment, task[group[0]].second_moment)
        for group in counted(groups, "forecast", "inputs")
    }


def forecast(recipe: Recipe) -> dict[tuple[str, ...], float]:
    """What a recipe's data shares with the text of its calibration; the base runs on both.

    Raises:
        UserError: the base's folder holds no weights; or as `Collecting.collect`.
    """
    if not has_weights(recipe.base):
        raise UserError(f"the forecast runs the base, and {recipe.base} holds no weights yet")
    budget = recipe.calibration.memory_budget or MEMORY
    collecting = Collecting.of(recipe.override({"calibration.memory_budget": budget}))
    model, processor = load_model(recipe.base, **recipe.loading), load_processor(recipe.base)
    keep, task = (
        collecting.collect(need, model, processor) for need in ("second_moment", "task_moment")
    )
    assert isinstance(keep, Statistics)
    assert isinstance(task, Statistics)
    return shared_energies(keep, task)
