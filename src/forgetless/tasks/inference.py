"""Running a model without changing it: what it accepts, padding, batches by length."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.core.errors import UserError
from forgetless.models.state import base_of, evaluating, unwrapped
from forgetless.models.text import text_config, without_cache

Ids = Sequence[int]

# What the keys and values of texts that are written together may take, and how many texts that are.
_CACHE_BYTES = 4 << 30
_WRITTEN_TOGETHER = range(32, 257)


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


def require_numbers(values: Tensor | Sequence[float]) -> None:
    """Refuse what a model said if any of it is no number.

    Raises:
        UserError: nan among logits, or among log-probabilities.
    """
    if torch.as_tensor(values).isnan().any():
        raise UserError(
            "the model's logits are nan: its weights may come from a training run that diverged "
            "(try a lower learning rate), or its dtype may be too narrow"
        )


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the forward pass of the model (without its adapter) names an argument."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return argument in inspect.signature(plain.forward).parameters


def padding_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding token; 0 where it has none, or one that the model does not embed.

    Padding is masked, so that any token would do, but some models look for their own.
    """
    embeddings = getattr(model, "get_input_embeddings", None)
    fill = tokenizer.pad_token_id or 0
    return fill if embeddings is None or fill < embeddings().weight.shape[0] else 0


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs belong: the device of the first weight."""
    return next(model.parameters()).device


def rows_with_cache(model: nn.Module, length: int) -> int:
    """How many texts to write at once, which end with at most `length` tokens.

    A step takes little longer for many texts than for one: 32 to 256, as many as have room for
    their keys and values.
    """
    few, many = _WRITTEN_TOGETHER[0], _WRITTEN_TOGETHER[-1]
    return max(few, min(_CACHE_BYTES // (length * _cache_bytes(model)), many))


def _cache_bytes(model: nn.Module) -> int:
    """Bytes of the keys and values of one token, where the config says how many there are."""
    config = text_config(model)
    layers, hidden, heads, shared, size = (
        getattr(config, name, None)
        for name in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
    )
    if not (layers and hidden and heads):
        return _CACHE_BYTES
    width = (shared or heads) * (size or hidden // heads)
    return int(2 * layers * width * next(model.parameters()).element_size())


def by_length(rows: Sequence[Ids], batch_size: int, *, alike: bool = False) -> Iterator[list[int]]:
    """Positions of `rows` in batches of similar length, longest first (so memory shows at once).

    With `alike`, of the same length.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    groups = groupby(order, key=lambda i: len(rows[i]) if alike else 0)
    for group in (list(places) for _, places in groups):
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def by_tokens(sizes: Sequence[int], tokens: int, rows: int | None = None) -> Iterator[list[int]]:
    """Positions in batches of similar size, largest first (so memory shows at once).

    A batch has at most so many tokens, padding included, and rows; one row is in it all the same.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    start = 0
    while start < len(order):
        fitting = max(1, tokens // sizes[order[start]])
        end = start + min(fitting, rows or fitting)
        yield order[start:end]
        start = end


@torch.no_grad()
def pads_left(model: nn.Module) -> bool:
    """Whether a prompt with padding in front gives the logits that it gives alone.

    Recurrent models read padding too, whatever the mask says. What it does to the logits where it
    is meant to be read is the scale.
    """
    device, plain = device_of(model), base_of(model)
    if not isinstance(plain, PreTrainedModel):
        return True
    words = [i % unwrapped(plain.get_input_embeddings()).num_embeddings for i in range(1, 9)]

    def last(ids: Ids, padding: int) -> Tensor:
        mask = torch.tensor([[0] * padding + [1] * (len(ids) - padding)], device=device)
        inputs = {"input_ids": torch.tensor([ids], device=device), "attention_mask": mask}
        if accepts(model, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logits: Tensor = model(**inputs).logits[0, -1].float()
        return logits

    with evaluating(model), without_cache(model):
        alone, read = last(words[4:], 0), last(words, 0)
        difference = (last(words, 4) - alone).norm()
        rounding = 4 * torch.finfo(next(model.parameters()).dtype).eps * alone.norm()
        # What is no number is not for padding to say.
        return not bool(difference > torch.maximum(0.1 * (read - alone).norm(), rounding))


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
