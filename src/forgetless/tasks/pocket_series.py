"""The third skill to learn: series of numbers, scored sum by sum."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from forgetless.data.pocket.series import Series, same_sums, series
from forgetless.tasks.base import Item, whole_number
from forgetless.tasks.questions import Generating


@dataclass(frozen=True)
class PocketSeries(Generating):
    """Share of series of numbers that the model's greedy answer steps through rightly.

    The value is the accuracy, 0..1: each of its three sums right. The instructions are of the
    test split, which no training instruction is in.

    Attributes:
        name: of the task.
        limit: how many series, 500 at most.
        seed: which series.
        max_new_tokens: length of an answer.

    Raises:
        UserError: settings out of range.
    """

    kind = "pocket_series"
    summary = "series of numbers, step by step (accuracy)"

    name: str = "pocket_series"
    limit: int = 200
    seed: int = 0
    max_new_tokens: int = 48

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        yield whole_number("limit", self.limit)
        too_many = type(self.limit) is int and self.limit > 500
        yield "limit must be at most 500" if too_many else None
        yield whole_number("seed", self.seed, 0)
        yield whole_number("max_new_tokens", self.max_new_tokens)

    @cached_property
    def _series(self) -> list[Series]:
        return series(self.limit, self.seed, "test")

    def content(self) -> Sequence[object]:
        """The instructions with their sums."""
        return [[one.prompt, one.answer] for one in self._series], self.max_new_tokens

    def questions(self) -> Sequence[Item]:
        """The instructions; an answer is all sums."""
        numbered = enumerate(self._series)
        return [Item(f"test{self.seed}:{i}", s.prompt, s.answer) for i, s in numbered]

    def right(self, written: Sequence[Sequence[str]]) -> list[list[bool]]:
        """Whether the sums are the series', every one of them."""
        pairs = zip(self._series, written, strict=True)
        return [[same_sums(text, one.answer) for text in each] for one, each in pairs]


TASK = PocketSeries
