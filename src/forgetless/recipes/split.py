"""The classes of one data set as tasks of a sequence, some at a time, in the order of a seed."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from forgetless.core.errors import UserError
from forgetless.core.settings import Count, Name, Section
from forgetless.data.classes import some
from forgetless.data.examples import load_examples
from forgetless.data.sources import Source

Classes = tuple[str, ...]
Orders = Mapping[str, list[str | int]] | list[list[str | int] | int]

_MOST_NAMED = 60
"""Characters of a task's name that has all of its classes."""


def shuffled(names: Sequence[str], seed: int) -> Classes:
    """The names in the random order of a seed.

        order = numpy.random.RandomState(seed).permutation(len(names))

    With seed 1993 it is the class order of iCaRL (main_resnet_tf.py: ``np.random.seed(1993)``, then
    ``np.random.shuffle`` of the classes' numbers, to the same effect), of PyCIL and PILOT
    (utils/data_manager.py: ``np.random.seed(seed)``, then ``np.random.permutation`` of the number
    of classes) and of most work after them: 68, 56, 78, 8, 23, ... of a hundred.
    """
    return tuple(names[i] for i in np.random.RandomState(seed).permutation(len(names)))


def named_orders(
    given: Orders, names: Sequence[str], called: Callable[[int, Classes], str]
) -> dict[str, Classes]:
    """Orders by their names.

    These are lists, by name or not, or seeds of `shuffled`; none for that of `names`. `called`
    names a list without a name, by its place from 1 and itself.
    """
    if isinstance(given, Mapping):
        return {name: tuple(map(str, order)) for name, order in given.items()}
    found: dict[str, Classes] = {}
    for place, order in enumerate(given or [list(names)], start=1):
        if isinstance(order, int):
            found[f"seed {order}"] = shuffled(names, order)
        else:
            words = tuple(map(str, order))
            found[called(place, words)] = words
    return found


class Split(Section):
    """How the classes of a data set become tasks.

    Attributes:
        data: a source of rows with classes.
        measure: a task that asks for them, or a list of these, each with a ``path`` of its own.
        tasks: how many, of as many classes each; or the number of classes of each task.
        classes: those that are learned, in the order in which a random order counts them; without,
            all of the data's, numbers by their size and names by the alphabet.
    """

    data: Name
    measure: dict[str, Any] | list[dict[str, Any]]
    tasks: Count | Annotated[list[Count], Field(min_length=1)]
    classes: Annotated[list[str | int], Field(min_length=1)] | None = None

    @field_validator("measure")
    @classmethod
    def _measure(cls, measure: Any) -> Any:
        for spec in measure if isinstance(measure, list) else [measure]:
            if not isinstance(spec.get("path"), str) or not spec.get("kind"):
                raise ValueError(
                    "every task that measures a split needs its kind and the path of the examples "
                    "of all classes, such as {kind: image_accuracy, path: test}"
                )
        return measure

    @cached_property
    def names(self) -> Classes:
        """The classes.

        Raises:
            FileNotFoundError: there is no such data.
            UserError: it cannot be read or has no classes; a name that a source cannot have.
        """
        found = [str(name) for name in self.classes or _classes_of(self.data)]
        if twice := {name for name in found if found.count(name) > 1}:
            raise UserError(f"the class {min(twice)!r} is named twice")
        if bad := [name for name in found if "," in name or "=" in name or name != name.strip()]:
            raise UserError(
                f"the class {bad[0]!r} has a comma, '=' or a space around it; rename it"
            )
        return tuple(found)

    def orders(self, given: Orders) -> dict[str, tuple[Classes, ...]]:
        """The classes of every task of every order, by the order's name.

        Of a task they stand in the order of `names`, so that a task of two orders is the same.

        Args:
            given: orders of all classes, by name or not, or seeds; none for that of `names`.

        Raises:
            UserError: an order that is none of all classes, or classes that do not make the tasks.
        """
        named = named_orders(given, self.names, lambda place, order: f"order {place}")
        return {order: self._parts(order, names) for order, names in named.items()}

    def _parts(self, order: str, names: Classes) -> tuple[Classes, ...]:
        """The classes of each task of one order."""
        if unknown := [name for name in names if name not in self.names]:
            raise UserError(f"{order} has {unknown[0]!r}, and the classes are {some(self.names)}")
        if sorted(names) != sorted(self.names):
            raise UserError(f"{order} must have each of the classes {some(self.names)} once")
        rest = iter(names)
        parts = [list(islice(rest, size)) for size in self._sizes()]
        return tuple(tuple(sorted(part, key=self.names.index)) for part in parts)

    def _sizes(self) -> list[int]:
        """How many classes each task has."""
        count = len(self.names)
        if isinstance(self.tasks, list):
            if sum(self.tasks) != count:
                raise UserError(f"tasks {self.tasks} have {sum(self.tasks)} classes, not {count}")
            return self.tasks
        if count % self.tasks:
            least, more = divmod(count, self.tasks)
            sizes = [least + 1] * more + [least] * (self.tasks - more)
            raise UserError(
                f"{count} classes do not make {self.tasks} tasks of as many each; "
                + (
                    f"say how many each has, such as tasks: {sizes}"
                    if least
                    else "take fewer tasks"
                )
            )
        return [count // self.tasks] * self.tasks

    def task(self, classes: Classes) -> dict[str, Any]:
        """The task of some of the classes, as a sequence has it, named by them."""
        name = name_of(classes)
        file = re.sub(r"[^\w.-]+", "-", name).strip("-")
        specs = self.measure if isinstance(self.measure, list) else [self.measure]
        return {
            "name": name,
            "data": _of(self.data, classes),
            "measure": [
                {
                    **spec,
                    "name": file if place == 0 else f"{file}-{spec.get('name', spec['kind'])}",
                    "path": _of(spec["path"], classes),
                }
                for place, spec in enumerate(specs)
            ],
        }


def name_of(classes: Classes) -> str:
    """What a task is called by its classes; of many by the first two, and a hash of all."""
    name = ", ".join(classes)
    if len(name) <= _MOST_NAMED or len(classes) < 3:
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:4]
    return f"{classes[0]}, {classes[1]} and {len(classes) - 2} more ({mark})"


def _of(source: str, classes: Classes) -> str:
    """The rows of a source that are of some classes."""
    return str(replace(Source.of(source), classes=classes))


def _classes_of(data: str) -> list[str]:
    """The classes of a source, numbers by their size and names by the alphabet."""
    examples = load_examples(data)
    labels = [record["label"] for record in examples if "label" in record] or examples.labels
    found = {str(label) for label in labels if label is not None}
    if not found:
        raise UserError(f"{data} has no classes to make tasks of; its rows need a label")
    return sorted(found, key=int if all(name.isdecimal() for name in found) else str)
