"""The processes of `torch.distributed`: each takes its share of the batches, sums are added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from forgetless.core.errors import OtherProcessError, UserError

T = TypeVar("T")

_WRAPPERS = ("FullyShardedDataParallel", "DistributedDataParallel", "DeepSpeedEngine")
_BEFORE = (
    "collect before the model is wrapped or sharded: every process holds the whole model and runs "
    "its share of the batches; or collect once in a process of its own and load the saved file"
)


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that collect together; one of one without them."""

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of the default process group, which `accelerate launch` and torchrun start."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def share(self, batches: Iterable[T]) -> Iterator[tuple[int, T]]:
        """Every `count`-th batch with its number, beginning with the `index`-th."""
        for number, batch in enumerate(batches):
            if number % self.count == self.index:
                yield number, batch

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of this tensor over all processes, in place where it lies."""
        if self.count == 1:
            return tensor
        sent = tensor.to(_device())
        distributed.all_reduce(sent)
        return tensor.copy_(sent) if sent is not tensor else tensor

    def everyones(self, value: T) -> list[T]:
        """What every process has for this value, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], T]) -> T:
        """What the first process gets by this work; the others wait for it.

        Raises:
            OtherProcessError: in the others, where it fails in the first.
        """
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        problem = None
        if self.index == 0:
            try:
                outcome = [work(), None]
            except Exception as error:
                problem, outcome = error, [None, str(error)]
        distributed.broadcast_object_list(outcome, src=0)
        if problem is not None:
            raise problem
        if outcome[1] is not None:
            raise OtherProcessError(outcome[1])
        result: T = outcome[0]
        return result

    def wait(self) -> None:
        """Go on when every process has come here."""
        self.everyones(None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work of this process alone; where it fails in one, it fails in all, and none waits."""
        problem = None
        try:
            yield
        except Exception as error:
            problem = error
        failed = any(self.everyones(problem is not None))
        if problem is not None:
            raise problem
        if failed:
            raise UserError("another process failed while collecting; its message says why")


def _device() -> torch.device:
    """Where the process group wants its tensors."""
    if "nccl" in distributed.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


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
