"""A recipe: everything that decides a run, as data that is checked before any weight is loaded.

A recipe is written in YAML, read into the models below (an unknown key or a bad value is an error
that names what is allowed) and never changes afterwards. ``check`` looks at what the values refer
to: files, the base's real shapes, the options of the method, the tasks.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from forgetless.errors import RecipeError, UserError

# ---------------------------------------------------------------------------------- the sections


class Section(BaseModel):
    """A frozen part of a recipe that knows all of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class AdapterSettings(Section):
    """Which method starts on which layers; ``full`` trains the weights themselves."""

    method: Name = "lora_null_v1"
    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 16.0
    target_modules: Any = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    options: dict[str, Any] = {}

    @field_validator("target_modules")
    @classmethod
    def _suffixes_or_regex(cls, value: Any) -> str | list[str]:
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
            return list(value)
        raise ValueError("must be 'all-linear', one regular expression or a list of layer names")


class CalibrationSettings(Section):
    """The text whose knowledge is to be kept; read only when the method needs statistics."""

    source: Name = "self"
    samples: Count = 256
    max_length: Annotated[int, Field(ge=2)] = 256
    batch_size: Count = 8


class DataSettings(Section):
    """The training data, and how its examples become tokens."""

    train: Name
    format: Literal["auto", "prompt_completion", "messages", "text"] = "auto"
    max_length: Annotated[int, Field(ge=2)] = 512
    pack: Any = "auto"
    limit: Count | None = None

    @field_validator("pack")
    @classmethod
    def _auto_or_bool(cls, value: Any) -> Literal["auto"] | bool:
        if value == "auto" or isinstance(value, bool):
            return value  # type: ignore[no-any-return]
        raise ValueError("must be 'auto', true or false")


