"""What a recipe measures: its tasks and probes, with what they take from its data."""

from collections.abc import Callable, Mapping
from typing import Any

from forgetless.data.modality import modality_of
from forgetless.data.settings import VALIDATION
from forgetless.data.texts import SELF
from forgetless.recipes.recipe import Recipe
from forgetless.tasks.settings import TaskSettings
from forgetless.training.settings import ProbeSettings

OwnText = Callable[[Mapping[str, Any]], str]
"""The file of what a base writes itself, for the settings of the task that reads it."""

_KINDS = ("learning", "forgetting")


def tasked(recipe: Recipe, own_text: OwnText | None = None) -> TaskSettings:
    """The tasks; where a share of the data is held out and none reads it, one more does.

    A path that is 'validation' stands for the held-out share. The task more takes the base's own
    loss, or accuracy, on it. `own_text` gives the file of what the base writes itself, for a task
    whose path is 'self'; None leaves that to the task.

    Raises:
        UserError: a share is held out, and the base is none.
    """
    held, given = recipe.data.held_out, recipe.tasks
    found = _resolved(given, held, own_text)
    if held is not None and not _reads(given, held) and not _reads(recipe.probes, held):
        kind = modality_of(recipe.base).loss_task
        if recipe.training.preference is not None:
            kind = "preference"
        head = {"head": "new"} if recipe.adapter.has_new_head else {}
        found["learning"] += [{"kind": kind, "name": VALIDATION, "path": held, **head}]
    return TaskSettings(**found)


def probed(recipe: Recipe, own_text: OwnText | None = None) -> ProbeSettings:
    """What is measured on the way, with the same paths as in `tasked`."""
    given = recipe.probes
    return given.model_copy(update=_resolved(given, recipe.data.held_out, own_text))


def _reads(given: TaskSettings | ProbeSettings, held: str) -> bool:
    """Whether any of these reads the held-out share."""
    return any(_resolved(given, held, None)[kind] != getattr(given, kind) for kind in _KINDS)


def _resolved(
    given: TaskSettings | ProbeSettings, held: str | None, own_text: OwnText | None
) -> dict[str, list[Any]]:
    """Specs of tasks or texts, by what they measure, with files for what paths stand for."""

    def of(spec: Any) -> Any:
        path = spec.get("path") if isinstance(spec, Mapping) else spec
        if path == VALIDATION and held is not None:
            found = held
        elif path == SELF and own_text is not None:
            found = own_text(spec if isinstance(spec, Mapping) else {})
        else:
            return spec
        return {**spec, "path": found} if isinstance(spec, Mapping) else found

    return {kind: [of(spec) for spec in getattr(given, kind)] for kind in _KINDS}
