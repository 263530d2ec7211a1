"""Models as they are used for a while: below their adapters, without them, drawing, recomputing."""

import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from forgetless.core.errors import UserError
from forgetless.models.weights import hold_packing, is_offloaded


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever is drawn inside, the generators of Python, NumPy and torch go on as before.

    Those of every accelerator that this process sees are meant; their states lie with the CPU.
    """
    python, numpy = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cuda" if accelerator is None else accelerator.type
    devices = range(torch.accelerator.device_count())
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def source_of(model: nn.Module) -> str:
    """Where the base below a model was loaded from, a folder or a name on the hub; "" if unknown.

    The name holds the revision that `load_model` was given, which transformers forgets.
    """
    base = base_of(model)
    name, revision = getattr(base, "name_or_path", ""), getattr(base, "hub_revision", None)
    return f"{name}@{revision}" if name and revision else name


def base_of(model: nn.Module) -> nn.Module:
    """The model below PEFT's wrapper; a plain model is returned as it is."""
    if not isinstance(model, PeftModel):
        return model
    base: nn.Module = model.get_base_model()
    return base


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base alone; afterwards parameters need gradients exactly as before.

    PEFT's own `disable_adapter` lets every adapter weight train when it ends, frozen ones too.
    """
    needed = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        with ExitStack() as off:
            if isinstance(model, PeftModel):
                with warnings.catch_warnings():
                    # Where the dial turned the layers off, a classifier's new head stays on.
                    warnings.filterwarnings("ignore", "The model contains some adapter layers")
                    off.enter_context(model.disable_adapter())
            yield
    finally:
        for weight, need in needed:
            weight.requires_grad_(need)


@contextmanager
def as_trained(model: nn.Module) -> Iterator[nn.Module]:
    """The base in evaluation mode, without gradients, its adapters on; everything is restored."""
    modules = list(model.modules())
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in modules):
        raise UserError("adapters are merged into this model; call model.unmerge_adapter() first")
    if any(_has_no_weights(module) for module in modules):
        raise UserError("the model has weights on the meta device; load it first")
    hold_packing(model)
    with torch.inference_mode(False), evaluating(model):
        yield base_of(model)


@contextmanager
def as_base(model: nn.Module) -> Iterator[nn.Module]:
    """The same without adapters."""
    with as_trained(model) as base, adapter_off(model):
        yield base


def require_checkpointing(model: nn.Module) -> None:
    """Refuse a model that cannot recompute activations.

    Raises:
        UserError: transformers has it for other architectures only.
    """
    if not getattr(base_of(model), "supports_gradient_checkpointing", True):
        raise UserError(
            f"{type(base_of(model)).__name__} cannot recompute activations; set "
            "training.gradient_checkpointing to false"
        )


def checkpoint_activations(model: Any, on: bool = True) -> None:
    """Recompute activations in the backward pass of this model, or keep them again.

    Raises:
        UserError: the architecture cannot recompute.
    """
    require_checkpointing(model)
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()


def _has_no_weights(module: nn.Module) -> bool:
    """On the meta device for good; offloaded weights are loaded by the forward."""
    weights = module.parameters(recurse=False)
    return any(weight.is_meta for weight in weights) and not is_offloaded(module)


def unwrapped(module: nn.Module) -> Any:
    """The base's own module, where PEFT has put one around it."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below the base once, under the name it has without adapters."""
    return _walk(base_of(model), "", set())


# No closure: one that calls itself is a cycle, which would keep the model in memory after its end.
def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    if module in seen:
        return
    seen.add(module)
    if name:
        yield name, module
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)
