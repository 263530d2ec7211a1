"""Several sequences in one row, none of which sees another.

A packed row carries the lengths of its sequences. `forgetless.data.batches` turns them into
position ids that begin again at every sequence, from which transformers builds the attention mask
that keeps them apart in most architectures (`forgetless.training` tries it before the first step,
and refuses the others). The first token of a sequence has no label, since the sequence before it
must not predict it.
"""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

IGNORED = -100
"""The label of a token that is not learned, as PyTorch's cross-entropy has it."""


class TokenRow(NamedTuple):
    """Tokens of one or several sequences.

    Attributes:
        labels: as long; the token where it is learned, IGNORED elsewhere.
        lengths: of its sequences, in order; their sum is the length of the row.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]


def packed(rows: Sequence[TokenRow], max_length: int) -> list[TokenRow]:
    """The same sequences in fewer rows of at most `max_length` tokens, none of them cut.

    Best fit decreasing: the longest first, each into the fullest row that still has room for it
    (`trl.pack_dataset`).
    """
    import datasets
    from trl import pack_dataset

    columns = {
        "input_ids": [row.input_ids for row in rows],
        "labels": [_without_first(row.labels) for row in rows],
    }
    table = pack_dataset(
        datasets.Dataset.from_dict(columns),
        max_length,
        # One batch: sequences of different batches would never share a row.
        map_kwargs={"batch_size": len(rows), "load_from_cache_file": False},
    )[:]
    return list(map(TokenRow, table["input_ids"], table["labels"], table["seq_lengths"]))


def wrapped(documents: Sequence[list[int]], max_length: int) -> list[TokenRow]:
    """Documents one after the other in rows of `max_length` tokens; the last may be shorter.

    Every token is learned but the first of a document and the first of a row. A document that does
    not end with its row goes on in the next as a sequence of its own.
    """
    tokens = list(chain.from_iterable(documents))
    ends = {0, *accumulate(map(len, documents)), *range(0, len(tokens), max_length)}
    rows = []
    for start in range(0, len(tokens), max_length):
        stop = min(start + max_length, len(tokens))
        cuts = sorted(end for end in ends if start < end < stop)
        parts = list(pairwise([start, *cuts, stop]))
        labels = [label for a, b in parts for label in _without_first(tokens[a:b])]
        if any(label != IGNORED for label in labels):
            rows.append(TokenRow(tokens[start:stop], labels, [b - a for a, b in parts]))
    return rows


def _without_first(labels: list[int]) -> list[int]:
    return [IGNORED, *labels[1:]]
