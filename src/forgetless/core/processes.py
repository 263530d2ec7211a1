"""The processes that work together: each takes its share, results are exchanged, all wait for one.

They are those of torch's default process group, whoever started it: accelerate's own state, which
reads the environment, takes a group that was joined in any other way for a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from forgetless.core.errors import OtherProcessError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The place of this process among those that work together; one of one without others.

    Attributes:
        index: which one this is, from 0. The first one writes files and speaks for all.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Those of the default process group, which `accelerate launch` and torchrun start."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.index == 0

    def share(self, items: Iterable[T]) -> Iterator[tuple[int, T]]:
        """Every `count`-th item with its number, beginning with the `index`-th."""
        for number, item in enumerate(items):
            if number % self.count == self.index:
                yield number, item

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of this tensor over all processes, in place where it lies."""
        if self.count == 1:
            return tensor
        on_gpu = "nccl" in distributed.get_backend()  # which takes no other tensors
        sent = tensor.to(torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu")
        distributed.all_reduce(sent)
        return tensor.copy_(sent) if sent is not tensor else tensor

    def gather(self, value: T) -> list[T]:
        """What every process has for this value, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def wait_for_everyone(self) -> None:
        """Return when every process has come here."""
        self.gather(None)

    def first(self, work: Callable[[], T]) -> T:
        """What the first process gets by this work; the others wait for it.

        Raises:
            OtherProcessError: in the others, where it fails in the first.
        """
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        problem = None
        if self.is_first:
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

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Work of this process alone; where it fails in one, it fails in all, and none waits."""
        problem = None
        try:
            yield
        except Exception as error:
            problem = error
        failed = any(self.gather(problem is not None))
        if problem is not None:
            raise problem
        if failed:
            raise UserError("another process failed; its message says why")
