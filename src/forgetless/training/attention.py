"""Dropout of attention weights, whatever dropout a model was built with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from forgetless.core.errors import UserError

__all__ = ["attention_dropout"]

_RATES = ("attention_dropout", "attn_dropout", "dropout", "dropout_prob")
"""What attention modules call it: a number, or an `nn.Dropout` beside which GPT-2 reads it."""


@contextmanager
def attention_dropout(model: nn.Module, p: float) -> Iterator[None]:
    """Drop each attention weight with probability `p` while `model` is in training mode.

    0 leaves the model as it was built. At the end of the block it is again as before.

    Raises:
        UserError: no attention module of the model has a dropout to set.
    """
    if p == 0:
        yield
        return
    found = list(_rates(model))
    if not found:
        raise UserError(
            f"attention_dropout is {p:g}, but no attention module of {type(model).__name__} has a "
            "dropout to set; set it to 0"
        )
    before = [(owner, name, getattr(owner, name)) for owner, name in found]
    for owner, name in found:
        setattr(owner, name, p)
    try:
        yield
    finally:
        for owner, name, rate in before:
            setattr(owner, name, rate)


def _rates(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every attention module, or its dropout module, with the attribute that holds the rate."""
    for module in model.modules():
        if "Attention" not in type(module).__name__:
            continue
        for name in _RATES:
            rate = getattr(module, name, None)
            if isinstance(rate, float | int) and not isinstance(rate, bool):
                yield module, name
                break
            if isinstance(rate, nn.Dropout):
                yield rate, "p"
                break
