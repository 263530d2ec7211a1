"""The anchored adapter of one layer: a frozen start, the trained moves, and PEFT's hooks for them.

Methods such as PiSSA or LoRA-Null start from B0 A0 != 0. Elsewhere that product is subtracted from
the stored weight; here the base is never touched. The start is a frozen *anchor* (A0, B0) and the
trained matrices are the *moves* dA and dB, both zero at step 0::

    W' = W + scaling * [(B0 + dB)(A0 + dA) - B0 A0]  =  W + scaling * [dB (A0 + dA) + B0 dA]
    y  = W x + scaling * [dB, B0] [A0 + dA ; dA] x

So step 0 and adapter-off are the base bit for bit, weight decay pulls towards the base, and the
result is a plain LoRA of rank 2r on the original base. Where the start's product is zero, or one
factor is frozen, the anchor cancels and PEFT's own LoRA layer of rank r does the same:

    B0 A0 = 0          W' = W + scaling * B A         A and B trained from (A0, B0)
    A frozen (dA = 0)  W' = W + scaling * dB A0       lora_A = A0 frozen, lora_B = dB
    B frozen (dB = 0)  W' = W + scaling * B0 dA       lora_B = B0 frozen, lora_A = dA
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.product import anchored_product
from forgetless.core.errors import UserError


class Anchor(nn.Module):
    """The frozen start of one layer: buffers A0 (rank, in) and B0 (out, rank)."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("anchor_A", A)
        self.register_buffer("anchor_B", B)


class AnchoredVariant(LoraVariant):
    """PEFT's hook for one adapter of one layer: the anchored product in place of B A."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """The layer's output (..., out) with the move added to the base's `result`."""
        anchor = module.lora_anchor[active_adapter]
        scaling: float = module.scaling[active_adapter]
        return anchored_product(
            result,
            module.lora_dropout[active_adapter](x),
            module.lora_A[active_adapter].weight,
            module.lora_B[active_adapter].weight,
            anchor.anchor_A,
            anchor.anchor_B,
            scaling,
        )

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with the move added, in the weight's own layout and dtype."""
        return _moved(module, active_adapter, orig_weight, sign=1)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the move to the weight in place."""
        orig_weight.data = _moved(module, active_adapter, orig_weight.data, sign=1)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with the move taken off again, up to the rounding of its dtype."""
        return _moved(module, active_adapter, orig_weight.data, sign=-1)


def _moved(module: LoraLayer, adapter_name: str, weight: Tensor, sign: int) -> Tensor:
    require_dense(weight)
    move = in_layout_of(module, low_rank_move(module, adapter_name))
    # One rounding: the sum is made in the adapter's precision and cast once.
    return (weight.to(move.dtype) + sign * move).to(weight.dtype)


def require_dense(weight: Tensor) -> None:
    """Refuse to merge into the packed numbers of a quantised weight."""
    if not weight.is_floating_point():
        raise UserError(
            f"cannot merge into a quantised weight ({weight.dtype}); serve the exported adapter "
            "beside the base, or merge it into the unquantised model"
        )


def in_layout_of(module: LoraLayer, move: Tensor) -> Tensor:
    """An (out, in) matrix as the layer stores it; Conv1D keeps the transpose."""
    return move.T if isinstance(module.get_base_layer(), Conv1D) else move


def is_anchored(module: LoraLayer, adapter_name: str) -> bool:
    """Whether the adapter has a frozen start in this layer."""
    return adapter_name in getattr(module, "lora_anchor", {})


def plain_factors(module: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of the plain LoRA that the adapter amounts to in one layer.

    Without the scaling. The rank is twice the adapter's where it is anchored:
    A = [A0 + dA ; dA] and B = [dB, B0].
    """
    dA, dB = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
    if not is_anchored(module, adapter_name):
        return dA, dB
    anchor = module.lora_anchor[adapter_name]
    return torch.cat([anchor.anchor_A + dA, dA]), torch.cat([dB, anchor.anchor_B], dim=1)


def low_rank_move(module: LoraLayer, adapter_name: str) -> Tensor:
    """The product scaling * B A of the plain factors, (out, in)."""
    A, B = plain_factors(module, adapter_name)
    scaling: float = module.scaling[adapter_name]
    return B @ A * scaling
