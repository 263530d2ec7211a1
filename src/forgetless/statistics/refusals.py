"""Models and batches that are already divided between processes, which statistics cannot take."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from forgetless.core.errors import UserError

_WRAPPERS = ("FullyShardedDataParallel", "DistributedDataParallel", "DeepSpeedEngine")
_BEFORE = (
    "collect before the model is wrapped or sharded: every process holds the whole model and runs "
    "its share of the batches; or collect once in a process of its own and load the saved file"
)


def refuse_sharded(model: nn.Module) -> None:
    """Refuse models of which a process sees only a part, or that a trainer has wrapped.

    Raises:
        UserError: FSDP, DeepSpeed, tensor parallel or DDP; the message says what to do.
    """
    for module in model.modules():
        if type(module).__name__ in _WRAPPERS:
            raise UserError(f"the model is wrapped in {type(module).__name__}; {_BEFORE}")
    for name, weight in model.named_parameters():
        if isinstance(weight, DTensor):
            raise UserError(f"{name!r} is sharded (FSDP2 or tensor parallel); {_BEFORE}")
        if hasattr(weight, "ds_id"):
            raise UserError(f"{name!r} is sharded (DeepSpeed ZeRO-3); {_BEFORE}")


def refuse_shared_out(batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Refuse a loader that already gives every process a part: the parts would be parted again.

    Raises:
        UserError: the loader was prepared by accelerate, or has a distributed sampler.
    """
    kinds = {kind.__name__ for kind in type(batches).__mro__}
    sampler = getattr(batches, "sampler", None)
    if kinds & {"DataLoaderShard", "DataLoaderDispatcher"} or isinstance(
        sampler, torch.utils.data.DistributedSampler
    ):
        raise UserError(
            "the batches are already divided between the processes; pass the same batches in "
            "every process (the loader before accelerator.prepare), each then takes its share"
        )
