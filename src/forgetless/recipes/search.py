"""The definition of a search: one recipe, and the settings among which a front is looked for.

name: repairs
recipe: {base: pocket, data: {train: "pocket:problems"}, training: {steps: 300}, ...}
arms:                                         # one is chosen; each with settings of its own
- {adapter.method: lora, space: {training.learning_rate: {low: 3e-4, high: 1e-2, log: true}}}
- {adapter.method: full, space: {training.learning_rate: {low: 3e-5, high: 1e-3, log: true}}}
space: {training.weight_decay: [0, 0.1, 0.3]} # of every arm
first: [{arm: lora, training.learning_rate: 3e-3, training.weight_decay: 0}]
trials: 40
replicate: [1, 2]                             # further seeds of what is on the front
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from forgetless.core.errors import RecipeError, UserError, unknown
from forgetless.core.settings import Count, Name, Section, validated
from forgetless.recipes.checking import Checker
from forgetless.recipes.recipe import Recipe
from forgetless.recipes.study import Definition, Gathered, labels
from forgetless.tasks import make_tasks

ARM = "arm"
"""The name under which trials have their arm."""

Value = str | int | float | bool | None


class Drawing(Protocol):
    """What draws settings: a trial of Optuna."""

    def suggest_categorical(self, name: str, choices: list[Value], /) -> Any:
        """One of the choices."""

    def suggest_int(self, name: str, low: int, high: int, /, *, step: int, log: bool) -> int:
        """A whole number, ends included."""

    def suggest_float(
        self, name: str, low: float, high: float, /, *, step: float | None, log: bool
    ) -> float:
        """A number, ends included."""


class Range(Section):
    """Numbers from ``low`` to ``high``, whole ones if all of it is whole.

    ``log`` draws factors alike, as is right for learning rates; a ``step`` draws multiples of it
    above ``low``.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: Annotated[int | float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _can_be_drawn_from(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs a low above 0 and has no step")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether it has whole numbers alone."""
        return all(isinstance(v, int) for v in (self.low, self.high, self.step or 1))


@dataclass(frozen=True)
class Dimension:
    """One setting and what it may be.

    Attributes:
        key: the dotted key of the recipe.
        name: what trials call it: the key, behind the arm's name where it is that arm's own.
        among: a range, or the choices.
    """

    key: str
    name: str
    among: Range | tuple[Any, ...]

    def draw(self, trial: Drawing) -> Any:
        """The trial's value; a number that is not whole has three digits."""
        if isinstance(self.among, tuple):
            choices = {_plain(choice): choice for choice in self.among}
            return choices[trial.suggest_categorical(self.name, list(choices))]
        low, high, log, step = self.among.low, self.among.high, self.among.log, self.among.step
        if self.among.is_whole:
            whole = int(low), int(high)
            return trial.suggest_int(self.name, *whole, step=int(step or 1), log=log)
        drawn = trial.suggest_float(self.name, float(low), float(high), step=step, log=log)
        return float(f"{drawn:.3g}")

    def ends(self) -> tuple[Any, ...]:
        """Every choice, or the ends of the range."""
        if isinstance(self.among, tuple):
            return self.among
        return self.among.low, self.among.high

    def refusal(self, value: Any) -> str | None:
        """Why it cannot have a value; None where it can."""
        if isinstance(self.among, tuple):
            known = value in self.among
            return None if known else f"must be one of {list(self.among)}, got {value!r}"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and self.among.low <= value <= self.among.high:
            return None
        return f"must be in {self.among.low:g}..{self.among.high:g}, got {value!r}"


def _plain(choice: Any) -> Value:
    """A choice as a storage can hold it: lists and mappings as JSON."""
    return json.dumps(choice, sort_keys=True) if isinstance(choice, list | dict) else choice


@dataclass(frozen=True)
class Arm:
    """What an arm fixes, and the settings that it leaves open."""

    name: str
    fixed: Mapping[str, Any]
    dimensions: tuple[Dimension, ...]


class Objectives(Section):
    """The tasks of the recipe to learn and not to forget, by name; the first of either if left out.

    Learning is the gain over the base and forgetting the loss against it, in the task's unit, such
    as a share of right answers, or nats per token of a KL.
    """

    learning: Name | None = None
    forgetting: Name | None = None


class SearchRecipe(Definition):
    """A recipe, and the settings among which a front of learning and forgetting is looked for.

    ``space`` maps dotted keys to lists of choices or to ranges, see `Range`. ``arms`` are mappings
    of dotted keys to values, each with an optional ``name`` and a ``space`` of its own, which takes
    the place of the common one where both have a key. ``first`` are settings to begin with. The
    ``sampler`` draws all others. ``trials`` or ``hours`` end the search; hours are those of a
    command. What is on the front is done with the further seeds of ``replicate``.
    """

    kind: ClassVar[str] = "search"

    space: dict[str, Any] = Field(default={})
    arms: list[dict[str, Any]] = Field(default=[])
    objectives: Objectives = Objectives()
    first: list[dict[str, Any]] = Field(default=[])
    sampler: Literal["tpe", "nsga2"] = "tpe"
    trials: Count | None = None
    hours: Annotated[float, Field(gt=0)] | None = None
    replicate: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[])

    @field_validator("arms")
    @classmethod
    def _named(cls, arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = [arm_name(arm) for arm in arms]
        for position, (arm, name) in enumerate(zip(arms, names, strict=True), start=1):
            if not isinstance(name, str) or not name:
                raise ValueError(f"arm {position} needs a name that is text, got {name!r}")
            if not isinstance(arm.get("space", {}), dict):
                raise ValueError(f"the space of arm {name} must be a mapping, got {arm['space']!r}")
            if names.count(name) > 1:
                raise ValueError(f"two arms are named {name!r}; give them a 'name'")
        return arms

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.trials is None and self.hours is None:
            raise ValueError("a search ends after so many 'trials' or 'hours'; give one of them")
        if self.trials is not None and len(self.first) > self.trials:
            raise ValueError(f"{len(self.first)} first settings are more than {self.trials} trials")
        return self

    @classmethod
    def refuse_other(cls, path: Path, content: Mapping[str, Any]) -> None:
        """Raise ``UserError`` for a file without a recipe and a space."""
        if "recipe" not in content or not ("space" in content or "arms" in content):
            raise UserError(f"{path} has no 'recipe' and 'space', so it is no search")

    def all_arms(self) -> dict[str, Arm]:
        """The arms by name; a search without any is one arm.

        Raises:
            RecipeError: what is wrong with their spaces.
        """
        found, problems = {}, []
        for content in self.arms or [{"name": self.name}]:
            name, own = arm_name(content), content.get("space", {})
            fixed = {k: v for k, v in content.items() if k not in ("name", "space")}
            dimensions = []
            for key, among in {**self.space, **own}.items():
                named = f"{name}: {key}" if key in own else key
                try:
                    dimensions.append(Dimension(key, named, _among(key, among)))
                except RecipeError as error:
                    where = f"arms.{name}.space" if key in own else "space"
                    problems += [f"{where}.{problem}" for problem in error.problems]
            found[name] = Arm(name, fixed, tuple(dimensions))
        if problems:
            raise RecipeError(self.name, list(dict.fromkeys(problems)))
        if not any(arm.dimensions for arm in found.values()) and len(found) < 2:
            raise RecipeError(self.name, ["space: there is nothing to choose; name settings"])
        return found

    def draw(self, trial: Drawing) -> tuple[str, dict[str, Any]]:
        """The arm of a trial, and its settings as dotted overrides of the recipe."""
        arms = self.all_arms()
        arm = next(iter(arms.values()))
        if len(arms) > 1:
            arm = arms[trial.suggest_categorical(ARM, list(arms))]
        return arm.name, {**arm.fixed, **{d.key: d.draw(trial) for d in arm.dimensions}}

    def recipe_of(self, arm: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The overrides of a run, with its name."""
        fixed = self.all_arms()[arm].fixed
        open_ = {key: value for key, value in overrides.items() if key not in fixed}
        return {**overrides, "name": " ".join([arm, *labels(open_)])}

    def asked(self) -> list[dict[str, Value]]:
        """What trials call the settings of ``first``; raises ``RecipeError`` for wrong ones."""
        arms, found, problems = self.all_arms(), [], []
        for position, settings in enumerate(self.first):
            name = settings.get(ARM, next(iter(arms)) if len(arms) == 1 else None)
            if name not in arms:
                problems.append(f"first.{position}.arm: must be one of {list(arms)}, got {name!r}")
                continue
            own = {dimension.key: dimension for dimension in arms[name].dimensions}
            values: dict[str, Value] = {ARM: name} if len(arms) > 1 else {}
            for key, value in settings.items():
                if key in own:
                    refusal = own[key].refusal(value)
                    problems += [f"first.{position}.{key}: {refusal}"] if refusal else []
                    values[own[key].name] = _plain(value)
                elif key != ARM:
                    problems.append(f"first.{position}: {unknown('setting', key, own)}")
            found.append(values)
        if problems:
            raise RecipeError(self.name, problems)
        return found

    def check(self, checker: Checker | None = None) -> dict[str, str]:
        """Look at everything; gives the tasks of both objectives, see `tasks`.

        The recipe is checked with every choice and both ends of every range, one after the other.

        Args:
            checker: as of `Gathered`.

        Raises:
            RecipeError: all that is wrong, before anything is run.
        """
        arms = self.all_arms()
        gathered = Gathered(self.name, checker)
        for arm in arms.values():
            usual = {**arm.fixed, **{d.key: d.ends()[0] for d in arm.dimensions}}
            settings = [usual] + [{**usual, d.key: v} for d in arm.dimensions for v in d.ends()[1:]]
            for overrides in settings:
                named = self.recipe_of(arm.name, overrides)
                gathered.add(named["name"], self.recipe, named)
        problems: list[str] = []
        if any(dimension.key == "seed" for arm in arms.values() for dimension in arm.dimensions):
            problems.append("space.seed: is nothing to choose; 'replicate' takes further seeds")
        try:
            self.asked()
        except RecipeError as error:
            problems += error.problems
        tasks = {}
        try:
            example = next(iter(gathered.recipes().values()))
            if example.seed in self.replicate:
                problems.append(f"replicate: {example.seed} is the seed of the trials; give others")
            tasks = self.tasks(example)
        except RecipeError as error:
            problems += error.problems
        if problems:
            raise RecipeError(self.name, problems)
        return tasks

    def tasks(self, recipe: Recipe) -> dict[str, str]:
        """The tasks of ``learning`` and ``forgetting`` by name, of a recipe of this search.

        Raises:
            RecipeError: the recipe does not have them.
        """
        found, problems = {}, []
        for kind in ("learning", "forgetting"):
            names = [task.name for spec in getattr(recipe.tasks, kind) for task in make_tasks(spec)]
            found[kind] = getattr(self.objectives, kind) or next(iter(names), "")
            if not names:
                problems.append(f"objectives.{kind}: the recipe's tasks.{kind} are empty")
            elif found[kind] not in names:
                problems.append(f"objectives.{kind}: {unknown('task', found[kind], names)}")
        if problems:
            raise RecipeError(self.name, problems)
        return found

    @property
    def meaning(self) -> dict[str, Any]:
        """What the settings of its trials mean: all but how long it takes and who draws."""
        return self.model_dump(mode="json", include={"recipe", "space", "arms", "objectives"})


def arm_name(content: Mapping[str, Any]) -> Any:
    """The name of an arm: its own, its method's, or what it fixes."""
    fixed = {key: value for key, value in content.items() if key not in ("name", "space")}
    return content.get("name") or " ".join(labels(fixed))


def _among(key: str, among: Any) -> Range | tuple[Any, ...]:
    """The range or the choices of a setting; raises ``RecipeError`` where it is neither."""
    if isinstance(among, Mapping):
        return validated(Range, among, key, key)
    if isinstance(among, list) and among:
        if len({repr(_plain(choice)) for choice in among}) < len(among):
            raise RecipeError(key, [f"{key}: a choice stands twice, got {among}"])
        return tuple(among)
    raise RecipeError(
        key,
        [f"{key}: must be a list of choices or a range {{low: , high: , log: }}, got {among!r}"],
    )
