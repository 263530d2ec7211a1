"""Replay: training data made of several sources with exact shares."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from forgetless.core.errors import UserError
from forgetless.data.modality import Batch, Rows, Sample


class Mixture(torch.utils.data.Dataset[Sample]):
    """An epoch of several sources, each with its share of the rows.

    Every row of the first source, the new task, is in every epoch once. Of source i with share s_i
    there are the nearest whole number to s_i / s_1 times as many rows, and one at the least. They
    come from an endless shuffled walk through that source: no row comes again before all others
    have come, also across epochs.

    Args:
        parts: the sources; a share is one of rows, which for packed data are of equal length.
        shares: positive, one for each source; only their ratios count.
        seed: of the walks.
        buffers: for each source how many of its rows are ever seen, drawn once; None for all.

    Raises:
        UserError: a share is not positive.
    """

    def __init__(
        self,
        parts: Sequence[Rows],
        shares: Sequence[float],
        seed: int,
        buffers: Sequence[int | None] = (),
    ) -> None:
        self.parts = list(parts)
        lengths = [len(part) for part in parts]
        self.buffers = [min(b or n, n) for b, n in zip(buffers or lengths, lengths, strict=True)]
        self.counts = _counts([len(part) for part in parts], shares)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the rows of this epoch from every source, as each has them then."""
        for part in self.parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        self._picked = [(0, row) for row in range(len(self.parts[0]))]
        for source in range(1, len(self.parts)):
            count = self.counts[source]
            rows = self._walk(source, epoch * count, count)
            self._picked += [(source, row) for row in rows]

    def _walk(self, source: int, start: int, count: int) -> list[int]:
        """The rows that the walk through a source meets in so many steps."""
        length = self.buffers[source]
        steps = range(start, start + count)
        orders = {turn: self._order(source, turn) for turn in {step // length for step in steps}}
        return [orders[step // length][step % length] for step in steps]

    def _order(self, source: int, turn: int) -> list[int]:
        length, buffer = len(self.parts[source]), self.buffers[source]
        if buffer == length:
            return self._shuffled(f"{source}/{turn}", length)
        kept = self._shuffled(f"{source}/buffer", length)[:buffer]
        return [kept[place] for place in self._shuffled(f"{source}/{turn}", buffer)]

    def _shuffled(self, key: str, length: int) -> list[int]:
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order: list[int] = torch.randperm(length, generator=generator).tolist()
        return order

    def __len__(self) -> int:
        return len(self._picked)

    def __getitem__(self, index: int) -> Sample:
        source, row = self._picked[index]
        return self.parts[source][row]

    @property
    def tokens(self) -> int:
        """Tokens of an epoch, where every source has rows of its mean length."""
        mean = [part.tokens / len(part) for part in self.parts]
        return round(sum(m * count for m, count in zip(mean, self.counts, strict=True)))

    @property
    def several(self) -> bool:
        """Whether a row holds more than one sequence."""
        return any(part.several for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows of all sources and of what decides the order."""
        content: list[object] = [[part.fingerprint for part in self.parts], self.counts, self.seed]
        if self.buffers != [len(part) for part in self.parts]:
            content.append(self.buffers)
        return hashlib.sha256(str(content).encode()).hexdigest()

    def join(self, rows: Sequence[Sample]) -> Batch:
        """As the sources do."""
        return self.parts[0].join(rows)

    def require_fitting(self, model: Any) -> None:
        """Raise what of any source the model cannot read."""
        for part in self.parts:
            part.require_fitting(model)


def _counts(lengths: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Rows of each source in an epoch."""
    if any(share <= 0 for share in shares):
        raise UserError(f"the weights of the training data must be positive, got {list(shares)}")
    counts = [round(lengths[0] * share / shares[0]) for share in shares]
    counts[0] = lengths[0]
    for number, count in enumerate(counts, start=1):
        if count == 0:
            warnings.warn(
                f"source {number} of the training data has one row in an epoch of {lengths[0]}, "
                "which is more than its weight asks for",
                stacklevel=3,
            )
    return [max(count, 1) for count in counts]
