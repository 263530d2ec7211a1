"""`train`: settings and tokens in, a trained model, a log and resumable checkpoints out."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from forgetless.data import Examples, tokenize
from forgetless.errors import UserError
from forgetless.recipe import TrainingSettings
from forgetless.training import checkpoints
from forgetless.training.batches import Padding, TokenRows
from forgetless.training.budget import Exceeded
from forgetless.training.forgetting import STATE_KEY, ForgettingCallback
from forgetless.training.log import LogLine, ProbeLine, TrainingLog
from forgetless.training.loraplus import require_both_factors, speed_up
from forgetless.training.mixture import Mixture
from forgetless.training.penalties import Penalty, make_penalty

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TrainingResult", "train"]

Rows = TokenRows | Mixture

KEPT_CHECKPOINTS = 2
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "sgd": "sgd"}


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
    examples: Examples | datasets.Dataset | Mixture,
    settings: TrainingSettings,
    folder: str | Path,
    *,
    seed: int = 0,
    probes: ForgettingCallback | None = None,
    penalties: Sequence[Mapping[str, Any]] = (),
    on_step: Callable[[int, int], None] | None = None,
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
            or a mixture of several sources.
        settings: how to train, and how often to write checkpoints and lines of the log.
        folder: takes ``log.jsonl`` and ``checkpoints/``, of which the newest two are kept.
        seed: of the order of the examples and of dropout.
        probes: what to measure on the way, and the budget that may end the training.
        penalties: terms added to the loss, as `forgetless.training.penalties` names them. They
            see `model` as it is given, so on resuming too it must be as before its first step.
        on_step: called after every step with its number and the number of all steps.

    Raises:
        UserError: the loss is no longer a number, the tokens do not fit the model, or `folder`
            holds checkpoints of another training.
    """
    folder = Path(folder)
    if isinstance(examples, Examples):
        examples = tokenize(examples, tokenizer)
    rows = examples if isinstance(examples, Mixture) else TokenRows(examples)
    _check(model, rows)
    require_both_factors(model, settings.loraplus_ratio)
    steps = _total_steps(len(rows), settings)

    terms = [make_penalty(spec) for spec in penalties]
    origin = _origin(model, rows, settings, seed) | (probes.decides if probes else {})
    if terms:
        origin["penalties"] = [dict(spec) for spec in penalties]
    checkpoint = _checkpoint_of(folder / "checkpoints", origin)
    start = checkpoints.step_of(checkpoint) if checkpoint else 0
    log = TrainingLog(folder / "log.jsonl", start)

    for term in terms:
        term.prepare(model, tokenizer, seed)

    with _quiet(), _prepared(model, settings.gradient_checkpointing), _progress_bar() as bar:
        trainer = _Trainer(
            model=model,
            args=_arguments(model, settings, folder / "checkpoints", steps, seed),
            train_dataset=rows,
            data_collator=Padding(tokenizer.pad_token_id or 0),
            # Probes come first, so that what they decide is in the log and sealed with the rest.
            callbacks=[
                *([probes] if probes else []),
                _Record(rows, log, origin, steps, bar, on_step, probes),
            ],
        )
        trainer.penalties = terms
        trainer.loraplus_ratio = settings.loraplus_ratio
        trainer.run(checkpoint, steps, probes)
    last = log.lines[-1]
    return TrainingResult(
        last.step,
        last.seconds,
        last.loss,
        last.tokens,
        start if checkpoint else None,
        round(probes.probe_seconds, 3) if probes else 0.0,
        probes.exceeded if probes else None,
    )


# ---- before the first step -----------------------------------------------------------------------


def _check(model: Any, rows: Rows) -> None:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not trained:
        raise UserError("no weight of the model asks for gradients; attach an adapter first")
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in trained):
        warnings.warn(
            "the trained weights are stored in 16 bits, which lose small updates; load the model "
            "with dtype 'float32' (training in precision 'bf16' is as fast)",
            stacklevel=3,
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and rows.longest > positions:
        raise UserError(
            f"the longest example has {rows.longest} tokens, but the model has {positions} "
            f"positions; set max_length to {positions} or less"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if rows.several and "position_ids" not in inspect.signature(base.forward).parameters:
        raise UserError(
            f"{type(base).__name__} takes no position ids, without which packed sequences would "
            "see each other; set data.pack to false"
        )
    words, largest = model.get_input_embeddings().num_embeddings, rows.largest_token
    if largest >= words:
        raise UserError(
            f"the data holds the token {largest}, but the model knows {words} tokens; "
            "use the tokenizer of this model"
        )


def _total_steps(examples: int, settings: TrainingSettings) -> int:
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    batches = math.ceil(examples / settings.batch_size)
    return math.ceil(settings.epochs * math.ceil(batches / settings.gradient_accumulation))


def _origin(model: Any, rows: Rows, settings: TrainingSettings, seed: int) -> dict[str, Any]:
    """What must be the same for a training to continue another one's checkpoint."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return {
        **settings.model_dump(mode="json", exclude={"checkpoint_every", "log_every"}),
        "seed": seed,
        "data": rows.fingerprint,
        "trained_weights": trained,
    }


def _checkpoint_of(folder: Path, origin: Mapping[str, Any]) -> Path | None:
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.discard_unsealed(folder)
    checkpoint = checkpoints.newest(folder)
    if checkpoint is not None:
        checkpoints.require_origin(checkpoint, origin)
    return checkpoint


def _arguments(
    model: Any, settings: TrainingSettings, folder: Path, steps: int, seed: int
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        optim=_OPTIMIZERS[settings.optimizer],
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        seed=seed,
        # Every epoch is shuffled by data_seed + epoch: keep neighbouring seeds apart.
        data_seed=(seed * 1_000_003) % 2**31,
        use_cpu=next(model.parameters()).device.type == "cpu",
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_steps=settings.checkpoint_every,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )


@contextmanager
def _prepared(model: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """Switch gradient checkpointing on; at the end undo what it and `Trainer` changed."""
    training, use_cache = model.training, getattr(model.config, "use_cache", False)
    own_attributes = set(vars(model))
    # The name before transformers 5.20 was gradient_checkpointing_enable.
    new = hasattr(model, "activation_checkpointing_enable")
    switch = "activation_checkpointing" if new else "gradient_checkpointing"
    if gradient_checkpointing:
        getattr(model, switch + "_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if gradient_checkpointing:
            getattr(model, switch + "_disable")()
            model.disable_input_require_grads()
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


def _progress_bar() -> Progress:
    """A bar on standard error; nothing where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4g}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
        refresh_per_second=2,
        disable=not console.is_terminal,
    )


