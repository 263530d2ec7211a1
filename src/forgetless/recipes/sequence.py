"""The definition of sequences: tasks that one base learns one after the other.

name: skills
recipe: {base: pocket, training: {steps: 300}, tasks: {forgetting: [pocket_recall]}}
tasks:                                        # in order; dotted keys change the recipe for one
- {name: problems, data: "pocket:problems", measure: pocket_problems}
- {name: series, data: "pocket:series", measure: pocket_series, training.steps: 200}
orders: [[problems, series], [series, problems]]
seeds: [0, 1, 2]
arms: [{adapter.method: lora}, {adapter.method: full, training.learning_rate: 3e-4}]

Every task of every sequence is a run, `after` the one before it. What the recipe calls forgetting
is the base's knowledge. In the place of `tasks` a `split` makes tasks of the classes of one data
set, and `orders` are then those of its classes:

split: {data: images, measure: {kind: image_accuracy, path: images-test}, tasks: 5}
orders: [1993, 1994]
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from forgetless.core.errors import UserError
from forgetless.data.examples import load_examples
from forgetless.data.modality import modality_of, new_classes
from forgetless.recipes.checking import Checker
from forgetless.recipes.recipe import EarlierSettings, Recipe
from forgetless.recipes.split import Split, name_of, named_orders
from forgetless.recipes.study import Definition, Gathered, labels

_OF_A_TASK = ("name", "data", "measure")
_OF_A_SEQUENCE = ("between", "earlier", "apart")
"""Keys of a definition that an arm may set too, and that are a run's own."""
_EARLIER = "earlier"
"""What stands for the data of every earlier task as the source of a penalty."""


Bound = Literal["joint", "separate"]
"""What sequences are compared with, as values of `between`."""


@dataclass(frozen=True)
class Chain:
    """One sequence of runs.

    Attributes:
        arm: what it was done with.
        seed: of every run.
        tasks: names, in the order in which they are learned.
        bound: "joint" of one run that learns all tasks at once, "separate" of runs that each learn
            one from the base; None of a sequence.
    """

    arm: str
    order: str
    seed: int
    tasks: tuple[str, ...]
    runs: tuple[str, ...]
    bound: Bound | None = None


