"""Which rows of a layer's input are tokens, and batches whose padding is on the right."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, arange, nn

from forgetless.core.errors import UserError
from forgetless.models.state import unwrapped


class TokenRows:
    """Which rows of a layer's input are tokens and not padding, for one batch.

    Args:
        encoder: a (batch, tokens) mask; None where every row is a token.
        decoder: the same for an encoder-decoder's decoder.
    """

    def __init__(self, encoder: Tensor | None = None, decoder: Tensor | None = None) -> None:
        self._encoder, self._decoder = (
            None
            if mask is None
            else (mask.shape, None if mask.all() else mask.flatten().nonzero().squeeze(1))
            for mask in (encoder, decoder)
        )
        self._in_decoder = False
        self._encoder_states: Tensor | None = None

    def enter_decoder(self, encoder_states: Tensor | None) -> None:
        self._in_decoder, self._encoder_states = True, encoder_states

    def of(self, name: str, x: Tensor) -> Tensor:
        """The rows that count, (tokens, in)."""
        states, rows = self._encoder_states, x.reshape(-1, x.shape[-1])
        is_cross = states is not None and states.data_ptr() == x.data_ptr()
        mask = self._decoder if self._in_decoder and not is_cross else self._encoder
        if mask is None:
            return rows
        (batch, tokens), kept = mask
        shape = tuple(x.shape[:-1])
        if shape in ((batch, tokens), (batch, 1, tokens), (batch * tokens,)):
            return rows if kept is None else rows[kept.to(rows.device)]
        if shape == (batch,):  # pooled: one row a sequence
            return rows
        if shape[0] == 1 and len(rows) != batch * tokens:  # a table, of which each sequence reads
            return rows.repeat(batch, 1)
        if kept is None:
            return rows
        raise UserError(
            f"layer {name!r} gets inputs of shape {tuple(x.shape)}, which cannot be matched to the "
            f"{batch} x {tokens} attention mask; pass batches without padding"
        )


def prepare(
    batch: Mapping[str, Tensor],
    base: nn.Module,
    targets: set[nn.Module],
    skip_first: int = 0,
    *,
    for_loss: bool = False,
) -> tuple[dict[str, Any], TokenRows]:
    """The forward's arguments on the model's device, padding on the right, and the masks.

    Other arguments than the forward's are dropped, the output head is left out if no target lies
    in it, and `skip_first` tokens of every sequence do not count. `for_loss` keeps the labels and
    has the whole output computed.
    """
    if not isinstance(batch, Mapping) or not any(isinstance(v, Tensor) for v in batch.values()):
        raise TypeError(
            "a batch must be a mapping of tensors such as {'input_ids': ..., 'attention_mask': "
            f"...}}, got {type(batch).__name__}"
        )
    accepted = inspect.signature(base.forward).parameters
    device, dtype = device_and_dtype(base)
    anything = not any(p.kind == p.POSITIONAL_OR_KEYWORD for p in accepted.values())
    given: dict[str, Any] = {n: v for n, v in batch.items() if anything or n in accepted}
    for name, value in given.items():
        if isinstance(value, Tensor):  # real-valued inputs, not masks, in the model's dtype
            cast = value.is_floating_point() and not name.endswith("mask")
            given[name] = value.to(device, dtype if cast else value.dtype)
    is_pair = is_encoder_decoder(base)
    if not is_pair and not for_loss:
        given.pop("labels", None)
    rows = _pad_right(given, is_pair, skip_first)
    if "use_cache" in accepted:
        given["use_cache"] = False
    if "logits_to_keep" in accepted and not for_loss and not _reads_head(base, targets):
        given["logits_to_keep"] = 1
    return given, rows


def _reads_head(base: nn.Module, targets: set[nn.Module]) -> bool:
    """Whether a target is the output head, or lies between the last block and the head."""
    head = getattr(base, "get_output_embeddings", lambda: None)()
    inner = getattr(base, "base_model", base)
    return (head is not None and unwrapped(head) in targets) or not targets <= {*inner.modules()}


def device_and_dtype(base: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the inputs go, and the number format of those that are real-valued.

    Offloaded weights are nowhere between two forwards; their hooks move the inputs themselves.
    """
    weights = [weight for weight in base.parameters() if weight.is_floating_point()]
    weight = next((weight for weight in weights if not weight.is_meta), weights[0])
    return weight.device if not weight.is_meta else torch.device("cpu"), weight.dtype


def is_encoder_decoder(base: nn.Module) -> bool:
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))


def _pad_right(given: dict[str, Any], is_pair: bool, skip_first: int) -> TokenRows:
    """Move leading padding to the end of its row, in place, and give the masks that result."""
    names = [name for name, value in given.items() if isinstance(value, Tensor)]
    decoder_names = [n for n in names if is_pair and (n.startswith("decoder_") or n == "labels")]
    encoder = _checked_mask(given.get("attention_mask"), "attention_mask")
    decoder = _checked_mask(given.get("decoder_attention_mask"), "decoder_attention_mask")
    if is_pair and decoder is None and "labels" in given:
        decoder = given["labels"] != -100
    encoder = _shift(given, [n for n in names if n not in decoder_names], encoder)
    decoder = _shift(given, decoder_names, decoder)
    if skip_first:
        encoder = _without_first(encoder, given, "", skip_first)
        decoder = _without_first(decoder, given, "decoder_", skip_first) if is_pair else None
    return TokenRows(encoder, decoder)


def _without_first(
    mask: Tensor | None, given: Mapping[str, Any], prefix: str, count: int
) -> Tensor:
    """A mask without the first `count` tokens of each row, of the inputs' shape if there is none.

    Raises:
        UserError: the inputs are no tokens.
    """
    if mask is None:
        inputs = given.get(f"{prefix}input_ids", given.get(f"{prefix}inputs_embeds"))
        if not isinstance(inputs, Tensor):
            raise UserError(
                "skip_first leaves out the first tokens of texts, and a batch has neither "
                f"{prefix}input_ids nor an attention mask; use skip_first=0"
            )
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    kept = mask.clone()
    kept[:, :count] = False
    return kept


def _checked_mask(mask: Any, name: str) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(f"{name} must be (batch, tokens) with 1 for real tokens, got {shape}")
    return mask != 0


def _shift(given: dict[str, Any], names: Iterable[str], mask: Tensor | None) -> Tensor | None:
    if mask is None or bool(mask[:, 0].all()):
        return mask
    length = mask.shape[1]
    first = mask.int().argmax(dim=1, keepdim=True)
    order = (arange(length, device=mask.device) + first) % length
    rows = arange(len(mask), device=mask.device)[:, None]
    for name in names:
        if given[name].shape[:2] == mask.shape:
            given[name] = given[name][rows, order]
    return mask[rows, order]
