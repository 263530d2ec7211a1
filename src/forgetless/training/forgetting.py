"""`ForgettingCallback`: learning and forgetting while any `transformers.Trainer` trains."""

import math
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback

from forgetless.core.errors import UserError
from forgetless.core.processes import Processes
from forgetless.data.examples import ChatTemplate
from forgetless.data.modality import Processor, modality_of
from forgetless.models.state import source_of
from forgetless.tasks.base import whole_number
from forgetless.tasks.journal import sharing
from forgetless.training.forgetting_budget import Action, Exceeded, ForgettingBudget
from forgetless.training.probes import Asked, Probes, RecordedBase
from forgetless.training.settings import ProbeSettings
from forgetless.training.weights import KeptWeights, put_back, trained_copy

SHARE = 0.04
"""Part of the training's time that probes are given where their steps are not; 5 % is promised."""

MOST_PROBES = 100
"""A curve needs no more."""

USUAL_PROBES = 20
"""Probes of a training with a budget, or of several processes, where their steps are not given."""

STATE_KEY = "forgetless"
"""Under which the trainer's own checkpoints hold what the callback needs to go on."""

BASE_FILE = "base-logits.safetensors"


@dataclass(frozen=True)
class Probe:
    """What the probes gave after a step.

    Attributes:
        step: optimiser steps done; 0 is before the first.
        values: by name, "learning/loss" or "forgetting/kl".
    """

    step: int
    values: dict[str, float]
    seconds: float