class SequenceRecipe(Definition):
    """Tasks, and the recipe by which each of them is learned after those before it.

    ``tasks`` have a ``name``, their training ``data`` and what ``measure`` them, a task or a list
    of which the first is what the matrix shows; further keys are dotted and change the recipe.
    ``split`` makes them of the classes of one data set, see `Split`, and names them by these.
    ``orders`` are lists of names (of a split, of all its classes), by name or not, or numbers, each
    the seed of a random order.
    ``between`` is a run's own, see `SequenceSettings`, or ``joint``, one run that learns all tasks
    at once, or ``separate``, a run for each from the base: what sequences are compared with.
    With a ``replay`` of 0.1 a buffer has a tenth of every earlier task's examples, each of which
    comes once an epoch. A penalty whose ``source`` is ``earlier`` is one on the data of each
    earlier task.
    With ``adapter.head: new`` all tasks of a classifier share one new head for the classes of all
    of them. ``loss_over`` says over which of these a run's loss runs: those of its ``data``, the
    task's and its buffers'; all that were ``seen`` so far; or ``all`` of the head.
    ``arms`` are mappings of dotted keys to values, each with an optional ``name``.
    """

    kind: ClassVar[str] = "sequence"

    tasks: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    split: Split | None = None
    orders: dict[str, list[str | int]] | list[list[str | int] | int] = Field(default=[])
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = [0]  # noqa: RUF012 - pydantic copies it
    between: Literal["continue", "stack", "merge", "joint", "separate"] = "continue"
    earlier: EarlierSettings = EarlierSettings()
    apart: Annotated[float, Field(gt=0)] | None = None
    replay: Annotated[float, Field(gt=0, le=1)] | None = None
    loss_over: Literal["data", "seen", "all"] = "data"
    arms: list[dict[str, Any]] = Field(default=[])

    @field_validator("tasks")
    @classmethod
    def _tasks(cls, tasks: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for position, task in enumerate(tasks or (), start=1):
            if missing := [key for key in _OF_A_TASK if not task.get(key)]:
                raise ValueError(f"task {position} needs {' and '.join(missing)}")
            if not isinstance(task["name"], str):
                raise ValueError(f"the name of task {position} must be text, got {task['name']!r}")
        names = [task["name"] for task in tasks or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two tasks are named {', '.join(sorted(twice))}")
        return tasks

    @model_validator(mode="after")
    def _arms_apart(self) -> Self:
        names = [name for name, _ in self.arm_changes()]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"two arms are named {twice[0]!r}; give each a 'name' of its own")
        return self

    @model_validator(mode="after")
    def _orders_of_tasks(self) -> Self:
        if (self.tasks is None) == (self.split is None):
            raise ValueError("give either tasks, or a split of one data set into them")
        if self.split is not None:
            try:
                _ = self._parts
            except (OSError, TypeError, UserError) as problem:
                raise ValueError(f"split: {problem}") from None
            return self
        known = [task["name"] for task in self.all_tasks]
        for name, order in self.all_orders().items():
            if unknown := [task for task in order if task not in known]:
                raise ValueError(f"order {name} has {unknown[0]!r}, and the tasks are {known}")
            if not order or len(set(order)) < len(order):
                raise ValueError(f"order {name} must name tasks, each once, got {list(order)}")
        return self

    @classmethod
    def refuse_other(cls, path: Path, content: Mapping[str, Any]) -> None:
        """Raise ``UserError`` for a file without a recipe or tasks."""
        if not content.keys() & {"tasks", "split"} or "recipe" not in content:
            raise UserError(f"{path} has no 'recipe' and 'tasks', so it is no sequence")

    def all_orders(self) -> dict[str, tuple[str, ...]]:
        """The names of the tasks in every order, by the order's name."""
        if self.split is not None:
            return {order: tuple(map(name_of, parts)) for order, parts in self._parts.items()}
        names = [task["name"] for task in self.all_tasks]
        return named_orders(self.orders, names, lambda place, order: " > ".join(order))

    @cached_property
    def all_tasks(self) -> list[dict[str, Any]]:
        """The tasks of the definition, or those of all orders of its split."""
        if self.split is None:
            return self.tasks or []
        parts = dict.fromkeys(part for parts in self._parts.values() for part in parts)
        return [self.split.task(part) for part in parts]

    @cached_property
    def _parts(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """The classes of every task of every order of a split."""
        return {} if self.split is None else self.split.orders(self.orders)

    def _measured(self, learned: tuple[str, ...]) -> list[dict[str, Any]]:
        """The tasks that a run which learned some is measured on: those of any order with them.

        Of a split every order has tasks of its own; sequences that share a run share its measures.
        """
        if self.split is None:
            return self.all_tasks
        orders = [order for order in self.all_orders().values() if {*learned} <= {*order}]
        return [task for task in self.all_tasks if any(task["name"] in o for o in orders)]

    def chains(self, checker: Checker | None = None) -> tuple[list[Chain], dict[str, Recipe]]:
        """Every sequence, and the recipes of their runs by run id, each after the one before it.

        Sequences that begin alike share the runs of their beginning. What is learned jointly or
        separately has no order, so that of several with the same tasks the first stands for all.
        A seed or an order that an arm has twice counts once.

        Args:
            checker: as of `Gathered`.

        Raises:
            RecipeError: the problems of all runs, each said once.
        """
        gathered, found = Gathered(self.name, checker), []
        for arm, changes in self.arm_changes():
            bound = _bound(changes)
            for order, names in self._orders(bound).items():
                parts = [names[: position + 1] for position in range(len(names))]
                if bound is not None:
                    parts = [names] if bound == "joint" else [(name,) for name in names]
                for seed in self.seeds:
                    runs: list[str | None] = []
                    for learned in parts:
                        overrides = self.run_changes(learned, changes, seed)
                        joined = (" > " if bound is None else " + ").join(learned)
                        overrides["name"] = f"{arm}: {joined}"
                        if runs and bound is None:
                            overrides["sequence.after"] = runs[-1] or "unknown"
                        runs.append(gathered.add(arm, self.recipe, overrides))
                    found.append(Chain(arm, order, seed, names, tuple(map(str, runs)), bound))
        apart = {(chain.arm, chain.runs): chain for chain in reversed(found)}
        return list(reversed(apart.values())), gathered.recipes()

    def _orders(self, bound: Bound | None) -> dict[str, tuple[str, ...]]:
        """The orders of a sequence; of what has no order, one of those with the same tasks."""
        found = self.all_orders()
        if bound is None:
            return found
        known = [task["name"] for task in self.all_tasks]
        apart = {frozenset(names): order for order, names in reversed(found.items())}
        return {
            order: tuple(sorted(names, key=known.index)) for names, order in reversed(apart.items())
        }

    def arm_changes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The name of every arm and what it changes."""
        own = self.model_dump(include=set(_OF_A_SEQUENCE))
        for arm in self.arms or [{}]:
            changes = {key: value for key, value in arm.items() if key != "name"}
            name = str(arm.get("name") or " ".join(labels(changes)) or self.name)
            yield (
                name,
                {
                    f"sequence.{key}" if key in _OF_A_SEQUENCE else key: value
                    for key, value in (own | changes).items()
                },
            )

    def run_changes(
        self, learned: tuple[str, ...], changes: Mapping[str, Any], seed: int
    ) -> dict[str, Any]:
        """What the recipe of a run changes, without the run before it.

        The run learns the last of the tasks after the others, or jointly with all of them in as
        many steps as they take one after the other.
        """
        *earlier, task = (t for name in learned for t in self.all_tasks if t["name"] == name)
        bound = _bound(changes)
        now = [*earlier, task] if bound == "joint" else [task]
        measured = [each for each in self._measured(learned) if each not in now]
        others = [spec for each in measured for spec in measures(each)]
        own = {key: value for key, value in task.items() if key not in _OF_A_TASK}
        found = {**changes, **own, "data.train": task["data"], "seed": seed}
        if bound is not None:
            del found["sequence.between"]
        replay = found.pop("replay", self.replay)
        if bound == "joint":
            replay, steps = 1.0, found.get("training.steps", self._section("training").get("steps"))
            found |= {} if steps is None else {"training.steps": steps * len(now)}
        if earlier and replay is not None:
            found["data.train"] = self._replayed(task["data"], [t["data"] for t in earlier], replay)
        penalties = []
        for spec in found.get("penalties", self.recipe.get("penalties")) or ():
            sources = [spec.get("source")] if isinstance(spec, Mapping) else [None]
            if sources == [_EARLIER]:
                penalties += [{**spec, "source": t["data"]} for t in earlier if t not in now]
            else:
                penalties.append(spec)
        loss_over = found.pop("loss_over", self.loss_over)
        head = found.get("adapter.head", self._section("adapter").get("head"))
        if head == "new" and all(self.classes.values()):
            found["adapter.head"] = list(
                self.split.names if self.split else _union(self.classes.values())
            )
            with_earlier = loss_over == "seen" or (loss_over == "data" and replay is not None)
            over = [*earlier, task] if with_earlier else [task]
            if loss_over != "all":
                found["sequence.classes"] = _union(self.classes[each["name"]] for each in over)
        return {
            **found,
            "penalties": penalties,
            "tasks.learning": [spec for each in now for spec in measures(each)],
            "tasks.forgetting": [*self.knowledge, *others],
        }

    def _replayed(self, new: str, old: Sequence[str], share: Any) -> Any:
        """Training data with a buffer of each old source, once an epoch."""
        if not all(path in self.counts for path in (new, *old)) or not isinstance(share, float):
            return new  # the check of the recipe tells what is wrong with the data
        buffers = [max(1, round(self.counts[path] * share)) for path in old]
        return [
            {"path": new, "weight": self.counts[new]},
            *({"path": p, "weight": n, "buffer": n} for p, n in zip(old, buffers, strict=True)),
        ]

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many examples the data of the tasks has; without what cannot be read."""
        found = {}
        for path in dict.fromkeys(task["data"] for task in self.all_tasks):
            with suppress(OSError, ValueError, TypeError):
                found[path] = len(load_examples(path))
        return found

    @cached_property
    def classes(self) -> dict[str, list[str]]:
        """The classes of every task that a new head learns; none where they cannot be read."""
        if self.split is not None:
            return {name_of(p): list(p) for parts in self._parts.values() for p in parts}
        found: dict[str, list[str]] = {task["name"]: [] for task in self.all_tasks}
        with suppress(OSError, ValueError, TypeError):
            modality = modality_of(str(self.recipe["base"]))
            if modality.labels is not None:
                for task in self.all_tasks:
                    found[task["name"]] = new_classes(modality, task["data"])
        return found

    @property
    def knowledge(self) -> list[Any]:
        """What measures the base's knowledge, the first for the matrix."""
        found = self._section("tasks").get("forgetting") or []
        return list(found) if isinstance(found, list) else [found]

    def _section(self, name: str) -> Mapping[str, Any]:
        found = self.recipe.get(name)
        return found if isinstance(found, Mapping) else {}


def _bound(changes: Mapping[str, Any]) -> Bound | None:
    """What an arm is as a bound of sequences; None of a sequence."""
    between = changes.get("sequence.between")
    return between if between in get_args(Bound) else None


def _union(parts: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in part))


def measures(task: Mapping[str, Any]) -> list[Any]:
    """What measures a task of a sequence, the first for the matrix."""
    given = task["measure"]
    return list(given) if isinstance(given, list) else [given]
