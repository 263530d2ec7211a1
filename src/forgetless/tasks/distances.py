"""How far a model's predictions are from its base's, token by token, in bounded memory.

Both models read a batch once, and only its last hidden states are kept; the logits over the
vocabulary are made for a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn

from forgetless.core.errors import UserError
from forgetless.models.state import adapter_off, evaluating
from forgetless.models.text import text_config, vocabulary_of
from forgetless.tasks.inference import Ids, by_length, device_of, pad, require_causal
from forgetless.tasks.journal import in_batches
from forgetless.tasks.logits import Reader, adapts_head, has_a_head, read, rows_of_logits
from forgetless.tasks.texts import Piece

# Numbers that a batch may have: hidden states, or logits where a model's head cannot be had apart.
_BATCH_NUMBERS = 1 << 26
_MOST_ROWS = 32

SUMS = ("kl", "reverse_kl", "cross_entropy", "base_entropy", "agreeing", "base_loss", "loss")
"""What is added up over the tokens of a piece, in nats, besides the counts of tokens and targets.

p is the base's distribution of the next token, q the model's, x the text's own next token:

    kl              sum_v p log(p / q), of each token 0 or more
    reverse_kl      sum_v q log(q / p), of each token 0 or more
    cross_entropy   - sum_v p log q, the soft cross-entropy: the base's entropy plus `kl`
    base_entropy    - sum_v p log p
    agreeing        tokens after which both models find the same next token likeliest
    base_loss       - log p(x), over the targets: tokens that have a next token in the piece
    loss            - log q(x), over the targets
