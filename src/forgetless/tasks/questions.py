"""Tasks that are answered in words: the model writes, and the answers are judged. No torch."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from forgetless.tasks.asking import Asking
from forgetless.tasks.base import Item, TaskResult
from forgetless.tasks.sampling import Sampling

if TYPE_CHECKING:
    from forgetless.tasks.base import Model, Tokenizer


class Generating(Asking):
    """A task whose questions may be answered several times.

    Attributes:
        stop: a text that ends an answer, or several.
        max_new_tokens: length of an answer.
    """

    stop: str | Sequence[str] = "\n"
    max_new_tokens: int

    @abstractmethod
    def questions(self) -> Sequence[Item]:
        """The items, not yet answered."""

    @abstractmethod
    def right(self, written: Sequence[Sequence[str]]) -> list[list[bool]]:
        """Whether each of several answers to each question is right."""

    def answers(
        self,
        model: Model,
        tokenizer: Tokenizer,
        samples: int,
        sampling: Sampling | None,
        batch_size: int | None,
    ) -> list[list[str]]:
        """Several answers to each question, drawn or, without `sampling`, the most probable."""
        # Imports torch, which naming and checking a task does not need.
        from forgetless.tasks.generation import generate

        asked = [item.prompt for item in self.questions() for _ in range(samples)]
        prompts, rendered = self.opened(asked, tokenizer)
        texts = generate(
            model,
            tokenizer,
            prompts,
            rendered=rendered,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            batch_size=batch_size,
            sampling=sampling,
        )
        return [[*texts[i : i + samples]] for i in range(0, len(texts), samples)]

    def measure(
        self, model: Model, tokenizer: Tokenizer, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The share of questions whose most probable answer is right."""
        written = self.answers(model, tokenizer, 1, None, batch_size)
        judged = zip(self.questions(), written, self.right(written), strict=True)
        items = [
            replace(item, answer=text.strip(), score=float(right))
            for item, (text,), (right,) in judged
        ]
        extra = self.unfinished(written)
        return TaskResult.of_items(self, items, metric="accuracy", extra=extra)

    def unfinished(self, written: Sequence[Sequence[str]]) -> dict[str, float]:
        """The shares of answers that are empty and that were cut off, where that is half of them.

        Then the score says more of the settings than of the model, and a warning says so.
        """
        texts = [text for each in written for text in each]
        empty = sum(not text.strip() for text in texts)
        cut = sum(bool(text.strip()) and getattr(text, "is_cut", False) for text in texts)
        if 2 * (empty + cut) < len(texts) or not texts:
            return {}
        warnings.warn(
            f"task {self.name!r}: of {len(texts)} answers {empty} are empty and {cut} were cut off "
            f"after max_new_tokens={self.max_new_tokens}; look at them, and at the task's prompt, "
            "stop, max_new_tokens and chat_template",
            stacklevel=2,
        )
        return {"empty_answers": empty / len(texts), "cut_answers": cut / len(texts)}
