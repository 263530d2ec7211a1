"""What a model can be scored on: one file a kind of task, one line here.

Importing this package loads no torch; a task does when it is evaluated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from forgetless.errors import UserError, unknown
from forgetless.tasks.base import Item, Task, TaskResult
from forgetless.tasks.kl import KL
from forgetless.tasks.perplexity import Perplexity
from forgetless.tasks.pocket_problems import PocketProblems
from forgetless.tasks.pocket_recall import PocketRecall

__all__ = [
    "KL",
    "TASKS",
    "Item",
    "Perplexity",
    "PocketProblems",
    "PocketRecall",
    "Spec",
    "Task",
    "TaskKind",
    "TaskResult",
    "make_task",
    "make_tasks",
]

Spec = str | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TaskKind:
    """A kind of task by its name.

    Attributes:
        make: a frozen dataclass that implements `Task`; its fields are the settings.
        summary: one line.
    """

    make: Callable[..., Task]
    summary: str

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting with its default; `dataclasses.MISSING` where it must be given."""
        return {field.name: field.default for field in dataclasses.fields(self.make)}  # type: ignore[arg-type]

    @property
    def required(self) -> list[str]:
        """Settings without a default."""
        return [key for key, value in self.settings.items() if value is dataclasses.MISSING]


TASKS: Mapping[str, TaskKind] = {
    "pocket_recall": TaskKind(PocketRecall, "facts recalled in a held-out phrasing (accuracy)"),
    "pocket_problems": TaskKind(PocketProblems, "word problems solved (accuracy)"),
    "perplexity": TaskKind(Perplexity, "mean token loss of a text file (nats per token)"),
    "kl": TaskKind(KL, "distance to the base model on held texts: KL(base || model) per token"),
}


def make_task(spec: Spec | Task) -> Task:
    """The task that a recipe names.

    Its file, if it has one, is read here, so that a missing, broken or empty one shows before any
    model is loaded.

    Args:
        spec: the name of a kind ("pocket_recall"); a mapping with "kind" and settings
            ({"kind": "kl", "path": "held.jsonl", "limit": 100}), where a "name" that is a kind
            may stand for it; or a task, which is given back.

    Raises:
        UserError: an unknown kind, unknown or missing settings, or values out of range; everything
            that is wrong in one message.
        FileNotFoundError: a file that was there a moment ago is gone.
    """
    if isinstance(spec, str):
        spec = {"kind": spec}
    if not isinstance(spec, Mapping):
        if callable(getattr(spec, "evaluate", None)):
            return spec
        raise UserError(f"a task is a name or a mapping with 'kind', got {spec!r}")
    settings = dict(spec)
    kind = settings.pop("kind", settings.get("name"))
    if kind is None:
        raise UserError(f"a task needs a 'kind', one of {', '.join(TASKS)}; got {dict(spec)!r}")
    if kind not in TASKS:
        raise unknown("task", str(kind), TASKS)
    task = _build(kind, settings)
    _ = task.fingerprint
    return task


def make_tasks(specs: Spec | Task | Iterable[Spec | Task]) -> list[Task]:
    """The tasks of several specs, or of one.

    Raises:
        UserError: everything that is wrong with any of them, and names given twice.
    """
    several: Iterable[Spec | Task]
    if isinstance(specs, str | Mapping) or not isinstance(specs, Iterable):
        several = [specs]
    else:
        several = specs
    tasks: list[Task] = []
    problems: list[str] = []
    for spec in several:
        try:
            task = make_task(spec)
        except (ValueError, OSError) as problem:
            problems.append(str(problem))
            continue
        if any(task.name == other.name for other in tasks):
            problems.append(f"two tasks are named {task.name!r}; give each a 'name' of its own")
        tasks.append(task)
    if problems:
        raise UserError("\n".join(problems))
    return tasks


def _build(kind: str, settings: Mapping[str, Any]) -> Task:
    """A task of a known kind; every problem of its settings in one message."""
    known = TASKS[kind].settings
    problems = [
        str(unknown(f"setting of task {kind!r}:", str(key), known))
        for key in settings
        if key not in known
    ]
    missing = [key for key in TASKS[kind].required if key not in settings]
    problems += [f"task {kind!r} needs a {key!r}" for key in missing]
    task = None
    if not missing:
        try:
            task = TASKS[kind].make(**{k: v for k, v in settings.items() if k in known})
        except UserError as problem:
            problems.append(str(problem))
    if task is None or problems:
        raise UserError("; ".join(problems))
    return task
