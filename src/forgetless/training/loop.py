"""`train`: settings and tokens in, a trained model, a log and resumable checkpoints out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers.utils import logging

from forgetless.core.errors import UserError, first_few
from forgetless.core.progress import Bar
from forgetless.data.examples import Examples
from forgetless.data.losses import own_loss
from forgetless.data.modality import Processor, Rows, modality_of
from forgetless.training import checkpoints
from forgetless.training.devices import Share, join
from forgetless.training.forgetting import ForgettingCallback
from forgetless.training.forgetting_budget import Exceeded
from forgetless.training.interruption import Interruption, Unlogged
from forgetless.training.launch import this_launch
from forgetless.training.log import Record, TrainingLog
from forgetless.training.model import compile_problems, prepared, require_trainable
from forgetless.training.optimizers import optimizer_problems
from forgetless.training.penalties import Penalty, make_penalty
from forgetless.training.schedules import measured_steps, total_steps
from forgetless.training.settings import TrainingSettings, what_decides_a_training
from forgetless.training.trackers import Trackers, tracker_problems
from forgetless.training.trainer import ExactTrainer
from forgetless.training.weights import trained_weights

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to.

    After a rollback, `steps`, `tokens` and `final_loss` are those of the weights that the model was
    given back, and `exceeded` says how far the training had gone.

    Attributes:
        steps: optimiser steps behind the weights, those before an interruption included.
        train_seconds: spent on all steps, without loading and without interruptions.
        final_loss: mean over the steps of the log's last line up to `steps`; NaN before the first.
        tokens: tokens that were read for them, padding not counted.
        resumed_from: the step at which this call took over, or None where it began anew.
        probe_seconds: how much of `train_seconds` the probes took.
        exceeded: which budget of forgetting ended the training before its last step; the weights
            are then those of its ``kept_step``. None when none did.
    """

    steps: int
    train_seconds: float
    final_loss: float
    tokens: int
    resumed_from: int | None = None
    probe_seconds: float = 0.0
    exceeded: Exceeded | None = None


def train(
    model: PreTrainedModel | PeftModel,
    processor: Processor,
    examples: Examples | datasets.Dataset | Rows,
    settings: TrainingSettings,
    folder: str | Path,
    *,
    seed: int = 0,
    probes: ForgettingCallback | None = None,
    penalties: Sequence[Mapping[str, Any] | Penalty] = (),
    on_step: Callable[[int, int], None] | None = None,
    on_point: Callable[[int], None] | None = None,
) -> TrainingResult:
    """Train the weights of `model` that ask for gradients, in place.

    The loss is the mean over all learned tokens of a step, however they are spread over the
    batches that it accumulates. Everything random follows from `seed`. A call that finds a
    checkpoint of the same training in `folder` continues after it; on one thread the losses are
    then, bit for bit, those of a training that was never interrupted.

    Args:
        model: a base of any modality, or a `PeftModel` of one.
        processor: what reads its data: of a language model the tokenizer.
        examples: what its modality makes rows of: examples, or tokens from
            `forgetless.data.tokenize`; or rows, such as a mixture of several sources.
        settings: how to train, and how often to write checkpoints and lines of the log.
        folder: takes ``log.jsonl`` and ``checkpoints/``, of which the newest two are kept.
        seed: of the order of the examples and of dropout.
        probes: what to measure on the way, and the budget that may end the training.
        penalties: terms added to the loss, as `forgetless.training.penalties` names them, or of
            your own. They see `model` as it is given, so on resuming too it must be as before its
            first step.
        on_step: called after every step with its number and the number of all steps.
        on_point: called after each step that `settings.measure_at` names, with its number, to
            keep the weights as they then are. After an interruption it may be called again for a
            step, with the very same weights.

    Raises:
        UserError: the loss is no longer a number, the rows do not fit the model, or `folder`
            holds checkpoints of another training.
        KeyboardInterrupt: Ctrl-C or SIGTERM came. The step was finished and saved, and the same
            call continues after it; a second Ctrl-C ends at once, and the newest checkpoint counts.
    """
    folder, processes = Path(folder), join()
    launch, asked = this_launch(), {"penalties": bool(penalties), "probes": probes is not None}
    problems = [
        *launch.obstacles(settings, **asked),
        *optimizer_problems(settings),
        *compile_problems(settings),
        *tracker_problems(settings),
    ]
    if problems:
        raise UserError(first_few(problems))
    rows = examples
    if not isinstance(rows, Rows):
        rows = modality_of(model).rows(rows, processor)
    require_trainable(model, settings)
    require_pairs(rows, model, settings)
    rows.require_fitting(model)
    steps = total_steps(rows, settings)

    terms = [make_penalty(spec) for spec in penalties]
    origin = _origin(model, rows, settings, seed) | (probes.decides if probes else {})
    if terms:
        origin["penalties"] = [
            dict(spec) if isinstance(spec, Mapping) else {"kind": repr(spec)} for spec in penalties
        ]
    checkpoint, unlogged, log = processes.first(lambda: _begin(folder, origin))
    log.is_kept = processes.is_first
    trackers = Trackers(settings.report_to, folder, checkpoint)
    resumed_from = checkpoints.step_of(checkpoint) if checkpoint else 0
    seconds_before = unlogged.seconds
    if seconds_before is None:  # the log's last line is that of the checkpoint
        seconds_before = log.lines[-1].seconds if log.lines else 0.0

    with (
        _quiet(),
        prepared(model, settings),
        trackers.named(),
        Bar("training", steps, "steps", done=resumed_from, unasked=True) as bar,
    ):
        points = measured_steps(steps, settings)
        record = Record(
            rows, log, origin, steps, bar, on_step, points, on_point, probes, seconds_before
        )
        interruption = Interruption(unlogged, record.seconds, bar.console.print)
        trainer = ExactTrainer(
            model,
            settings,
            folder / "checkpoints",
            steps,
            seed,
            trackers,
            unlogged,
            train_dataset=rows,
            data_collator=Share(rows.join, processes),
            # Probes come first, so that what they decide is in the log and sealed with the rest.
            callbacks=[*([probes] if probes else []), record, trackers, interruption],
        )
        several = settings.gradient_accumulation > 1 or launch.processes > 1
        divides = trainer.model_accepts_loss_kwargs
        if settings.preference is None:
            trainer.take_loss(own_loss(model, several=several, divides=divides))
        for term in terms:  # now that the model is on the device where it trains
            term.prepare(model, processor, seed)
        trainer.penalties = terms
        with interruption.awaited():
            trainer.run(checkpoint, steps, probes)
    return _result(log, probes, resumed_from)


