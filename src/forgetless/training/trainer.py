"""transformers' `Trainer` as this package uses it: exact, on the devices of the launch."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from forgetless.core.errors import UserError
from forgetless.data.losses import Loss, answer_logps, dpo_loss, orpo_loss
from forgetless.models.heads import is_of_new_head
from forgetless.models.state import adapter_off, base_of, evaluating
from forgetless.training import checkpoints
from forgetless.training.devices import gather_optimizer, gathered, is_sharded, leave_sharded, shard
from forgetless.training.forgetting import STATE_KEY, ForgettingCallback
from forgetless.training.interruption import Unlogged
from forgetless.training.launch import this_launch
from forgetless.training.optimizers import optimizer_options
from forgetless.training.penalties import Penalty
from forgetless.training.schedules import rate_factor
from forgetless.training.settings import TrainingSettings
from forgetless.training.trackers import Trackers
from forgetless.training.weights import trained_weights
from forgetless.training.zero import Zero


class _Arguments(TrainingArguments):
    # One process uses one device. Trainer would spread a batch of this size to each that it sees.
    n_gpu = property(lambda self: min(super().n_gpu, 1))


class ExactTrainer(Trainer):
    """`Trainer` with penalties, that stops at a loss that is no number and decays matrices only.

    Args:
        model: as it was given; its device decides.
        folder: takes the checkpoints.
        seed: of the order of the examples and of dropout.
        unlogged: the losses since the last line of the log.
        **options: Trainer's own.

    Attributes:
        penalties: terms of the loss, prepared.
    """

    def __init__(
        self,
        model: Any,
        settings: TrainingSettings,
        folder: Path,
        steps: int,
        seed: int,
        trackers: Trackers,
        unlogged: Unlogged,
        **options: Any,
    ) -> None:
        self.settings = settings
        self.unlogged = unlogged
        self.penalties: Sequence[Penalty] = ()
        self.zero: Zero | None = None
        self.tokens_of_batch = 0
        self.shards = this_launch().strategy == "FSDP2"
        # A model that is to be sharded, or copied to every process, comes to the devices later.
        comes_later = this_launch().processes > 1 and torch.accelerator.is_available()
        present = next(weight for weight in model.parameters() if not weight.is_meta)
        chosen, own = optimizer_options(settings)
        arguments = _Arguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.schedule,  # for trackers; see `create_scheduler`
            **chosen,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.precision == "bf16",
            torch_compile=settings.compile,
            # Else Trainer turns it on together with compiling, for all that comes later.
            tf32=False if settings.compile else None,
            seed=seed,
            # Every epoch is shuffled by data_seed + epoch: keep neighbouring seeds apart.
            data_seed=(seed * 1_000_003) % 2**31,
            use_cpu=present.device.type == "cpu" and not comes_later,
            logging_steps=settings.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="non_padding",
            save_steps=settings.checkpoint_every,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to=trackers.names,
            run_name=trackers.run,
            project=trackers.project,
        )
        super().__init__(model, arguments, optimizer_cls_and_kwargs=own, **options)
        losses = (None, "ForCausalLM")
        if settings.preference or getattr(base_of(model), "loss_type", None) not in losses:
            # Their forward takes what Trainer divides by, and their loss is a mean all the same.
            self.model_accepts_loss_kwargs = False

    def run(self, checkpoint: Path | None, steps: int, probes: ForgettingCallback | None) -> None:
        """Train, from `checkpoint` on where there is one."""
        if checkpoint is not None:
            found = checkpoints.callback_state(checkpoint, STATE_KEY)
            if probes is not None and found is not None:
                probes.restore(found)
            over = probes is not None and probes.exceeded is not None
            if over or checkpoints.step_of(checkpoint) >= steps:
                self._load_from_checkpoint(str(checkpoint))  # `train` would add a step
                return
        self.remove_callback(PrinterCallback)
        if self.args.world_size > 1:  # or the masks of dropout would be alike in all processes
            torch.manual_seed(self.args.seed + self.args.process_index)
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            if self.zero is not None:
                self.zero.end()

    def take_loss(self, loss: Loss | None) -> None:
        """Compute the loss by `loss` instead of the model's own, where one is given."""
        if loss is not None:
            self.compute_loss_func = loss
            self._loss_shifts_labels = True  # so that Trainer counts what is learned alike
            self.model_accepts_loss_kwargs = False

    def _preference_loss(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch of pairs; the base is the model with its adapter off."""
        wanted = self.settings.preference
        assert wanted is not None
        given = {name: value for name, value in inputs.items() if name != "labels"}
        pairs = inputs["labels"], inputs["position_ids"]
        logps, counts = answer_logps(model(**given).logits, *pairs)
        if wanted.loss == "orpo":
            return orpo_loss(logps, counts, wanted.beta)
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with torch.no_grad(), adapter_off(plain), evaluating(plain):
            of_base, _ = answer_logps(plain(**given).logits, *pairs)
        return dpo_loss(logps, of_base, wanted.beta)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch; the last batch of a step also bears the penalties."""
        if self.settings.preference is not None:
            loss = self._preference_loss(model, inputs)
        else:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not (self.penalties and model.training and self.accelerator.sync_gradients):
            return loss
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        step = self.state.global_step
        values = (penalty.weight * penalty(plain, step) for penalty in self.penalties)
        total = sum(values, start=torch.zeros_like(loss))
        self.unlogged.penalty += total.item()
        # `training_step` divides by the batches of a step where the model does not do so itself.
        scaled = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        divided = not scaled or kwargs.get("num_items_in_batch") is None
        return loss + total * (self.current_gradient_accumulation_steps if divided else 1)

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        self.tokens_of_batch = inputs.pop("tokens")
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        step, rate = self.state.global_step + 1, self.lr_scheduler.get_last_lr()[0]
        if self.args.world_size == 1:  # all must stop alike: several look at the mean, in the log
            require_finite("loss", loss.item(), step, rate)
        if self.zero is not None and self.accelerator.sync_gradients:
            require_finite("gradient", self.zero.norm, step, rate)
        self.unlogged.total += loss.item()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's; the loss is the mean since the line before, also over an interruption."""
        if "loss" in logs:
            logs["loss"], penalty = self.unlogged.take(self.state.global_step)
            if self.penalties:
                logs["penalty"] = penalty
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's optimizer; with LoRA+, B in groups of its own."""
        is_new = self.optimizer is None
        if self.shards and not is_sharded(self.model):
            shard(self.model)
            leave_sharded(self.accelerator)
        optimizer = super().create_optimizer(model)
        if not is_new:
            return optimizer
        if self.shards:
            gather_optimizer(optimizer)
        plain = self.model if model is None else model
        if self.settings.loraplus_ratio != 1:
            speed_up(optimizer, plain, self.settings.loraplus_ratio)
        if rate := self.settings.head_learning_rate:
            trained = trained_weights(plain).items()
            set_rate(optimizer, [w for name, w in trained if is_of_new_head(plain, name)], rate)
        # DeepSpeed drops empty groups, and the files are the same whoever trains.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        if stage := this_launch().zero_stage:
            norm = self.settings.max_grad_norm
            self.zero = Zero(self.accelerator, self.model, optimizer, stage, norm)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of `rate_factor`."""
        if self.lr_scheduler is None:
            factor = rate_factor(self.settings, num_training_steps)
            self.lr_scheduler: Any = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> Any:
        """Trainer's, with all rows of a step in every process; the collator takes a share."""
        loader = super().get_train_dataloader()
        shards = loader.batch_sampler
        if isinstance(shards, BatchSamplerShard):
            # It would also fill the last batch of an epoch up with rows that were there already.
            shards.num_processes, shards.process_index, shards.even_batches = 1, 0, False
        return loader

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        # Shards are moved one by one. What is offloaded comes for each forward.
        if not self.shards and not any(weight.is_meta for weight in model.parameters()):
            super()._move_model_to_device(model, device)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; shards are gathered first."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        weights = gathered(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trainer's; weights keep the names that they have in memory, and an adapter has no card.

        By these names alone Trainer reads them back, and passes over the others in silence, while
        `save_pretrained` writes the older names of some architectures.
        """
        model: Any = self.model
        name, own = "create_or_update_model_card", lambda folder: None
        if isinstance(model, PreTrainedModel):
            name, own = (
                "save_pretrained",
                partial(model.save_pretrained, save_original_format=False),
            )
        setattr(model, name, own)
        try:
            super()._save(output_dir, state_dict)
        finally:
            delattr(model, name)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        gathers = is_sharded(self.model) or self.zero is not None
        if gathers and not self.args.should_save:
            self.optimizer.state_dict()  # takes part in the gathering
        super()._save_optimizer_and_scheduler(output_dir)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name, weight in model.named_parameters() if weight.ndim >= 2]

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        # Trainer would count what has no mask with its padding, and ask all processes.
        self.state.num_input_tokens_seen += self.tokens_of_batch

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        return 0  # counting them walks over all modules at every step


def speed_up(optimizer: Optimizer, model: Any, ratio: float) -> None:
    """LoRA+: the weights of B in groups of their own, with `ratio` times the learning rate.

    DoRA's lengths go with B. For an anchored adapter A and B are the moves. The groups are those of
    `peft.optimizers.create_loraplus_optimizer`.

    Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models",
    arXiv:2402.12354.
    """
    names = ("lora_B", "lora_magnitude_vector")
    fast = [w for name, w in trained_weights(model).items() if any(part in name for part in names)]
    set_rate(optimizer, fast, ratio * optimizer.param_groups[0]["lr"])


def set_rate(optimizer: Optimizer, weights: Sequence[Tensor], learning_rate: float) -> None:
    """Give some of the weights groups of their own, with this learning rate."""
    chosen = set(weights)
    for group in list(optimizer.param_groups):
        moved = [weight for weight in group["params"] if weight in chosen]
        if moved:
            group["params"] = [weight for weight in group["params"] if weight not in chosen]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})


class DivergenceError(UserError):
    """A loss or a gradient is no longer a number."""


def require_finite(name: str, value: float, step: int, learning_rate: float) -> None:
    """Raise `DivergenceError` for a loss or gradient that is no number."""
    if not math.isfinite(value):
        raise DivergenceError(
            f"the {name} became {value} at step {step}, learning rate {learning_rate:.3g}; lower "
            "training.learning_rate or raise training.warmup_ratio"
        )
