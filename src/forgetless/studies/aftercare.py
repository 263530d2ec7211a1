"""After the training: how much of an adapter to use, how strongly to repair it, and what it costs.

A `Point` is one way to use what was trained: repaired with a strength, then turned to a scale. At
each, the model's distance from its base is measured on held-out text to keep, and its loss on
held-out text of the new task; `choose` takes one of them by a budget, or at the knee of the curve.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from forgetless.adapters.comparators import Compared, compared, updated
from forgetless.adapters.dial import dial, require_turnable, scale_folder
from forgetless.adapters.folders import export, load, save
from forgetless.adapters.repair import Forecast, Repairs, factors_of, is_tuned, on_base, put, repair
from forgetless.adapters.settings import AdapterSettings, Comparator
from forgetless.core.errors import UserError
from forgetless.core.progress import counted
from forgetless.data.held import HeldOut, hold_out, write_texts
from forgetless.data.modality import Processor, modality_of
from forgetless.data.settings import CalibrationSettings, DataSettings
from forgetless.data.texts import SELF, said
from forgetless.models.heads import heads_of, is_without_own
from forgetless.models.hub import folder_of
from forgetless.models.load import load_tuned
from forgetless.models.state import base_of
from forgetless.scores.gates import Limit
from forgetless.statistics.moments import Statistics, is_statistics
from forgetless.statistics.own_text import settled_text
from forgetless.studies.inputs import Collecting
from forgetless.tasks import Task, TaskResult, make_task
from forgetless.tasks.evaluation import Scores, evaluate

HELD_TEXTS = 64
"""Most held-out examples that a choice looks at."""

SCALES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""What the dial is turned to where nothing else is asked for."""


@dataclass(frozen=True, order=True)
class Setting:
    """One way to use what was trained: `strength` of the repair, `scale` of the dial after it.

    Or, in place of both, the label of a `comparator`.
    """

    strength: float = 0.0
    scale: float = 1.0
    comparator: str = ""

    @property
    def label(self) -> str:
        """A name for folders and tables: ``trained``, ``repair-0.1``, ``dial-0.5``, or both."""
        if self.comparator:
            return self.comparator
        parts = [
            f"repair-{self.strength:g}" if self.strength else "",
            f"dial-{self.scale:g}" if self.scale != 1 else "",
        ]
        return "-".join(filter(None, parts)) or "trained"

    def to_json(self) -> dict[str, Any]:
        """What it is, as one mapping."""
        if self.comparator:
            return {"comparator": self.comparator}
        return {"strength": self.strength, "scale": self.scale}


TRAINED = Setting()
"""All of the adapter, as it was trained."""

BASE = Setting(scale=0.0)
"""None of it."""

_ROUNDING = 1e-9
"""Of a difference of two scores."""


@dataclass(frozen=True)
class Point:
    """What a setting leaves of the drift and gives up of the skill, on held-out text.

    Attributes:
        kl: KL(base || model) on held-out text to keep, in nats per token; None without such text.
        loss: mean loss on held-out text of the new task; None without.
        drift: the share of the trained adapter's KL that is left; where no KL was measured, of
            what it does to the layers' outputs on the text to keep, by the moments.
        given_up: the share of what the training took off the task's loss that is lost again; where
            no loss was measured, of the update's effect on the task, by the moments. Below 0 where
            the loss is better than as trained.
        scores: on further tasks, where some were asked for.
    """

    setting: Setting
    kl: float | None
    loss: float | None
    drift: float
    given_up: float
    scores: Scores = field(default_factory=lambda: Scores(()))

    def to_json(self) -> dict[str, Any]:
        """As one mapping; of the scores their numbers, without items."""
        return {
            **self.setting.to_json(),
            "kl": self.kl,
            "loss": self.loss,
            "drift": self.drift,
            "given_up": self.given_up,
            "scores": self.scores.to_json(),
        }