class ForgettingCallback(TrainerCallback):
    """Scores probes of learning and forgetting every few steps, and may end the training by them.

    Give it to `transformers.Trainer`, any TRL trainer or `forgetless.training.train`. The values go
    to the trainer's `report_to` and its log history as ``learning/<name>`` and
    ``forgetting/<name>``, and to `history`. Training with probes gives, bit for bit, the weights of
    a training without, as long as no budget is exceeded. The probes see the model in evaluation
    mode, as the trainer runs it (with its autocast), without gradients.

    The base is the model with its adapter off. Where the weights themselves are trained it is
    `reference`, or else what the model said to the same texts before the first step, which is kept
    (at most 1 GiB, and written beside the checkpoints).

    Probes run before the first step, after the last, and between at even distances: as many as
    take 4 % of the training's time, 100 at most. Their steps then follow the clock. With `every`
    they are its multiples. With a budget they decide about the weights, so without `every` they
    are fixed too: every twentieth part of the training. So they are on several processes (DDP),
    which share the scoring, unless the base is known by what it said before the first step.

    Args:
        forgetting: what is to be kept: texts (KL(base || model) per token on 32 of them), a task's
            name or mapping as in recipes, a task; or several of these.
        learning: what is to be learned: texts (mean token loss on 32 of them), or tasks.
        every: steps from probe to probe; None as said above.
        max_kl: budget; see `forgetless.training.forgetting_budget` for this and the next two.
        max_drop: budget.
        on_exceed: "stop" or "rollback".
        chat_template: off for probes whose prompts stand as they are, though the base has a chat
            template; tasks that are given may say otherwise.
        system: what is said before each prompt, by the template.
        reference: the untouched base, where no adapter can be switched off.
        processor: what reads the probes' data, of a language model the tokenizer; None for the
            trainer's own, or that of the folder that the model is from.
        tokenizer: the same by its name for language models.

    Attributes:
        history: every probe of the last training, in order.
        exceeded: which budget ended it; None when none did.

    Raises:
        UserError: everything that is wrong with the probes and the budget, before any training.

    Example:
        >>> probes = fl.ForgettingCallback("old.txt", "held.jsonl", max_kl=0.1)  # doctest: +SKIP
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[probes])  # doctest: +SKIP
    """

    def __init__(
        self,
        forgetting: Asked | Iterable[Asked] = (),
        learning: Asked | Iterable[Asked] = (),
        *,
        every: int | None = None,
        max_kl: float | None = None,
        max_drop: float | None = None,
        on_exceed: Action = "stop",
        chat_template: ChatTemplate = "auto",
        system: str | None = None,
        reference: nn.Module | None = None,
        processor: Processor | None = None,
        tokenizer: Processor | None = None,
    ) -> None:
        if problem := whole_number("every", every, optional=True):
            raise UserError(problem)
        said = {"chat_template": chat_template, "system": system}
        self.probes = Probes(learning, forgetting, said)
        self.budget = ForgettingBudget(max_kl, max_drop, on_exceed)
        distances = [task for task in self.probes.forgetting.values() if task.needs_reference]
        if max_kl is not None and not distances:
            raise UserError(
                "max_kl needs a forgetting probe that measures KL; give texts, as in "
                "forgetting='old.txt'"
            )
        if max_drop is not None and len(distances) == len(self.probes.forgetting):
            raise UserError(
                "max_drop needs a forgetting probe with a score of its own, such as "
                "'pocket_recall'; distances to the base are limited by max_kl"
            )
        self.every = every
        self.reference = reference
        self.processor = tokenizer if processor is None else processor
        self.history: list[Probe] = []
        self.exceeded: Exceeded | None = None
        self._base: dict[str, float] = {}
        self._clock = _Clock()
        self._several = False
        self._trainer: Trainer | None = None
        self._model: Any = None
        self._asked: nn.Module | None = None
        self._final: dict[str, torch.Tensor] | None = None

    @property
    def decides(self) -> dict[str, Any]:
        """What decides the trained weights, as plain JSON values; nothing without a budget."""
        if not self.budget.is_set:
            return {}
        forgetting = self.probes.fingerprint
        return {"budget": {**asdict(self.budget), "every": self.every, "forgetting": forgetting}}

    @property
    def probe_seconds(self) -> float:
        """What all probes of the last training took together."""
        return sum(probe.seconds for probe in self.history)

    # ------------------------------------------------------------------------ the trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The probe before the first step; on resuming, what was before."""
        self._trainer = trainer = _trainer_of(self)
        if trainer is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise UserError(
                "ForgettingCallback needs the whole model on every device, and FSDP and DeepSpeed "
                "spread it; train on one device or with DDP, or measure afterwards"
            )
        # Without what distributes or compiles it; its own autocast stays.
        self._model = extract_model_from_parallel(
            kwargs["model"], keep_fp32_wrapper=True, keep_torch_compile=False
        )
        self._reader = self.processor or _processor_of(self._model, kwargs.get("processing_class"))
        self._kept = KeptWeights(Path(args.output_dir))
        self._several = args.world_size > 1
        self._final = None
        saved = state.stateful_callbacks.get(STATE_KEY)
        if not state.global_step or saved is None:
            self._begin(args, state, control)
        else:
            self._resume(args, state, saved)
        self._clock = _Clock(self._trained_before, time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A probe where one is due, and the end where it exceeds the budget."""
        self._clock.tick(state.global_step)
        if self._final is not None:  # the checkpoint was already over: this step never was
            put_back(self._model, self._final)
            control.should_training_stop = True
            return
        if self._is_due(state.global_step, state.max_steps):
            self._probe(args, state, control)
        self._save(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every checkpoint knows the weights to which it may have to go back."""
        if self._rolls_back and state.is_world_process_zero:
            self._kept.add_to(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the trainer, which has this callback: in a circle its memory would stay."""
        self._trainer = self._model = self._asked = self._final = None

    # ------------------------------------------------------------------------------------- start

    @property
    def _rolls_back(self) -> bool:
        return self.budget.is_set and self.budget.on_exceed == "rollback"

    @property
    def _has_base(self) -> bool:
        return self.reference is not None or isinstance(self._model, PeftModel)

    def _begin(self, args: Any, state: Any, control: Any) -> None:
        self.history, self.exceeded, self._trained_before = [], None, 0.0
        needs_base = self.probes.need_reference or self.budget.max_drop is not None
        if state.global_step and needs_base and not self._has_base:
            raise UserError(
                "the checkpoint is of a training without probes, so the base is not known any "
                "more; pass reference=, the untouched base"
            )
        recorded = None
        if self.probes.need_reference and not self._has_base:
            recorded = RecordedBase(self._model)
        self._asked = recorded or self.reference
        started = _now(self._model)
        if self.budget.max_drop is not None:
            with self._sharing():
                self._base = self.probes.of_base(self._model, self._reader, self.reference)
        self._probe(args, state, control)
        seconds = round(_now(self._model) - started, 6)
        self.history[0] = replace(self.history[0], seconds=seconds)
        if recorded is not None:
            recorded.close()
            if state.is_world_process_zero:
                recorded.save(Path(args.output_dir) / BASE_FILE)
        self._save(state)

    def _resume(self, args: Any, state: Any, saved: dict[str, Any]) -> None:
        self.restore(saved)
        self._asked = self.reference
        if self.probes.need_reference and not self._has_base:
            self._asked = RecordedBase.load(Path(args.output_dir) / BASE_FILE)
        if self.exceeded is not None:
            self._final = trained_copy(self._model)
        elif self._rolls_back:
            self._kept.take_from(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over history and budget from a trainer state's ``stateful_callbacks``."""
        self.history = [Probe(**probe) for probe in saved["history"]]
        self.exceeded = Exceeded(**saved["exceeded"]) if saved["exceeded"] else None
        self._base = dict(saved["base"])
        self._trained_before = float(saved["trained_seconds"])

    def _save(self, state: Any) -> None:
        """Leave in the trainer's state what `restore` needs; a checkpoint may come next."""
        saved = state.stateful_callbacks.setdefault(STATE_KEY, {"history": []})
        saved["history"] += [asdict(probe) for probe in self.history[len(saved["history"]) :]]
        saved["exceeded"] = asdict(self.exceeded) if self.exceeded else None
        saved["base"] = self._base
        saved["trained_seconds"] = self._clock.seconds or self._trained_before

    # ------------------------------------------------------------------------------------ probes

    def _is_due(self, step: int, steps: int) -> bool:
        if step >= steps:
            return True
        every = self.every
        if every is None and (self.budget.is_set or self._several):
            every = math.ceil(steps / USUAL_PROBES)
        if every is not None:
            return step % every == 0
        whole = self._clock.expected(step, steps)
        if whole is None:
            return False
        # As many as fit into what is left of the share, at even distances; one more is kept for
        # the last step.
        since, cost = self.history[-1].step, self.history[-1].seconds
        fitting = int((SHARE * whole - self.probe_seconds) / cost) - 1
        distance = max((steps - since) / (max(fitting, 0) + 1), steps / MOST_PROBES)
        return step - since >= distance

    def _sharing(self) -> AbstractContextManager[None]:
        """Each process has what it asked of a base that is recorded, so it asks everything."""
        is_recorded = isinstance(self._asked, RecordedBase)
        return nullcontext() if is_recorded else sharing(Processes.current())

    def _probe(self, args: Any, state: Any, control: Any) -> None:
        """Score, log, and compare with the budget."""
        started = _now(self._model)
        with self._sharing():
            learning, forgetting = self.probes.measure(self._model, self._reader, self._asked)
        if self._several:  # all must judge alike
            learning, forgetting = broadcast_object_list([learning, forgetting])
        values = {f"learning/{name}": result.value for name, result in learning.items()}
        values |= {f"forgetting/{name}": result.value for name, result in forgetting.items()}
        if self.budget.is_set:
            self._judge(args, state, control, forgetting)
        seconds = _now(self._model) - started
        self._clock.last = time.perf_counter()
        self.history.append(Probe(state.global_step, values, round(seconds, 6)))
        # The values go to the trainer's `report_to` and its log history.
        if self._trainer is None:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
            return
        # A log of ours must not swallow the trainer's own at the same step; and subclasses add to
        # their next log what they have gathered since the last, so theirs is not called.
        wanted = control.should_log
        Trainer.log(self._trainer, dict(values))
        control.should_log = wanted

    def _judge(self, args: Any, state: Any, control: Any, results: Any) -> None:
        """End the training if the results exceed the budget."""
        over = self.budget.overrun(results, self._base)
        step = state.global_step
        if over is None:
            if self._rolls_back and state.is_world_process_zero:
                self._kept.keep(self._model, step, state.num_input_tokens_seen)
            return
        if step == 0:
            raise UserError(
                f"the budget {over[0]}={over[1]:g} is exceeded before the first step: "
                f"{over[2]!r} gives {over[3]:.4g}; is the model already tuned?"
            )
        kept = step, state.num_input_tokens_seen
        if self._rolls_back:
            if self._trainer is not None:
                self._trainer.accelerator.wait_for_everyone()
            kept = self._kept.restore(self._model)
        self.exceeded = Exceeded(*over, step, self.budget.on_exceed, *kept)
        control.should_training_stop = True
        # As at the last step of a training that goes to its end.
        control.should_save |= args.save_strategy == "steps"


def from_settings(settings: ProbeSettings, said: Mapping[str, Any]) -> ForgettingCallback | None:
    """The callback that a recipe asks for; None where it asks for none.

    Raises:
        UserError: as `ForgettingCallback`.
    """
    given = settings.model_dump()
    return ForgettingCallback(**given, **said) if settings != type(settings)() else None


@dataclass
class _Clock:
    """Time spent on steps, without that of the probes.

    Attributes:
        seconds: so far, also in earlier sessions.
        last: when the last step, or the probe after it, had ended.
        warm: the first step of this session, which is slow and not what the others are like, and
            the seconds until its end.
    """

    seconds: float = 0.0
    last: float = 0.0
    warm: tuple[int, float] | None = None

    def tick(self, step: int) -> None:
        """A step has ended."""
        now = time.perf_counter()
        self.seconds, self.last = self.seconds + now - self.last, now
        self.warm = self.warm or (step, self.seconds)

    def expected(self, step: int, steps: int) -> float | None:
        """Seconds of all steps together, as far as can be told; None after one step."""
        if self.warm is None or step == self.warm[0]:
            return None
        pace = (self.seconds - self.warm[1]) / (step - self.warm[0])
        return self.seconds + pace * (steps - step)


def _trainer_of(callback: ForgettingCallback) -> Trainer | None:
    """The trainer whose event this is.

    A trainer tells its callbacks everything but itself, and only it can log to `report_to`; it is
    found as the one that is calling. None where somebody else calls.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    return None


def _processor_of(model: Any, processing: Any) -> Processor:
    """The model's kind of processor among what the trainer has, else that of the model's folder."""
    modality = modality_of(model)
    for found in (
        processing,
        *getattr(processing, "__dict__", {}).values(),
    ):  # one may hold another
        if isinstance(found, modality.processor_type):
            return found
    source, name = source_of(model), modality.processor_name
    if not source:
        raise UserError(
            f"the probes read data, and neither the trainer nor the model says by which {name}; "
            f"pass processor= (the {name}) to ForgettingCallback"
        )
    return modality.load_processor(source)


def _now(model: nn.Module) -> float:
    """The time when the device has done all that it was given."""
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
