"""A recipe: everything that decides a run, as data that is checked before any weight is loaded.

A recipe is written in YAML, read into the models below (an unknown key or a bad value is an error
that names what is allowed) and never changes afterwards. ``check`` looks at what the values refer
to: files, the base's real shapes, the options of the method, the tasks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from forgetless.errors import RecipeError
from forgetless.reading import friendly, load_yaml, with_overrides

# ---------------------------------------------------------------------------------- the sections


class Section(BaseModel):
    """A frozen part of a recipe that knows all of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class AdapterSettings(Section):
    """Which method starts on which layers; ``full`` trains the weights themselves.

    See `forgetless.attach` for every value.
    """

    method: Name = "lora_null_v1"
    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 16.0
    target_modules: Any = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, Count] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    options: dict[str, Any] = {}

    @field_validator("target_modules")
    @classmethod
    def _suffixes_or_regex(cls, value: Any) -> str | list[str]:
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
            return list(value)
        raise ValueError(
            "must be 'all-linear', 'attention', 'mlp', one regular expression or a list of layer "
            "names"
        )


DATA = "data"
"""The calibration source that stands for the training data."""

TASK_METHODS = frozenset({"eva", "corda_ipm"})
"""Methods whose second moment is over the new task's text, and not over the text to keep."""


class CalibrationSettings(Section):
    """The text whose knowledge is to be kept; read only when the method needs statistics.

    ``source`` is one text, or a list of ``{source, weight}``, whose weights are shares of the mean.
    ``data`` is the training data; ``auto`` is that for methods that look at the new task only, and
    ``self`` for the others. ``skip_first`` and ``memory_budget`` are those of `forgetless.collect`.
    """

    source: Any = "auto"
    samples: Count = 256
    max_length: Annotated[int, Field(ge=2)] = 256
    batch_size: Count = 8
    skip_first: Annotated[int, Field(ge=0)] = 0
    memory_budget: int | str | None = None

    @field_validator("source")
    @classmethod
    def _source_or_sources(cls, value: Any) -> str | list[dict[str, Any]]:
        if isinstance(value, str) and value:
            return value
        weighted = isinstance(value, list) and all(_is_weighted_source(v, "source") for v in value)
        if value and weighted:
            return value  # type: ignore[no-any-return]
        raise ValueError(
            "must be a file, 'self', 'data', 'auto', or a list of {source: ..., weight: positive "
            "number}"
        )

    def sources(self, method: str) -> list[tuple[str, float]]:
        """Every source with its weight, for a method; none of them is ``auto``."""
        if self.source == "auto":
            return [(DATA if method in TASK_METHODS else "self", 1.0)]
        if isinstance(self.source, str):
            return [(self.source, 1.0)]
        return [(part["source"], float(part["weight"])) for part in self.source]


class DataSettings(Section):
    """The training data, and how its examples become tokens.

    ``format`` ``text`` reads prompts with completions as raw text, every token of which is learned.
    ``train`` is one source, or a list of ``{path, weight}`` for replay: the first is the new task,
    of which every example is in every epoch, the others have their exact share of an epoch's rows.
    """

    train: Any
    format: Literal["auto", "prompt_completion", "messages", "text"] = "auto"
    max_length: Annotated[int, Field(ge=2)] = 512
    pack: Any = "auto"
    limit: Count | None = None

    @field_validator("train")
    @classmethod
    def _source_or_sources(cls, value: Any) -> str | list[dict[str, Any]]:
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list) and value and all(map(_is_weighted_source, value)):
            return value
        raise ValueError(
            "must be a file or a list of {path: file, weight: positive number}, the new task first"
        )

    @property
    def sources(self) -> list[tuple[str, float]]:
        """Every source with its weight, the new task first."""
        if isinstance(self.train, str):
            return [(self.train, 1.0)]
        return [(source["path"], float(source["weight"])) for source in self.train]

    @field_validator("pack")
    @classmethod
    def _auto_or_bool(cls, value: Any) -> Literal["auto"] | bool:
        if value == "auto" or isinstance(value, bool):
            return value  # type: ignore[no-any-return]
        raise ValueError("must be 'auto', true or false")


def _is_weighted_source(value: Any, name: str = "path") -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() == {name, "weight"}
        and isinstance(value[name], str)
        and isinstance(value["weight"], int | float)
        and value["weight"] > 0
    )


RECORDING = frozenset({"checkpoint_every", "log_every", "report_to"})
"""Settings of a training that say what is written of it, and decide no weight."""


