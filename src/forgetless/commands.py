"""What the single-purpose commands do: statistics, a start, scores, an export. No printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forgetless import adapters, calibration, store
from forgetless.adapters import ExportReport
from forgetless.checking import Checker
from forgetless.core import find_method
from forgetless.errors import RecipeError, UserError
from forgetless.evaluation import Comparison, Scores, compare, evaluate
from forgetless.models import load_model, load_tokenizer, meta_model, target_layers
from forgetless.recipe import AdapterSettings, CalibrationSettings, Recipe
from forgetless.stages import attached, calibration_text
from forgetless.statistics import Statistics, collect
from forgetless.store import RunFolder
from forgetless.tasks import make_tasks

CONFIG_FILE = "adapter_config.json"


def collect_statistics(
    base: str,
    settings: CalibrationSettings,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    dtype: str = "auto",
    seed: int = 0,
    memory_budget: str | None = None,
) -> Statistics:
    """The statistics of the base's activations on a calibration text."""
    target_layers(meta_model(base), target_modules)  # a name that matches nothing shows here
    calibration.fingerprint(settings.source)
    model, tokenizer = load_model(base, dtype=dtype), load_tokenizer(base)
    text = calibration_text(settings, model, tokenizer, seed)
    return collect(model, text, target_modules, memory_budget)


# ----------------------------------------------------------------------------------------- init


@dataclass(frozen=True)
class Start:
    """An adapter before its first step, written into a folder.

    Attributes:
        folder: where it lies.
        obstacle: why a trainer that knows only PEFT cannot continue it as the method means; None
            where it can.
    """

    folder: Path
    obstacle: str | None


def init(
    base: str,
    settings: AdapterSettings,
    out: str | Path,
    *,
    source: CalibrationSettings | Statistics | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> Start:
    """Write the start of an adapter, for whatever trains it.

    A start that adds nothing to the base and trains both factors is a plain LoRA, which every
    PEFT-based trainer continues. The others are written in the package's own form.

    Raises:
        RecipeError: unknown method or option, a rank that does not fit, no such layers.
        UserError: the method needs statistics and ``source`` is None; ``out`` is not empty.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder")
    problems = Checker().adapter(base, settings)
    if problems:
        raise RecipeError("init", problems)
    method = find_method(settings.method)
    if method.factors is None:
        raise UserError("method 'full' trains the weights themselves: there is no adapter to start")
    if method.needs and source is None:
        raise UserError(
            f"method {settings.method!r} needs to know what to keep: give --calibration FILE, "
            "--calibration self (text sampled from the base), or --stats FOLDER"
        )
    model = load_model(base, dtype=dtype)
    if isinstance(source, CalibrationSettings) and method.needs:
        calibration.fingerprint(source.source)
        text = calibration_text(source, model, load_tokenizer(base), seed)
        source = collect(model, text, settings.target_modules)
    statistics = source if isinstance(source, Statistics) else None
    model = attached(settings, model, statistics, seed)
    with store.new_folder(out) as folder:
        adapters.save(model, folder)
    return Start(out, _obstacle(settings.method, model.peft_config["default"].start))


def _obstacle(method: str, start: Mapping[str, Any]) -> str | None:
    """Why a trainer that knows only PEFT cannot train this start as the method means it."""
    if start["anchored"]:
        return (
            f"{method!r} does not start from the base itself: a plain LoRA with these factors "
            "would change the base before the first step"
        )
    frozen = {"A", "B"} - set(start["trains"])
    if frozen:
        return f"{method!r} keeps {frozen.pop()} frozen, and PEFT would train it"
    return None


# ----------------------------------------------------------------------------------------- eval


@dataclass(frozen=True)
class Measurement:
    """Scores of a base and, where an adapter was given, of the adapter on it."""

    base: Scores
    adapted: Scores | None = None

    @property
    def comparison(self) -> Comparison | None:
        """What the adapter changed."""
        return None if self.adapted is None else compare(self.base, self.adapted)

    def to_json(self) -> dict[str, Any]:
        """All scores without their items, and the comparison."""
        comparison = self.comparison
        return {
            "base": self.base.to_json(),
            "adapted": None if self.adapted is None else self.adapted.to_json(),
            "comparison": None if comparison is None else comparison.to_json(),
        }


def measure(
    base: str, specs: Sequence[Any], *, adapter: str | Path | None = None, dtype: str = "auto"
) -> Measurement:
    """Score a base on tasks, and an adapter, a run or a fully trained model beside it."""
    tasks = make_tasks(specs)
    if not tasks:
        raise UserError("no task given; 'forgetless tasks' lists them")
    trained = None if adapter is None else Trained.find(adapter)
    tokenizer = load_tokenizer(base)
    model = load_model(base, dtype=dtype)
    before = evaluate(model, tasks, tokenizer, reference=model)
    if trained is None:
        return Measurement(before)
    if trained.is_adapter:
        return Measurement(before, evaluate(adapters.load(model, trained.folder), tasks, tokenizer))
    full = load_model(str(trained.folder), dtype=dtype)
    return Measurement(before, evaluate(full, tasks, tokenizer, reference=model))


def task_specs(names: str, limit: int | None) -> list[dict[str, Any]]:
    """Tasks of the command line: ``pocket_recall,perplexity:notes.txt`` and a limit for all."""
    specs: list[dict[str, Any]] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        kind, _, path = name.partition(":")
        spec: dict[str, Any] = {"kind": kind}
        if path:
            label = store.folder_name(f"{kind}_{Path(path).stem}")
            spec |= {"path": path, "name": label}
        specs.append(spec if limit is None else spec | {"limit": limit})
    return specs


# --------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Trained:
    """Trained weights: an adapter's folder or a whole model's, and the base where it is known."""

    folder: Path
    base: str | None
    is_adapter: bool

    @classmethod
    def find(cls, path: str | Path) -> Trained:
        """What lies at ``path``: a run's folder, an adapter's or a model's."""
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no folder {path}; give a run or an adapter")
        run = RunFolder(path)
        if run.recipe.exists():
            base = Recipe.load(run.recipe).base
            for folder, is_adapter in ((run.native, True), (run.model, False)):
                if folder.exists():
                    return cls(folder, base, is_adapter)
            raise UserError(f"the run {path} has no trained weights yet; finish it first")
        config = store.read_json(path / CONFIG_FILE)
        if config:
            return cls(path, config.get("base_model_name_or_path"), True)
        if (path / "config.json").exists():
            return cls(path, None, False)
        raise UserError(
            f"{path} is neither a run nor an adapter: it has no recipe.yaml and no {CONFIG_FILE}"
        )


def export(
    source: str | Path, out: str | Path, rank: Any = "exact", base: str | None = None
) -> ExportReport:
    """Write a run's or a folder's adapter as a plain PEFT LoRA for the untouched base."""
    trained, out = Trained.find(source), Path(out)
    if not trained.is_adapter:
        raise UserError(f"{source} is a whole model, not an adapter; use it as it is")
    base = base or trained.base
    if base is None:
        raise UserError(f"{source} does not say which base it is for; give --base")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder")
    model = adapters.load(load_model(base), trained.folder)
    with store.new_folder(out) as folder:
        report = adapters.export(model, folder, rank)
    return replace(report, folder=out)


def parse_rank(text: str) -> str | int:
    """``exact``, ``requested`` or a number, from the command line."""
    if text in ("exact", "requested"):
        return text
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"rank must be 'exact', 'requested' or a number from 1, got {text!r}")
    return int(text)
