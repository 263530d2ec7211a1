"""Mean token loss, and perplexity, of any text."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from forgetless.core.errors import UserError
from forgetless.data.examples import Examples
from forgetless.data.texts import read_examples as read_texts
from forgetless.data.tokens import tokenize
from forgetless.tasks.base import TaskResult, check_settings, fingerprint_of, whole_number
from forgetless.tasks.texts import source_problem

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["Perplexity"]

_VERSION = 1

# Beyond it, exp() of a loss is no longer a float64.
_LARGEST_LOSS = 700.0


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by each token of a text.

        loss = - 1 / N * sum_t log p(x_t | x_<t)     perplexity = exp(loss)

    N counts every token of raw text but the first of each document, and only the answer's tokens
    of prompts with answers and of conversations, as in training. The value is the loss, in nats per
    token; lower is better. An item is a document; its score is its own mean loss, its weight its
    number of tokens. A single long document has its windows as items.

    Attributes:
        path: a file that `forgetless.data.load_examples` reads, or a text of the pocket world.
        name: of the task.
        limit: read the first so many examples only; of a single document, so many windows.
        max_length: tokens that the model sees at once; less where its context is shorter.
        stride: tokens by which windows of a longer document move on; None for half a window.
            Smaller is slower and gives each token more context.

    Raises:
        UserError: settings out of range, or no such file.
    """

    path: str | Path
    name: str = "perplexity"
    limit: int | None = None
    max_length: int = 512
    stride: int | None = None

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        problems = [
            source_problem(self.path),
            whole_number("limit", self.limit, optional=True),
            whole_number("max_length", self.max_length, 2),
            whole_number("stride", self.stride, optional=True),
        ]
        if not any(problems) and self.stride is not None and self.stride >= self.max_length:
            problems.append(
                f"stride must be below max_length ({self.max_length}), got {self.stride}"
            )
        check_settings("perplexity", self.name, problems)

    @cached_property
    def _examples(self) -> Examples:
        return read_texts(self.path, self.limit)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the texts, the window and the version of this task."""
        content = [self._examples.fingerprint, self.max_length, self.stride]
        if self._windows is not None:
            content.append({"windows": self._windows})
        return fingerprint_of("perplexity", _VERSION, *content)

    @property
    def _windows(self) -> int | None:
        """The most windows to read, where the limit cannot be one of documents."""
        return self.limit if len(self._examples) == 1 else None

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> TaskResult:
        """The mean loss of `model`; `extra` has the perplexity and the number of tokens."""
        from forgetless.tasks.inference import context_of
        from forgetless.tasks.likelihood import items_of, losses

        started = time.perf_counter()
        length = min(self.max_length, context_of(model) or self.max_length)
        stride = min(self.stride or length // 2, length - 1)
        rows, labels = _tokens(self._examples, tokenizer)
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
        result = TaskResult.of_items(
            self,
            items_of(pieces, rows, tokenizer),
            metric="loss",
            higher_is_better=False,
            seconds=time.perf_counter() - started,
        )
        return replace(
            result,
            extra={
                "perplexity": math.exp(min(result.value, _LARGEST_LOSS)),
                "tokens": sum(piece.tokens for piece in pieces),
            },
        )


def _tokens(
    examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Token ids of each example and, where only a part of it counts, its labels."""
    from forgetless.tasks.inference import encode

    if examples.kind == "text":
        return encode(tokenizer, [record["text"] for record in examples]), None
    dataset = tokenize(examples, tokenizer, max_length=sys.maxsize, pack=False)
    return list(dataset["input_ids"]), list(dataset["labels"])