class TrainingSettings(Section):
    """How to train, for so many ``steps``, ``epochs`` or ``tokens``.

    ``batch_size`` counts the rows of all processes together, so that any number of them do the
    same training; a step has ``gradient_accumulation`` such batches.
    ``loraplus_ratio`` is LoRA+'s rate of B over that of A, which is the learning rate.
    ``attention_dropout`` drops attention weights while training. The schedules ``constant`` and
    ``inverse_sqrt`` end, over the last ``cooldown_ratio`` of the steps, in a straight line to 0.
    After the shares ``measure_at`` of the training, such as 0.25 and 0.5, the weights are kept and
    scored as points of the learning-forgetting curve; the schedule takes no notice of them.
    ``weight_decay`` is that of AdamW, on matrices alone: an adapter's move, and so the model, is
    pulled towards the base, but the weights that ``full`` trains are pulled towards 0 (the penalty
    ``l2_start`` pulls those to the base). ``betas`` and ``eps`` are the optimiser's own where they
    are not given. ``compile`` runs the training, and nothing else, through `torch.compile`: the
    losses are the same up to rounding, and a resumed training too. ``report_to`` names trackers,
    which get what the log gets.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    loraplus_ratio: Annotated[float, Field(gt=0)] = 1.0
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    tokens: Count | None = None
    measure_at: list[Annotated[float, Field(gt=0, lt=1)]] = []
    batch_size: Count = 32
    gradient_accumulation: Count = 1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    cooldown_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion", "adafactor", "sgd"] = (
        "adamw"
    )
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] | None = None
    eps: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    gradient_checkpointing: bool = False
    checkpoint_every: Count = 100
    log_every: Count = 10
    report_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = []

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        durations = {name: getattr(self, name) for name in ("steps", "epochs", "tokens")}
        given = [f"{name}={value:g}" for name, value in durations.items() if value is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise ValueError(f"give one of steps, epochs and tokens, got {got}")
        return self

    @model_validator(mode="after")
    def _cooldown_of_a_flat_schedule(self) -> Self:
        if self.cooldown_ratio and self.schedule in ("cosine", "linear"):
            raise ValueError(
                f"cooldown_ratio is for the schedules constant and inverse_sqrt; {self.schedule!r} "
                "falls to 0 anyway"
            )
        if self.warmup_ratio + self.cooldown_ratio > 1:
            raise ValueError(
                "warmup_ratio and cooldown_ratio together must be at most 1, got "
                f"{self.warmup_ratio:g} and {self.cooldown_ratio:g}"
            )
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


class ProbeSettings(Section):
    """What is measured while training, and how much of it may be forgotten; empty for nothing.

    See `forgetless.ForgettingCallback` for every value.
    """

    learning: list[Any] = []
    forgetting: list[Any] = []
    every: Count | None = None
    max_kl: Annotated[float, Field(gt=0)] | None = None
    max_drop: Annotated[float, Field(gt=0)] | None = None
    on_exceed: Literal["stop", "rollback"] = "stop"


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
    probes: ProbeSettings = ProbeSettings()
    penalties: list[dict[str, Any]] = []
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

        Tasks, names, export settings, the cadence of logs and checkpoints, and probes without a
        budget are left out, so that a new evaluation finds the trained run.
        """
        content = json.dumps(_what_decides_the_weights(self), sort_keys=True)
        return f"{self.adapter.method}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


# ---------------------------------------------------------------------------------- checking


def check(recipe: Recipe) -> list[str]:
    """Every problem that can be known before any weight is loaded; empty when there is none.

    Looks for the base, the data and the calibration text, reads them, builds the model's shapes on
    the meta device, and asks the method about its rank and options and each task about its spec.
    """
    from forgetless.checking import Checker  # which loads torch

    return Checker().check(recipe)


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


# ------------------------------------------------------------------------------- content hashes


