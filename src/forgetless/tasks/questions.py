"""The questions of a task that generates, and the score of one answer to each. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from forgetless.tasks.base import Item, Task, TaskResult
from forgetless.tasks.sampling import Sampling

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["Generating", "Questions", "score_answers"]


@dataclass(frozen=True)
class Questions:
    """What a model is asked, and how its answers are judged.

    Attributes:
        ids: of the items.
        prompts: what the model reads.
        expected: right answers.
        stop: a text that ends an answer, or several.
        max_new_tokens: length of an answer.
        right: whether each of several answers to each question is right.
    """

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    expected: tuple[str, ...]
    stop: str | Sequence[str]
    max_new_tokens: int
    right: Callable[[Sequence[Sequence[str]]], list[list[bool]]]

    def item(self, place: int) -> tuple[str, str, str]:
        """Id, prompt and right answer of a question."""
        return self.ids[place], self.prompts[place], self.expected[place]

    def answers(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        samples: int,
        sampling: Sampling | None,
        batch_size: int | None,
    ) -> list[list[str]]:
        """Several answers to each question, drawn or, without `sampling`, the most probable."""
        from forgetless.tasks.generation import generate

        texts = generate(
            model,
            tokenizer,
            [prompt for prompt in self.prompts for _ in range(samples)],
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            batch_size=batch_size,
            sampling=sampling,
        )
        return [texts[i : i + samples] for i in range(0, len(texts), samples)]


@runtime_checkable
class Generating(Protocol):
    """A task whose questions may be answered several times."""

    def questions(self) -> Questions:
        """Them."""


def score_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    asked: Questions,
    batch_size: int | None,
) -> TaskResult:
    """The share of questions whose most probable answer is right."""
    started = time.perf_counter()
    written = asked.answers(model, tokenizer, 1, None, batch_size)
    judged = zip(written, asked.right(written), strict=True)
    items = [
        Item(*asked.item(place), text.strip(), float(right))
        for place, ((text,), (right,)) in enumerate(judged)
    ]
    return TaskResult.of_items(
        task,
        items,
        metric="accuracy",
        higher_is_better=True,
        seconds=time.perf_counter() - started,
    )
