"""The anchored layer: a frozen start, the trained moves, and PEFT's hooks for them.

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

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forgetless.models import linear_weight

PREFIX = "base_model.model."
"""What PEFT puts before the name of every layer of the base."""

# Written as `peft_type` for anchored adapters, so that PEFT alone refuses the folder instead of
# loading the moves as if they were a whole LoRA.
ANCHORED_TYPE = "FORGETLESS_ANCHORED_LORA"


@dataclass
class StartConfig(LoraConfig):
    """PEFT's LoRA config, and how the adapter started (see `Start`)."""

    start: dict[str, Any] | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """What `adapter_config.json` holds: a plain LoRA's, unless the adapter is anchored."""
        values: dict[str, Any] = super().to_dict()
        if self.start and self.start["anchored"]:
            return values | {"peft_type": ANCHORED_TYPE}
        del values["start"]  # PEFT alone would warn of a key that it does not know
        return values


@dataclass(frozen=True)
class Start:
    """How an adapter started; kept beside its weights in `forgetless.json`.

    Attributes:
        method: a name of METHODS.
        trains: the factors that are trained, ("A", "B"), ("A",) or ("B",).
        anchored: whether the frozen start is needed beside the trained matrices.
        seed: what random starts were drawn with.
        options: the method's own options, as given.
    """

    method: str
    trains: tuple[str, ...]
    anchored: bool
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Start:
        """The start that `dataclasses.asdict` or its JSON describes."""
        return cls(**{**values, "trains": tuple(values["trains"])})

    @property
    def frozen(self) -> tuple[str, ...]:
        """PEFT's names of the matrices that are not trained."""
        return tuple(f"lora_{factor}" for factor in ("A", "B") if factor not in self.trains)


class Anchor(nn.Module):
    """The frozen start of one layer: buffers A0 (rank, in) and B0 (out, rank)."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("anchor_A", A)
        self.register_buffer("anchor_B", B)


class AnchoredVariant(LoraVariant):
    """PEFT's hook for one adapter of one layer: the anchored product in place of B A."""

    @staticmethod
    def factors(module: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
        """[A0 + dA ; dA] (2 rank, in) and [dB, B0] (out, 2 rank); B A is the move."""
        anchor = module.lora_anchor[adapter_name]
        dA = module.lora_A[adapter_name].weight
        dB = module.lora_B[adapter_name].weight
        return torch.cat([anchor.anchor_A + dA, dA]), torch.cat([dB, anchor.anchor_B], dim=1)

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """The layer's output (..., out) with the move added to the base's `result`."""
        A, B = AnchoredVariant.factors(module, active_adapter)
        scaling: float = module.scaling[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        return result + F.linear(F.linear(x, A), B) * scaling

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

    @staticmethod
    def supports_lora_conversion() -> bool:
        """PEFT's own conversion reads lora_A and lora_B alone; `export` is the exact way."""
        return False


def _moved(module: LoraLayer, adapter_name: str, weight: Tensor, sign: int) -> Tensor:
    delta = _delta_weight(module, adapter_name)
    if isinstance(module.get_base_layer(), Conv1D):
        delta = delta.T
    # One rounding: the sum is made in the adapter's precision and cast once.
    return (weight.to(delta.dtype) + sign * delta).to(weight.dtype)


def plain_factors(module: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of the plain LoRA that the adapter amounts to in one layer.

    Without the scaling. The rank is twice the adapter's where it is anchored.
    """
    if isinstance(module.lora_variant.get(adapter_name), AnchoredVariant):
        return AnchoredVariant.factors(module, adapter_name)
    return module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight


def _delta_weight(module: LoraLayer, adapter_name: str) -> Tensor:
    A, B = plain_factors(module, adapter_name)
    scaling: float = module.scaling[adapter_name]
    return B @ A * scaling


def adapted_layers(model: PeftModel, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """The layers that the adapter changes, by their names in the base model."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


@torch.no_grad()
def delta_weights(
    model: PeftModel, adapter_name: str = "default"
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer name, W, delta_W), both (out, in) in float32, one layer at a time."""
    for name, module in adapted_layers(model, adapter_name).items():
        weight = linear_weight(module.get_base_layer()).float()
        yield name, weight, _delta_weight(module, adapter_name).float()


def add_adapter(model: nn.Module, config: StartConfig, adapter_name: str) -> PeftModel:
    """PEFT's wrapping, without its random start leaving a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=adapter_name)
        model.add_adapter(adapter_name, config)
    model.set_adapter(adapter_name)
    return model


@torch.no_grad()
def install(
    module: LoraLayer, adapter_name: str, start: Start, A: Tensor, B: Tensor, anchor: Anchor | None
) -> None:
    """Put one layer's start in place of PEFT's."""
    module.lora_A[adapter_name].weight.copy_(A)
    module.lora_B[adapter_name].weight.copy_(B)
    if anchor is not None:
        if not hasattr(module, "lora_anchor"):
            module.lora_anchor = nn.ModuleDict()
            # Lets PEFT delete the anchor together with its adapter.
            module.other_param_names = (*module.other_param_names, "lora_anchor")
        module.lora_anchor[adapter_name] = anchor.to(module.lora_A[adapter_name].weight)
        module.lora_variant[adapter_name] = AnchoredVariant()
    if start.frozen:
        # PEFT honours this whenever it switches adapters or turns training on.
        module.frozen_peft_weight_names = module.frozen_peft_weight_names | {
            adapter_name: start.frozen
        }
        module._freeze_non_trainable_peft_weights(adapter_name)