MODEL_FILES = frozenset({".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"})
"""Endings of the files that decide what a model folder computes; its README does not."""


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder."""
    path = Path(path)
    return _hash_of(sorted(path.rglob("*")) if path.is_dir() else [path], path)


def _hash_of(files: Iterable[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for file in filter(Path.is_file, files):
        status = file.stat()
        name = file.relative_to(root).as_posix()
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
    folder = Path(resolved)
    if folder.is_dir():
        return weights_hash(folder)
    from huggingface_hub import hf_hub_download

    commit = Path(hf_hub_download(resolved, "config.json")).parent.name
    return hashlib.sha256(f"{resolved}@{commit}".encode()).hexdigest()


def weights_hash(folder: str | Path) -> str:
    """SHA-256 of the files in a model's or an adapter's folder that decide what it computes."""
    folder = Path(folder)
    return _hash_of(sorted(f for f in folder.iterdir() if f.suffix in MODEL_FILES), folder)


def _source_hash(source: str, fingerprint: Callable[[str], str]) -> str:
    """The content of a file or folder; what else a source may be called knows its fingerprint."""
    return content_hash(source) if Path(source).exists() else fingerprint(source)


def input_keys(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """For each need of the method, what decides it: base, layers, text, the seed that drew it."""
    from forgetless.methods import METHODS

    settings = recipe.calibration
    common = {
        "base": base_hash(recipe.base),
        "dtype": recipe.dtype,
        "target_modules": recipe.adapter.target_modules,
        "seed": recipe.seed,
        **_without_idle(settings.model_dump(exclude={"memory_budget"}), {"skip_first": 0}),
    }
    sources = settings.sources(recipe.adapter.method)
    texts = [[_calibration_key(recipe, source), weight] for source, weight in sources]
    keep = texts[0][0] if len(texts) == 1 else texts
    task = {**common, "source": _calibration_key(recipe, DATA)}
    found = {
        "second_moment": {**common, "source": keep},
        "task_moment": task,
        "gradient": {**task, "gradient": True},
    }
    return {need: found[need] for need in sorted(METHODS[recipe.adapter.method].needs)}


def _calibration_key(recipe: Recipe, source: str) -> Any:
    """What decides the text of one source."""
    from forgetless.calibration import fingerprint
    from forgetless.data import load_examples

    if source != DATA:
        return _source_hash(source, fingerprint)
    path = recipe.data.sources[0][0]
    as_text = {"format": "text"} if recipe.data.format == "text" else {}
    return {
        **as_text,
        "data": _source_hash(path, lambda name: load_examples(name).fingerprint),
        "max_length": recipe.data.max_length,
        "limit": recipe.data.limit,
    }


_SWITCHES: Mapping[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "loraplus_ratio": 1.0,
    "tokens": None,
    "measure_at": [],
    "cooldown_ratio": 0.0,
    "attention_dropout": 0.0,
    "betas": None,
    "eps": None,
    "compile": False,
}
"""Settings that decide nothing at these values; a run without them keeps its id."""


def _without_idle(values: dict[str, Any], idle: Mapping[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in values.items() if key not in idle or v != idle[key]}


def what_decides_a_training(settings: TrainingSettings) -> dict[str, Any]:
    """The settings without those that only record, and without switches that are off."""
    return _without_idle(settings.model_dump(mode="json", exclude=set(RECORDING)), _SWITCHES)


def _what_decides_the_weights(recipe: Recipe) -> dict[str, Any]:
    from forgetless.data import load_examples

    adapter = _without_idle(recipe.adapter.model_dump(), _SWITCHES)
    if recipe.adapter.method == "full":
        adapter = {"method": "full"}
    data = recipe.data.model_dump(exclude={"train"})
    content = [
        [_source_hash(path, lambda name: load_examples(name).fingerprint), weight]
        for path, weight in recipe.data.sources
    ]
    data["content"] = content[0][0] if isinstance(recipe.data.train, str) else content
    inputs = input_keys(recipe) if adapter["method"] != "full" else {}
    alone = inputs.get("second_moment") if len(inputs) == 1 else None
    found = {
        "base": base_hash(recipe.base),
        "dtype": recipe.dtype,
        "seed": recipe.seed,
        "adapter": adapter,
        "calibration": alone or inputs or None,
        "data": data,
        "training": what_decides_a_training(recipe.training),
    }
    if recipe.penalties:
        found["penalties"] = [_penalty_key(spec) for spec in recipe.penalties]
    if recipe.probes.max_kl is not None or recipe.probes.max_drop is not None:
        from forgetless.training.forgetting import from_settings

        probes = from_settings(recipe.probes)
        found |= probes.decides if probes else {}
    return found


def _penalty_key(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a penalty: its settings, with the content of its files for their names."""
    from forgetless.calibration import fingerprint

    key = dict(spec)
    if "source" in spec:
        key["source"] = _source_hash(spec["source"], fingerprint)
    if "adapters" in spec:
        key["adapters"] = [content_hash(folder) for folder in spec["adapters"]]
    return key