"""


def distances(
    model: nn.Module,
    rows: Sequence[Ids],
    *,
    max_length: int,
    reference: nn.Module | None = None,
    batch_size: int | None = None,
) -> list[Piece]:
    """Distances from the base of the next-token distributions after every token of each text.

    Texts longer than `max_length` tokens are cut into pieces that are read apart. Both models see
    the same batches and the same chunks of tokens, so a model that equals the base bit for bit
    is at a distance of exactly 0. Memory does not grow with the texts: next to the models it holds
    a batch's hidden states and the logits of some tokens (at least one token's), 8 M numbers of
    either model.

    Args:
        model: the tuned model.
        rows: token ids of each text.
        max_length: tokens of a piece, 1 or more.
        reference: the base; None for a PeftModel, whose base is itself with the adapter off.
        batch_size: pieces at once, at most; None for 32. Fewer where they would not fit.

    Returns:
        One piece after the other, in the order of the texts.

    Raises:
        UserError: no reference and no adapter to switch off, two vocabularies, or not a causal
            language model.
    """
    require_causal(model)
    if reference is None and not isinstance(model, PeftModel):
        raise UserError(
            "KL needs the base model to compare with: pass reference=base, or a PeftModel, "
            f"whose base is itself with the adapter off; got {type(model).__name__} alone"
        )
    cuts = [(text, i) for text, ids in enumerate(rows) for i in range(0, len(ids), max_length)]
    pieces = [rows[text][start : start + max_length] for text, start in cuts]
    pair = _Pair(model, reference)
    longest = max((len(piece) for piece in pieces), default=1)
    fitting = _BATCH_NUMBERS // (longest * pair.numbers_a_token)

    def sums(places: Sequence[int]) -> list[list[float]]:
        return _batch_sums(pair, pad([pieces[i] for i in places], 0, device_of(model)))

    with evaluating(model), evaluating(model if reference is None else reference):
        batches = by_length(pieces, max(1, min(batch_size or _MOST_ROWS, fitting)))
        found = in_batches("distances", pieces, batches, sums)
    return [
        Piece(
            text,
            start,
            {"tokens": len(ids), "targets": len(ids) - 1} | dict(zip(SUMS, numbers, strict=True)),
        )
        for (text, start), ids, numbers in zip(cuts, pieces, found, strict=True)
    ]


def _batch_sums(pair: _Pair, batch: Mapping[str, Tensor]) -> list[list[float]]:
    """`SUMS` for every row of a batch."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    following, has_next = ids.roll(-1, 1).flatten(), (mask & mask.roll(-1, 1)).clone()
    has_next[:, -1] = False
    places = mask.flatten().nonzero().squeeze(1)
    base_at, tuned_at = pair.readers(batch)
    values = []
    for part in torch.split(places, pair.chunk):
        base = base_at(part)
        tuned = base if pair.is_one else tuned_at(part)
        _check_same_vocabulary(base, tuned)
        values.append(_compare(base, tuned, following[part], has_next.flatten()[part]))
    rows = (places // mask.shape[1]).cpu()
    sums = torch.zeros(len(mask), len(SUMS), dtype=torch.float64).index_add_(
        0, rows, torch.cat(values)
    )
    numbers: list[list[float]] = sums.tolist()
    return numbers


def _compare(base: Tensor, tuned: Tensor, following: Tensor, has_next: Tensor) -> Tensor:
    """`SUMS` for each token, (tokens, 7), on the CPU.

        KL(p || q) = sum_v e_p (a - b) / S_p - log S_p + log S_q
        e_p = exp(a), S_p = sum_v e_p, likewise e_q and S_q of b

    with a and b the logits less their largest. Terms are float32 and sums float64: logarithms of
    probabilities in float32 would be wrong in the sixth digit, all of one token's in the same way,
    while the errors of these terms are in the seventh and cancel. The logits of both are (tokens,
    vocabulary).
    """
    a = _Softmax(base)
    b = a if tuned is base else _Softmax(tuned)
    gap = a.logits - b.logits
    kl = a.mean(gap) - a.log_sum + b.log_sum
    reverse = b.mean(gap.neg_()) - b.log_sum + a.log_sum
    # Rounding can push a divergence of almost nothing below 0, where none can be.
    kl, reverse = kl.clamp_(min=0), reverse.clamp_(min=0)
    entropy = a.log_sum - a.mean(a.logits)
    agreeing = (a.likeliest == b.likeliest).to(kl.dtype)
    losses = [torch.where(has_next, model.loss(following), 0.0) for model in (a, b)]
    numbers = [kl, reverse, entropy + kl, entropy, agreeing, *losses]
    return torch.stack(numbers, dim=1).cpu().double()


class _Softmax:
    """The distribution of some logits (tokens, vocabulary), not normalised.

    Attributes:
        logits: less the largest of each token, float32.
        likeliest: the token of the largest.
        log_sum: log of the sum of their exponentials.
    """

    def __init__(self, logits: Tensor) -> None:
        largest, self.likeliest = logits.float().max(-1)
        self.logits = logits.float() - largest[:, None]
        self._weights = self.logits.exp()
        # Apple's GPUs have no float64.
        self._wide = torch.float32 if logits.device.type == "mps" else torch.float64
        self._sum = self._weights.sum(-1, dtype=self._wide)
        self.log_sum = self._sum.log()

    def mean(self, values: Tensor) -> Tensor:
        """Of values (tokens, vocabulary); one never said counts nothing, even if infinite."""
        terms = self._weights * values
        total = terms.sum(-1, dtype=self._wide)
        if not total.isfinite().all():
            total = terms.masked_fill_(self._weights == 0, 0.0).sum(-1, dtype=self._wide)
        return total / self._sum

    def loss(self, said: Tensor) -> Tensor:
        """- log p of one token each."""
        return self.log_sum - self.logits.gather(1, said[:, None]).squeeze(1)


def _check_same_vocabulary(base: Tensor, tuned: Tensor) -> None:
    if tuned.shape != base.shape:
        raise UserError(
            f"the reference has {base.shape[-1]} tokens in its vocabulary and the model "
            f"{tuned.shape[-1]}; KL needs the base that the model was made from"
        )


class _Pair:
    """The tuned model and its base, asked for the logits of some tokens of a batch.

    Args:
        model: the tuned model.
        reference: the base; None for `model` with its adapter off.
    """

    def __init__(self, model: nn.Module, reference: nn.Module | None) -> None:
        self.model, self.base = model, model if reference is None else reference
        self.is_one = reference is model  # a base that is asked how far it is from itself
        self.off = partial(adapter_off, model) if reference is None else nullcontext
        self.apart = has_a_head(self.model) and has_a_head(self.base)
        # Hidden states are read with adapters off; switching takes long, and few adapt the head.
        switches = self.apart and adapts_head(model)
        self.off_at_head = self.off if switches else nullcontext
        vocabulary = vocabulary_of(model) or 1 << 17
        hidden = int(getattr(text_config(model), "hidden_size", None) or 1 << 14)
        self.numbers_a_token = hidden if self.apart else vocabulary
        self.chunk = rows_of_logits(model)

    def readers(self, batch: Mapping[str, Tensor]) -> tuple[Reader, Reader]:
        """How to read the logits of the base and of the tuned model, on the tuned one's device."""
        tuned = read(self.model, batch, apart=self.apart)
        if self.is_one:
            return tuned, tuned
        with self.off():
            asked_off = read(self.base, batch, apart=self.apart)
        device = device_of(self.model)

        def base(places: Tensor) -> Tensor:
            with self.off_at_head():
                return asked_off(places).to(device)

        return base, tuned