class Adjustable:
    """A trained adapter, or a model tuned in whole, that can be set to any `Setting`.

    Args:
        adapter: the folder of an adapter or of a tuned model, a PeftModel, or a tuned model.
        base: the untouched model. An adapter's folder is put on it.
        keep: activations on text to keep; None for the dial alone.
        task: those on the new task's text.
        strengths: of the repairs that will be asked for.
        comparators: likewise; with `keep`.

    Attributes:
        model: as it was trained.
        reference: the base, for distances to it; None where that is the adapter switched off.
        repairs: the solutions; None without strengths, and for a tuned model.
    """

    def __init__(
        self,
        adapter: str | Path | nn.Module,
        base: nn.Module,
        keep: Statistics | None = None,
        task: Statistics | None = None,
        strengths: Iterable[float] = (),
        comparators: Iterable[Comparator] = (),
    ) -> None:
        self.repairs: Repairs | None = None
        self.comparators = {wanted.label: wanted for wanted in comparators}
        self._told: dict[str, Compared] = {}
        self.reference: nn.Module | None = None
        wanted = [strength for strength in strengths if strength]
        self._moments = keep, task
        self.own = "default"
        adapter = adapter if isinstance(adapter, nn.Module) else folder_of(adapter)
        if is_tuned(adapter):
            self.model: Any = (
                adapter if isinstance(adapter, nn.Module) else load_tuned(adapter, base)
            )
            self.reference = base
            return
        self.model = adapter if isinstance(adapter, PeftModel) else load(base, str(adapter))
        require_turnable(self.model)  # to nothing, by which the base is measured
        self.own, self.repaired = self.model.active_adapters[0], "repaired"
        if wanted and keep is not None:
            _, self.repaired = on_base(self.model, self.model, self.own)
            self.model.set_adapter(self.own)
            self.repairs = Repairs(factors_of(self.model, self.repaired), keep, task, wanted)

    @contextmanager
    def at(self, setting: Setting) -> Iterator[Any]:
        """The model at a setting; as it was trained afterwards."""
        model = self.model
        if setting.comparator:
            with updated(model, self._compared(setting.comparator).updates, self.reference):
                yield model
            return
        if self.reference is not None and setting.strength:
            keep, task = self._moments
            assert keep is not None
            model = repair(model, self.reference, keep, task, setting.strength)
        elif setting.strength:
            assert self.repairs is not None
            put(model, self.repairs.A(setting.strength), self.repaired)
            model.set_adapter(self.repaired)
        try:
            with dial(model, setting.scale, base=self.reference):
                yield model
        finally:
            if self.reference is None:
                model.set_adapter(self.own)

    def write(
        self, setting: Setting, folder: Path, processor: Processor, rank: int | None = None
    ) -> None:
        """Write what it is at a setting: a plain LoRA, or the model that was tuned in whole.

        The setting is without a comparator, which may be no LoRA. Of a tuned model a LoRA of `rank`
        is made; None is for the model itself. The processor is what a model has beside it.
        """
        if self.reference is not None and rank is None:
            with self.at(setting) as model:
                model.save_pretrained(folder)
            processor.save_pretrained(folder)
            return
        if self.reference is not None:
            keep, task = self._moments
            assert keep is not None
            found = repair(self.model, self.reference, keep, task, setting.strength, rank=rank)
            save(found, folder)
        elif setting.strength:
            assert self.repairs is not None
            put(self.model, self.repairs.A(setting.strength), self.repaired)
            save(self.model, folder, self.repaired)
        else:
            export(self.model, folder, adapter_name=self.own)
        if setting.scale != 1:
            scale_folder(folder, setting.scale)

    def _compared(self, label: str) -> Compared:
        """What a comparator makes of the update; the updates themselves are not kept."""
        keep, task = self._moments
        assert keep is not None
        wanted, base = self.comparators[label], self.reference or self.model
        made = compared(wanted, self.model, base, keep, task, self.own)
        if self.reference is None:
            self.model.set_adapter(self.own)
        self._told[label] = replace(made, updates={})
        return made

    def told(self, setting: Setting) -> Compared:
        """What a comparator does by the moments, without its updates."""
        return self._told.get(setting.comparator) or self._compared(setting.comparator)

    def forecast(self, setting: Setting) -> Forecast:
        """By the moments: what is left of the disturbance, what is missed of the task's effect."""
        if setting.comparator:
            return self.told(setting).forecast
        repaired = Forecast(1.0, 0.0)
        if self.repairs is not None:
            repaired = self.repairs.forecast(setting.strength)
        # An amplitude of 1 - √missed, times the scale, is what is left of the effect.
        missed = (1 - setting.scale * (1 - repaired.missed**0.5)) ** 2
        return Forecast(repaired.kept * setting.scale**2, missed)


