"""What a model can be scored on: one file a kind of task, one line here.

Importing this package loads no torch; a task does when it is evaluated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from forgetless.core.errors import UserError, unknown
from forgetless.tasks.base import Item, Task, TaskResult
from forgetless.tasks.diversity import Diversity
from forgetless.tasks.exact_match import ExactMatch
from forgetless.tasks.harness import LMEval
from forgetless.tasks.humaneval import HumanEval
from forgetless.tasks.kl import KL
from forgetless.tasks.mbpp import MBPP
from forgetless.tasks.multiple_choice import MultipleChoice
from forgetless.tasks.names import SUITES, resolved
from forgetless.tasks.perplexity import Perplexity
from forgetless.tasks.pocket_choice import PocketChoice
from forgetless.tasks.pocket_functions import PocketFunctions
from forgetless.tasks.pocket_problems import PocketProblems
from forgetless.tasks.pocket_recall import PocketRecall
from forgetless.tasks.pocket_series import PocketSeries
from forgetless.tasks.sandbox import CodeResult, run_code

__all__ = [
    "KL",
    "MBPP",
    "SUITES",
    "TASKS",
    "CodeResult",
    "Diversity",
    "ExactMatch",
    "HumanEval",
    "Item",
    "LMEval",
    "MultipleChoice",
    "Perplexity",
    "PocketChoice",
    "PocketFunctions",
    "PocketProblems",
    "PocketRecall",
    "PocketSeries",
    "Spec",
    "Task",
    "TaskKind",
    "TaskResult",
    "make_task",
    "make_tasks",
    "run_code",
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
    "pocket_choice": TaskKind(PocketChoice, "facts recognised among four answers (accuracy)"),
    "pocket_functions": TaskKind(PocketFunctions, "small functions that pass their tests (pass@1)"),
    "pocket_series": TaskKind(PocketSeries, "series of numbers, step by step (accuracy)"),
    "humaneval": TaskKind(HumanEval, "HumanEval's functions that pass their tests (pass@k)"),
    "mbpp": TaskKind(MBPP, "MBPP's functions that pass their tests (pass@k)"),
    "diversity": TaskKind(Diversity, "different outputs among several draws on another task"),
    "perplexity": TaskKind(Perplexity, "mean token loss of a text file (nats per token)"),
    "kl": TaskKind(KL, "distance to the base model on held texts: KL(base || model) per token"),
    "multiple_choice": TaskKind(MultipleChoice, "the most probable of given answers (accuracy)"),
    "generate": TaskKind(ExactMatch, "generated answers compared with accepted ones (accuracy)"),
    "lm_eval": TaskKind(LMEval, "a task of the lm-evaluation-harness, by its name there"),
}


def make_task(spec: Spec | Task) -> Task:
    """The task that a recipe names.

    Its file, if it has one, is read here, so that a missing, broken or empty one shows before any
    model is loaded.

    Args:
        spec: the name of a kind ("pocket_recall"), of a task of lm-eval ("hellaswag") or of a YAML
            file with either; a mapping with such a name as its "kind" and settings ({"kind": "kl",
            "path": "held.jsonl", "limit": 100}), where a "name" that is a kind may stand for it; or
            a task, which is given back.

    Raises:
        UserError: an unknown kind, unknown or missing settings, or values out of range; everything
            that is wrong in one message. A suite, which stands for several tasks.
        FileNotFoundError: a file that was there a moment ago is gone.
    """
    made = _made(spec)
    if len(made) != 1:
        raise UserError(f"{spec!r} stands for several tasks ({', '.join(t.name for t in made)})")
    return made[0]


def _made(spec: Spec | Task) -> list[Task]:
    """The task of a spec, or those of a suite; each with its data read."""
    if not isinstance(spec, str | Mapping):
        if callable(getattr(spec, "evaluate", None)):
            return [spec]
        raise UserError(f"a task is a name or a mapping with 'kind', got {spec!r}")
    known = {kind: task.settings for kind, task in TASKS.items()}
    made, problems = [], []
    for settings in resolved(spec, known):
        try:
            task = _build(settings.pop("kind"), settings)
            _ = task.fingerprint
            made.append(task)
        except (ValueError, OSError) as problem:
            problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UserError("\n".join(map(str, problems)))
    return made


def make_tasks(specs: Spec | Task | Iterable[Spec | Task]) -> list[Task]:
    """The tasks of several specs, or of one; a suite ("commonsense") stands for its tasks.

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
            made = _made(spec)
        except (ValueError, OSError) as problem:
            problems.append(str(problem))
            continue
        for task in made:
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
