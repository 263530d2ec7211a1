"""Sums over the inputs of layers, taken by hooks while the model runs."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.errors import UserError
from forgetless.statistics.padding import TokenRows, is_encoder_decoder, prepare

# Rows of X taken to float64 at a time: bounds the copy, and is enough to keep the product fast.
_CHUNK_ROWS = 2048
# Rows of the lower triangle computed by one product.
_PANEL = 128


class _Finished(Exception):  # noqa: N818 - it is no error
    """Raised inside a forward once no layer of the pass is left to come; never leaves here."""


@dataclass
class _Seen:
    """A tensor that some layer got as its input in the forward that is running."""

    tensor: weakref.ref[Tensor]
    version: int
    layer: str


@dataclass
class Collector:
    """Sums x x^T over the inputs of some layers, one forward after the other.

    The first forward goes all the way and teaches the order in which layers are called and which
    of them get the very same tensor; of those, the one called first, the *leader*, is summed.
    Later forwards stop after the last block that is needed.
    """

    base: nn.Module
    layers: Mapping[str, nn.Module]
    leader: dict[str, str] = field(default_factory=dict)
    tokens: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._calls: Counter[str] = Counter()  # in the first forward; keys in call order
        self._sums: dict[str, Tensor] = {}  # lower triangles, float64
        self._seen: dict[int, _Seen] = {}
        self._rows = TokenRows()
        self._learnt = False
        self._summing = True

    def learn(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Run the first batch only for the order of the layers and their shared inputs."""
        self._summing = False
        self.run(itertools.islice(batches, 1), self.layers)
        self._summing = True

    def groups(self) -> list[list[str]]:
        """Layers that share an input, leader first, in the order of their first call."""
        groups: dict[str, list[str]] = {}
        called = [*self._calls, *(name for name in self.layers if name not in self._calls)]
        for name in called:
            groups.setdefault(self.leader.get(name, name), []).append(name)
        return list(groups.values())

    def run(self, batches: Iterable[Mapping[str, Tensor]], names: Iterable[str]) -> None:
        """Add the inputs of the named layers over all batches."""
        names = list(names)
        number = -1
        with ExitStack() as hooks:
            for name in names:
                hook = self._layer_hook(name)
                handle = self.layers[name].register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            hooks.callback(self._watch_decoder())
            if self._learnt:
                hooks.callback(self._stop_after_last(names))
            for number, batch in enumerate(batches):
                self._forward(batch, number)
                if not self._learnt:
                    self._learnt = True
                    hooks.callback(self._stop_after_last(names))
        if number < 0:
            raise UserError("there are no batches to collect statistics from")

    def take(self) -> dict[str, Tensor]:
        """The finished means of this pass, by leader; the collector keeps none of them."""
        means = {}
        for name in list(self._sums):
            total = self._sums.pop(name)
            if self.tokens[name] > 0:
                _mirror_lower_triangle(total)
                means[name] = total.div_(self.tokens[name]).cpu()
        return means

    def _forward(self, batch: Mapping[str, Tensor], number: int) -> None:
        arguments, self._rows = prepare(batch, self.base, set(self.layers.values()))
        self._seen.clear()
        try:
            self.base(**arguments)
        except _Finished:
            pass
        finally:
            self._seen.clear()
            self._rows = TokenRows()
        self._check_finite(number)

    def _layer_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if not self._learnt:
                self._calls[name] += 1
            if self._leader_of(name, x) == name and self._summing:
                self._add(name, x)

        return hook

    def _leader_of(self, name: str, x: Tensor) -> str:
        """The layer that got this very tensor first; the same one in every forward."""
        seen = self._seen.get(x.data_ptr())
        # While the seen tensor lives, nothing else can be at its address.
        first = seen.tensor() if seen else None
        same = (
            seen is not None
            and first is not None
            and (first is x or _same_rows(first, x))
            and seen.version == x._version
        )
        now = seen.layer if seen is not None and same else name
        leader = self.leader.setdefault(name, name if self._learnt else now)
        if leader not in (name, now):
            raise RuntimeError(
                f"layer {name!r} shared its input with {leader!r} in the first batch and does not "
                "now; collect the two in separate calls, by target_modules"
            )
        if now == name:
            self._seen[x.data_ptr()] = _Seen(weakref.ref(x), x._version, name)
        return leader

    def _add(self, name: str, x: Tensor) -> None:
        rows = self._rows.of(name, x)
        if rows.device.type == "mps":  # has no float64
            rows = rows.cpu()
        size = rows.shape[1]
        if name not in self._sums:
            self._sums[name] = torch.zeros(size, size, dtype=torch.float64, device=rows.device)
        for start in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows[start : start + _CHUNK_ROWS]
            _add_lower_triangle(self._sums[name], chunk.double())
        self.tokens[name] += len(rows)

    def _check_finite(self, number: int) -> None:
        """NaN and infinity anywhere in a layer's rows end up in the trace of its sum."""
        if not self._sums:
            return
        traces = torch.stack([total.trace().cpu() for total in self._sums.values()])
        for name, finite in zip(self._sums, traces.isfinite().tolist(), strict=True):
            if not finite:
                raise UserError(
                    f"the inputs of layer {name!r} hold NaN or infinity in batch {number} (the "
                    "first layer where that shows); check the weights, or use float32 or bfloat16 "
                    "instead of float16"
                )

    def _watch_decoder(self) -> Callable[[], None]:
        """Tell the rows of encoder and decoder apart, from the moment the decoder starts."""
        if not is_encoder_decoder(self.base):
            return lambda: None

        def started(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._rows.enter_decoder(kwargs.get("encoder_hidden_states"))

        decoder: nn.Module = self.base.get_decoder()  # type: ignore[operator]
        return decoder.register_forward_pre_hook(started, with_kwargs=True).remove

    def _stop_after_last(self, names: Sequence[str]) -> Callable[[], None]:
        """End each forward after the block of the last layer; gives what undoes it.

        Whole blocks, so that experts chosen by the data are not cut off. Where a layer was not
        called in the first forward, or several times, the end cannot be known.
        """
        if any(self._calls[name] != 1 for name in names):
            return lambda: None
        last = [name for name in self._calls if name in names][-1]

        def finish(*_: Any) -> None:
            raise _Finished

        return _outermost_block(self.base, last).register_forward_hook(finish).remove


def _same_rows(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors at the same address are the same rows, up to their grouping."""
    same_size = a.numel() == b.numel() and a.shape[-1] == b.shape[-1]
    return same_size and a.is_contiguous() and b.is_contiguous()


def _outermost_block(base: nn.Module, name: str) -> nn.Module:
    """The element of the outermost ModuleList around a layer; the layer itself outside of any."""
    module = base
    for part in name.split("."):
        parent, module = module, module.get_submodule(part)
        if isinstance(parent, nn.ModuleList):
            return module
    return module


def _add_lower_triangle(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to the lower triangle, and to the rest of each diagonal panel."""
    size = total.shape[0]
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])


def _mirror_lower_triangle(total: Tensor) -> None:
    """Make the matrix symmetric, in place."""
    size = total.shape[0]
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        total[:start, start:stop].copy_(total[start:stop, :start].T)
        diagonal = total[start:stop, start:stop]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