class TrainingSettings(Section):
    """How to train, for so many ``steps`` or for so many ``epochs``."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Count = 32
    gradient_accumulation: Count = 1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    precision: Literal["float32", "bf16"] = "float32"
    gradient_checkpointing: bool = False
    checkpoint_every: Count = 100
    log_every: Count = 10

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            got = (
                "neither"
                if self.steps is None
                else f"steps={self.steps} and epochs={self.epochs:g}"
            )
            raise ValueError(f"give either steps or epochs, got {got}")
        return self


class ExportSettings(Section):
    """The rank of the exported adapter: ``exact``, ``requested`` (recompressed) or a number."""

    rank: Any = "exact"

    @field_validator("rank")
    @classmethod
    def _rank(cls, value: Any) -> str | int:
        if value in ("exact", "requested") or (type(value) is int and value >= 1):
            return value  # type: ignore[no-any-return]
        raise ValueError("must be 'exact', 'requested' or a whole number of at least 1")


class TaskSettings(Section):
    """What training should raise and what it should not lower: names or mappings."""

    learning: list[Any] = []
    forgetting: list[Any] = []

    @field_validator("learning", "forgetting")
    @classmethod
    def _specs(cls, value: list[Any]) -> list[Any]:
        for position, spec in enumerate(value):
            if not (isinstance(spec, str) and spec) and not (isinstance(spec, Mapping) and spec):
                raise ValueError(
                    f"number {position + 1} must be a task's name or a mapping with 'kind', "
                    f"got {spec!r}"
                )
        return value


class Recipe(Section):
    """Everything that decides one run.

    Paths are taken from the working directory. ``name`` is for people and decides nothing.
    """

    name: Name | None = None
    base: Name
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    adapter: AdapterSettings = AdapterSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    data: DataSettings
    training: TrainingSettings
    export: ExportSettings = ExportSettings()
    tasks: TaskSettings = TaskSettings()

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """The recipe of a YAML file, with dotted ``overrides`` put over it.

        Raises:
            FileNotFoundError: there is no such file.
            RecipeError: one line for each key or value that is wrong.
        """
        return cls.parse(load_yaml(path), overrides, source=str(path))

    @classmethod
    def parse(
        cls,
        content: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        *,
        source: str = "recipe",
    ) -> Self:
        """The recipe of a mapping such as YAML gives; raises ``RecipeError`` with all problems."""
        if "recipe" in content and ("axes" in content or "arms" in content):
            raise RecipeError(source, ["this is a study; run it with 'forgetless study'"])
        merged = with_overrides(content, overrides or {})
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            problems = [friendly(cls, detail) for detail in error.errors()]
            raise RecipeError(source, problems + _semantic_problems(cls, merged, error)) from None

    def override(self, overrides: Mapping[str, Any]) -> Self:
        """A copy with dotted keys replaced, such as ``{"training.steps": 10}``."""
        return self.parse(self.model_dump(), overrides, source=self.name or "recipe")

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML that ``load`` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)

    @property
    def run_id(self) -> str:
        """The method's name and a hash of what decides the trained weights.

        Tasks, names, export settings and the cadence of logs and checkpoints are left out, so
        that a new evaluation finds the trained run.
        """
        content = json.dumps(_what_decides_the_weights(self), sort_keys=True)
        return f"{self.adapter.method}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


# -------------------------------------------------------------------------- YAML and overrides


class _Loader(yaml.SafeLoader):
    """YAML in which ``1e-5`` is a number (YAML 1.1 says a string) and no key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise UserError(f"the key {key.value!r} is given twice (again in line {line})")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\d[\d_]*\.?[\d_]*[eE][-+]?\d+|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?"
        r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises ``UserError`` naming the line that cannot be read."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain data only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise UserError(f"not valid YAML: {where}{getattr(error, 'problem', error)}") from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is a folder, empty, not YAML, or not a mapping of keys to values.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the YAML file itself")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path} (looked in {path.absolute().parent})")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a recipe is YAML") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if content is None:
        raise UserError(f"{path} is empty; see recipes/own-model.yaml for a recipe to start from")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} must hold keys and values such as 'base: pocket'")
    return content


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

    Setting ``training.steps`` clears ``training.epochs`` and the other way round.
    """
    merged: dict[str, Any] = json.loads(json.dumps(content, default=str))
    other = {"training.steps": "training.epochs", "training.epochs": "training.steps"}
    for key, value in overrides.items():
        *parents, last = key.split(".")
        section = merged
        for parent in parents:
            below = section.get(parent)
            if not isinstance(below, dict):
                section[parent] = below = {}
            section = below
        section[last] = value
        if key in other and value is not None and other[key] not in overrides:
            section.pop(other[key].rpartition(".")[2], None)
    return merged


# ------------------------------------------------------------------------------ words for errors


def friendly(model: type[BaseModel], error: ErrorDetails) -> str:
    """One pydantic error as ``where: what is wrong, what is allowed, what was given``."""
    where = ".".join(str(part) for part in error["loc"])
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = _keys(model, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if kind == "missing":
        return f"{where}: missing; every recipe needs it"
    if kind == "value_error":
        return f"{where}: {error['ctx']['error']}" + _got(given)
    return f"{where}: {_expected(error)}, got {_shown(given)}"


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


def _expected(error: ErrorDetails) -> str:
    if error["type"] in _EXPECTED:
        return f"must be {_EXPECTED[error['type']]}"
    return error["msg"].replace("Input should be", "must be")


def _got(given: Any) -> str:
    """The value, where the message of our own check does not hold it already."""
    return "" if isinstance(given, list | dict) else f", got {_shown(given)}"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys of the section at ``location``."""
    for part in location:
        section = model.model_fields[str(part)].annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return []
        model = section
    return list(model.model_fields)


