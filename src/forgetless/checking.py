"""What the values of a recipe refer to, looked at before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from forgetless.calibration import fingerprint
from forgetless.core import find_method
from forgetless.data import load_examples
from forgetless.methods import METHODS
from forgetless.models import linear_weight, load_tokenizer, meta_model, target_layers
from forgetless.recipe import AdapterSettings, DataSettings, Recipe, TaskSettings, needs_statistics
from forgetless.tasks import make_task

COLLECTED = frozenset({"second_moment"})
"""What a method may need that the statistics of a run hold."""


class Checker:
    """Checks recipes; whatever several of them share is looked at once."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Any, str | None]] = {}

    def check(self, recipe: Recipe) -> list[str]:
        """The problems of one recipe, see `check`."""
        found = [
            *self._adapter(recipe.base, recipe.adapter),
            *self._data(recipe.data),
            *self._statistics(recipe),
            *self._tasks(recipe.tasks),
        ]
        return list(dict.fromkeys(found))

    def _attempt(self, look: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
        """What ``look`` gives, or what was wrong; asked once for the same arguments."""
        key = f"{look!r}{arguments!r}"
        if key not in self._seen:
            try:
                self._seen[key] = look(*arguments), None
            except (ValueError, TypeError, OSError) as problem:
                self._seen[key] = None, str(problem)
        return self._seen[key]

    def adapter(self, base: str, settings: AdapterSettings) -> list[str]:
        """The problems of an adapter on a base."""
        return list(self._adapter(base, settings))

    def _adapter(self, base: str, settings: AdapterSettings) -> Iterator[str]:
        model, problem = self._attempt(meta_model, base)
        if problem is None:
            _, problem = self._attempt(load_tokenizer, base)
        if problem is not None:
            yield f"base: {problem}"
        method, problem = self._attempt(find_method, settings.method)
        if problem is not None:
            yield f"adapter.method: {problem}"
        elif missing := sorted(method.needs - COLLECTED):
            yield (
                f"adapter.method: {method.name!r} needs {' and '.join(missing)}, and a recipe "
                f"collects {', '.join(COLLECTED)} only; use forgetless.decompose"
            )
        elif method.factors is not None:
            _, problem = self._attempt(method.check, 1, (1, 1), settings.options)
            if problem is not None:
                yield f"adapter.options: {problem}"
            elif model is not None:
                yield from self._layers(model, settings)

    def _layers(self, model: Any, settings: AdapterSettings) -> Iterator[str]:
        """The rank against every layer; one sentence for all layers of a shape."""
        try:
            layers = target_layers(model, settings.target_modules)
        except ValueError as problem:
            yield f"adapter.target_modules: {problem}"
            return
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, layer in layers.items():
            shapes.setdefault(tuple(linear_weight(layer).shape), []).append(name)
        for shape, names in shapes.items():
            try:
                find_method(settings.method).check(settings.rank, shape, {}, names[0])
            except ValueError as problem:
                more = f" (and {len(names) - 1} more of this shape)" if len(names) > 1 else ""
                yield f"adapter.rank: {problem}{more}"

    def _data(self, settings: DataSettings) -> Iterator[str]:
        examples, problem = self._attempt(load_examples, settings.train)
        if problem is not None:
            yield f"data.train: {problem}"
        elif settings.format not in ("auto", examples.kind):
            yield f"data.format: {settings.format!r} given, but the data is {examples.kind!r}"

    def _statistics(self, recipe: Recipe) -> Iterator[str]:
        if recipe.adapter.method in METHODS and needs_statistics(recipe):
            _, problem = self._attempt(fingerprint, recipe.calibration.source)
            if problem is not None:
                yield f"calibration.source: {problem}"

    def _tasks(self, settings: TaskSettings) -> Iterator[str]:
        names: set[str] = set()
        for kind in ("learning", "forgetting"):
            for position, spec in enumerate(getattr(settings, kind)):
                where = f"tasks.{kind}.{position}"
                task, problem = self._attempt(make_task, spec)
                if problem is not None:
                    yield f"{where}: {problem}"
                elif task.name in names:
                    yield f"{where}: a second task named {task.name!r}; give it a 'name' of its own"
                else:
                    names.add(task.name)
