"""Tokens in memory and batches of them.

Reading rows of a `datasets.Dataset` one by one costs a small model several percent of every step;
slices of one tensor cost nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from forgetless.data.packing import IGNORED

Sample = dict[str, Any]
"""`input_ids` and `labels`, tensors of one length, and `lengths`, of the sequences in them."""


class TokenRows(torch.utils.data.Dataset[Sample]):
    """The rows of a tokenised data set, each a slice of one tensor.

    Args:
        dataset: a `datasets.Dataset` with the columns ``input_ids`` and ``labels``, and
            ``lengths`` where rows hold several sequences.
    """

    def __init__(self, dataset: Any) -> None:
        packed = "lengths" in dataset.column_names
        self.parts: list[list[int]] | None = list(dataset["lengths"]) if packed else None
        table = dataset.with_format("arrow")[:]
        columns = {name: table.column(name).combine_chunks() for name in ("input_ids", "labels")}
        lengths = columns["input_ids"].value_lengths().to_pylist()
        self.flat = {
            name: torch.tensor(column.flatten().to_numpy(zero_copy_only=False), dtype=torch.long)
            for name, column in columns.items()
        }
        self.rows = list(zip(*(torch.split(f, lengths) for f in self.flat.values()), strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        input_ids, labels = self.rows[index]
        lengths = [len(input_ids)] if self.parts is None else self.parts[index]
        return {"input_ids": input_ids, "labels": labels, "lengths": lengths}

    @property
    def several(self) -> bool:
        """Whether a row holds more than one sequence."""
        return self.parts is not None and any(len(parts) > 1 for parts in self.parts)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(input_ids) for input_ids, _ in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.flat["input_ids"].numel()

    @property
    def largest_token(self) -> int:
        """The largest token id."""
        return int(self.flat["input_ids"].max())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens, labels and lengths."""
        lengths = self.parts or [[len(input_ids)] for input_ids, _ in self.rows]
        digest = hashlib.sha256(str(lengths).encode())
        for flat in self.flat.values():
            digest.update(flat.numpy().data)
        return digest.hexdigest()


class Padding:
    """Joins rows into one batch, each padded at its end to the longest of them.

    Where a row holds several sequences the batch has position ids and no attention mask: from
    them transformers keeps the sequences, and the padding, apart. Padding is the token 0: no model
    sees it, and a tokenizer's own padding token may lie outside the model's embeddings.
    """

    def __call__(self, rows: Sequence[Sample]) -> dict[str, Tensor]:
        input_ids = [row["input_ids"] for row in rows]
        padded = pad_sequence(input_ids, batch_first=True, padding_value=0)
        labels = [row["labels"] for row in rows]
        batch = {
            "input_ids": padded,
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
        if any(len(row["lengths"]) > 1 for row in rows):
            lengths = [row["lengths"] for row in rows]
            return batch | {"position_ids": positions(lengths, padded.shape[1])}
        each = torch.tensor([len(ids) for ids in input_ids])
        mask = torch.arange(padded.shape[1]) < each[:, None]
        return batch | {"attention_mask": mask.long()}


def positions(lengths: Sequence[Sequence[int]], width: int) -> Tensor:
    """Position ids (rows, width) that begin at 0 with every sequence, and with the padding.

    Args:
        lengths: of the sequences of each row.
        width: tokens of the longest row.
    """
    rows = []
    for parts in lengths:
        padding = width - sum(parts)
        rows.append(torch.cat([torch.arange(n) for n in (*parts, padding)]))
    return torch.stack(rows)
