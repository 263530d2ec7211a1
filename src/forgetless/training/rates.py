"""The highest stable learning rate, by short trainings from one start.

"LoRA Learns Less and Forgets Less" (2405.09673, section 4.7) advises to sweep the rate and to take
the highest stable one. With s_t the mean loss of the last w steps (w a tenth of them, rounded up),
a rate is stable when

- every loss and gradient is finite;
- the loss does not spike: the most that s_t ever rises over its running minimum is at most that of
  the lowest rate, which sees the same batches, plus 10 % of the first s;
- it learns: the last s is below the first by at least 90 % of what the best rate gains.

First and last are those of the same batches for all; the first s is the lowest rate's, which has
hardly moved by then.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forgetless.core.errors import UserError
from forgetless.core.files import read_json, read_jsonl, remove, write_json
from forgetless.data.modality import Processor
from forgetless.training.loop import train
from forgetless.training.probes import Asked, Probes
from forgetless.training.settings import TrainingSettings
from forgetless.training.trainer import DivergenceError
from forgetless.training.weights import put_back, trained_copy

MARGIN = 0.1
"""Of the first smoothed loss: a rise beyond it, and beyond what the batches explain, is a spike."""

TOLERANCE = 0.1
"""Part of the best rate's gain that a stable rate may lack."""

STEPS = range(20, 101)
"""Steps of a trial where they are not given: a twentieth of the training, at least and at most."""


@dataclass(frozen=True)
class Trial:
    """A short training at one rate.

    Attributes:
        losses: of every step; they end early where one was no number.
        forgetting: by name, what the trial did to what is to be kept; empty if nobody looked.
    """

    learning_rate: float
    losses: list[float]
    forgetting: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a trial says of its rate.

    Attributes:
        final_loss: mean of the last steps; None where the loss was no number.
        rise: the most that the smoothed loss rose over its running minimum; None likewise.
        stable: see the module.
    """

    learning_rate: float
    final_loss: float | None
    rise: float | None
    stable: bool
    why: str


def grid(centre: float) -> list[float]:
    """Six rates, evenly spread on a logarithmic scale over the two decades around a centre."""
    return [float(f"{centre * 10 ** (2 * i / 5 - 1):.2g}") for i in range(6)]


def some_steps(whole: int) -> int:
    """Steps of a trial for a training of so many."""
    return min(whole, max(STEPS.start, min(STEPS.stop - 1, whole // 20)))


def shortened(settings: TrainingSettings, rate: float, steps: int) -> TrainingSettings:
    """The same training at another rate, its schedule drawn together to so many steps."""
    duration: dict[str, Any] = {"steps": steps, "epochs": None, "tokens": None}
    unseen: dict[str, Any] = {"log_every": 1, "measure_at": [], "report_to": []}
    return settings.model_copy(update={"learning_rate": rate, **duration, **unseen})


def find_learning_rate(
    model: Any,
    processor: Processor,
    examples: Any,
    settings: TrainingSettings,
    folder: str | Path,
    *,
    rates: Sequence[float],
    steps: int,
    seed: int = 0,
    penalties: Sequence[Mapping[str, Any]] = (),
    forgetting: Asked | Sequence[Asked] = (),
) -> Iterator[Trial]:
    """Train briefly at each rate, from the same start on the same batches; a trial at a time.

    The model is given back after every trial as it was, bit for bit, for which a copy of its
    trained weights is held on the CPU. A trial that is finished is not repeated when the call is.

    Args:
        model: as for `forgetless.training.train`, and likewise the next three.
        processor: what reads its data.
        examples: what it is trained on.
        settings: of the whole training.
        folder: takes a JSON file for every finished trial.
        rates: to be tried.
        steps: of a trial.
        seed: as for `train`.
        penalties: as for `train`.
        forgetting: what is measured after each trial of a `PeftModel`: texts (KL to the base per
            token on 32 of them), or tasks, as for `ForgettingCallback`.

    Yields:
        The trials in the order of the rates, for `judge`.
    """
    probes = Probes((), forgetting) if forgetting and hasattr(model, "disable_adapter") else None
    for rate in rates:
        place = Path(folder) / f"{rate:.6g}"
        kept = place.with_name(f"{place.name}.json")
        if not kept.exists():
            before = trained_copy(model, "cpu")
            try:
                brief = shortened(settings, rate, steps)
                options: Any = {"seed": seed, "penalties": penalties}
                with suppress(DivergenceError):
                    train(model, processor, examples, brief, place, **options)
                lines = read_jsonl(place / "log.jsonl")
                losses = [line["loss"] for line in lines if "loss" in line]
                values = {}
                if probes is not None and len(losses) == steps:
                    _, found = probes.measure(model, processor, None)
                    values = {name: result.value for name, result in found.items()}
            finally:
                put_back(model, before)
                model.zero_grad()
            write_json(kept, asdict(Trial(rate, losses, values)), checked=True)
            remove(place)
        yield Trial(**read_json(kept))


# ---- judging -------------------------------------------------------------------------------------


def judge(trials: Sequence[Trial], steps: int) -> tuple[list[Verdict], float]:
    """A verdict on each rate, in ascending order, and the highest stable rate.

    Raises:
        UserError: no rate is stable.
    """
    trials = sorted(trials, key=lambda trial: trial.learning_rate)
    window = math.ceil(steps / 10)
    curves = {
        trial.learning_rate: [
            sum(trial.losses[end - window : end]) / window for end in range(window, steps + 1)
        ]
        for trial in trials
        if len(trial.losses) == steps
    }
    verdicts = [_verdict(trial, curves) for trial in trials]
    stable = [verdict.learning_rate for verdict in verdicts if verdict.stable]
    if not stable:
        tried = ", ".join(f"{v.learning_rate:g}: {v.why}" for v in verdicts)
        raise UserError(f"no learning rate is stable ({tried}); give other --rates, or more steps")
    return verdicts, max(stable)


def _verdict(trial: Trial, curves: Mapping[float, Sequence[float]]) -> Verdict:
    rate, curve = trial.learning_rate, curves.get(trial.learning_rate)
    if curve is None:
        why = f"no number after step {len(trial.losses)}"
        return Verdict(rate, None, None, stable=False, why=why)
    lowest = curves[min(curves)]
    first, best = lowest[0], min(other[-1] for other in curves.values())
    gain, rise = first - curve[-1], _rise(curve)
    if rise > _rise(lowest) + MARGIN * first:
        why = f"spikes by {rise:.3g}"
    elif gain <= 0:
        why = "learns nothing"
    elif gain < (1 - TOLERANCE) * (first - best):
        why = f"{100 * gain / (first - best):.0f} % of the best rate's fall"
    else:
        return Verdict(rate, curve[-1], rise, stable=True, why="stable")
    return Verdict(rate, curve[-1], rise, stable=False, why=why)


def _rise(curve: Sequence[float]) -> float:
    """The most by which a curve is above its running minimum."""
    lowest = itertools.accumulate(curve, min)
    return max(value - low for value, low in zip(curve, lowest, strict=True))
