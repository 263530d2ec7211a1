"""Collecting statistics: which layers, in how many passes, and what to warn of."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
import transformers
from torch import Tensor, nn

from forgetless.errors import UserError
from forgetless.models import as_base, linear_weight, target_layers
from forgetless.statistics.collector import Collector
from forgetless.statistics.moments import Spilled, Statistics

_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12} | {
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40
}  # fmt: skip


def collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    target_modules: str | Sequence[str] = "all-linear",
    memory_budget: int | str | None = None,
) -> Statistics:
    """Second moments of the inputs of every target layer, over all tokens that are not padding.

    Which rows of an input count:

    - inputs (batch, tokens, in), or the same flattened to (batch * tokens, in): those where
      `attention_mask` is 1. Without a mask (text of equal length, image patches) all of them.
    - in the decoder of an encoder-decoder: those where `decoder_attention_mask` is 1, without one
      those whose label is not -100; cross-attention's keys and values follow the encoder's mask.
    - pooled inputs (batch, in): one row a sequence.

    Batch size, padding side and number of passes do not change the result beyond the rounding of
    the model's own forward: 1e-12 relative in float64, about 1e-6 in float32.

    Args:
        model: any transformers model. It is left as it was found. Of a PeftModel the base is
            measured, adapters off.
        batches: keyword arguments of the model's forward. Left padding is moved to the right, so
            that every token has the position it has without padding. Arguments that the forward
            does not know are dropped, `labels` too unless the model is an encoder-decoder.
        target_modules: as in `target_layers`.
        memory_budget: bytes, or text such as "2GiB", for the matrices held at a time. Batches are
            then run several times, each time only as deep as needed, and finished matrices wait
            on disk (in the system's temporary folder). None holds all of them and needs one pass.

    Returns:
        One entry a layer that was called. Warns of layers that never were, and of layers that
        saw fewer tokens than they have inputs.

    Raises:
        UserError: no batches or only padding, a budget too small for the largest layer, merged
            adapters, NaN or infinity in the inputs of a layer, or rows that cannot be matched to
            the mask.
    """
    layers = target_layers(model, target_modules)
    sizes = {name: linear_weight(layer).shape[1] for name, layer in layers.items()}
    budget = None if memory_budget is None else _parse_budget(memory_budget, sizes)
    with as_base(model) as base:
        collector = Collector(base, layers)
        if budget is None:
            collector.run(batches, layers)
            matrices: Mapping[str, Tensor] = collector.take()
        else:
            matrices = _in_passes(collector, batches, sizes, budget)
    leader = {name: collector.leader[name] for name in layers if name in collector.leader}
    tokens = {n: collector.tokens[first] for n, first in leader.items() if first in matrices}
    if not tokens:
        raise UserError(
            "no token reached a target layer: the batches are all padding, or the model's forward "
            "calls none of the layers"
        )
    _warn_of_gaps(layers, sizes, tokens)
    metadata = {
        "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        "tokens": max(tokens.values()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return Statistics.of(matrices, {name: leader[name] for name in tokens}, tokens, metadata)


def _in_passes(
    collector: Collector,
    batches: Iterable[Mapping[str, Tensor]],
    sizes: Mapping[str, int],
    budget: int,
) -> Mapping[str, Tensor]:
    """As many matrices a pass as the budget allows; finished ones are moved to disk."""
    batches = list(batches) if iter(batches) is batches else batches
    collector.learn(batches)
    finished = Spilled()
    for names in _passes(collector.groups(), sizes, budget):
        collector.run(batches, names)
        finished.add(collector.take())
    return finished


def _passes(
    groups: Iterable[Sequence[str]], sizes: Mapping[str, int], budget: int
) -> list[list[str]]:
    """Layer names of each pass, in call order; layers of one group share a matrix."""
    passes: list[list[str]] = []
    free = 0
    for group in groups:
        need = _matrix_bytes(sizes[group[0]])
        if need > free:
            passes.append([])
            free = budget
        passes[-1].extend(group)
        free -= need
    return passes


def _matrix_bytes(size: int) -> int:
    return 8 * size * size


def _parse_budget(budget: int | str, sizes: Mapping[str, int]) -> int:
    """The budget in bytes, at least one matrix of the widest layer."""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", budget.lower())
        if not match or (match[2] or "b") not in _UNITS:
            raise UserError(
                f"memory_budget must be bytes or text such as '2GiB' or '500MB', got {budget!r}"
            )
        budget = int(float(match[1]) * _UNITS[match[2] or "b"])
    widest = max(sizes, key=lambda name: sizes[name])
    need = _matrix_bytes(sizes[widest])
    if budget < need:
        raise UserError(
            f"memory_budget must be at least {need} bytes ({need / 2**20:.1f} MiB), for the "
            f"matrix of layer {widest!r} with {sizes[widest]} inputs, got {budget} bytes"
        )
    return budget


def _warn_of_gaps(
    layers: Iterable[str], sizes: Mapping[str, int], tokens: Mapping[str, int]
) -> None:
    unseen = [name for name in layers if name not in tokens]
    if unseen:
        warnings.warn(
            f"no input reached {len(unseen)} of the target layers, {unseen[0]!r} among them; they "
            "have no statistics",
            stacklevel=3,
        )
    few = [name for name, count in tokens.items() if count < sizes[name]]
    if few:
        warnings.warn(
            f"{len(few)} of {len(tokens)} layers saw fewer tokens than they have inputs "
            f"({few[0]!r}: {tokens[few[0]]} tokens, {sizes[few[0]]} inputs), so part of their null "
            "space is arbitrary; use more or longer samples",
            stacklevel=3,
        )
