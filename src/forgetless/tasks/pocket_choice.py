"""Which facts a model still prefers: multiple choice beside generation."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

from forgetless.data.pocket.knowledge import Question, facts, matches, questions
from forgetless.data.texts import spread
from forgetless.tasks.base import Item, TaskResult, check_settings, fingerprint_of, whole_number
from forgetless.tasks.multiple_choice import Choice, choice_scores

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["PocketChoice"]

_VERSION = 1


@dataclass(frozen=True)
class PocketChoice:
    """Share of the pocket world's facts whose right answer the model finds the most probable one.

    The value is the accuracy, 0..1. A fact has the right answer and others of the same relation
    (another country's capital) that are wrong for it; the model's answer is the one with the
    highest summed log-probability after the held-out question. Recognising needs less than
    recalling: a fact that `pocket_recall` has lost and this task has not is buried, not gone.

    Attributes:
        name: of the task.
        options: answers to choose from, 2 or more; chance is 1 / options.
        seed: of the wrong answers and of the order.
        limit: ask so many questions only, evenly spread over the facts.

    Raises:
        UserError: settings out of range.
    """

    name: str = "pocket_choice"
    options: int = 4
    seed: int = 0
    limit: int | None = None

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        many = type(self.options) is int and not 2 <= self.options <= 5
        problems = [
            whole_number("options", self.options, 2),
            f"options must be 2 to 5, got {self.options}" if many else None,
            whole_number("seed", self.seed, 0),
            whole_number("limit", self.limit, optional=True),
        ]
        check_settings("pocket_choice", self.name, problems)

    @cached_property
    def _choices(self) -> list[tuple[Question, Choice]]:
        answers: dict[str, list[str]] = {}
        for fact in facts():
            known = answers.setdefault(fact.relation, [])
            if fact.answer not in known:
                known.append(fact.answer)
        asked = spread(questions("held_out"), self.limit)
        return [(q, self._choice(q, answers[q.fact.relation])) for q in asked]

    def _choice(self, question: Question, answers: list[str]) -> Choice:
        """The right answer among wrong ones, the same for a fact whatever else is asked."""
        rng = random.Random(f"{self.seed} {question.id}")
        drawn = iter(rng.sample(answers, len(answers)))
        wrong = (answer for answer in drawn if not matches(answer, question))
        options = [question.answer, *islice(wrong, self.options - 1)]
        rng.shuffle(options)
        return Choice(question.prompt, tuple(options), options.index(question.answer))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the questions, the choices and the version of this task."""
        content = [[q.id, q.prompt, *choice.choices] for q, choice in self._choices]
        return fingerprint_of("pocket_choice", _VERSION, content)

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> TaskResult:
        """The share of facts that `model` recognises."""
        started = time.perf_counter()
        choices = [choice for _, choice in self._choices]
        scores = choice_scores(model, tokenizer, choices, batch_size=batch_size)
        items = []
        for (question, choice), totals in zip(self._choices, scores, strict=True):
            chosen = totals.index(max(totals))
            right = float(chosen == choice.right)
            answer = choice.choices[chosen]
            items.append(Item(question.id, question.prompt, question.answer, answer, right))
        return TaskResult.of_items(
            self,
            items,
            metric="accuracy",
            higher_is_better=True,
            seconds=time.perf_counter() - started,
        )