# ---- the steps -----------------------------------------------------------------------------------


class _Trainer(Trainer):
    """`Trainer` with penalties, that stops at a loss that is no number and decays matrices only."""

    penalties: Sequence[Penalty] = ()
    loraplus_ratio: float = 1.0

    def run(self, checkpoint: Path | None, steps: int, probes: ForgettingCallback | None) -> None:
        """Train, from `checkpoint` on where there is one."""
        if checkpoint is not None:
            found = checkpoints.trainer_state(checkpoint)["stateful_callbacks"].get(STATE_KEY)
            if probes is not None and found is not None:
                probes.restore(found)
            over = probes is not None and probes.exceeded is not None
            if over or checkpoints.step_of(checkpoint) >= steps:
                self._load_from_checkpoint(str(checkpoint))  # `train` would add a step
                return
        self.remove_callback(PrinterCallback)
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch; the last batch of a step also bears the penalties."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not (self.penalties and model.training and self.accelerator.sync_gradients):
            return loss
        plain, step = self.accelerator.unwrap_model(model), self.state.global_step
        terms = [penalty.weight * penalty(plain, step) for penalty in self.penalties]
        # `training_step` divides by the batches of a step where the model does not do so itself.
        divided = not self.model_accepts_loss_kwargs or kwargs.get("num_items_in_batch") is None
        return loss + sum(terms) * (self.current_gradient_accumulation_steps if divided else 1)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        rate = self.lr_scheduler.get_last_lr()[0]
        _require_finite("loss", loss.item(), self.state.global_step + 1, rate)
        return loss

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's optimizer; with LoRA+, B in groups of its own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.loraplus_ratio != 1:
            speed_up(optimizer, self.model if model is None else model, self.loraplus_ratio)
        return optimizer

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name, weight in model.named_parameters() if weight.ndim >= 2]

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        return 0  # counting them walks over all modules at every step


def _require_finite(name: str, value: float, step: int, learning_rate: float) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"the {name} became {value} at step {step}, learning rate {learning_rate:.3g}; lower "
            "training.learning_rate or raise training.warmup_ratio"
        )


class _Record(TrainerCallback):
    """Keeps the log, the seals, the progress bar and the caller up to date."""

    def __init__(
        self,
        rows: Rows,
        log: TrainingLog,
        origin: Mapping[str, Any],
        steps: int,
        bar: Progress,
        on_step: Callable[[int, int], None] | None,
        probes: ForgettingCallback | None,
    ) -> None:
        self.rows = rows
        self.log = log
        self.origin = origin
        self.steps = steps
        self.bar = bar
        self.on_step = on_step
        self.probes = probes
        self.seconds_before = log.lines[-1].seconds if log.lines else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        self.task = self.bar.add_task(
            "training", total=self.steps, completed=state.global_step, loss=math.nan
        )
        self._keep_probes()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Accelerate tells the data set of a new epoch only where it wrapped no sampler.
        if isinstance(self.rows, Mixture):
            self.rows.set_epoch(int(state.epoch))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The mean loss of a line must not reach over a checkpoint, or a resumed training would
        # give another mean than an undisturbed one.
        control.should_log |= control.should_save
        self._keep_probes()
        self.bar.advance(self.task)
        if self.on_step is not None:
            self.on_step(state.global_step, self.steps)

    def _keep_probes(self) -> None:
        """Write what the probes gave since the last time."""
        for probe in self.probes.history if self.probes else []:
            if probe.step not in self.log.probes:
                self.log.append(ProbeLine(probe.step, probe.values, probe.seconds))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:  # the summary at the end
            return
        line = LogLine(
            step=state.global_step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs["grad_norm"],
            tokens=state.num_input_tokens_seen,
            seconds=round(self.seconds_before + time.perf_counter() - self.started, 3),
        )
        _require_finite("gradient", line.grad_norm, line.step, line.learning_rate)
        self.log.append(line)
        self.bar.update(self.task, loss=line.loss)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir)
        checkpoints.seal(folder / f"{checkpoints.PREFIX}{state.global_step}", self.origin)
        checkpoints.prune(folder, KEPT_CHECKPOINTS)
