"""How much of what a base says its statistics need: more is written until the tail has settled.

For the inputs of a layer and a text of n tokens with second moment C, let N be the `RANK` weakest
directions of C, a = tr(Nᵀ C N) their energy on that text, h the energy of the same N on a fresh
one, and e the least energy that any so many directions have over all that the base ever says. N
is the best for its own text and as good as any other choice for a fresh one, so that, on average,

    a <= e <= h

To first order in 1 / n the two are equally far from e, as errors inside and outside the data of a
fit are (Akaike 1974), so the excess of what N leaks can be seen without knowing e:

    excess(n) = h / e - 1 = (h - a) / (h + a),   excess(k n) = excess(n) / k

The sequences are shared out between two halves; N of each is held against the other, and all
together have half the excess of a half. They are enough when they leak, ‖X N‖, at most `LEAK` times
as much as four times as many would:

    (1 + excess(n)) / (1 + excess(4 n)) <= LEAK²

It is to hold on average over layers, where each counts the same: energies of layers differ by
orders of magnitude, and their sum would be that of two or three layers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.core.linalg import eigen_tail
from forgetless.data.settings import CalibrationSettings
from forgetless.data.texts import sampled_together, self_text
from forgetless.models.sampling import as_writer
from forgetless.models.state import as_base
from forgetless.models.targets import target_layers
from forgetless.models.weights import weight_shape
from forgetless.statistics.collector import Collector, add_lower_triangle, mirror_lower_triangle
from forgetless.statistics.passes import matrix_bytes

LEAK = 1.05
"""Times what four times the text would leak."""

RANK = 32
"""Directions that are looked at, whatever the rank of an adapter: arms share one text."""

FIRST, MOST = 32, 1024
"""Sequences of the first round at the least, and of all at the most."""

ENOUGH = 28
"""Tokens for each direction of the widest input, which are seldom too few: 21 to 24 were needed."""

GROWTH = 1.25, 4.0
"""Times the sequences so far that are wanted after another round, the least and the most."""

_BYTES = 2 * 2**30
# Tokens of each sequence whose inputs are added at a time: a product of few rows is slow.
_STEPS = 16


def settled_text(
    model: nn.Module,
    tokenizer: Any,
    target_modules: str | Sequence[str],
    settings: CalibrationSettings,
    seed: int = 0,
) -> list[list[int]]:
    """As many sequences as the statistics of these layers need, see above.

    Returns:
        The first so many sequences of `self_text`, from `FIRST` to `MOST`.

    Raises:
        UserError: as `self_text`.
    """
    with as_writer(model) as writer:
        said: list[list[int]] = []
        layers = spread(target_layers(writer, target_modules))
        halves = _Halves.of(writer, layers, settings.skip_first)
        wanted = _first_round(writer, halves.layers.values(), settings.max_length)
        while len(said) < wanted:
            asked = wanted - len(said), settings.max_length, seed, len(said)
            with halves.listening():
                said += self_text(writer, tokenizer, *asked, before=halves.before)
            excess = halves.excess() / 2
            # (1 + x) / (1 + x / 4) <= LEAK² for an excess x of this.
            enough = (LEAK**2 - 1) / (1 - LEAK**2 / 4)
            if excess > enough:
                # Heavy tails and texts that are of one piece settle more slowly than as 1 / n.
                growth = min(max((excess / enough) ** 1.5, GROWTH[0]), GROWTH[1])
                wanted = min(2 * math.ceil(len(said) * growth / 2), MOST)
        return said


def _first_round(base: nn.Module, layers: Iterable[nn.Module], max_length: int) -> int:
    """Sequences that are likely to be enough, if as many are written together.

    A round takes `max_length` forwards, however many it writes; those of a base that has little
    room for keys and values are no dearer in small rounds.
    """
    asked = ENOUGH * max(weight_shape(layer)[1] for layer in layers) / max_length
    return max(FIRST, min(2 * math.ceil(asked / 2), sampled_together(base, max_length)))


def spread(layers: Mapping[str, nn.Module], most: int = 8) -> dict[str, nn.Module]:
    """The layers of at most so many blocks, evenly spread.

    Enough for an average; and few enough that two float64 matrices of each input take at most 2 GiB
    in all, unless those of one block take more.
    """
    blocks: dict[str, list[str]] = {}
    for name in layers:
        number = re.search(r"\.(\d+)\.", name)
        blocks.setdefault(number[1] if number else "", []).append(name)
    sizes = [weight_shape(layers[name])[1] for name in max(blocks.values(), key=len)]
    taken = 2 * sum(matrix_bytes((size, size)) for size in sizes)
    count = min(max(_BYTES // taken, 1), most, len(blocks))
    groups = list(blocks.values())
    # The middles of equal parts.
    chosen = [groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)]
    return {name: layers[name] for group in chosen for name in group}


@dataclass
class _Halves:
    """Sums of x xᵀ over what layers read while a base writes, of every other sequence apart.

    The last token of a sequence is written and not read, so it is not among them; nor is what
    layers such as experts read, which are not given a row of every sequence.
    """

    layers: Mapping[str, nn.Module]
    skip_first: int
    sums: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    tokens: Counter[tuple[int, str]] = field(default_factory=Counter)
    _together: int = 0
    _rows: tuple[Tensor, ...] = ()
    _read: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, layers: Mapping[str, nn.Module], skip_first: int) -> _Halves:
        """Of the layers that are the first to get their input."""
        tokens = torch.zeros((1, 2), dtype=torch.long)
        with as_base(model) as base:
            collector = Collector(base, layers)
            collector.learn(0, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        first = {name: layers[name] for name, leader in collector.leader.items() if name == leader}
        return cls(first, skip_first)

    def before(self, numbers: range, position: int, written: Tensor) -> None:
        """What is to be known before a forward, see `self_text`."""
        if position and position % _STEPS == 0:
            self._add_up()
        places = written.nonzero().squeeze(1)
        is_odd = (places + numbers.start) % 2 == 1
        counts = position >= self.skip_first
        self._rows = (places[~is_odd], places[is_odd]) if counts else ()
        self._together = len(written)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take what the layers read inside of this."""
        with ExitStack() as hooks:
            hooks.callback(self._add_up)
            for name, layer in self.layers.items():
                handle = layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    def _hook(self, name: str) -> Callable[..., None]:
        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            x = x.reshape(-1, x.shape[-1])
            for half, rows in enumerate(self._rows if len(x) == self._together else ()):
                self._read.setdefault((half, name), []).append(x[rows.to(x.device)])

        return take

    def _add_up(self) -> None:
        """Add what was read to the sums, many rows at a time."""
        for key, parts in self._read.items():
            rows = torch.cat(parts)
            rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # has no float64
            if key not in self.sums:
                self.sums[key] = rows.new_zeros(rows.shape[1], rows.shape[1])
            add_lower_triangle(self.sums[key], rows)
            self.tokens[key] += len(rows)
        self._read.clear()
        self._rows = ()

    def excess(self) -> float:
        """Of a half, see the top: the mean over layers and over which is held against which."""
        found = []
        for name in self.layers:
            keys = [key for key in ((0, name), (1, name)) if self.tokens[key]]
            means = [self.sums[key] / self.tokens[key] for key in keys]
            for mean in means:
                mirror_lower_triangle(mean)
            for C, fresh in (means, means[::-1]) if len(means) == 2 else ():
                tail = eigen_tail(C, min(RANK, len(C)))
                a = float(tail.values.clamp(min=0).sum())
                h = float((tail.vectors * (fresh @ tail.vectors)).sum())
                found.append((h - a) / (h + a) if h > 0 else 0.0)
        return sum(found) / len(found) if found else 0.0
