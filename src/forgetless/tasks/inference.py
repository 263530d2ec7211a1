"""Running a model without changing it: modes, padding, batches by length."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from forgetless.errors import UserError

__all__ = [
    "accepts",
    "adapter_off",
    "by_length",
    "context_of",
    "device_of",
    "encode",
    "evaluating",
    "pad",
    "require_causal",
]

Ids = Sequence[int]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """The base model; afterwards parameters need gradients exactly as before.

    PEFT's own `disable_adapter` lets every adapter weight train when it ends, frozen ones too.
    """
    needed = {weight: weight.requires_grad for weight in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for weight, need in needed.items():
            weight.requires_grad_(need)


def require_causal(model: nn.Module) -> None:
    """Refuse models that do not continue text.

    Raises:
        UserError: an encoder-decoder, an encoder or an image model.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    can_generate = getattr(plain, "can_generate", None)
    encoder_decoder = getattr(getattr(plain, "config", None), "is_encoder_decoder", False)
    if encoder_decoder or not (callable(can_generate) and can_generate()):
        raise UserError(
            f"text tasks need a causal language model, got {type(plain).__name__}; "
            "load it with AutoModelForCausalLM"
        )


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the forward pass of the model (without its adapter) names an argument."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return argument in inspect.signature(plain.forward).parameters


def context_of(model: nn.Module) -> int | None:
    """Most tokens that the model can read at once, where its config says so."""
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs belong: the device of the first weight."""
    return next(model.parameters()).device


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids with the tokenizer's own beginning, without an end that it may add."""
    if not texts:
        return []
    end = tokenizer.eos_token_id
    rows: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    return [row[:-1] if len(row) > 1 and row[-1] == end else row for row in rows]


def by_length(rows: Sequence[Ids], batch_size: int) -> Iterator[list[int]]:
    """Positions of `rows` in batches of similar length, longest first (so memory shows at once)."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad(
    rows: Sequence[Ids], fill: int, device: torch.device, *, left: bool = False
) -> Mapping[str, Tensor]:
    """`input_ids` and `attention_mask`, (rows, longest), padded on one side."""
    longest = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        gap = [0] * (longest - len(row))
        filled = [fill] * len(gap)
        ids.append([*filled, *row] if left else [*row, *filled])
        mask.append(gap + [1] * len(row) if left else [1] * len(row) + gap)
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
