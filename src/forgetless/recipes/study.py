"""The definition of a study: one recipe, varied along axes and in arms.

name: rates
recipe: {base: pocket, data: {train: "pocket:problems"}, training: {steps: 300}}
axes: {seed: [0, 1, 2]}                       # every run is done with every value
arms:                                         # one run each, times the axes
- {adapter.method: full, training.learning_rate: 3e-4}
- {name: gentle, adapter.method: lora, training.weight_decay: 0.3}
"""

import itertools
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from forgetless.core.errors import RecipeError, UserError
from forgetless.core.files import load_yaml
from forgetless.core.settings import Section, validated, with_overrides
from forgetless.recipes.checking import Checker, load_recipe
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe

Axes = dict[str, Annotated[list[Any], Field(min_length=1)]]
_AXES = TypeAdapter(Axes, config=ConfigDict(strict=True))


class Gathered:
    """The recipes of many runs, checked together.

    Args:
        source: what they are of, for messages.
        checker: for the processes that do a run; None for those of this launch.
    """

    def __init__(self, source: str, checker: Checker | None) -> None:
        self._source, self._checker, self._count = source, checker or Checker(), 0
        self._found: dict[str, Recipe] = {}
        self._problems: dict[str, list[str]] = {}  # each with the arms that have it

    def add(self, arm: str, content: Mapping[str, Any], overrides: Mapping[str, Any]) -> str | None:
        """The run id of one more recipe; None as soon as something is wrong with any of them."""
        self._count += 1
        try:
            recipe = load_recipe(content, overrides, self._checker)
            wrong = self._checker.check(recipe)
        except RecipeError as error:
            wrong = error.problems
        for problem in wrong:
            self._problems.setdefault(problem, []).append(arm)
        if self._problems:
            return None
        key = run_id(recipe)
        self._found.setdefault(key, recipe)
        return key

    def recipes(self) -> dict[str, Recipe]:
        """The recipes by run id, in their order.

        Raises:
            RecipeError: the problems of all of them, each said once.
        """
        said = []
        for problem, arms in self._problems.items():
            more = f" and {len(arms) - 3} more" if len(arms) > 3 else ""
            shown = f" (in {', '.join(dict.fromkeys(arms[:3]))}{more})"
            said.append(problem if len(arms) == self._count else problem + shown)
        if said:
            raise RecipeError(self._source, said)
        return self._found


class Definition(Section):
    """A named recipe that many runs come from: the part that studies and sequences share."""

    kind: ClassVar[str]
    """What messages call it."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    recipe: dict[str, Any]

    @classmethod
    @abstractmethod
    def refuse_other(cls, path: Path, content: Mapping[str, Any]) -> None:
        """Raise ``UserError`` for a file that defines something else."""

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """The definition of a YAML file; its name is the file's when it has none.

        ``recipe`` may name another file, taken from this one's folder. ``overrides`` change that
        recipe.
        """
        path = Path(path)
        content = load_yaml(path)
        cls.refuse_other(path, content)
        if isinstance(content.get("recipe"), str):
            content["recipe"] = load_yaml(path.parent / content["recipe"])
        return cls.parse({"name": path.stem, **content}, overrides, source=str(path))

    @classmethod
    def parse(
        cls,
        content: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        *,
        source: str | None = None,
    ) -> Self:
        """The definition of a mapping; raises ``RecipeError`` with all problems of its form."""
        definition = validated(cls, with_overrides(content, {}), source or cls.kind)
        if overrides:
            changed = with_overrides(definition.recipe, overrides)
            definition = definition.model_copy(update={"recipe": changed})
        return definition


class StudyRecipe(Definition):
    """A recipe and how it is varied.

    ``axes`` maps dotted keys to lists of values, all combined. ``arms`` are mappings of dotted keys
    to values, each with an optional ``name`` and an optional ``axes`` of its own.
    """

    kind: ClassVar[str] = "study"

    axes: Axes = Field(default={})
    arms: list[dict[str, Any]] = Field(default=[])

    @field_validator("arms")
    @classmethod
    def _arms(cls, arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for position, arm in enumerate(arms, start=1):
            if not isinstance(arm.get("name", "unnamed"), str):
                raise ValueError(f"the name of arm {position} must be text, got {arm['name']!r}")
            try:
                _AXES.validate_python(arm.get("axes", {}))
            except ValidationError:
                raise ValueError(
                    f"the axes of arm {position} must be lists of values, got {arm['axes']!r}"
                ) from None
        return arms

    @classmethod
    def refuse_other(cls, path: Path, content: Mapping[str, Any]) -> None:
        """Raise ``UserError`` for a file that is a recipe."""
        if "base" in content and "recipe" not in content:
            raise UserError(f"{path} is a recipe, not a study; run it with 'forgetless run'")

    def recipes(self, checker: Checker | None = None) -> dict[str, Recipe]:
        """The runs by run id; combinations that come to the same weights are one run.

        Args:
            checker: as of `Gathered`.

        Raises:
            RecipeError: the problems of all combinations, each said once.
        """
        gathered = Gathered(self.name, checker)
        owners: dict[str | None, str] = {}
        lost: dict[str, str] = {}
        for arm in self.arms or [{}]:
            runs = {
                gathered.add(name, self.recipe, {**overrides, "name": name}): name
                for name, overrides in self._combinations_of(arm)
            }
            if runs.keys() <= owners.keys():
                lost |= {name: owners[run] for run, name in runs.items()}
            owners = runs | owners
        recipes = gathered.recipes()
        for name, owner in lost.items():
            warnings.warn(
                f"{self.name}: arm {name!r} trains the same weights as {owner!r} and is no run of "
                "its own; what follows a training (export, repair, dial, tasks) belongs in the "
                "recipe",
                stacklevel=2,
            )
        return recipes

    def combinations(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The name of the arm and the overrides of every run, in order."""
        for arm in self.arms or [{}]:
            yield from self._combinations_of(arm)

    def _combinations_of(self, arm: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        fixed = {key: value for key, value in arm.items() if key not in ("name", "axes")}
        axes = {**self.axes, **arm.get("axes", {})}
        for values in itertools.product(*axes.values()):
            varied = dict(zip(axes, values, strict=True))
            named = [arm["name"], *labels(varied)] if "name" in arm else labels(fixed | varied)
            yield " ".join(named) or self.name, fixed | varied


def labels(overrides: Mapping[str, Any]) -> Iterator[str]:
    """``pissa learning_rate=0.001``: what sets an arm apart. Seeds belong to one arm."""
    for key, value in overrides.items():
        if key == "adapter.method":
            yield str(value)
        elif key != "seed":
            shown = f"{value:g}" if isinstance(value, float) else value
            yield f"{key.rpartition('.')[2]}={shown}"
