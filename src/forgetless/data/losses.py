"""The loss that a training is about, and whether a model computes it by itself."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from forgetless.core.errors import UserError
from forgetless.data.packing import IGNORED
from forgetless.models.state import base_of, evaluating, unwrapped
from forgetless.models.text import without_cache

Loss = Callable[..., Tensor]
"""The loss of a batch from a model's output, ``labels`` and ``num_items_in_batch``, what is learned
in the whole step, as `transformers.Trainer` asks for it."""


def token_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy of the learned tokens, each from the logits before it.

    Args:
        outputs: of a causal language model, with logits (batch, tokens, vocabulary).
        labels: (batch, tokens), IGNORED where nothing is learned.
        num_items_in_batch: what to divide by instead of the number of this batch's own.
    """
    logits = outputs["logits"][:, :-1].float()
    wanted = labels[:, 1:].to(logits.device)
    total = functional.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    count = (wanted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device)


@torch.no_grad()
def own_loss(model: nn.Module, *, several: bool = False, divides: bool = False) -> Loss | None:
    """`token_loss` where the model's own loss is another, which is tried on eight tokens.

    Some architectures compare a token with its own logits and so learn to copy (BART and its kin as
    decoders), others take the number of tokens to divide by and pass over it. What they add of
    their own, such as a router's balance, stays where the rest is right. A step may have `several`
    batches, over which the mean is taken; a model that is asked to divide by the tokens of the
    whole step `divides`.

    Raises:
        UserError: the model sees the tokens that it is to predict.
    """
    base: Any = base_of(model)
    writes = isinstance(base, PreTrainedModel) and base.can_generate()
    if not writes or base.config.is_encoder_decoder:
        return None
    parameters = inspect.signature(base.forward).parameters
    here = (weight.device for weight in base.parameters() if not weight.is_meta)
    device = next(here, torch.device("cpu"))  # of a model that is offloaded in whole
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 8, 7, 6, 5]], device=device)
    ids %= unwrapped(base.get_input_embeddings()).num_embeddings
    labels = ids.clone()
    labels[0, :6] = labels[1, :3] = IGNORED
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "output_router_logits" in parameters:
        given["output_router_logits"] = False
    divisor = 2 * int((labels != IGNORED).sum())
    divided = {"num_items_in_batch": divisor} if divides else {}
    with evaluating(model), without_cache(model):
        outputs = model(**given, labels=labels, **divided)
    logits = outputs["logits"]
    if logits is None:  # a kernel that makes none with the loss
        return None
    first, other = logits[:, :4].float()  # of tokens that are alike up to there
    if (first - other).norm() > 32 * torch.finfo(logits.dtype).eps * first.norm():
        raise UserError(
            f"{type(base).__name__} sees the tokens that it is to predict, so there would be "
            "nothing to learn; load it as a decoder (is_decoder: true in its config), or take a "
            "causal base"
        )
    right = token_loss(outputs, labels, divisor if divides else None)
    is_right = torch.isclose(outputs["loss"].float(), right, rtol=1e-3, atol=0)
    return None if is_right and (divides or not several) else token_loss


def answer_logps(logits: Tensor, labels: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log p of the two answers of each row, as sums over their learned tokens; and how many these
    are, both (rows, 2).

    Args:
        logits: (rows, tokens, vocabulary).
        labels: (rows, tokens), IGNORED where nothing is learned.
        position_ids: (rows, tokens), 0 where a sequence, or the padding, begins.
    """
    wanted = labels[:, 1:].to(logits.device)
    each = functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
    )
    sequence = (position_ids == 0).cumsum(1)[:, 1:].to(logits.device)
    parts = [(sequence == number) & (wanted != IGNORED) for number in (1, 2)]
    sums = torch.stack([-(each * part).sum(1) for part in parts], 1)
    return sums, torch.stack([part.sum(1) for part in parts], 1)


def dpo_loss(logps: Tensor, of_base: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation: the mean of

        - log sigmoid(beta [ log p(chosen) / p_base(chosen) - log p(rejected) / p_base(rejected) ])

    Args:
        logps: of the chosen and the rejected answers, (rows, 2).
        of_base: the base's.
        beta: how strongly the model is held to the base.

    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7.
    """
    moved = logps - of_base
    return -functional.logsigmoid(beta * (moved[:, 0] - moved[:, 1])).mean()


def orpo_loss(logps: Tensor, counts: Tensor, beta: float) -> Tensor:
    """Odds ratio preference optimisation, which asks no base: the mean of

        - log P(chosen) - beta log sigmoid( log odds(chosen) / odds(rejected) )

    where log P is the mean of log p over the answer's tokens, and odds = P / (1 - P).

    Args:
        logps: of the chosen and the rejected answers, (rows, 2).
        counts: their tokens.
        beta: the weight of the second term, lambda in the paper.

    Source: Hong, Lee and Thorne 2024, arXiv:2403.07691, equations 4 to 7.
    """
    mean = logps / counts
    odds = mean - torch.log1p(-mean.exp().clamp(max=1 - 1e-7))
    return (-mean[:, 0] - beta * functional.logsigmoid(odds[:, 0] - odds[:, 1])).mean()


def loss_of(model: nn.Module) -> Loss:
    """The mean loss of what a batch learns, from the model's output and ``labels``."""
    return own_loss(model) or (lambda outputs, labels: outputs.loss)
