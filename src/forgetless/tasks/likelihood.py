"""Token losses of texts, in bounded memory."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from forgetless.data.packing import IGNORED
from forgetless.models.state import evaluating
from forgetless.models.text import require_known_tokens
from forgetless.tasks.inference import Ids, by_tokens, device_of, pad, require_causal
from forgetless.tasks.journal import in_batches
from forgetless.tasks.logits import Reader, read, rows_of_logits, tokens_at_once
from forgetless.tasks.texts import Piece


class _Window(NamedTuple):
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
        batch_size: windows at once, at most; fewer where they have more than `tokens_at_once`.

    Returns:
        One piece a window that has targets, in the order of the texts.

    Raises:
        UserError: not a causal language model.
    """
    require_causal(model)
    require_known_tokens(rows, model)
    windows = [
        window
        for text, ids in enumerate(rows)
        for window in _windows(text, ids, labels[text] if labels else ids, max_length, stride)
    ]
    inputs = [window.ids for window in windows]
    device = device_of(model)

    def sums(places: Sequence[int]) -> list[float]:
        batch = pad([inputs[i] for i in places], 0, device)
        # Position t predicts token t + 1, so labels move one to the left.
        moved = [[*windows[i].labels[1:], IGNORED] for i in places]
        targets = pad(moved, IGNORED, device)["input_ids"]
        return _row_losses(read(model, batch), targets, rows_of_logits(model))

    with evaluating(model):
        batches = by_tokens(list(map(len, inputs)), tokens_at_once(model), batch_size)
        asked = [[window.ids, window.labels] for window in windows]
        totals = in_batches("losses", asked, batches, sums)
    return [
        Piece(w.text, w.start, {"tokens": sum(x != IGNORED for x in w.labels), "loss": total})
        for w, total in zip(windows, totals, strict=True)
    ]


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


def _row_losses(logits_of: Reader, targets: Tensor, at_once: int) -> list[float]:
    """Cross-entropy of each row, summed in float64 over its targets (rows, tokens).

    Logits are made for a few tokens at a time, and for none that has no target.
    """
    counted, wanted = targets != IGNORED, targets.flatten()
    places = counted.flatten().nonzero().squeeze(1)
    losses = [
        functional.cross_entropy(logits_of(part).float(), wanted[part], reduction="none")
        for part in torch.split(places, at_once)
    ]
    rows = (places // counted.shape[1]).cpu()
    sums = torch.zeros(len(counted), dtype=torch.float64)
    totals: list[float] = sums.index_add_(0, rows, torch.cat(losses).cpu().double()).tolist()
    return totals
