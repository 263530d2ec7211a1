"""Training in several processes: how they meet, share the rows of a step and gather weights.

A recipe's batch is that of all processes together: each reads the same rows and learns from its
part of them, and the loss is the mean over all learned tokens of the step in all of them. So one
process and several do the same training, up to rounding. (`forgetless.training.zero` is how they
do so under DeepSpeed.)

Under FSDP2 every process also holds only a shard of every weight. The model is sharded here, by
torch's `fully_shard` and after a checkpoint was read into it, and what is written is gathered again
first: the files are those of one process. That works on any device, while accelerate shards on GPUs
alone, and it never moves an anchor, which accelerate's loading does not expect.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from forgetless.core.errors import OtherProcessError, UserError
from forgetless.core.processes import Processes
from forgetless.data.modality import Batch, Sample
from forgetless.data.packing import IGNORED
from forgetless.training.launch import this_launch

PATIENCE = timedelta(days=7)
"""How long processes wait for one that measures; a dead one is noticed by the launcher."""

_LOST = re.compile(r"gloo|nccl|connection (closed|reset)", re.IGNORECASE)
"""In the messages of a backend that can no longer reach another process."""


def join() -> Processes:
    """Meet the other processes of this launch; of one, when there is no launcher."""
    launch = this_launch()  # reads, once, what is taken away below
    # What is to be sharded is sharded here. Trainer would do it in its own way, also for one.
    for sharding in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(sharding, None)
    if launch.processes > 1:
        PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    return Processes.current()


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Say in plain words that another process is gone, where the backend says what it saw."""
    try:
        yield
    except RuntimeError as error:
        if distributed.is_initialized() and _LOST.search(str(error)):
            raise OtherProcessError(
                "another process of this launch has ended; what it or the launcher says tells why, "
                "and the same command goes on from the last checkpoint"
            ) from error
        raise


# ---- the rows of a step --------------------------------------------------------------------------


@dataclass
class Share:
    """Joins this process's part of the rows of a batch, and counts ``tokens`` in all of them.

    At the end of an epoch there may be fewer rows than processes: those without one read a row of
    the others, from which they learn nothing.

    Attributes:
        join: makes a batch of rows.
        processes: this process and the others.
    """

    join: Callable[[Sequence[Sample]], Batch]
    processes: Processes

    def __call__(self, rows: Sequence[Sample]) -> dict[str, Any]:
        mine = [row for _, row in self.processes.share(rows)]
        if not mine:
            mine = [{**rows[0], "labels": torch.full_like(rows[0]["labels"], IGNORED)}]
        return {**self.join(mine), "tokens": sum(sum(row["lengths"]) for row in rows)}


# ---- sharded weights -----------------------------------------------------------------------------


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only a part of the weights."""
    return isinstance(model, FSDPModule)


def shard(model: nn.Module) -> None:
    """Leave this process its shard of every weight, block by block of the model.

    Raises:
        UserError: quantised or offloaded weights, which cannot be cut.
    """
    refuse_packed(model, "FSDP2")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = accelerator.type if accelerator else "cpu"
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for part in (*blocks, model):
        sharded = fully_shard(part, mesh=mesh)
        if device == "cpu":  # gloo of older torch gives the sum where the mean is asked for
            sharded.set_force_sum_reduction_for_comms(True)


def refuse_packed(model: nn.Module, strategy: str) -> None:
    """Refuse a model with weights that are not there as plain numbers.

    Raises:
        UserError: names a quantised or offloaded weight, and the strategy.
    """
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.is_meta:
            raise UserError(
                f"{name!r} is {'offloaded' if weight.is_meta else 'quantised'}, which {strategy} "
                "does not take; train in one process"
            )


def leave_sharded(accelerator: Accelerator) -> None:
    """Have the accelerator take a model as it is, and give norms of gradients as plain numbers."""
    prepare, clip = accelerator.prepare_model, accelerator.clip_grad_norm_

    def prepare_model(model: Any, *_: Any, **__: Any) -> Any:
        return prepare(model, device_placement=False, evaluation_mode=True)

    def clip_grad_norm(*arguments: Any, **options: Any) -> Any:
        return _whole(clip(*arguments, **options))

    accelerator.prepare_model = prepare_model
    accelerator.clip_grad_norm_ = clip_grad_norm


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, whole and on the CPU, in the first process; empty in the others.

    Of a PeftModel those of its adapters. Every process must call it.
    """
    adapters_alone = isinstance(model, PeftModel)
    return _gathered(
        (name, weight)
        for name, weight in model.state_dict(keep_vars=True).items()
        if not adapters_alone or "lora_" in name or weight.requires_grad
    )


def _gathered(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """One at a time, so that no other process ever holds two of them whole."""
    found: dict[str, Tensor] = {}
    first_names: dict[Tensor, str] = {}
    for name, weight in weights:
        if weight in first_names:  # tied
            whole = found.get(first_names[weight])
        else:
            first_names[weight] = name
            whole = _whole(weight.detach()).cpu()
        if whole is not None and distributed.get_rank() == 0:
            found[name] = whole
    return found


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer of shards give and take its state as that of whole weights.

    Its `state_dict` must then be called in every process; the first one gets the state.
    """

    def give(_: Any, found: dict[str, Any]) -> dict[str, Any]:
        state = {}
        for number, entry in found["state"].items():
            plain = {key: v for key, v in entry.items() if not isinstance(v, Tensor)}
            tensors = {key: v for key, v in entry.items() if isinstance(v, Tensor)}
            state[number] = plain | _gathered(tensors.items())
        return {**found, "state": state}

    def cut(weight: Tensor, entry: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(weight, DTensor):
            return dict(entry)
        mesh, placements = weight.device_mesh, weight.placements
        return {
            key: distribute_tensor(value.to(mesh.device_type), mesh, placements)
            if isinstance(value, Tensor) and value.shape == weight.shape
            else value
            for key, value in entry.items()
        }

    def take(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        numbers = [number for group in given["param_groups"] for number in group["params"]]
        of = dict(zip(numbers, weights, strict=True))
        return {**given, "state": {n: cut(of[n], entry) for n, entry in given["state"].items()}}

    optimizer.register_state_dict_post_hook(give)
    optimizer.register_load_state_dict_pre_hook(take)
