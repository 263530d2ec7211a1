"""Sums over the inputs of layers, taken by hooks while the model runs."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.core.errors import UserError
from forgetless.core.processes import Processes
from forgetless.models.weights import weight_shape
from forgetless.statistics.padding import TokenRows, is_encoder_decoder, prepare

Batch = Mapping[str, Tensor]

# Rows of X taken to float64 at a time: bounds the copy, and is enough to keep the product fast.
_CHUNK_ROWS = 2048
# Rows of the lower triangle computed by one product. Small ones waste less of the other triangle;
# on a CPU, multiples of 24 fill the kernels of MKL's product in float64 (128 is 20 % slower).
_PANEL = {"cpu": 96, "cuda": 512}


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
    of them get the very same tensors; of those, the one called first, the *leader*, is summed. If
    some share but a part of their inputs, it is run again with a sum for each of these. Later
    forwards stop after the last block that is needed.
    """

    base: nn.Module
    layers: Mapping[str, nn.Module]
    skip_first: int = 0
    leader: dict[str, str] = field(default_factory=dict)
    tokens: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # lower triangles, float64
        self._calls: Counter[str] = Counter()  # in the first forward; keys in call order
        self._seen: dict[int, _Seen] = {}
        self._apart: set[str] = set()  # layers that got another tensor than their leader, too
        self._rows = TokenRows()
        self._learnt = False
        self._summing = True

    def learn(self, number: int, batch: Batch) -> None:
        """Run one batch only for the order of the layers and their shared inputs."""
        self._summing = False
        try:
            self.run([(number, batch)], self.layers)
        finally:
            self._summing = True

    @property
    def lessons(self) -> tuple[Counter[str], dict[str, str]]:
        """What the first forward taught: the calls of each layer, and the leaders."""
        return self._calls, self.leader

    def adopt(self, lessons: tuple[Counter[str], dict[str, str]]) -> None:
        """Take over what was learned elsewhere, so that all processes agree."""
        self._calls, self.leader = Counter(lessons[0]), dict(lessons[1])
        self._learnt = True

    def groups(self) -> list[list[str]]:
        """Layers that share an input, leader first, in the order of their first call."""
        groups: dict[str, list[str]] = {}
        called = [*self._calls, *(name for name in self.layers if name not in self._calls)]
        for name in called:
            groups.setdefault(self.leader.get(name, name), []).append(name)
        return list(groups.values())

    def run(
        self,
        batches: Iterable[tuple[int, Batch]],
        names: Iterable[str],
        begin: Callable[[int], None] | None = None,
    ) -> None:
        """Add the inputs of the named layers over all batches, which come with their numbers.

        Args:
            batches: (number, batch).
            names: target layers.
            begin: called with the number of each batch before its forward.
        """
        names = list(names)
        with ExitStack() as hooks:
            for name in names:
                hook = self._layer_hook(name)
                handle = self.layers[name].register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            hooks.callback(self._watch_decoder())
            if self._learnt:
                hooks.callback(self._stop_after_last(names, whole_block=begin is not None))
            for number, batch in batches:
                if begin is not None:
                    begin(number)
                self._forward(batch, number)
                if not self._learnt:
                    self._learnt = True
                    if self._tell_apart() and self._summing:
                        self.drop()
                        self._forward(batch, number)
                    hooks.callback(self._stop_after_last(names, whole_block=begin is not None))

    def _tell_apart(self) -> bool:
        """Give a sum of its own to each layer that shares but a part of its leader's inputs."""
        calls = self._calls
        fewer = {name for name, first in self.leader.items() if calls[name] != calls[first]}
        self._apart |= fewer
        self.leader.update({name: name for name in self._apart})
        return bool(self._apart)

    def resume(self, sums: Mapping[str, Tensor], tokens: Mapping[str, int]) -> None:
        """Go on from these sums."""
        self.sums = dict(sums)
        self.tokens.update(tokens)

    def drop(self) -> None:
        """Forget the sums of this pass."""
        for name in self.sums:
            del self.tokens[name]
        self.sums.clear()

    def add_up(self, names: Iterable[str], processes: Processes) -> None:
        """Add the sums and tokens of these layers over all processes."""
        if processes.count == 1:
            return
        leaders = [name for name in names if self.leader.get(name, name) == name]
        counts = processes.gather([self.tokens[name] for name in leaders])
        for name, tokens in zip(leaders, map(sum, zip(*counts, strict=True)), strict=True):
            if tokens:
                self.leader.setdefault(name, name)
                self.sums[name] = processes.sum(self._sum(name, "cpu"))
                self.tokens[name] = tokens

    def take(self) -> Iterator[tuple[str, Tensor]]:
        """The finished means of this pass, by leader; the collector keeps none of them."""
        for name in list(self.sums):
            total = self.sums.pop(name)
            if self.tokens[name] > 0:
                mirror_lower_triangle(total)
                yield name, total.div_(self.tokens[name]).cpu()

    def _sum(self, name: str, device: torch.device | str) -> Tensor:
        """The sum of a layer's inputs so far; a matrix of zeros there where it has none yet."""
        if name not in self.sums:  # no default of a `get`: a matrix may take half a gigabyte
            size = weight_shape(self.layers[name])[1]
            self.sums[name] = torch.zeros(size, size, dtype=torch.float64, device=device)
        return self.sums[name]

    def _forward(self, batch: Batch, number: int) -> None:
        arguments, self._rows = prepare(
            batch, self.base, set(self.layers.values()), self.skip_first
        )
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
            if not self._learnt:
                self._apart.add(name)
                return leader
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
        total = self.sums[name] = self._sum(name, rows.device).to(rows.device)
        for start in range(0, len(rows), _CHUNK_ROWS):
            add_lower_triangle(total, rows[start : start + _CHUNK_ROWS].double())
        self.tokens[name] += len(rows)

    def _check_finite(self, number: int) -> None:
        """NaN and infinity anywhere in a layer's rows end up in the trace of its sum."""
        if not self.sums:
            return
        device = next(iter(self.sums.values())).device  # one wait for it, not one a layer
        traces = torch.stack([total.trace().to(device) for total in self.sums.values()])
        for name, finite in zip(self.sums, traces.isfinite().tolist(), strict=True):
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

    def _stop_after_last(self, names: Sequence[str], whole_block: bool) -> Callable[[], None]:
        """End each forward when the last layer has its input; gives what undoes it.

        After its whole block where that is asked for, or where the block has a list of layers of
        its own, such as experts, whose order the data may decide. Where a layer was not called in
        the first forward, or several times, the end cannot be known.
        """
        if any(self._calls[name] != 1 for name in names):
            return lambda: None
        last = [name for name in self._calls if name in names][-1]

        def finish(*_: Any) -> None:
            raise _Finished

        block = _outermost_block(self.base, last)
        if whole_block or any(isinstance(part, nn.ModuleList) for part in block.modules()):
            return block.register_forward_hook(finish).remove
        return self.layers[last].register_forward_pre_hook(finish).remove


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


def add_lower_triangle(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to the lower triangle, and to the rest of each diagonal panel."""
    size, panel = total.shape[0], _panel(total)
    for start in range(0, size, panel):
        stop = min(start + panel, size)
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])


def mirror_lower_triangle(total: Tensor) -> None:
    """Make the matrix symmetric, in place."""
    size, panel = total.shape[0], _panel(total)
    for start in range(0, size, panel):
        stop = min(start + panel, size)
        total[:start, start:stop].copy_(total[start:stop, :start].T)
        diagonal = total[start:stop, start:stop]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)


def _panel(total: Tensor) -> int:
    return _PANEL.get(total.device.type, _PANEL["cuda"])
