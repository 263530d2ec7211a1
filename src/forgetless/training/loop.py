"""`train`: settings and tokens in, a trained model, a log and resumable checkpoints out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from forgetless.core.errors import UserError, first_few
from forgetless.core.progress import Bar, ended
from forgetless.data.batches import Padding
from forgetless.data.examples import Examples
from forgetless.data.tokens import tokenize
from forgetless.models.load import checkpoint_activations
from forgetless.training import checkpoints
from forgetless.training.attention import attention_dropout
from forgetless.training.budget import Exceeded
from forgetless.training.compiling import compile_problems, compiling
from forgetless.training.devices import Share, join
from forgetless.training.durations import Rows, measured_steps, rows_of, total_steps
from forgetless.training.forgetting import ForgettingCallback
from forgetless.training.interruption import Interruption, Unlogged
from forgetless.training.launch import this_launch
from forgetless.training.log import TrainingLog
from forgetless.training.loraplus import require_both_factors
from forgetless.training.optimizers import optimizer_class, optimizer_problems
from forgetless.training.penalties import make_penalty
from forgetless.training.record import Points, Record
from forgetless.training.restoring import trained_weights
from forgetless.training.settings import TrainingSettings, what_decides_a_training
from forgetless.training.token_checks import require_fitting, require_kept_apart
from forgetless.training.trackers import Trackers, tracker_problems
from forgetless.training.trainer import ExactTrainer, trainer_arguments

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TrainingResult", "train"]


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        steps: optimiser steps, those before an interruption included.
        train_seconds: spent on them, without loading and without interruptions.
        final_loss: mean over the steps of the last line of the log.
        tokens: tokens that were read, padding not counted.
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
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples | datasets.Dataset | Rows,
    settings: TrainingSettings,
    folder: str | Path,
    *,
    seed: int = 0,
    probes: ForgettingCallback | None = None,
    penalties: Sequence[Mapping[str, Any]] = (),
    on_step: Callable[[int, int], None] | None = None,
    on_point: Callable[[int], None] | None = None,
) -> TrainingResult:
    """Train the weights of `model` that ask for gradients, in place.

    The loss is the mean over all learned tokens of a step, however they are spread over the
    batches that it accumulates. Everything random follows from `seed`. A call that finds a
    checkpoint of the same training in `folder` continues after it; on one thread the losses are
    then, bit for bit, those of a training that was never interrupted.

    Args:
        model: a causal language model, or a `PeftModel` of one.
        tokenizer: its tokenizer.
        examples: tokens from `forgetless.data.tokenize`; or examples, which it is then called on;
            or rows, such as a mixture of several sources.
        settings: how to train, and how often to write checkpoints and lines of the log.
        folder: takes ``log.jsonl`` and ``checkpoints/``, of which the newest two are kept.
        seed: of the order of the examples and of dropout.
        probes: what to measure on the way, and the budget that may end the training.
        penalties: terms added to the loss, as `forgetless.training.penalties` names them. They
            see `model` as it is given, so on resuming too it must be as before its first step.
        on_step: called after every step with its number and the number of all steps.
        on_point: called after each step that `settings.measure_at` names, with its number, to
            keep the weights as they then are. After an interruption it may be called again for a
            step, with the very same weights.

    Raises:
        UserError: the loss is no longer a number, the tokens do not fit the model, or `folder`
            holds checkpoints of another training.
        KeyboardInterrupt: Ctrl-C or SIGTERM came. The step was finished and saved, and the same
            call continues after it; a second Ctrl-C ends at once, and the newest checkpoint counts.
    """
    folder, ranks = Path(folder), join()
    _require_fitting(settings, bool(penalties), probes is not None)
    if isinstance(examples, Examples):
        examples = tokenize(examples, tokenizer)
    rows = rows_of(examples)
    _check(model)
    require_fitting(model, rows)
    require_kept_apart(model, rows)
    require_both_factors(model, settings.loraplus_ratio)
    steps = total_steps(rows, settings)

    terms = [make_penalty(spec) for spec in penalties]
    origin = _origin(model, rows, settings, seed) | (probes.decides if probes else {})
    if terms:
        origin["penalties"] = [dict(spec) for spec in penalties]
    checkpoint, unlogged, log = ranks.first(lambda: _begin(folder, origin))
    log.is_kept = ranks.index == 0
    trackers = Trackers(settings.report_to, folder, checkpoint)

    for term in terms:
        term.prepare(model, tokenizer, seed)

    with (
        _quiet(),
        _prepared(model, settings.gradient_checkpointing),
        compiling(settings.compile),
        attention_dropout(model, settings.attention_dropout),
        trackers.named(),
        ended(Bar("training", steps, done=_steps_done(checkpoint))) as bar,
    ):
        record = Record(rows, log, origin, steps, bar, on_step, probes, unlogged.seconds)
        interruption = Interruption(unlogged, record.seconds, bar.console.print)
        trainer = ExactTrainer(
            model=model,
            args=trainer_arguments(model, settings, folder / "checkpoints", steps, seed, trackers),
            train_dataset=rows,
            data_collator=Share(Padding(tokenizer.pad_token_id or 0), ranks),
            # Probes come first, so that what they decide is in the log and sealed with the rest.
            callbacks=[
                *([probes] if probes else []),
                Points(measured_steps(steps, settings), on_point),
                record,
                trackers,
                interruption,
            ],
            optimizer_cls_and_kwargs=optimizer_class(settings),
        )
        trainer.penalties = terms
        trainer.loraplus_ratio = settings.loraplus_ratio
        trainer.settings = settings
        trainer.unlogged = unlogged
        with interruption.awaited():
            trainer.run(checkpoint, steps, probes)
    last = log.lines[-1]
    return TrainingResult(
        last.step,
        last.seconds,
        last.loss,
        last.tokens,
        _steps_done(checkpoint) or None,
        round(probes.probe_seconds, 3) if probes else 0.0,
        probes.exceeded if probes else None,
    )


# ---- before the first step -----------------------------------------------------------------------


def _steps_done(checkpoint: Path | None) -> int:
    return checkpoints.step_of(checkpoint) if checkpoint else 0


def _require_fitting(settings: TrainingSettings, penalties: bool, probes: bool) -> None:
    launch = this_launch()
    obstacles = launch.obstacles(settings, penalties=penalties, probes=probes)
    own = *optimizer_problems(settings), *compile_problems(settings), *tracker_problems(settings)
    if problems := [*obstacles, *own]:
        raise UserError(first_few(problems))


def _check(model: Any) -> None:
    trained = trained_weights(model).values()
    if not trained:
        raise UserError("no weight of the model asks for gradients; attach an adapter first")
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in trained):
        warnings.warn(
            "the trained weights are stored in 16 bits, which lose small updates; load the model "
            "with dtype 'float32' (training in precision 'bf16' is as fast)",
            stacklevel=3,
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
    return checkpoint, unlogged, TrainingLog(folder / "log.jsonl", unlogged.since)


@contextmanager
def _prepared(model: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """Switch gradient checkpointing on; at the end undo what it and `Trainer` changed."""
    training, use_cache = model.training, getattr(model.config, "use_cache", False)
    own_attributes = set(vars(model))
    if gradient_checkpointing:
        checkpoint_activations(model)
    try:
        yield
    finally:
        if gradient_checkpointing:
            checkpoint_activations(model, on=False)
        for added in set(vars(model)) - own_attributes:  # the forward that casts to bf16
            delattr(model, added)
        model.config.use_cache = use_cache
        model.train(training)


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
