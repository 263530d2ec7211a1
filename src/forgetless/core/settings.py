"""Settings that a user writes: checked, frozen, and every mistake told in words."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from forgetless.core.errors import RecipeError, UserError
from forgetless.core.files import parse_yaml


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Overrides from a command line: ``["seed=1"]`` gives ``{"seed": 1}``."""
    overrides = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set takes key=value such as training.steps=10, got {assignment!r}")
        overrides[key.strip()] = parse_yaml(value)
    return overrides


def with_overrides(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of ``content`` with dotted keys set.

    Setting one of ``training.steps``, ``.epochs`` and ``.tokens`` clears the others.

    Raises:
        UserError: a mapping that no YAML file could hold, such as one inside itself.
    """
    try:
        merged: dict[str, Any] = json.loads(json.dumps(content, default=str))
    except (TypeError, ValueError, RecursionError) as problem:
        raise UserError(f"a recipe has plain values, and text as keys: {problem}") from None
    durations = {f"training.{name}" for name in ("steps", "epochs", "tokens")}
    for key, value in overrides.items():
        *parents, last = key.split(".")
        section = merged
        for parent in parents:
            below = section.get(parent)
            if not isinstance(below, dict):
                section[parent] = below = {}
            section = below
        section[last] = value
        if key in durations and value is not None:
            for other in durations - overrides.keys():
                section.pop(other.rpartition(".")[2], None)
    return merged


Model = TypeVar("Model", bound=BaseModel)


def validated(
    model: type[Model], values: Mapping[str, Any], source: str, key: str | None = None
) -> Model:
    """The model of values that a user gave; raises ``RecipeError`` with all problems.

    Args:
        model: of them.
        values: as they were given.
        source: what they are from, for messages.
        key: under which they stand there.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_in_words(model, detail, key) for detail in error.errors()]
        raise RecipeError(source, problems) from None


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "list_type": "a list",
    "string_too_short": "text that is not empty",
}


def _in_words(model: type[BaseModel], error: ErrorDetails, key: str | None) -> str:
    """One pydantic error as ``where: what is wrong, what is allowed, what was given``."""
    place = ".".join(str(part) for part in (key, *error["loc"]) if part is not None)
    where = f"{place}: " if place else ""  # a check on a whole recipe has none
    kind, given = error["type"], error["input"]
    shown = "nothing" if given is None else repr(given)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    if kind == "extra_forbidden":
        known = _keys(model, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}unknown key; {hint}"
    if kind == "missing":
        return f"{where}missing; every recipe needs it"
    if kind == "value_error":  # our own checks say of lists and mappings what was in them
        got = "" if isinstance(given, list | dict) else f", got {shown}"
        return f"{where}{error['ctx']['error']}{got}"
    expected = f"must be {_EXPECTED[kind]}" if kind in _EXPECTED else error["msg"]
    known = _keys(model, error["loc"]) if kind.startswith("model_") else []
    hint = f"; its keys are {', '.join(known)}" if known else ""
    return f"{where}{expected.replace('Input should be', 'must be')}, got {shown}{hint}"


def _keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys of the section at ``location``, in which an entry of a list has place and kind."""
    found = [model]
    for part in location:
        if isinstance(part, str) and len(found) > 1:
            found = [m for m in found if part in get_args(m.model_fields["kind"].annotation)]
        elif isinstance(part, str):
            found = list(_sections(found[0].model_fields[part].annotation))
        if not found:
            return []
    return list(found[0].model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation names, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


class Section(BaseModel):
    """A frozen part of a recipe that knows all of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Name = Annotated[str, Field(min_length=1)]

Count = Annotated[int, Field(ge=1)]


def without_idle(values: Mapping[str, Any], idle: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those that decide nothing, since they are as in ``idle``."""
    return {key: v for key, v in values.items() if key not in idle or v != idle[key]}
