"""Which facts a model still prefers: multiple choice beside generation."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from forgetless.data.pocket.knowledge import facts, matches, questions
from forgetless.data.texts import spread
from forgetless.tasks.base import Item, Task, TaskResult, whole_number
from forgetless.tasks.multiple_choice import choice_scores

if TYPE_CHECKING:
    from forgetless.tasks.base import Model, Tokenizer


@dataclass(frozen=True)
class PocketChoice(Task):
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

    kind = "pocket_choice"
    summary = "facts recognised among four answers (accuracy)"

    name: str = "pocket_choice"
    options: int = 4
    seed: int = 0
    limit: int | None = None

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        many = type(self.options) is int and not 2 <= self.options <= 5
        yield whole_number("options", self.options, 2)
        yield f"options must be 2 to 5, got {self.options}" if many else None
        yield whole_number("seed", self.seed, 0)
        yield whole_number("limit", self.limit, optional=True)

    @cached_property
    def _choices(self) -> list[tuple[Item, tuple[str, ...]]]:
        """Each question with the answers to choose from."""
        answers: dict[str, list[str]] = {}
        for fact in facts():
            known = answers.setdefault(fact.relation, [])
            if fact.answer not in known:
                known.append(fact.answer)
        asked = []
        for question in spread(questions("held_out"), self.limit):
            # The same choices for a fact, whatever else is asked.
            rng = random.Random(f"{self.seed} {question.id}")
            others = answers[question.fact.relation]
            drawn = rng.sample(others, len(others))
            wrong = (answer for answer in drawn if not matches(answer, question))
            options = [question.answer, *islice(wrong, self.options - 1)]
            rng.shuffle(options)
            item = Item(question.id, question.prompt, question.answer)
            asked.append((item, tuple(options)))
        return asked

    def content(self) -> Sequence[object]:
        """The questions with their choices."""
        return ([[item.id, item.prompt, *options] for item, options in self._choices],)

    def measure(
        self, model: Model, tokenizer: Tokenizer, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The share of facts that `model` recognises."""
        asked = [(item.prompt, options) for item, options in self._choices]
        items = []
        for (item, options), totals in zip(
            self._choices, choice_scores(model, tokenizer, asked, batch_size), strict=True
        ):
            answer = options[totals.index(max(totals))]
            items.append(replace(item, answer=answer, score=float(answer == item.expected)))
        return TaskResult.of_items(self, items, metric="accuracy")


TASK = PocketChoice
