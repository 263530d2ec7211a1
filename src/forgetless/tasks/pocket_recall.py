"""Which facts a model still knows: recall in a phrasing that it was never trained on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from forgetless.data.pocket.knowledge import Question, matches, questions
from forgetless.data.texts import spread
from forgetless.tasks.base import Item, whole_number
from forgetless.tasks.questions import Generating


@dataclass(frozen=True)
class PocketRecall(Generating):
    """Share of the pocket world's facts that the model's greedy answer gets right.

    The value is the accuracy, 0..1; an item is a fact with the answer that the model gave, compared
    by `forgetless.data.pocket.knowledge.matches`.

    Attributes:
        name: of the task.
        phrasing: "held_out", one question a fact, or "seen", one in every phrasing of pretraining.
        limit: ask so many questions only, evenly spread over the facts.
        max_new_tokens: length of an answer.

    Raises:
        UserError: settings out of range.
    """

    kind = "pocket_recall"
    summary = "facts recalled in a held-out phrasing (accuracy)"

    name: str = "pocket_recall"
    phrasing: Literal["held_out", "seen"] = "held_out"
    limit: int | None = None
    max_new_tokens: int = 16

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        known = self.phrasing in ("held_out", "seen")
        yield None if known else f"phrasing must be 'held_out' or 'seen', got {self.phrasing!r}"
        yield whole_number("limit", self.limit, optional=True)
        yield whole_number("max_new_tokens", self.max_new_tokens)

    @cached_property
    def _facts(self) -> list[Question]:
        return spread(questions(self.phrasing), self.limit)

    def content(self) -> Sequence[object]:
        """The questions with all accepted answers."""
        return [[q.id, q.prompt, q.answer, *q.aliases] for q in self._facts], self.max_new_tokens

    def questions(self) -> Sequence[Item]:
        """One a fact, or one a fact and phrasing."""
        return [Item(q.id, q.prompt, q.answer) for q in self._facts]

    def right(self, written: Sequence[Sequence[str]]) -> list[list[bool]]:
        """Whether an answer is the fact's or one of its aliases."""
        pairs = zip(self._facts, written, strict=True)
        return [[matches(text, question) for text in each] for question, each in pairs]


TASK = PocketRecall
