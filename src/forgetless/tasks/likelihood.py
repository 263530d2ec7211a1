"""Token losses of texts, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from forgetless.data.packing import IGNORED
from forgetless.models.load import evaluating
from forgetless.tasks.base import Item
from forgetless.tasks.inference import Ids, by_length, device_of, pad, require_causal, rows_that_fit
from forgetless.tasks.journal import section
from forgetless.tasks.texts import beginning

if TYPE_CHECKING:
    from forgetless.tasks.distances import Distance

__all__ = ["Piece", "items_of", "losses"]

# Logits (tokens x vocabulary) that are looked at in one go.
_CHUNK_LOGITS = 1 << 21

# Tokens of a text that are enough for its beginning.
_HEAD = 48


class Piece(NamedTuple):
    """A quantity summed over the tokens of one piece of a text.

    Attributes:
        text: position of the text.
        start: position of the piece's first token in the text.
        total: the sum over its tokens, in nats.
        tokens: how many tokens that are, 1 or more.
    """

    text: int
    start: int
    total: float
    tokens: int


@dataclass(frozen=True)
class _Window:
    """What the model sees at once of a text, with the targets that are new in it."""

    text: int
    start: int
    ids: Ids
    labels: Ids


def losses(
    model: nn.Module,
    rows: Sequence[Ids],
    labels: Sequence[Ids] | None = None,
    *,
    max_length: int,
    stride: int,
    batch_size: int | None = None,
) -> list[Piece]:
    """Summed -log p(token | tokens before it) of each window of each text.

    Windows hold up to `max_length` tokens and start `stride` tokens apart. A token is a target
    once: in the first window that reaches it. So the targets of later windows have at least
    `max_length - stride` tokens before them, and the sums of a text's windows are its own. The
    first token of a text has nothing before it and is never a target.

    Args:
        model: a causal language model.
        rows: token ids of each text.
        labels: of the same lengths, `IGNORED` where a token is context only; None for `rows`.
        max_length: 2 or more.
        stride: in 1..max_length - 1.
        batch_size: windows at once, fewer where their logits have no room; None for as many as
            `rows_that_fit` says.

    Returns:
        One piece a window that has targets, in the order of the texts.

    Raises:
        UserError: not a causal language model.
    """
    require_causal(model)
    windows = [
        window
        for text, ids in enumerate(rows)
        for window in _windows(text, ids, labels[text] if labels else ids, max_length, stride)
    ]
    totals = [0.0] * len(windows)
    device = device_of(model)
    kept = section("losses", [[window.ids, window.labels] for window in windows])

    def sums(places: Sequence[int]) -> list[float]:
        group = [windows[i] for i in places]
        batch = pad([window.ids for window in group], 0, device)
        # Position t predicts token t + 1, so labels move one to the left.
        targets = pad([[*w.labels[1:], IGNORED] for w in group], IGNORED, device)["input_ids"]
        return _row_losses(_logits(model, batch), targets)

    with evaluating(model):
        for places in _batches(model, [window.ids for window in windows], batch_size):
            for place, total in zip(places, kept.batch(places, partial(sums, places)), strict=True):
                totals[place] = total
    return [
        Piece(w.text, w.start, total, sum(label != IGNORED for label in w.labels))
        for w, total in zip(windows, totals, strict=True)
    ]


def items_of(
    pieces: Sequence[Piece | Distance], rows: Sequence[Ids], tokenizer: PreTrainedTokenizerBase
) -> list[Item]:
    """One item a text: the mean over its tokens, weighted by their number.

    The pieces of a single text are items of their own, for an error cannot be told from one item.
    Neighbours resemble each other, so that error is rather too small than too large.
    """
    alone = len({piece.text for piece in pieces}) == 1
    groups: dict[tuple[int, int], list[Piece | Distance]] = {}
    for piece in pieces:
        groups.setdefault((piece.text, piece.start if alone else 0), []).append(piece)
    items = []
    for (text, start), parts in groups.items():
        tokens = sum(part.tokens for part in parts)
        head = tokenizer.decode(rows[text][start : start + _HEAD], skip_special_tokens=True)
        score = sum(part.total for part in parts) / tokens
        identity = f"{text}:{start}" if alone else str(text)
        items.append(Item(identity, beginning(head), "", "", score, float(tokens)))
    return items


def _windows(text: int, ids: Ids, labels: Ids, max_length: int, stride: int) -> Iterator[_Window]:
    """Windows of one text; a label counts in the first window in which it has a token before it."""
    known = 1
    for start in range(0, max(len(ids) - 1, 0), stride):
        end = min(start + max_length, len(ids))
        context = [IGNORED] * (known - start)
        new = [*context, *labels[known:end]]
        if any(label != IGNORED for label in new):
            yield _Window(text, start, ids[start:end], new)
        known = end
        if end == len(ids):
            return


def _batches(model: nn.Module, rows: Sequence[Ids], batch_size: int | None) -> Iterator[list[int]]:
    """Positions of rows in batches whose logits fit; the longest row decides how many that are."""
    longest = max((len(row) for row in rows), default=1)
    return by_length(rows, rows_that_fit(model, longest, batch_size))


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    device = device_of(model)
    inputs = {key: value.to(device) for key, value in batch.items()}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _row_losses(logits: Tensor, targets: Tensor) -> list[float]:
    """Cross-entropy of each row, summed over its targets."""
    counted = targets != IGNORED
    flat, wanted = logits.flatten(0, 1), targets.flatten()

    def losses_at(places: Tensor) -> Tensor:
        return functional.cross_entropy(flat[places].float(), wanted[places], reduction="none")

    return _row_sums(counted, losses_at, logits.shape[-1])


def _row_sums(
    counted: Tensor, values_at: Callable[[Tensor], Tensor], vocabulary: int
) -> list[float]:
    """Sums, in float64, of a per-token quantity over the counted tokens (rows, tokens) of each row.

    The quantity is computed for a few tokens at a time, so that no second copy of all logits is
    ever made.
    """
    places = counted.flatten().nonzero().squeeze(1)
    parts = torch.split(places, max(1, _CHUNK_LOGITS // vocabulary))
    values = torch.cat([values_at(part) for part in parts]).cpu().double()
    rows = (places // counted.shape[1]).cpu()
    sums = torch.zeros(len(counted), dtype=torch.float64).index_add_(0, rows, values)
    return [float(total) for total in sums]
