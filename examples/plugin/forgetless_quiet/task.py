"""How often an answer is brief."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from forgetless.tasks import Item
from forgetless.tasks.base import whole_number
from forgetless.tasks.questions import Generating
from forgetless.tasks.rows import file_problem, read_records, the_field


@dataclass(frozen=True)
class Brief(Generating):
    """Share of prompts whose greedy answer has at most so many words, and one at least.

    Attributes:
        path: a file with a prompt in each row.
        prompt: the field that has it.
        words: most words of a brief answer.
        max_new_tokens: length of an answer.
        name: of the task.
        limit: the first so many prompts only.
    """

    kind = "brief"
    summary = "answers of a few words (share)"

    path: str
    prompt: str = "prompt"
    words: int = 5
    max_new_tokens: int = 16
    name: str = "brief"
    limit: int | None = None

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        yield from super().problems()
        yield file_problem(self.path)
        yield whole_number("words", self.words)
        yield whole_number("max_new_tokens", self.max_new_tokens)
        yield whole_number("limit", self.limit, optional=True)

    @cached_property
    def _prompts(self) -> list[str]:
        rows = read_records(self.path, self.limit)
        return [str(the_field(row, self.prompt, where)) for where, row in rows]

    def content(self) -> Sequence[object]:
        """What decides the score besides the model."""
        return self._prompts, self.words, self.max_new_tokens

    def questions(self) -> Sequence[Item]:
        """The prompts; no answer is expected."""
        return [Item(str(number), prompt, "") for number, prompt in enumerate(self._prompts)]

    def right(self, written: Sequence[Sequence[str]]) -> list[list[bool]]:
        """Whether each answer is brief."""
        return [[1 <= len(text.split()) <= self.words for text in each] for each in written]
