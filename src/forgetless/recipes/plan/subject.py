"""What a plan is made for: the shapes of a base, and the lengths of its training data."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from forgetless.data.batches import TokenRows
from forgetless.data.examples import load_examples
from forgetless.data.tokens import tokenize
from forgetless.models.load import load_tokenizer, meta_model, target_layers
from forgetless.models.weights import weight_shape

LONGEST_ROW = 2048
"""Tokens of a row of raw text, and of the longest example, beyond which nothing is advised."""

COVERED = 0.99
"""Share of the examples that are not to be cut."""

TOO_MUCH_PADDING = 0.4
"""Share of padding in a batch from which packing is advised."""


@dataclass(frozen=True)
class Base:
    """A base by its config.

    Attributes:
        name: as the user gave it.
        model: its shapes, on the meta device, in the number format of the stored weights.
    """

    name: str
    model: Any

    @classmethod
    def find(cls, name: str) -> Base:
        """The base of a name, as `meta_model` finds it; a folder needs no weights for this."""
        return cls(name, meta_model(name, weights=False))

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(weight.numel() for weight in self.model.parameters())

    @property
    def width(self) -> int:
        """Its hidden size."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def positions(self) -> int | None:
        """Most tokens of a sequence; None where the architecture has no limit."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if found is None else int(found)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the stored weights."""
        found: torch.dtype = next(self.model.parameters()).dtype
        return found

    @property
    def largest_rank(self) -> int:
        """The shortest side of the layers that an adapter goes on."""
        return min(min(weight_shape(layer)) for layer in target_layers(self.model).values())


@dataclass(frozen=True)
class Rows:
    """Training data as its base's tokens.

    Attributes:
        kind: ``text``, ``prompt_completion`` or ``messages``.
        examples: how many there are.
        max_length: the advised one.
        pack: whether packing is advised.
        padding: share of padding in batches of 8 without packing.
        lengths: tokens of each row, packed where that is advised.
        several: whether a row holds several sequences.
    """

    kind: str
    examples: int
    max_length: int
    pack: bool
    padding: float
    lengths: Sequence[int]
    several: bool

    @property
    def is_text(self) -> bool:
        """Whether it is raw text."""
        return self.kind == "text"

    @classmethod
    def of(cls, path: str, base: Base) -> Rows:
        """The rows of a file or of another source of training data.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: broken data, or a base without a tokenizer.
        """
        examples, tokenizer = load_examples(path), load_tokenizer(base.name, weights=False)

        def tokenized(max_length: int, pack: bool) -> tuple[list[int], bool]:
            rows = TokenRows(tokenize(examples, tokenizer, max_length=max_length, pack=pack))
            return [len(rows[i]["input_ids"]) for i in range(len(rows))], rows.several

        most = min(base.positions or LONGEST_ROW, LONGEST_ROW)
        whole, _ = tokenized(base.positions or 2**30, False)
        if examples.kind == "text":
            length, padding, pack = max(2, min(most, sum(whole))), 0.0, True
        else:
            covering = sorted(whole)[math.ceil(COVERED * len(whole)) - 1]
            step = 64 if covering > 64 else 8
            length = min(most, step * math.ceil(covering / step))
            padding = _padding([min(n, length) for n in whole])
            pack = padding > TOO_MUCH_PADDING
        lengths, several = tokenized(length, pack)
        return cls(examples.kind, len(examples), length, pack, padding, lengths, several)


def _padding(lengths: Sequence[int]) -> float:
    """Share of padding in random batches of 8."""
    drawn = random.Random(0).sample(lengths, len(lengths))
    parts = [drawn[start : start + 8] for start in range(0, len(drawn), 8)]
    return 1 - sum(lengths) / sum(max(part) * len(part) for part in parts)