class Bench:
    """Measures settings on held-out text, each once.

    Args:
        trained: what is set.
        processor: of the base.
        keep: held-out text to keep; None for no KL, as of a repair on an encoder without a head.
        task: held-out text of the new task; None for no loss.
        batch_size: texts at once; None lets each task choose.
        said: how prompts are put to the base, see `DataSettings.said`; None by the tasks' defaults.
    """

    def __init__(
        self,
        trained: Adjustable,
        processor: Processor,
        keep: Path | None = None,
        task: Path | str | None = None,
        batch_size: int | None = None,
        said: Mapping[str, Any] | None = None,
    ) -> None:
        self.trained, self.processor, self.batch_size = trained, processor, batch_size
        self._held: dict[str, Task] = {}
        modality = modality_of(trained.model)
        kinds = {"kl": (modality.distance_task, keep), "loss": (modality.loss_task, task)}
        for name, (kind, text) in kinds.items():
            by_moments = name == "kl" and trained.repairs is not None
            if by_moments and is_without_own(base_of(trained.model)):
                continue  # no head of the base's own says anything: the forecasts tell the drift
            if text is not None:
                held = {"kind": kind, "name": name, "path": str(text), "limit": HELD_TEXTS}
                if name == "loss" and heads_of(trained.model) is not None:
                    held["head"] = "new"
                self._held[name] = make_task(held, said)
        self._seen: dict[tuple[Setting, str], TaskResult] = {}

    def measure(self, setting: Setting, tasks: Sequence[Task] = ()) -> Point:
        """One point; the base and the adapter as trained are measured with the first."""
        held = list(self._held.values())
        before, ideal, here = (self._values(each, held) for each in (BASE, TRAINED, setting))
        foreseen = self.trained.forecast(setting)
        drift, given_up = foreseen.kept, foreseen.missed
        if ideal.get("kl"):
            drift = here["kl"] / ideal["kl"]
        if "loss" in here:
            learned = before["loss"] - ideal["loss"]
            # Where training did not lower the held-out loss, the nats themselves are told.
            given_up = (here["loss"] - ideal["loss"]) / (learned if learned > 0 else 1.0)
        self._values(setting, tasks)
        scores = Scores(self._seen[setting, task.name] for task in tasks)
        return Point(setting, here.get("kl"), here.get("loss"), drift, given_up, scores)

    def curve(self, settings: Iterable[Setting], tasks: Sequence[Task] = ()) -> list[Point]:
        """The points of several settings, in their order."""
        distinct = list(dict.fromkeys(settings))
        return [self.measure(each, tasks) for each in counted(distinct, "measuring", "settings")]

    def _values(self, setting: Setting, tasks: Sequence[Task]) -> dict[str, float]:
        """The value of each task at a setting, measured where it was not yet."""
        missing = [task for task in tasks if (setting, task.name) not in self._seen]
        if missing:
            reference = self.trained.reference
            with self.trained.at(setting) as model:
                found = evaluate(
                    model, missing, self.processor, reference=reference, batch_size=self.batch_size
                )
            self._seen |= {(setting, name): result for name, result in found.items()}
        values = {task.name: self._seen[setting, task.name].value for task in tasks}
        if "loss" in values:  # an accuracy has it beside its value
            values["loss"] = self._seen[setting, "loss"].extra.get("loss", values["loss"])
        return values


def choose(
    points: Sequence[Point],
    *,
    max_kl: float | None = None,
    max_drop: float | None = None,
    limits: Sequence[Limit] = (),
) -> Point:
    """The point that meets the budgets at the least cost, or the one at the knee of the curve.

    Args:
        points: on one adapter.
        max_kl: most nats per token on the held-out text to keep; of the points within it, the one
            that gives up least.
        max_drop: most that may be given up of what was learned, as a share; of the points within
            it, the one with the least drift. With both budgets, that within both which gives up
            least.
        limits: most that single tasks may lose against the adapter as trained; of those tasks every
            point has its score, and one of the points is as trained.

    Returns:
        Without a budget the knee: where, with both shares scaled to 0..1 over the points, the
        curve of drift against what is given up lies farthest below its chord.

    Raises:
        UserError: no point meets the budgets, or KL was not measured where it has one.
    """
    if max_kl is not None and any(point.kl is None for point in points):
        raise UserError("max_kl needs held-out text to keep; give the text itself, no statistics")
    if max_kl is None and max_drop is None and not limits:
        return _knee(points)
    trained = next((point for point in points if point.setting == TRAINED), points[0])
    within = [
        point
        for point in points
        if (max_kl is None or (point.kl is not None and point.kl <= max_kl))
        and (max_drop is None or point.given_up <= max_drop)
        and all(_keeps_to(limit, point, trained) for limit in limits)
    ]
    if not within:
        raise UserError(_nothing_within(points, max_kl, max_drop, limits))
    if max_kl is not None:
        return min(within, key=lambda point: (point.given_up, point.drift))
    return min(within, key=lambda point: (point.drift, point.given_up))


def _knee(points: Sequence[Point]) -> Point:
    """The point with the least sum of the two shares, each scaled to 0..1."""
    ranges = [
        (min(values), (max(values) - min(values)) or 1.0)
        for values in ([p.drift for p in points], [p.given_up for p in points])
    ]

    def cost(point: Point) -> float:
        values = point.drift, point.given_up
        return sum((v - low) / size for v, (low, size) in zip(values, ranges, strict=True))

    return min(points, key=lambda point: (cost(point), point.given_up))


def _keeps_to(limit: Limit, point: Point, trained: Point) -> bool:
    """Whether a task lost no more than it may, against the adapter as trained."""
    assert limit.task is not None
    now, before = point.scores[limit.task], trained.scores[limit.task]
    lost = before.value - now.value if now.higher_is_better else now.value - before.value
    allowed = limit.size * abs(before.value) if limit.relative else limit.size
    return lost <= allowed + _ROUNDING


