"""What the words of an option mean: rates, ranks, layers, tasks, settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from forgetless.core.errors import UserError

if TYPE_CHECKING:
    from forgetless.data.settings import CalibrationSettings
    from forgetless.tasks import Task


def rates_of(text: str) -> list[float]:
    """Learning rates: ``1e-4,3e-4``."""
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError:
        message = f"--rates takes numbers with commas between, as 1e-4,3e-4; got {text!r}"
        raise typer.BadParameter(message) from None


def numbers_of(option: str, text: str) -> list[float]:
    """Numbers with commas between: ``0,0.5,1``."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{option} takes numbers with commas between, got {text!r}") from None


def rank_of(text: str) -> str | int:
    """``exact``, ``requested`` or a number."""
    if text in ("exact", "requested"):
        return text
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"rank must be 'exact', 'requested' or a number from 1, got {text!r}")
    return int(text)


def targets_of(text: str) -> str | list[str]:
    """A list where commas stand between names, else the word or regular expression itself."""
    from forgetless.models.parts import PARTS

    names = [name.strip() for name in text.split(",")]
    return names if len(names) > 1 or (text.isidentifier() and text not in PARTS) else text


def options_of(assignments: Sequence[str] | None) -> dict[str, Any]:
    """The method's options: ``position=0.5``."""
    from forgetless.core.settings import parse_assignments

    return parse_assignments(_pairs("--option", assignments))


def by_layer(option: str, assignments: Sequence[str] | None) -> dict[str, Any]:
    """Settings LAYER=NUMBER, where a layer may be a regular expression with an = in it."""
    from forgetless.core.files import parse_yaml

    parts = [text.rpartition("=") for text in _pairs(option, assignments)]
    return {layer: parse_yaml(number) for layer, _, number in parts}


def _pairs(option: str, assignments: Sequence[str] | None) -> Sequence[str]:
    """The same, once each is seen to have a name before an =."""
    for text in assignments or ():
        if text.find("=") < 1:
            raise UserError(f"{option} takes a name and a value with an = between, got {text!r}")
    return assignments or ()


def calibration_of(
    source: str, samples: str, max_length: int, batch_size: int, **more: Any
) -> CalibrationSettings:
    """The text to keep, and how much of it is read."""
    from forgetless.core.settings import validated
    from forgetless.data.settings import CalibrationSettings

    values = {
        "source": source,
        "samples": int(samples) if samples.isdigit() else samples,
        "max_length": max_length,
        "batch_size": batch_size,
        **more,
    }
    return validated(CalibrationSettings, values, "calibration")


def task_specs(names: str, **options: Any) -> list[dict[str, Any]]:
    """Tasks: ``pocket_recall,perplexity:notes.txt,commonsense,mine.yaml``.

    They are as a recipe names them, see `forgetless.tasks.names.resolved`. Of the options those
    that are not None go to the tasks that have them.
    """
    from forgetless.tasks import TASKS, kind_of
    from forgetless.tasks.names import resolved

    known = {kind: task.defaults() for kind, task in TASKS.items()}
    given = {key: value for key, value in options.items() if value is not None}
    specs: list[dict[str, Any]] = []
    parts = re.split(r",(?![^,:]*=)", names)  # of FILE#prompt=q,completion=a the commas stay
    for name in filter(None, (part.strip() for part in parts)):
        for settings in resolved(name, known):
            asked = kind_of(settings["kind"])
            if "path" in asked.required() and "path" not in settings:
                raise UserError(f"task {name!r} needs a 'path': write {name}:FILE")
            has = asked.defaults()
            specs.append(settings | {key: value for key, value in given.items() if key in has})
    return specs


def learned_among(tasks: Sequence[Task], names: str) -> list[str]:
    """Those of the tasks that ``names``, written as for `task_specs`, mean; by their own names.

    Raises:
        UserError: a name that is none of them.
    """
    known = [task.name for task in tasks]
    learned = []
    for name in filter(None, names.split(",")):
        own = [name] if name in known else _names_of(name)
        if not own or not set(own) <= set(known):
            raise UserError(f"{name} cannot be learned: not among the tasks {', '.join(known)}")
        learned += own
    return learned


def _names_of(spec: str) -> list[str]:
    """Of the tasks that a name on the command line stands for; none where it stands for nothing."""
    from forgetless.tasks import make_tasks

    try:
        return [task.name for task in make_tasks(task_specs(spec))]
    except (UserError, FileNotFoundError):
        return []
