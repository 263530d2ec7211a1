"""The weights of linear layers as matrices, whatever they are stored in.

Plain parameters are given as they are, bitsandbytes' and torchao's as a dequantised copy; the layer
itself is never changed. What cannot be read as a whole matrix (a shard, a weight that lies on no
device, another quantiser's packing) is named with the way out.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from forgetless.core.errors import UserError

DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The number formats in which a weight is simply its values."""

_PACKED = ("qweight", "W_q", "weight_packed", "codebooks", "weight_scale_inv")
"""Attributes of the layers of GPTQ, AWQ and AutoRound, HQQ, compressed-tensors, AQLM, FP8."""

_QUANTISE = (
    "load the unquantised model, or quantise it with bitsandbytes (load_in_4bit, load_in_8bit) or "
    "torchao's weight-only int8"
)
_BEFORE_WRAPPING = (
    "attach before the model is wrapped or sharded (each process computes the same start), or "
    "attach once, forgetless.save the start, and forgetless.load it before wrapping"
)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer that an adapter can sit on.

    A router that gives the chosen experts beside its product is none, whatever its class.
    """
    return isinstance(module, nn.Linear | Conv1D) and _gives_product_alone(module)


def _gives_product_alone(module: Any) -> bool:
    """Whether (rows, in) give (rows, out), tried without numbers on a class of a model's own."""
    kind: Any = type(module)
    if kind in (nn.Linear, Conv1D) or not kind.__module__.startswith("transformers"):
        return True
    outputs, inputs = weight_shape(module)
    twin = copy.copy(module)
    twin._parameters = {
        name: None if weight is None else nn.Parameter(torch.empty(weight.shape, device="meta"))
        for name, weight in module._parameters.items()
    }
    try:
        found = kind.forward(twin, torch.empty(1, inputs, device="meta"))
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(found, Tensor) and found.shape == (1, outputs)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, also where its weight is packed or not loaded."""
    layer: Any = _below_adapters(module)
    if isinstance(layer, Conv1D):
        in_features, out_features = layer.weight.shape
        return out_features, in_features
    return layer.out_features, layer.in_features


def linear_weight(module: nn.Module) -> Tensor:
    """W (out, in) of a linear layer: a view of the parameter itself, also for GPT-2's Conv1D.

    A quantised weight (bitsandbytes, torchao) comes as a new tensor with the values that the layer
    computes with, an offloaded one from where it is kept. A layer that carries PEFT adapters gives
    the weight of its base layer.

    Raises:
        TypeError: the module is not a linear layer, or its weight is packed in another way.
    """
    module = _below_adapters(module)
    if not is_linear(module):
        raise TypeError(f"need a Linear or Conv1D layer, got {type(module).__name__}")
    hook = _offloading(module)
    weight: Any = module.weight if hook is None else hook.weights_map["weight"]
    if is_quantised(module):
        dense = _dequantised(module)
    elif weight.dtype in DENSE:
        dense = weight
    else:
        raise TypeError(
            f"the weight of this {type(module).__name__} is quantised ({weight.dtype}) in a form "
            f"that cannot be read; {_QUANTISE}"
        )
    return dense.T if isinstance(module, Conv1D) else dense


def is_quantised(module: nn.Module) -> bool:
    """Whether the layer's weight is packed by bitsandbytes or torchao."""
    weight: Any = _below_adapters(module).weight
    return _bits_and_bytes(weight) or type(weight).__module__.startswith("torchao.")


def _bits_and_bytes(weight: Any) -> bool:
    """Packed by bitsandbytes; its parameters are plain ones until they are first moved."""
    return type(weight).__name__ in ("Params4bit", "Int8Params") and weight.dtype not in DENSE


@torch.no_grad()
def _dequantised(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    if not _bits_and_bytes(weight):
        values: Tensor = weight.dequantize()
        return values
    import bitsandbytes

    if type(weight).__name__ == "Params4bit":
        values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        return values
    # The layer takes the scales over from its weight in its first forward.
    state: Any = module.state
    scales = weight.SCB if state.SCB is None else state.SCB
    values = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales)
    return values


