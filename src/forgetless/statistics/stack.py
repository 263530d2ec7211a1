"""The blocks of a model, one after the other, and passes that go on where the last one ended.

Under a memory budget the same batches run several times. Instead of running the first blocks again
in every pass, what a pass's last block put out is kept on disk, and in the next pass the blocks up
to that one only hand it on. A model may do more than pass hidden states from block to block; so the
first batch of every such pass is compared, block by block and bit by bit, with a whole forward.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from forgetless.core.tensors import read_tensors

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Diverged(Exception):  # noqa: N818 - caught by whoever tried
    """A forward that goes on from kept states is not the whole forward."""


@dataclass(frozen=True)
class Stack:
    """The elements of a model's only outermost ModuleList that holds target layers.

    Attributes:
        block_of: target layer -> index of its block; layers outside of the list are missing.
    """

    blocks: Sequence[nn.Module]
    block_of: Mapping[str, int]

    @classmethod
    def find(cls, base: nn.Module, layers: Iterable[str]) -> Stack | None:
        """The stack, or None where there is no list, or more than one (encoder and decoder)."""
        found: dict[int, nn.ModuleList] = {}
        block_of = {}
        for name in layers:
            module = base
            for part in name.split("."):
                parent, module = module, module.get_submodule(part)
                if isinstance(parent, nn.ModuleList):
                    found[id(parent)] = parent
                    block_of[name] = int(part)
                    break
        if len(found) != 1:
            return None
        return cls(list(next(iter(found.values()))), block_of)


@dataclass(frozen=True)
class Leg:
    """One pass through part of a stack.

    Attributes:
        first: the block it begins with; those before it hand on what was kept.
        keep: the block after which the states are kept for the next leg; None for none.
    """

    first: int = 0
    keep: int | None = None


def legs(stack: Stack | None, passes: Sequence[Sequence[str]]) -> list[Leg]:
    """The leg of each pass; all of them the whole way where the passes go back and forth."""
    plain = [Leg() for _ in passes]
    if stack is None or not passes:
        return plain
    needed = [[stack.block_of[n] for n in names if n in stack.block_of] for names in passes]
    in_order = [block for blocks in needed for block in blocks]
    if in_order != sorted(in_order):
        return plain
    made, first = [], 0
    for here, after in zip(needed, [*needed[1:], []], strict=True):
        keep = min(here[-1], after[0] - 1) if here and after else None
        if keep is not None and keep < first:
            keep = None
        made.append(Leg(first, keep))
        first = first if keep is None else keep + 1
    return made


@dataclass
class Relay:
    """Keeps and hands on the states between the legs of a stack.

    Attributes:
        works: whether going on from kept states gave the same as a whole forward so far.
    """

    stack: Stack
    works: bool = True
    _learnt: int = -1
    _digests: dict[int, int | None] = field(default_factory=dict)
    _kept: _States | None = None

    @contextmanager
    def learning(self, number: int) -> Iterator[None]:
        """Note what every block puts out in the whole forward of this batch, which runs meanwhile.

        Later legs are compared with it; where they lack its states, none of theirs are trusted.
        """
        order: list[int] = []
        self._learnt = number

        def note(index: int, output: Any) -> None:
            order.append(index)
            self._digests[index] = _digest(output)

        with self._watching(note):
            yield
        self.works = order == list(range(len(self.stack.blocks))) and None not in (
            self._digests.values()
        )

    @contextmanager
    def running(self, leg: Leg) -> Iterator[Callable[[int], None]]:
        """Run forwards of a leg; gives what must be told the number of a batch before its forward.

        Raises:
            Diverged: from the first batch's forward, if a block put out something else than
                while learning.
        """
        kept = self._kept if self._kept is not None and self._learnt in self._kept else None
        keeping = _States()
        now = -1

        def note(index: int, output: Any) -> None:
            compared = now == self._learnt and index >= leg.first > 0
            if compared and _digest(output) != self._digests[index]:
                raise Diverged
            if index == leg.keep:
                keeping.add(now, output)

        def begin(number: int) -> None:
            nonlocal now
            now = number
            release()
            if kept is not None and leg.first and number in kept:
                states = kept.get(number)
                for block in skipped:
                    vars(block)["forward"] = lambda *_, **__: states

        def release() -> None:
            for block in skipped:
                vars(block).pop("forward", None)

        skipped = self.stack.blocks[: leg.first]
        with self._watching(note), ExitStack() as stack:
            stack.callback(release)
            yield begin
        if leg.keep is not None:
            self._kept = keeping

    @property
    def possible(self) -> bool:
        """Whether blocks can be skipped: nobody else has replaced their forward."""
        return self.works and not any("forward" in vars(block) for block in self.stack.blocks)

    @contextmanager
    def _watching(self, note: Callable[[int, Any], None]) -> Iterator[None]:
        with ExitStack() as hooks:
            for index, block in enumerate(self.stack.blocks):

                def hook(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
                    note(index, output)

                hooks.callback(block.register_forward_hook(hook).remove)
            yield


class _States:
    """What a block put out for every batch, on disk; deleted together with this object."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="forgetless-states-"))
        self._forms: dict[int, list[torch.device | None] | torch.device] = {}
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __contains__(self, number: int) -> bool:
        return number in self._forms

    def add(self, number: int, output: Any) -> None:
        parts = [output] if isinstance(output, Tensor) else list(output)
        devices = [None if part is None else part.device for part in parts]
        form = devices[0] if isinstance(output, Tensor) else devices
        save_file(
            {str(i): part.contiguous() for i, part in enumerate(parts) if part is not None},
            self._folder / f"{number}.safetensors",
        )
        assert form is not None
        self._forms[number] = form

    def get(self, number: int) -> Any:
        form = self._forms[number]
        parts = read_tensors(self._folder / f"{number}.safetensors")
        if isinstance(form, torch.device):
            return parts["0"].to(form)
        return tuple(None if d is None else parts[str(i)].to(d) for i, d in enumerate(form))


def _digest(output: Any) -> int | None:
    """The sum of all bits as whole numbers; None for what is no tensor or tuple of tensors."""
    parts = [output] if isinstance(output, Tensor) else output
    if not isinstance(output, Tensor | tuple):
        return None
    total = 0
    for part in parts:
        if isinstance(part, Tensor):
            whole = part.detach().contiguous().view(_WHOLE[part.element_size()])
            total += int(whole.sum(dtype=torch.int64))
        elif part is not None:
            return None
    return total