def _nothing_within(
    points: Sequence[Point], max_kl: float | None, max_drop: float | None, limits: Sequence[Limit]
) -> str:
    budgets = [f"a loss of at most {limit} of {limit.task}" for limit in limits]
    if max_kl is not None:
        least = min(points, key=lambda point: point.kl or 0.0)
        budgets.append(
            f"a KL of at most {max_kl:g} (the least is {least.kl:.3g}, at {least.setting.label})"
        )
    if max_drop is not None:
        least = min(points, key=lambda point: point.given_up)
        budgets.append(
            f"at most {100 * max_drop:g} % given up of what was learned (the least is "
            f"{100 * least.given_up:.3g} %, at {least.setting.label})"
        )
    return f"none of the {len(points)} settings meets {' with '.join(budgets)}; allow more"


# --- the texts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """A text as it is used here: its activations, and what of it is held out to measure on."""

    statistics: Statistics | None
    held: Path | None


_AS_READ: dict[str, Any] = {"limit": None, "columns": {}, "validation": None}
"""How the rows are read that `hold_out` wrote."""


def require_text(source: str) -> None:
    """Raise ``UserError`` where a text to measure on is saved statistics."""
    if is_statistics(source):
        raise UserError(f"{source} holds statistics; give the text itself to measure on")


@dataclass(frozen=True)
class Reading:
    """How texts are read: on which layers of which base, and how much of them.

    Attributes:
        base: the model. Of a PeftModel the base is measured, adapters off.
        target_modules: the layers; a list of whole names, or what `target_layers` takes.
        calibration: how much of each text; its source is not looked at.
        data: how the new task's text becomes tokens; its path is not looked at.
        trained: the model whose activations on the new task's text count; None for the base's.
            A repair by those of the trained model keeps more of the skill and of the knowledge
            (docs/results/aftercare.md); by the base's, the text is told of before any training.
    """

    base: Any
    processor: Processor
    target_modules: Any
    calibration: CalibrationSettings
    data: DataSettings
    seed: int = 0
    trained: Any = None

    def keep(self, source: str, folder: Path) -> Read:
        """The text to keep: a file, "self" for text that the base says, or saved statistics."""
        if is_statistics(source):
            return Read(Statistics.load(source), None)
        parts = self._parts(source, folder)
        return Read(self._collected("second_moment", parts.rest), parts.held)

    def task(self, source: str, folder: Path) -> Read:
        """The new task's text, read as training reads it; or saved statistics."""
        if is_statistics(source):
            return Read(Statistics.load(source), None)
        parts = hold_out(source, folder, self.data.limit, modality_of(self.base).kinds)
        return Read(self._collected("task_moment", parts.rest), parts.held)

    def measured(self, source: str, folder: Path) -> Read:
        """A text that nothing is learned from: all of it is there to measure on."""
        require_text(source)
        return Read(None, self._parts(source, folder).held if source == SELF else Path(source))

    def whole(self, source: str, folder: Path) -> Statistics:
        """The activations of a whole text to keep, or saved ones."""
        if is_statistics(source):
            return Statistics.load(source)
        if source == SELF:
            self._parts(source, folder)
            return self._collected("second_moment", folder / "all.jsonl")
        return self._collected("second_moment", Path(source))

    def _parts(self, source: str, folder: Path) -> HeldOut:
        if source != SELF:
            return hold_out(source, folder, kinds=modality_of(self.base).kinds)
        settings = self.calibration
        own_texts = modality_of(self.base).own_texts
        if own_texts is None:
            raise UserError(f"this base says nothing by itself, so {SELF!r} is nothing to keep")
        if settings.samples == "auto":
            how = self.target_modules, settings, self.seed
            settled = settled_text(self.base, self.processor, *how)
            return write_texts(said(self.processor, settled), folder)
        asked = settings.samples, settings.max_length, self.seed
        return write_texts(own_texts(self.base, self.processor, *asked), folder)

    def _collected(self, need: str, text: Path) -> Statistics:
        trained = self.trained if need == "task_moment" else None
        collecting = Collecting(
            AdapterSettings(target_modules=self.target_modules),
            self.calibration.model_copy(update={"source": str(text)}),
            self.data.model_copy(update={"train": str(text), **_AS_READ}),
            self.seed,
        )
        model, processor = self.base if trained is None else trained, self.processor
        if need == "task_moment" and heads_of(model) is not None:
            processor = modality_of(model).reader(processor, model.config).under("new")
        found = collecting.collect(need, model, processor, adapters_on=trained is not None)
        assert isinstance(found, Statistics)
        return found
