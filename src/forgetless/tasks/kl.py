"""How far a model has moved from its base on any text, without a benchmark."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from forgetless.core.metrics import mean_stderr
from forgetless.data.examples import Examples
from forgetless.data.texts import read_examples as read_texts
from forgetless.data.tokens import tokenize
from forgetless.tasks.base import TaskResult, check_settings, fingerprint_of, whole_number
from forgetless.tasks.texts import source_problem

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from forgetless.tasks.distances import Distance

__all__ = ["KL"]

_VERSION = 1

# Beyond it, exp() of a loss is no longer a float64.
_LARGEST_LOSS = 700.0


@dataclass(frozen=True)
class KL:
    """Mean KL divergence of the model's next-token distributions from the base's.

        KL = 1 / N * sum_t sum_v p_base(v | x_<=t) * log( p_base(v | x_<=t) / p_model(v | x_<=t) )

    N counts every token of the prompts (of examples with answers, the prompts alone; of
    conversations, all of it). In nats per token, 0 or more, lower is better; exactly 0 for a model
    whose logits are the base's. An item is a prompt, its weight its number of tokens.

    The same pass gives further distances, in `extra`; per token, and those marked * with their
    standard error over items as `<name>_stderr`:

        reverse_kl *         KL(model || base)
        soft_cross_entropy   - sum_v p_base log p_model = base_entropy + KL
        base_entropy         - sum_v p_base log p_base
        top1_agreement *     share of tokens after which both find the same next token likeliest
        loss, base_loss      - log p of the text's own next token, under the model and the base
        loss_change *        loss - base_loss
        perplexity, base_perplexity, perplexity_ratio    exp of these three

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
        from forgetless.tasks.distances import distances
        from forgetless.tasks.inference import context_of
        from forgetless.tasks.likelihood import items_of

        started = time.perf_counter()
        rows = _tokens(self._examples, tokenizer)
        pieces = distances(
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
        return replace(result, extra=_further(pieces))


def _further(pieces: Sequence[Distance]) -> dict[str, float]:
    """The further distances, as means over tokens; those that are not finite are left out.

    Errors are over texts, or over the pieces of a single one, as those of the main value are.
    """
    several = len({piece.text for piece in pieces}) > 1
    items: dict[int, list[Distance]] = {}
    for piece in pieces:
        items.setdefault(piece.text if several else piece.start, []).append(piece)
    tokens, targets = _sum(pieces, "tokens"), _sum(pieces, "targets")
    found = {
        "tokens": int(tokens),
        "soft_cross_entropy": _sum(pieces, "cross_entropy") / tokens,
        "base_entropy": _sum(pieces, "base_entropy") / tokens,
        **_mean("reverse_kl", [_sums(i, "reverse_kl") for i in items.values()]),
        **_mean("top1_agreement", [_sums(i, "agreeing") for i in items.values()]),
    }
    if targets:
        losses = {of: _sum(pieces, f"{of}loss") / targets for of in ("", "base_")}
        change = losses[""] - losses["base_"]
        found |= {f"{of}loss": loss for of, loss in losses.items()}
        found |= {f"{of}perplexity": _exp(loss) for of, loss in losses.items()}
        found["perplexity_ratio"] = _exp(change)
        found |= _mean("loss_change", [_loss_change(i) for i in items.values()])
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _sum(pieces: Sequence[Distance], what: str) -> float:
    """Of one field over pieces."""
    return float(sum(getattr(piece, what) for piece in pieces))


def _sums(item: Sequence[Distance], what: str) -> tuple[float, float]:
    """An item's sum of a quantity over its tokens, and how many these are."""
    return _sum(item, what), _sum(item, "tokens")


def _loss_change(item: Sequence[Distance]) -> tuple[float, float]:
    """An item's sum of what was added to the loss of each target, and how many these are."""
    return _sum(item, "loss") - _sum(item, "base_loss"), _sum(item, "targets")


def _mean(name: str, sums: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The mean per token and its standard error over items; items without tokens do not count."""
    known = [(total / tokens, tokens) for total, tokens in sums if tokens]
    if not all(math.isfinite(value) for value, _ in known):
        return {}
    mean = mean_stderr([value for value, _ in known], [tokens for _, tokens in known])
    return {name: mean.value, f"{name}_stderr": mean.stderr}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < _LARGEST_LOSS else math.inf


def _tokens(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    from forgetless.tasks.inference import encode

    if examples.kind == "messages":
        dataset = tokenize(examples, tokenizer, max_length=sys.maxsize, pack=False)
        return list(dataset["input_ids"])
    key = "text" if examples.kind == "text" else "prompt"
    return encode(tokenizer, [record[key] for record in examples])
