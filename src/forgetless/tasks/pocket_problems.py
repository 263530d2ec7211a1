"""The first skill to learn: arithmetic word problems, scored by their final answer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from forgetless.data.pocket.problems import Problem, final_answer, problems
from forgetless.tasks.base import Item, whole_number
from forgetless.tasks.questions import Generating


@dataclass(frozen=True)
class PocketProblems(Generating):
    """Share of word problems whose greedy solution ends in the right number.

    The value is the accuracy, 0..1. The problems are of the test split, which no training problem
    is in; an item's answer is the whole solution, right or wrong by its final number alone.

    Attributes:
        name: of the task.
        limit: how many problems.
        seed: which problems.
        max_new_tokens: length of a solution.

    Raises:
        UserError: settings out of range.
    """

    kind = "pocket_problems"
    summary = "word problems solved (accuracy)"

    name: str = "pocket_problems"
    limit: int = 200
    seed: int = 0
    max_new_tokens: int = 48

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        yield whole_number("limit", self.limit)
        yield whole_number("seed", self.seed, 0)
        yield whole_number("max_new_tokens", self.max_new_tokens)

    @cached_property
    def _problems(self) -> list[Problem]:
        return problems(self.limit, self.seed, "test")

    def content(self) -> Sequence[object]:
        """The problems with their answers."""
        return [[p.prompt, p.answer] for p in self._problems], self.max_new_tokens

    def questions(self) -> Sequence[Item]:
        """The problems; an answer is the number alone."""
        numbered = enumerate(self._problems)
        return [Item(f"test{self.seed}:{i}", p.prompt, p.answer) for i, p in numbered]

    def right(self, written: Sequence[Sequence[str]]) -> list[list[bool]]:
        """Whether a solution ends in the right number."""
        pairs = zip(self._problems, written, strict=True)
        return [[final_answer(text) == p.answer for text in each] for p, each in pairs]


TASK = PocketProblems
