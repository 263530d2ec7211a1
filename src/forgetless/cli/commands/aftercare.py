"""A trained adapter used in part, repaired, and looked into."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forgetless.adapters.folders import CONFIG_FILE, load
from forgetless.adapters.foreign import require_usable
from forgetless.adapters.layer import adapted_layers
from forgetless.adapters.repair import checked_strength, repair_folder
from forgetless.adapters.spectra import Spectra, spectra
from forgetless.cli.commands.folders import Trained, known_base, load_base, require_new
from forgetless.core.errors import UserError
from forgetless.core.files import new_folder, read_json, write_json
from forgetless.data.held import EVERY, require_two_parts
from forgetless.data.modality import load_processor
from forgetless.data.settings import CalibrationSettings, DataSettings
from forgetless.data.texts import SELF, read_examples
from forgetless.models.load import load_tuned, meta_model
from forgetless.scores.gates import Limit, parse_limits
from forgetless.statistics.moments import Statistics, is_statistics
from forgetless.studies.aftercare import (
    BASE,
    TRAINED,
    Adjustable,
    Bench,
    Point,
    Read,
    Reading,
    Setting,
    choose,
    require_text,
)
from forgetless.studies.folder import write_csv
from forgetless.tasks import make_tasks

REPORT_FILE = "aftercare.json"
"""Beside a written adapter: what was measured, and what was taken."""


@dataclass(frozen=True)
class Asked:
    """What is done to a trained adapter, in values.

    Attributes:
        source: folder of an adapter, a run or a tuned model.
        base: its base; None for the one that the folder names.
        keep: text to keep, "self", or a folder of statistics; None for none.
        task: text of the new task, or a folder of statistics; None for none.
        strengths: of repairs; several are chosen among.
        scales: of the dial; likewise.
        max_kl, max_drop: budgets, see `choose`; `max_drop` as 'forgetless compare' takes it.
        specs: tasks to score the base, the adapter as trained and the chosen one on.
        everywhere: whether to score the tasks at every setting.
        rank: for a tuned model: of the adapter to make of it.
        calibration, dtype, batch_size, seed: how texts are read and scored.
    """

    source: str
    base: str | None = None
    keep: str | None = None
    task: str | None = None
    strengths: Sequence[float] = ()
    scales: Sequence[float] = (1.0,)
    max_kl: float | None = None
    max_drop: Sequence[str] = ()
    specs: Sequence[Any] = ()
    everywhere: bool = False
    rank: int | None = None
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    dtype: str = "auto"
    batch_size: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Adjusted:
    """What was measured, and which point was taken.

    Attributes:
        points: the base, the adapter as trained, and every setting that was asked for.
        chosen: of the settings asked for; None where there was nothing to choose by.
        folder: what was written; None where nothing was.
    """

    points: Sequence[Point]
    chosen: Point | None
    folder: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "points": [point.to_json() for point in self.points],
            "chosen": None if self.chosen is None else self.chosen.to_json(),
            "folder": None if self.folder is None else str(self.folder),
        }


def adjust(asked: Asked, out: str | Path | None = None) -> Adjusted:
    """Measure an adapter repaired and turned to some settings, and write the one that is chosen.

    Raises:
        UserError: nothing to measure by, an adapter that is not for the base, budgets that no
            setting meets; ``out`` is not empty.
    """
    if out is not None:
        require_new(Path(out))
    for strength in asked.strengths:
        checked_strength(strength)
    trained, base = _found(asked)
    limits = parse_limits(asked.max_drop)
    tasks = make_tasks(asked.specs)
    unknown = [limit.task for limit in limits if limit.task not in (None, *(t.name for t in tasks))]
    if unknown:
        raise UserError(f"--max-drop names {unknown[0]!r}, which is none of --tasks")
    _require_texts(asked)
    model, processor = load_base(base, trained.folder, asked.dtype), load_processor(base)
    layers: Any = "all-linear"
    if trained.is_adapter:
        require_usable(trained.folder, model)
        adapter: Any = load(model, trained.folder)
        layers = list(adapted_layers(adapter))
    else:
        adapter = load_tuned(trained.folder, model)
    with tempfile.TemporaryDirectory(prefix="forgetless-aftercare-") as place:
        reading = Reading(
            adapter if trained.is_adapter else model,
            processor,
            layers,
            asked.calibration,
            DataSettings(train="the new task"),
            asked.seed,
            trained=adapter,
        )
        keep, task = _read(reading, asked, Path(place))
        adjustable = Adjustable(adapter, model, keep.statistics, task.statistics, asked.strengths)
        bench = Bench(adjustable, processor, keep.held, task.held, asked.batch_size)
        settings = [
            Setting(strength, scale)
            for strength in asked.strengths or (0.0,)
            for scale in asked.scales
        ]
        scored = any(limit.task for limit in limits) or asked.everywhere
        points = bench.curve([BASE, TRAINED, *settings], tasks if scored else ())
        among = [point for point in points if point.setting in {TRAINED, *settings}]
        chosen = _chosen(asked, settings, among, limits)
        if tasks and not scored:
            points = [
                bench.measure(p.setting, tasks if p.setting in _told(chosen) else ())
                for p in points
            ]
            chosen = chosen and bench.measure(chosen.setting, tasks)
        if out is not None and chosen is not None:
            with new_folder(Path(out)) as folder:
                adjustable.write(chosen.setting, folder, processor, asked.rank)
                found = Adjusted(points, chosen, Path(out))
                write_json(folder / REPORT_FILE, _provenance(asked, found, adjustable))
            return found
    return Adjusted(points, chosen)


def repair_from_statistics(asked: Asked, out: str | Path) -> Adjusted:
    """Repair an adapter's folder by given statistics and one strength, or "auto" by the moments.

    Not one weight of the base is loaded.
    """
    require_new(Path(out))
    trained, base = _found(asked)
    keep, task = (None if s is None else Statistics.load(s) for s in (asked.keep, asked.task))
    assert keep is not None
    strength: Any = asked.strengths[0] if len(asked.strengths) == 1 else "auto"
    with new_folder(Path(out)) as folder:
        made, taken = repair_folder(
            trained.folder, folder, meta_model(base, bare=True), keep, task, strength
        )
        points = [
            Point(Setting(s), None, None, made.forecast(s).kept, made.forecast(s).missed)
            for s in made.strengths
        ]
        chosen = next(point for point in points if point.setting.strength == taken)
        found = Adjusted(points, chosen, Path(out))
        write_json(folder / REPORT_FILE, {**_settings_of(asked), **found.to_json()})
    return found


def needs_no_weights(asked: Asked) -> bool:
    """Whether `repair_from_statistics` does what is asked."""
    given = [source for source in (asked.keep, asked.task) if source is not None]
    plain = asked.rank is None and not asked.specs and tuple(asked.scales) == (1.0,)
    budgets = asked.max_kl is not None or asked.max_drop
    return (
        plain
        and not budgets
        and asked.keep is not None
        and all(map(is_statistics, given))
        and read_json(Trained.find(asked.source).folder / CONFIG_FILE).get("peft_type") == "LORA"
    )


def look_into(
    source: str,
    base: str | None,
    keep: str | None,
    task: str | None = None,
    *,
    calibration: CalibrationSettings,
    of_weights: bool = True,
    dtype: str = "auto",
    seed: int = 0,
) -> Spectra:
    """The spectra of a trained adapter, a run or a tuned model."""
    asked = Asked(source, base, keep, calibration=calibration, dtype=dtype, seed=seed)
    trained, name = _found(asked)
    for text in (keep, task):
        if text is not None:
            _require_readable(text, read_examples)
    model = load_base(name, trained.folder, dtype)
    adapter: Any = load(model, trained.folder) if trained.is_adapter else str(trained.folder)
    stats = of_task = None
    if keep is not None:
        on: Any = adapter if trained.is_adapter else model
        layers: Any = list(adapted_layers(adapter)) if trained.is_adapter else "all-linear"
        with tempfile.TemporaryDirectory(prefix="forgetless-spectra-") as place:
            reading = Reading(
                on, load_processor(name), layers, calibration, DataSettings(train="-"), seed
            )
            stats = reading.whole(keep, Path(place))
            if task is not None:
                of_task = reading.task(task, Path(place)).statistics
    return spectra(adapter, model, stats, task_stats=of_task, of_weights=of_weights)


def _found(asked: Asked) -> tuple[Trained, str]:
    """What was trained, and the name of its base."""
    trained = Trained.find(asked.source)
    return trained, known_base(asked.base, trained, asked.source)


def _require_texts(asked: Asked) -> None:
    """Raise what is wrong with the texts, as far as their first examples show it."""
    texts = [source for source in (asked.keep, asked.task) if source is not None]
    if asked.strengths and asked.keep is None:
        raise UserError("a repair needs the text to keep: give --keep FILE, or --keep self")
    if asked.max_kl is not None and (asked.keep is None or is_statistics(asked.keep)):
        raise UserError("--max-kl needs held-out text to keep: give the text itself as --keep")
    for source in texts:
        if asked.strengths:
            _require_readable(source, require_two_parts)
        else:
            require_text(source)
            _require_readable(source, read_examples)


def _require_readable(source: str, read: Callable[[str, int], object]) -> None:
    """Read the first examples of a file; what the base says and saved statistics are none."""
    if source != SELF and not is_statistics(source):
        read(source, EVERY)


def _read(reading: Reading, asked: Asked, place: Path) -> tuple[Read, Read]:
    """The two texts; without a repair they are measured on, and nothing is collected."""
    nothing = Read(None, None)
    if not asked.strengths:
        keep = nothing if asked.keep is None else reading.measured(asked.keep, place / "keep")
        return keep, nothing if asked.task is None else reading.measured(asked.task, place)
    assert asked.keep is not None
    keep = reading.keep(asked.keep, place / "keep")
    return keep, nothing if asked.task is None else reading.task(asked.task, place / "task")


def _chosen(
    asked: Asked, settings: Sequence[Setting], points: Sequence[Point], limits: Sequence[Limit]
) -> Point | None:
    """The only setting that was asked for, or the one to take of several."""
    shares = [limit.size for limit in limits if limit.task is None]
    budget = {
        "max_kl": asked.max_kl,
        "max_drop": shares[0] if shares else None,
        "limits": [limit for limit in limits if limit.task is not None],
    }
    alone = [point for point in points if point.setting in settings]
    if len(alone) == 1 and not any(budget.values()):
        return alone[0]
    measured = any(point.kl is not None or point.loss is not None for point in points)
    if not (measured or asked.strengths or any(budget.values())):
        return None  # scores of tasks alone: there is nothing to weigh them by
    return choose(points, **budget)  # type: ignore[arg-type]


def _told(chosen: Point | None) -> set[Setting]:
    """The settings whose scores are told where they were not what was chosen by."""
    return {BASE, TRAINED} | (set() if chosen is None else {chosen.setting})


def _settings_of(asked: Asked) -> dict[str, Any]:
    return {
        "source": asked.source,
        "keep": asked.keep,
        "task": asked.task,
        "max_kl": asked.max_kl,
        "max_drop": list(asked.max_drop),
        "calibration": asked.calibration.model_dump(exclude={"source", "memory_budget"}),
        "seed": asked.seed,
    }


def _provenance(asked: Asked, found: Adjusted, adjustable: Adjustable) -> dict[str, Any]:
    """What was asked and found, with what the moments say of every layer."""
    layers: Mapping[str, Any] = {}
    if adjustable.repairs is not None and found.chosen is not None:
        forecasts = adjustable.repairs.forecasts[found.chosen.setting.strength]
        layers = {name: asdict(forecast) for name, forecast in forecasts.items()}
    return {**_settings_of(asked), **found.to_json(), "layers": layers}


def write_spectra(found: Spectra, path: Path) -> None:
    """Write every layer as JSON, or as one row of a CSV table."""
    if path.suffix == ".json":
        write_json(path, found.to_json())
    else:
        write_csv(path, found.rows, list(found.rows[0]))