def unreadable(module: nn.Module) -> str | None:
    """Why no adapter can start on this layer, and what to do; None where one can."""
    weight: Any = _below_adapters(module).weight
    if isinstance(weight, DTensor):
        return f"is sharded (FSDP2 or tensor parallel); {_BEFORE_WRAPPING}"
    if hasattr(weight, "ds_id"):
        return f"is sharded (DeepSpeed ZeRO-3); {_BEFORE_WRAPPING}"
    if is_offloaded(module):
        dense = not is_quantised(module) and weight.dtype in DENSE
        return None if dense else "is quantised and offloaded; load it quantised on one device"
    if weight.is_meta:
        return (
            "has no weights: it is on the meta device; load them first (from_pretrained, or "
            "to_empty and load_state_dict)"
        )
    if _is_repacked(weight):
        return (
            "was repacked by bitsandbytes for inference on this processor, and lets no gradient "
            "through any more; load the base again and attach before evaluating it (an attached "
            "model is not repacked)"
        )
    if not is_quantised(module) and weight.dtype not in DENSE:
        return f"is quantised ({weight.dtype}) in an unknown form; {_QUANTISE}"
    return None


def _is_repacked(weight: Any) -> bool:
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False) is True


def hold_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from rewriting its 4-bit weights in the first evaluation on a CPU.

    On processors with bfloat16 instructions it repacks them for inference, with rounded scales,
    for good, and the layer then lets no gradient through.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put bitsandbytes' 8-bit weights back after PEFT has looked at them.

    To read one on a CPU for DoRA, PEFT replaces it by a copy that has lost its scales.
    """
    layers: list[Any] = [m for m in model.modules() if type(m).__name__ == "Linear8bitLt"]
    layers = [layer for layer in layers if hasattr(layer, "state")]  # PEFT's has the same name
    kept = [(layer, layer.weight, layer.state.CB, layer.state.SCB) for layer in layers]
    scales = [getattr(layer.weight, "SCB", None) for layer in layers]
    try:
        yield
    finally:
        for (layer, weight, CB, SCB), own in zip(kept, scales, strict=True):
            layer.weight, layer.state.CB, layer.state.SCB = weight, CB, SCB
            weight.SCB = own


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the module's weights for each forward only."""
    return _offloading(module) is not None


def computing_device(module: nn.Module) -> torch.device:
    """Where the layer computes, also when its weight lies elsewhere until then."""
    hook = _offloading(module)
    if hook is not None:
        return torch.device(hook.execution_device)
    device: torch.device = _below_adapters(module).weight.device
    return device


def _offloading(module: nn.Module) -> Any:
    """The hook that loads the module's weights for each forward; None without one."""
    hook = getattr(_below_adapters(module), "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((each for each in hooks if getattr(each, "offload", False)), None)


def require_readable(model: nn.Module) -> None:
    """Refuse a model whose layers are wrapped or packed in a way that hides their weights.

    Raises:
        UserError: the model is wrapped by FSDP, or quantised by anything but bitsandbytes and
            torchao; the message names it.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UserError(f"the model is sharded by FSDP; {_BEFORE_WRAPPING}")
        if any(hasattr(module, attribute) for attribute in _PACKED):
            raise UserError(
                f"the base is quantised with {_quantiser(model, module)}: the weight of {name!r} "
                f"cannot be read as a matrix; {_QUANTISE}"
            )


def _quantiser(model: nn.Module, module: nn.Module) -> str:
    """What the model's config calls the quantisation, or the kind of the layer."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    values = config if isinstance(config, dict) else vars(config) if config is not None else {}
    method = values.get("quant_method")
    named = str(getattr(method, "value", method)).upper() if method else ""
    return named or type(module).__name__


def _below_adapters(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
