"""DoRA on any start: the length of every row of the weight is trained beside its direction.

With M = scaling * B A of the plain LoRA that the adapter amounts to, and m the trained lengths::

    W' = diag(m / n) (W + M),    n = lengths of the rows of W + M, taken as constants

m starts as the lengths of the rows of W. M is zero at step 0 for every start, anchored ones too,
so m / n is exactly one and the output is the base bit for bit. Source: Liu et al. 2024, "DoRA:
Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353; PEFT reads the exported adapter with its
own DoRA layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

from forgetless.adapters.anchored import (
    AnchoredVariant,
    in_layout_of,
    is_anchored,
    low_rank_move,
    plain_factors,
    require_dense,
)
from forgetless.core.errors import UserError
from forgetless.models.weights import linear_weight


class DoraVariant(LoraVariant):
    """PEFT's hook for one DoRA adapter of one layer, anchored or not.

    PEFT's own hook takes the first lengths in the weight's dtype and the later ones in the
    adapter's, so that with a bfloat16 base its step 0 is not the base.
    """

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """The layer's output (..., out); dropout acts on the adapter's input alone."""
        layer = module.get_base_layer()
        alone = result
        if active_adapter != next(n for n in module.active_adapters if n in module.lora_A):
            # The stretch is one of W + M, and `result` has other adapters' moves in it already.
            alone = layer(x.to(layer.weight.dtype) if layer.weight.is_floating_point() else x)
        product = alone if layer.bias is None else alone - layer.bias
        if is_anchored(module, active_adapter):
            moved = AnchoredVariant.forward(module, active_adapter, x, product)
        else:
            A, B = plain_factors(module, active_adapter)
            x = module.lora_dropout[active_adapter](x)
            moved = product + F.linear(F.linear(x, A), B) * module.scaling[active_adapter]
        return result + (_stretch(module, active_adapter) * moved - product)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W' in the weight's own layout and dtype."""
        require_dense(orig_weight)
        if module.merged_adapters:
            raise UserError(
                "a DoRA adapter stretches the weight and can only be merged first; call "
                "model.unmerge_adapter() before"
            )
        stretch = in_layout_of(module, _stretch(module, active_adapter).detach()[:, None])
        module._cache_store(_cache_key(active_adapter), stretch)
        move = in_layout_of(module, low_rank_move(module, active_adapter))
        return (stretch * (orig_weight.to(move.dtype) + move)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Put W' in the place of W."""
        orig_weight.data = DoraVariant.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W again, up to the rounding of its dtype."""
        stretch: Tensor = module._cache_pop(_cache_key(active_adapter))
        move = in_layout_of(module, low_rank_move(module, active_adapter))
        weight = orig_weight.data
        return (weight.to(move.dtype) / stretch - move).to(weight.dtype)

    @staticmethod
    def supports_lora_conversion() -> bool:
        """A stretched weight is no low-rank update."""
        return False


def _cache_key(adapter_name: str) -> str:
    return f"{adapter_name}-stretch"


def _stretch(module: LoraLayer, adapter_name: str) -> Tensor:
    """The ratio m / n, (out,); gradients reach m alone."""
    magnitude: Tensor = module.lora_magnitude_vector[adapter_name].weight
    return magnitude / row_lengths(module, adapter_name)


@torch.no_grad()
def row_lengths(module: LoraLayer, adapter_name: str) -> Tensor:
    """The length of every row of W + M, (out,), in the adapter's dtype."""
    with torch.autocast(module.lora_A[adapter_name].weight.device.type, enabled=False):
        move = low_rank_move(module, adapter_name)
        weight = linear_weight(module.get_base_layer()).to(move)
        lengths: Tensor = torch.linalg.vector_norm(weight + move, dim=1)
    return lengths


def is_dora(module: LoraLayer, adapter_name: str) -> bool:
    """Whether the adapter trains lengths of its own in this layer."""
    return adapter_name in module.lora_magnitude_vector


@torch.no_grad()
def set_magnitude(module: LoraLayer, adapter_name: str) -> None:
    """Let m start as the lengths of the rows, and put the hook in PEFT's place."""
    magnitude = module.lora_magnitude_vector[adapter_name]
    magnitude.weight.copy_(row_lengths(module, adapter_name))
    module.lora_variant[adapter_name] = DoraVariant()


def dora_update(module: LoraLayer, adapter_name: str, weight: Tensor) -> Tensor:
    """W' - W, (out, in)."""
    move = low_rank_move(module, adapter_name)
    stretch = _stretch(module, adapter_name)[:, None]
    return stretch * (weight.to(move.dtype) + move) - weight.to(move.dtype)
