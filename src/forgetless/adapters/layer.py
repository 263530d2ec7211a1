"""The layers of an adapter: how it started, how a start is put on them, and what they then say."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn

from forgetless.adapters.anchored import (
    Anchor,
    AnchoredVariant,
    in_layout_of,
    is_anchored,
    low_rank_move,
)
from forgetless.adapters.dora import DoraVariant, dora_update, is_dora, set_magnitude
from forgetless.core.errors import UserError
from forgetless.models.weights import linear_weight

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

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, beside the weights; without them, as PEFT asks to convert a start, refused."""
        if self.start and self.start["anchored"] and "auto_mapping_dict" not in kwargs:
            raise UserError(
                "the config of an anchored adapter says nothing without its weights, and there is "
                "no initial adapter to take out of it: forgetless.export writes the plain LoRA"
            )
        super().save_pretrained(save_directory, **kwargs)


@dataclass(frozen=True)
class Start:
    """How an adapter started; kept beside its weights in `forgetless.json`.

    Attributes:
        method: a name of METHODS, or that of a `Method` of one's own.
        trains: the factors that are trained, ("A", "B"), ("A",) or ("B",).
        anchored: whether the frozen start is needed beside the trained matrices.
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


def adapted_layers(
    model: PeftModel | LoraModel, adapter_name: str = "default"
) -> dict[str, LoraLayer]:
    """The layers that the adapter changes, by their names in the base model."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in (model.model if isinstance(model, LoraModel) else model).named_modules()
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


@torch.no_grad()
def install(
    module: LoraLayer, adapter_name: str, start: Start, A: Tensor, B: Tensor, anchor: Anchor | None
) -> None:
    """Put one layer's start in place of PEFT's."""
    if not isinstance(module, Linear) and type(module).__name__ not in _BITS_AND_BYTES:
        raise UserError(
            f"PEFT adapts this base with {type(module).__name__}, which no start fits; load the "
            "base unquantised, or quantised with bitsandbytes or torchao"
        )
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
    if not isinstance(module, _WithAnchors):
        kind: Any = type(module)
        module.__class__ = _class_with_anchors(kind)
    if isinstance(module, TorchaoLoraLinear) and adapter_name in module.lora_variant:
        module.merge = _refuse_merge  # PEFT's asks no hook and would merge something else
    if start.frozen:
        # PEFT honours this whenever it switches adapters or turns training on.
        module.frozen_peft_weight_names = module.frozen_peft_weight_names | {
            adapter_name: start.frozen
        }
        module._freeze_non_trainable_peft_weights(adapter_name)


def at_step_zero(A: Tensor, B: Tensor, start: Start) -> tuple[Tensor, Tensor, Anchor | None]:
    """What lora_A, lora_B and the anchor are at step 0 of a start; the table is in `anchored`."""
    if start.anchored:
        return torch.zeros_like(A), torch.zeros_like(B), Anchor(A, B)
    if start.trains == ("A", "B"):
        return A, B, None
    return (
        (A, torch.zeros_like(B), None) if start.trains == ("B",) else (torch.zeros_like(A), B, None)
    )


def copy_start(module: LoraLayer, adapter_name: str, to: str, start: Start) -> None:
    """Put one adapter's start on another, which has PEFT's own in this layer."""
    if start.anchored:
        anchor = module.lora_anchor[adapter_name]
        A, B = anchor.anchor_A, anchor.anchor_B
    else:
        has_it = to if start.trains == ("A", "B") else adapter_name
        A, B = module.lora_A[has_it].weight, module.lora_B[has_it].weight
    install(module, to, start, *at_step_zero(A.detach().clone(), B.detach().clone(), start))


def _refuse_merge(*_: Any, **__: Any) -> None:
    raise UserError(
        "an adapter cannot be merged into torchao's quantised weights; serve the exported adapter "
        "beside the base, or merge it into the unquantised model"
    )


# ---- what PEFT's layers say of an adapter whose A and B are not all of it -----------------------


class _WithAnchors:
    """Methods of PEFT's layers that read or write A and B alone, put right for anchored ones."""

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """W' - W of one adapter, as the layer stores its weight."""
        if isinstance(self.lora_variant.get(adapter), DoraVariant):
            weight = linear_weight(self.get_base_layer())
            return in_layout_of(self, dora_update(self, adapter, weight))
        if is_anchored(self, adapter):
            return in_layout_of(self, low_rank_move(self, adapter))
        delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        return delta

    def _load_from_state_dict(self: Any, state: Any, prefix: str, *rest: Any) -> None:
        anchors = f"{prefix}lora_anchor."
        given = {
            key.removeprefix(anchors).split(".")[0] for key in state if key.startswith(anchors)
        }
        own = set(getattr(self, "lora_anchor", ()))
        if given - own:
            rest[-1].append(
                f"{prefix}lora_A and lora_B belong to an anchor, and the adapter in the model has "
                "none; load the anchored adapter with forgetless.load under a name of its own"
            )
        if any(f"{prefix}lora_A.{name}.weight" in state for name in own - given):
            warnings.warn(
                "the A and B of an anchored adapter are loaded without an anchor, so they must be "
                "moves from its own; load any other adapter with forgetless.load under a name of "
                "its own",
                stacklevel=2,
            )
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[misc]

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _blank, (type(self).__mro__[2],), self.__dict__


def _refused(name: str) -> Callable[..., Any]:
    """A method of PEFT's layers that would overwrite A and B of an anchored adapter."""

    def method(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if is_anchored(self, adapter_name):
            raise UserError(
                f"{name} would leave the anchor of {adapter_name!r} behind; delete the adapter and "
                "attach it again with forgetless.attach"
            )
        return getattr(super(type(self), self), name)(adapter_name, *args, **kwargs)

    method.__doc__ = f"PEFT's `{name}`, refused for an anchored adapter."
    return method


_STARTS = ("corda", "loftq", "lora_ga", "mica", "olora", "orthogonal", "pissa")
_OVERWRITE = ("reset_lora_parameters", "update_layer", *(f"{name}_init" for name in _STARTS))


@cache
def _class_with_anchors(kind: Any) -> Any:
    """The class that PEFT chose for a layer, with the methods above."""
    overwriting = {name: _refused(name) for name in _OVERWRITE if hasattr(kind, name)}
    names = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_WithAnchors, kind), names | overwriting)


def _blank(kind: Any) -> Any:
    """A layer before its contents, for copies."""
    made = _class_with_anchors(kind)
    return made.__new__(made)