def _semantic_problems(
    cls: type[Recipe], content: dict[str, Any], error: ValidationError
) -> list[str]:
    """What ``check`` finds once the values that are not even well-formed are left out.

    A user then sees the misspelt key and the missing file in one go. Nothing is found when what is
    left is no recipe.
    """
    rest = with_overrides(content, {})
    for detail in error.errors():
        section: Any = rest
        for part in detail["loc"][:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and detail["loc"]:
            section.pop(detail["loc"][-1], None)
    try:
        return check(cls.model_validate(rest))
    except ValidationError:
        return []


SectionType = TypeVar("SectionType", bound=Section)


def validated(section: type[SectionType], **values: Any) -> SectionType:
    """A section from values that a user gave; raises ``RecipeError`` with all problems."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problems = [friendly(section, detail) for detail in error.errors()]
        raise RecipeError("settings", problems) from None


# ------------------------------------------------------------------------------- content hashes


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files."""
    path = Path(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        status = file.stat()
        name = file.relative_to(path).as_posix() if file != path else ""
        digest.update(f"{name}:{_file_hash(file, status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _file_hash(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_hash(base: str) -> str:
    """What a base's name stands for: the folder's content, or the commit of a model on the hub."""
    from forgetless.models import resolve_base

    resolved = resolve_base(base)
    if Path(resolved).is_dir():
        return content_hash(resolved)
    from huggingface_hub import hf_hub_download

    commit = Path(hf_hub_download(resolved, "config.json")).parent.name
    return hashlib.sha256(f"{resolved}@{commit}".encode()).hexdigest()


def _source_hash(source: str, fingerprint: Callable[[str], str]) -> str:
    """The content of a file or folder; what else a source may be called knows its fingerprint."""
    return content_hash(source) if Path(source).exists() else fingerprint(source)


def needs_statistics(recipe: Recipe) -> bool:
    """Whether the recipe's method reads the statistics of the activations."""
    from forgetless.methods import METHODS

    return bool(METHODS[recipe.adapter.method].needs)


def calibration_key(recipe: Recipe) -> dict[str, Any]:
    """What decides the statistics: base, number format, layers, text, and the seed that drew it."""
    from forgetless.calibration import fingerprint

    return {
        "base": base_hash(recipe.base),
        "dtype": recipe.dtype,
        "target_modules": recipe.adapter.target_modules,
        "seed": recipe.seed,
        **recipe.calibration.model_dump(),
        "source": _source_hash(recipe.calibration.source, fingerprint),
    }


def _what_decides_the_weights(recipe: Recipe) -> dict[str, Any]:
    from forgetless.data import load_examples

    adapter = recipe.adapter.model_dump()
    if recipe.adapter.method == "full":
        adapter = {"method": "full"}
    data = recipe.data.model_dump(exclude={"train"})
    data["content"] = _source_hash(recipe.data.train, lambda name: load_examples(name).fingerprint)
    return {
        "base": base_hash(recipe.base),
        "dtype": recipe.dtype,
        "seed": recipe.seed,
        "adapter": adapter,
        "calibration": calibration_key(recipe) if needs_statistics(recipe) else None,
        "data": data,
        "training": recipe.training.model_dump(exclude={"checkpoint_every", "log_every"}),
    }


# --------------------------------------------------------------------------------------- checking

COLLECTED = frozenset({"second_moment"})
"""What a method may need that the statistics of a run hold."""


def check(recipe: Recipe) -> list[str]:
    """Every problem that can be known before any weight is loaded; empty when there is none.

    Looks for the base, the data and the calibration text, reads them, builds the model's shapes on
    the meta device, and asks the method about its rank and options and each task about its spec.
    """
    return Checker().check(recipe)


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
        key = f"{look.__name__}{arguments!r}"
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
        from forgetless.core import find_method
        from forgetless.models import load_tokenizer

        model, problem = self._attempt(_shapes, base)
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
        from forgetless.core import find_method
        from forgetless.models import linear_weight, target_layers

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
        from forgetless.data import load_examples

        examples, problem = self._attempt(load_examples, settings.train)
        if problem is not None:
            yield f"data.train: {problem}"
        elif settings.format not in ("auto", examples.kind):
            yield f"data.format: {settings.format!r} given, but the data is {examples.kind!r}"

    def _statistics(self, recipe: Recipe) -> Iterator[str]:
        from forgetless.calibration import fingerprint
        from forgetless.methods import METHODS

        if recipe.adapter.method in METHODS and needs_statistics(recipe):
            _, problem = self._attempt(fingerprint, recipe.calibration.source)
            if problem is not None:
                yield f"calibration.source: {problem}"

    def _tasks(self, settings: TaskSettings) -> Iterator[str]:
        from forgetless.tasks import make_task

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


def _shapes(base: str) -> Any:
    from forgetless.models import meta_model, resolve_base

    resolve_base(base)
    return meta_model(base)
