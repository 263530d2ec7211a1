"""Mean token loss, and perplexity, of any text."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from forgetless.core.errors import UserError
from forgetless.data.encoding import encode
from forgetless.data.tokens import tokenize
from forgetless.tasks.base import TaskResult, whole_number
from forgetless.tasks.texts import LARGEST_LOSS, TextTask, added, items_of

if TYPE_CHECKING:
    from forgetless.tasks.base import Model, Tokenizer


@dataclass(frozen=True)
class Perplexity(TextTask):
    """How surprised a model is by each token of a text.

        loss = - 1 / N * sum_t log p(x_t | x_<t)     perplexity = exp(loss)

    N counts every token of raw text but the first of each document, and only the answer's tokens
    of prompts with answers and of conversations, as in training. The value is the loss, in nats per
    token; lower is better. An item is a document; its score is its own mean loss, its weight its
    number of tokens. A single long document has its windows as items.

    Prompts with completions go through the tokenizer's chat template, where it has one, as in
    training.

    Attributes:
        path: a file that `forgetless.data.load_examples` reads, or a text of the pocket world.
        name: of the task.
        limit: read the first so many examples only; of a single document, so many windows.
        max_length: tokens that the model sees at once; less where its context is shorter.
        chat_template: off for prompts and completions as they stand.
        system: what is said before each of them, by the template.
        stride: tokens by which windows of a longer document move on; None for half a window.
            Smaller is slower and gives each token more context.

    Raises:
        UserError: settings out of range, or no such file.
    """

    kind = "perplexity"
    summary = "mean token loss of a text file (nats per token)"

    path: str | Path
    name: str = "perplexity"
    limit: int | None = None
    max_length: int = 512
    stride: int | None = None
    chat_template: str = "auto"
    system: str | None = None

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        found = [
            *super().problems(),
            whole_number("max_length", self.max_length, 2),
            whole_number("stride", self.stride, optional=True),
        ]
        if not any(found) and self.stride is not None and self.stride >= self.max_length:
            found.append(f"stride must be below max_length ({self.max_length}), got {self.stride}")
        return found

    @property
    def _windows(self) -> int | None:
        """The most windows to read, where the limit cannot be one of documents."""
        return self.limit if len(self.examples) == 1 else None

    def content(self) -> Sequence[object]:
        """The texts and the window."""
        windows = [] if self._windows is None else [{"windows": self._windows}]
        said = self.said("auto")
        return self.examples.fingerprint, self.max_length, self.stride, *windows, *said

    def measure(
        self, model: Model, tokenizer: Tokenizer, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The mean loss of `model`; `extra` has the perplexity and the number of tokens."""
        from forgetless.models.text import positions_of
        from forgetless.tasks.likelihood import losses

        length = min(self.max_length, positions_of(model) or self.max_length)
        stride = min(self.stride or length // 2, length - 1)
        labels: list[list[int]] | None = None
        if self.examples.kind == "text":
            rows = encode(tokenizer, [record["text"] for record in self.examples])
        else:
            learned = tokenize(self.examples, tokenizer, max_length=sys.maxsize, pack=False)
            rows, labels = list(learned["input_ids"]), list(learned["labels"])
        if self._windows is not None:
            end = length + (self._windows - 1) * stride
            rows, labels = [rows[0][:end]], labels and [labels[0][:end]]
        pieces = losses(
            model, rows, labels, max_length=length, stride=stride, batch_size=batch_size
        )
        if not pieces:
            raise UserError(
                f"{self.path}: no text has a second token, so there is nothing to predict"
            )
        items = items_of(pieces, "loss", rows, tokenizer)
        result = TaskResult.of_items(self, items, metric="loss", higher_is_better=False)
        perplexity = math.exp(min(result.value, LARGEST_LOSS))
        tokens = int(added(pieces, "tokens"))
        return replace(result, extra={"perplexity": perplexity, "tokens": tokens})


TASK = Perplexity
