"""How far a model has moved from its base on any text, without a benchmark."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forgetless.core.errors import UserError
from forgetless.data.encoding import encode
from forgetless.data.texts import OWN_SEED, SELF, SELF_DRAWN, self_text
from forgetless.data.tokens import tokenize
from forgetless.tasks.base import TaskResult, whole_number
from forgetless.tasks.texts import LARGEST_LOSS, Piece, TextTask, added, items_of, per_token

if TYPE_CHECKING:
    from forgetless.tasks.base import Model, Tokenizer


OWN_TEXTS = 64
"""How many texts the base writes for a task that does not say."""


@dataclass(frozen=True)
class KL(TextTask):
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
        path: a file of texts or prompts, a text of the pocket world, or "self" for texts that the
            base writes itself: no data is needed, and the mean is over what the base would say.
        name: of the task.
        limit: read the first so many prompts only; of the pocket world's facts, so many evenly
            spread ones; of the base's own texts, how many it writes (`OWN_TEXTS`).
        chat_template: off for prompts as they stand; otherwise they are what the user says, by the
            tokenizer's chat template where it has one.
        system: what is said before each of them, by the template.
        max_length: longer texts are cut into pieces of so many tokens, which are read apart; less
            where the model's context is shorter.

    Raises:
        UserError: settings out of range, or no such file.

    Reference:
        Kalajdzievski 2024, "Scaling Laws for Forgetting When Fine-Tuning Large Language Models",
        arXiv:2401.05605, measures forgetting by the cross-entropy to the base's predictions; this
        is that less the base's own entropy, so that the base itself has 0.
    """

    kind = "kl"
    summary = "distance to the base model on held texts: KL(base || model) per token"
    needs_reference = True

    path: str | Path
    name: str = "kl"
    limit: int | None = None
    max_length: int = 256
    chat_template: str = "auto"
    system: str | None = None

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        return [*super().problems(), whole_number("max_length", self.max_length)]

    def content(self) -> Sequence[object]:
        """The texts and where they are cut; of the base's own texts, how many."""
        if self.path == SELF:
            return SELF_DRAWN, self.limit or OWN_TEXTS, self.max_length
        return self.examples.fingerprint, self.max_length, *self.said("auto")

    def measure(
        self, model: Model, tokenizer: Tokenizer, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The divergence of `model` from `reference`."""
        from forgetless.models.text import positions_of
        from forgetless.tasks.distances import distances

        rows: list[list[int]]
        if self.path == SELF:
            rows = self._own_texts(model if reference is None else reference, tokenizer)
        elif self.examples.kind == "messages":
            whole = tokenize(self.examples, tokenizer, max_length=sys.maxsize, pack=False)
            rows = list(whole["input_ids"])
        elif self.examples.kind == "text":
            rows = encode(tokenizer, [record["text"] for record in self.examples])
        else:
            asked = [record["prompt"] for record in self.examples]
            prompts, rendered = self.opened(asked, tokenizer)
            rows = encode(tokenizer, prompts, rendered=rendered)
        length = min(self.max_length, positions_of(model) or self.max_length)
        pieces = distances(
            model, rows, max_length=length, reference=reference, batch_size=batch_size
        )
        items = items_of(pieces, "kl", rows, tokenizer)
        further = _further(pieces)
        return TaskResult.of_items(self, items, metric="kl", higher_is_better=False, extra=further)

    def _own_texts(self, base: Model, tokenizer: Tokenizer) -> list[list[int]]:
        """What the base writes: once a task, for every model that is measured with it."""
        kept: dict[str, list[list[int]]] = vars(self)
        if SELF not in kept:
            if not hasattr(base, "generate"):
                raise UserError(
                    f"task {self.name!r}: path {SELF!r} is text that the base writes, and this "
                    "reference writes none; give a file"
                )
            count = self.limit or OWN_TEXTS
            kept[SELF] = self_text(base, tokenizer, count, self.max_length, OWN_SEED)
        return kept[SELF]


def _further(pieces: Sequence[Piece]) -> dict[str, float]:
    """The further distances, as means over tokens; those that are not finite are left out."""

    def change(parts: Sequence[Piece]) -> float:
        return added(parts, "loss") - added(parts, "base_loss")

    tokens, targets = added(pieces, "tokens"), added(pieces, "targets")
    found = {
        "tokens": int(tokens),
        "soft_cross_entropy": added(pieces, "cross_entropy") / tokens,
        "base_entropy": added(pieces, "base_entropy") / tokens,
        **per_token("reverse_kl", pieces, lambda parts: added(parts, "reverse_kl")),
        **per_token("top1_agreement", pieces, lambda parts: added(parts, "agreeing")),
    }
    if targets:
        losses = {of: added(pieces, f"{of}loss") / targets for of in ("", "base_")}
        found |= {f"{of}loss": loss for of, loss in losses.items()}
        found |= {f"{of}perplexity": _exp(loss) for of, loss in losses.items()}
        found["perplexity_ratio"] = _exp(losses[""] - losses["base_"])
        found |= per_token("loss_change", pieces, change, "targets")
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf


TASK = KL
