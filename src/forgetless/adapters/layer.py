"""Adapters of a PEFT model: their config, their layers, and how a start is put on a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn

from forgetless.adapters.anchored import Anchor, AnchoredVariant, low_rank_move
from forgetless.adapters.dora import dora_update, is_dora, set_magnitude
from forgetless.core.errors import UserError
from forgetless.models.weights import computing_device, hold_packing, linear_weight, untouched

_BITS_AND_BYTES = ("Linear4bit", "Linear8bitLt")

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
        if is_dora(module, adapter_name):
            delta = dora_update(module, adapter_name, weight)
        else:
            delta = low_rank_move(module, adapter_name)
        yield name, weight, delta.float()


def add_adapter(model: nn.Module, config: StartConfig, adapter_name: str) -> PeftModel:
    """PEFT's wrapping, without its random start leaving a trace in the global generator."""
    hold_packing(model)
    with untouched(model), torch.random.fork_rng(devices=[]):
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            model.set_adapter(adapter_name)
        else:
            model = get_peft_model(model, config, adapter_name=adapter_name)
    for module in adapted_layers(model, adapter_name).values():
        for part in (module.lora_A[adapter_name], module.lora_B[adapter_name]):
            if (
                part.weight.is_meta
            ):  # PEFT puts it where the weight of an offloaded layer is: nowhere
                part.to_empty(device=computing_device(module))
    return model


@torch.no_grad()
def install(
    module: LoraLayer, adapter_name: str, start: Start, A: Tensor, B: Tensor, anchor: Anchor | None
) -> None:
    """Put one layer's start in place of PEFT's."""
    _require_hooks(module)
    module.lora_A[adapter_name].weight.copy_(A)
    module.lora_B[adapter_name].weight.copy_(B)
    if anchor is not None:
        if not hasattr(module, "lora_anchor"):
            module.lora_anchor = nn.ModuleDict()
            # Lets PEFT delete the anchor together with its adapter.
            module.other_param_names = (*module.other_param_names, "lora_anchor")
        module.lora_anchor[adapter_name] = anchor.to(module.lora_A[adapter_name].weight)
        module.lora_variant[adapter_name] = AnchoredVariant()
    if is_dora(module, adapter_name):
        set_magnitude(module, adapter_name)
    if isinstance(module, TorchaoLoraLinear) and adapter_name in module.lora_variant:
        module.merge = _refuse_merge  # PEFT's asks no hook and would merge something else
    if start.frozen:
        # PEFT honours this whenever it switches adapters or turns training on.
        module.frozen_peft_weight_names = module.frozen_peft_weight_names | {
            adapter_name: start.frozen
        }
        module._freeze_non_trainable_peft_weights(adapter_name)


def _require_hooks(module: LoraLayer) -> None:
    """Anchored and frozen starts need a layer of PEFT that asks our hooks."""
    if not isinstance(module, Linear) and type(module).__name__ not in _BITS_AND_BYTES:
        raise UserError(
            f"PEFT adapts this base with {type(module).__name__}, which no start fits; load the "
            "base unquantised, or quantised with bitsandbytes or torchao"
        )


def _refuse_merge(*_: Any, **__: Any) -> None:
    raise UserError(
        "an adapter cannot be merged into torchao's quantised weights; serve the exported adapter "
        "beside the base, or merge it into the unquantised model"
    )
