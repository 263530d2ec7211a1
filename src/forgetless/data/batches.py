"""Tokens in memory and batches of them.

Reading rows of a `datasets.Dataset` one by one costs a small model several percent of every step;
slices of one tensor cost nothing.
"""

import hashlib
import inspect
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from forgetless.core.errors import UserError
from forgetless.data.modality import Batch, Sample
from forgetless.data.packing import IGNORED
from forgetless.models.state import base_of, evaluating
from forgetless.models.text import positions_of, require_known_tokens, without_cache
from forgetless.models.weights import is_linear, linear_weight, unreadable


class TokenRows(torch.utils.data.Dataset[Sample]):
    """The rows of a tokenised data set: `input_ids` and `labels`, each a slice of one tensor.

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
    def fingerprint(self) -> str:
        """SHA-256 of all tokens, labels and lengths."""
        lengths = self.parts or [[len(input_ids)] for input_ids, _ in self.rows]
        digest = hashlib.sha256(str(lengths).encode())
        for flat in self.flat.values():
            digest.update(flat.numpy().data)
        return digest.hexdigest()

    def join(self, rows: Sequence[Sample]) -> Batch:
        """See `Padding`."""
        return Padding()(rows)

    def _end(self) -> int | None:
        """The token that most rows end in, by the first of them; None where there is none."""
        learned = [labels[labels != IGNORED] for _, labels in self.rows[:256]]
        ends = Counter(int(labels[-1]) for labels in learned if len(labels))
        ((token, count),) = ends.most_common(1) or ((None, 0),)
        return token if 2 * count > len(learned) else None

    def require_fitting(self, model: Any) -> None:
        """See to it that the model has a position and a word for each token, and keeps rows apart.

        A model without weights is not asked whether the sequences of a row would see each other,
        nor whether it can learn to stop, of which a warning says that it may not.

        Raises:
            UserError: the rows are too long, of another tokenizer, or packed for a model in which
                their sequences see each other.
        """
        positions = positions_of(model)
        if positions is not None and self.longest > positions:
            raise UserError(
                f"the longest example has {self.longest} tokens, but the model has {positions} "
                f"positions; set max_length to {positions} or less"
            )
        require_known_tokens([[int(self.flat["input_ids"].max())]], model)
        if all(weight.is_meta for weight in model.parameters()):
            return
        base = base_of(model)
        if (end := self._end()) is not None and _looks_untrained(model, end):
            warnings.warn(
                f"the answers end in the token {end}, whose row of the output layer looks "
                "untrained, and this training does not reach it: the model may never stop. Name "
                "the output layer in target_modules (mostly 'lm_head'), train the row with PEFT's "
                "modules_to_save or trainable_token_indices, or end answers in another token",
                stacklevel=2,
            )
        if self.several and not _keeps_apart(base):
            raise UserError(
                f"packed sequences would see each other in {type(base).__name__}, which does not "
                "keep them apart by their position ids; set data.pack to false"
            )


_UNTRAINED = 0.25
"""Share of the usual size below which a row was never trained. The least row of SmolLM2-135M has
0.57 of the median norm and 0.73 of the median distance from the mean; fresh rows of transformers
have at most 0.16 of the one, or, resized to the mean, nearly nothing of the other."""


@torch.no_grad()
def _looks_untrained(model: Any, token: int) -> bool:
    """Whether a row of a frozen output layer is far smaller, or far nearer the mean, than usual."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if not is_linear(head) or head.weight.requires_grad or unreadable(head) is not None:
        return False
    weight = linear_weight(head)
    some = weight[:: max(1, len(weight) // 4096)].float()
    row, mean = weight[token].float(), some.mean(0)
    sizes = (row.norm(), some.norm(dim=1)), ((row - mean).norm(), (some - mean).norm(dim=1))
    return any(bool(own < _UNTRAINED * usual.median()) for own, usual in sizes)


@torch.no_grad()
def _keeps_apart(model: Any) -> bool:
    """Whether a sequence gives the same logits after either of two others in its row.

    Not every forward that takes position ids makes a mask of them, and recurrent layers need more
    than a mask. What the two others do to the logits where they are meant to be seen is the scale.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [4, 3, 2, 1, 1, 2, 3, 4]], device=device)

    def difference(sequence: int) -> float:
        """Between the second halves of the rows, with sequences of so many tokens."""
        places = torch.arange(sequence, device=device).repeat(2, 8 // sequence)
        logits = model(input_ids=tokens, position_ids=places).logits
        after_one, after_other = logits[:, 4:].float()
        return float((after_one - after_other).norm())

    with evaluating(model), without_cache(model):
        return difference(4) <= 1e-3 * difference(8)


class Padding:
    """Joins rows into one batch, each padded at its end to the longest of them.

    Where a row holds several sequences the batch has position ids and no attention mask: from
    them transformers keeps the sequences, and the padding, apart. Padding is the token 0: no model
    sees it, and a tokenizer's own padding token may lie outside the model's embeddings.
    """

    def __call__(self, rows: Sequence[Sample]) -> Batch:
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
    """Position ids (rows, width) that begin at 0 with every sequence, and with the padding."""
    rows = []
    for parts in lengths:
        padding = width - sum(parts)
        rows.append(torch.cat([torch.arange(n) for n in (*parts, padding)]))
    return torch.stack(rows)
