"""How far a model has moved from its base, without any benchmark."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from forgetless.data import Examples, tokenize
from forgetless.tasks.base import TaskResult, check_settings, fingerprint_of, whole_number
from forgetless.tasks.texts import read_texts, source_problem

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["KL"]

_VERSION = 1


@dataclass(frozen=True)
class KL:
    """Mean KL divergence of the model's next-token distributions from the base's.

        KL = 1 / N * sum_t sum_v p_base(v | x_<=t) * log( p_base(v | x_<=t) / p_model(v | x_<=t) )

    N counts every token of the prompts (of examples with answers, the prompts alone; of
    conversations, all of it). In nats per token, 0 or more, lower is better; exactly 0 for a model
    whose logits are the base's. An item is a prompt, its weight its number of tokens.

    Attributes:
        path: a file of texts or prompts, or a text of the pocket world.
        name: of the task.
        limit: read the first so many prompts only; of the pocket world's facts, so many evenly
            spread ones.
        max_length: longer texts are cut into pieces of so many tokens, which are read apart; less
            where the model's context is shorter.

    Raises:
        UserError: settings out of range, or no such file.

    Reference:
        Kalajdzievski 2024, "Scaling Laws for Forgetting When Fine-Tuning Large Language Models",
        arXiv:2401.05605, measures forgetting by the cross-entropy to the base's predictions; this
        is that less the base's own entropy, so that the base itself has 0.
    """

    path: str | Path
    name: str = "kl"
    limit: int | None = None
    max_length: int = 256

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        problems = [
            source_problem(self.path),
            whole_number("limit", self.limit, optional=True),
            whole_number("max_length", self.max_length),
        ]
        check_settings("kl", self.name, problems)

    @cached_property
    def _examples(self) -> Examples:
        return read_texts(self.path, self.limit)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the texts, the cut and the version of this task."""
        return fingerprint_of("kl", _VERSION, self._examples.fingerprint, self.max_length)

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> TaskResult:
        """The divergence of `model` from `reference`.

        Args:
            model: the tuned model.
            tokenizer: of both.
            reference: the base; None for a PeftModel, whose base is itself with the adapter off.
            batch_size: texts at once.
        """
        from forgetless.tasks.inference import context_of
        from forgetless.tasks.likelihood import divergences, items_of

        started = time.perf_counter()
        rows = _tokens(self._examples, tokenizer)
        pieces = divergences(
            model,
            rows,
            max_length=min(self.max_length, context_of(model) or self.max_length),
            reference=reference,
            batch_size=batch_size,
        )
        result = TaskResult.of_items(
            self,
            items_of(pieces, rows, tokenizer),
            metric="kl",
            higher_is_better=False,
            seconds=time.perf_counter() - started,
        )
        return replace(result, extra={"tokens": sum(piece.tokens for piece in pieces)})


def _tokens(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    from forgetless.tasks.inference import encode

    if examples.kind == "messages":
        dataset = tokenize(examples, tokenizer, max_length=sys.maxsize, pack=False)
        return list(dataset["input_ids"])
    key = "text" if examples.kind == "text" else "prompt"
    return encode(tokenizer, [record[key] for record in examples])
