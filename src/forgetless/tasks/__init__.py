"""What a model can be scored on: one file a kind of task, one line here.

The file has a frozen dataclass over `forgetless.tasks.base.Task` (or over `Generating`, `CodeTask`
or `TextTask`, which are tasks with most of it done) and calls it `TASK`; the file's name is the
kind's. Importing this package loads no torch; a task does when it is evaluated.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any

from forgetless.core.errors import UserError, unknown
from forgetless.core.plugins import is_named, named, offered
from forgetless.tasks.base import Item, Task, TaskResult
from forgetless.tasks.names import SUITES, resolved
from forgetless.tasks.sandbox import CodeResult, run_code

__all__ = [
    "SUITES",
    "TASKS",
    "CodeResult",
    "Item",
    "Spec",
    "Task",
    "TaskResult",
    "kind_of",
    "make_task",
    "make_tasks",
    "run_code",
]

Spec = str | Mapping[str, Any]

_KINDS = (
    "pocket_recall",
    "pocket_problems",
    "pocket_choice",
    "pocket_functions",
    "pocket_series",
    "humaneval",
    "mbpp",
    "diversity",
    "perplexity",
    "preference",
    "kl",
    "multiple_choice",
    "generate",
    "lm_eval",
    "image_accuracy",
    "sentence_accuracy",
    "neighbours",
    "retrieval",
    "class_kl",
)


def _fault(kind: str, found: Any) -> str:
    """What keeps an object from being the tasks of that kind, or of any where it is empty."""
    if not (isinstance(found, type) and issubclass(found, Task)):
        return f"it is no class over forgetless.tasks.Task, but {found!r}"
    return "" if kind in ("", found.kind) else f"the tasks call their kind {found.kind!r}"


TASKS: Mapping[str, type[Task]] = MappingProxyType(
    {kind: import_module(f"forgetless.tasks.{kind}").TASK for kind in _KINDS}
    | offered("forgetless.tasks", "task", _KINDS, _fault)
)
"""Kind -> the class of its tasks, in the order in which they are shown: ours, then others'."""


def kind_of(name: str) -> type[Task]:
    """The tasks of a kind in `TASKS`, or of ``module:name``.

    Raises:
        UserError: there are none.
    """
    if is_named(name):
        found: type[Task] = named(name, "task", partial(_fault, ""))
        return found
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def make_task(spec: Spec | Task, usual: Mapping[str, Any] | None = None) -> Task:
    """The task that a recipe names.

    Its file, if it has one, is read here, so that a missing, broken or empty one shows before any
    model is loaded; not where reading it would run code of the user's.

    Args:
        spec: the name of a kind ("pocket_recall", or "module:name"), of a task of lm-eval
            ("hellaswag") or of a YAML file with either; a mapping with such a name as its "kind"
            and settings ({"kind": "kl", "path": "held.jsonl", "limit": 100}), where a "name" that
            is a kind may stand for it; or a task, which is given back.
        usual: settings of tasks that have them and do not give their own.

    Raises:
        UserError: an unknown kind, unknown or missing settings, or values out of range; everything
            that is wrong in one message. A suite, which stands for several tasks.
        FileNotFoundError: a file that was there a moment ago is gone.
    """
    made = _made(spec, usual or {})
    if len(made) != 1:
        raise UserError(f"{spec!r} stands for several tasks ({', '.join(t.name for t in made)})")
    return made[0]


def _made(spec: Spec | Task, usual: Mapping[str, Any]) -> list[Task]:
    """The task of a spec, or those of a suite; each with its data read."""
    if not isinstance(spec, str | Mapping):
        if callable(getattr(spec, "evaluate", None)):
            return [spec]
        raise UserError(f"a task is a name or a mapping with 'kind', got {spec!r}")
    known = {kind: task.defaults() for kind, task in TASKS.items()}
    made: list[Task] = []
    problems: list[Exception] = []
    for settings in resolved(spec, known):
        try:
            kind = settings.pop("kind")
            own = kind_of(kind).defaults()
            more = {key: value for key, value in usual.items() if key in own}
            if settings.get("chat_template") == "off":
                more.pop("system", None)  # which a template says
            task = _build(kind, more | settings)
            if not task.has_own_code:
                _ = task.fingerprint
            made.append(task)
        except (ValueError, OSError) as problem:
            problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UserError("\n".join(map(str, problems)))
    return made


def make_tasks(
    specs: Spec | Task | Iterable[Spec | Task], usual: Mapping[str, Any] | None = None
) -> list[Task]:
    """The tasks of several specs, or of one; a suite ("commonsense") stands for its tasks.

    For `usual` see `make_task`.

    Raises:
        UserError: everything that is wrong with any of them, and names given twice.
    """
    one = isinstance(specs, str | Mapping) or not isinstance(specs, Iterable)
    several: Iterable[Any] = [specs] if one else specs  # type: ignore[assignment]
    tasks: list[Task] = []
    problems: list[str] = []
    for spec in several:
        try:
            made = _made(spec, usual or {})
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
    made = kind_of(kind)
    known = made.defaults()
    problems = [
        str(unknown(f"setting of task {kind!r}:", str(key), known))
        for key in settings
        if key not in known
    ]
    missing = [key for key in made.required() if key not in settings]
    problems += [f"task {kind!r} needs a {key!r}" for key in missing]
    task = None
    if not missing:
        try:
            task = made(**{k: v for k, v in settings.items() if k in known})
        except UserError as problem:
            problems.append(str(problem))
    if task is None or problems:
        raise UserError("; ".join(problems))
    return task
