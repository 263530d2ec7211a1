"""Which facts a model still knows: recall in a phrasing that it was never trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from forgetless.data.pocket.knowledge import Question, matches, questions
from forgetless.data.texts import spread
from forgetless.tasks.base import TaskResult, check_settings, fingerprint_of, whole_number
from forgetless.tasks.questions import Questions, score_answers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["PocketRecall"]

_VERSION = 1


@dataclass(frozen=True)
class PocketRecall:
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

    name: str = "pocket_recall"
    phrasing: Literal["held_out", "seen"] = "held_out"
    limit: int | None = None
    max_new_tokens: int = 16

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        known = self.phrasing in ("held_out", "seen")
        problems = [
            None if known else f"phrasing must be 'held_out' or 'seen', got {self.phrasing!r}",
            whole_number("limit", self.limit, optional=True),
            whole_number("max_new_tokens", self.max_new_tokens),
        ]
        check_settings("pocket_recall", self.name, problems)

    @cached_property
    def _questions(self) -> list[Question]:
        return spread(questions(self.phrasing), self.limit)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the questions, the accepted answers and the version of this task."""
        content = [[q.id, q.prompt, q.answer, *q.aliases] for q in self._questions]
        return fingerprint_of("pocket_recall", _VERSION, content, self.max_new_tokens)

    def questions(self) -> Questions:
        """The facts, to draw several answers for."""
        return Questions(
            ids=tuple(question.id for question in self._questions),
            prompts=tuple(question.prompt for question in self._questions),
            expected=tuple(question.answer for question in self._questions),
            stop="\n",
            max_new_tokens=self.max_new_tokens,
            right=lambda written: [
                [matches(text, question) for text in each]
                for question, each in zip(self._questions, written, strict=True)
            ],
        )

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> TaskResult:
        """The share of facts that `model` recalls."""
        return score_answers(model, tokenizer, self, self.questions(), batch_size)