def require_pairs(rows: Rows, model: Any, settings: TrainingSettings) -> None:
    """See to it that a training on preferences has pairs of answers, and a base to compare with.

    Raises:
        UserError: it has not.
    """
    if settings.preference is None:
        return
    if any(len(rows[index]["lengths"]) != 2 for index in range(len(rows))):
        raise UserError("training.preference learns from pairs; give rows of chosen and rejected")
    if settings.preference.loss == "dpo" and not isinstance(model, PeftModel):
        raise UserError("dpo compares with the base; train an adapter, or take the loss orpo")


def _result(
    log: TrainingLog, probes: ForgettingCallback | None, resumed_from: int
) -> TrainingResult:
    over = probes.exceeded if probes else None
    last = log.lines[-1]
    kept = (last.step, last.tokens) if over is None else (over.kept_step, over.kept_tokens)
    losses = [line.loss for line in log.lines if line.step <= kept[0]]
    return TrainingResult(
        steps=kept[0],
        train_seconds=last.seconds,
        final_loss=losses[-1] if losses else math.nan,
        tokens=kept[1],
        resumed_from=resumed_from or None,
        probe_seconds=round(probes.probe_seconds, 3) if probes else 0.0,
        exceeded=over,
    )


def _origin(model: Any, rows: Rows, settings: TrainingSettings, seed: int) -> dict[str, Any]:
    """What must be the same for a training to continue another one's checkpoint."""
    trained = sum(weight.numel() for weight in trained_weights(model).values())
    return {
        **what_decides_a_training(settings),
        "seed": seed,
        "data": rows.fingerprint,
        "trained_weights": trained,
    }


def _begin(folder: Path, origin: Mapping[str, Any]) -> tuple[Path | None, Unlogged, TrainingLog]:
    """The checkpoint to continue, if there is one, and the log until then."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoints.discard_unsealed(folder / "checkpoints")
    checkpoint = checkpoints.newest(folder / "checkpoints")
    if checkpoint is not None:
        checkpoints.require_origin(checkpoint, origin)
    unlogged = Unlogged.of(checkpoint)
    return checkpoint, unlogged, TrainingLog(folder / "log.jsonl", unlogged.since, checkpoint)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the bars and notes that transformers writes at every checkpoint."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
