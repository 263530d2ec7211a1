"""`dial`: how much of a trained update to use, from none of it (the base) to all, and beyond.

The whole update is scaled, W + s · delta_W, and never A and B each, which would give s². A plain
LoRA, anchored or not, is turned by its scaling; an adapter of another kind, such as DoRA, by
mixing the layer's output with the base's, which for these is the same: W' x = W x + delta_W x.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from forgetless.adapters.anchored import AnchoredVariant, is_anchored
from forgetless.adapters.folders import WEIGHTS_FILE, without_new_head, write_weights
from forgetless.adapters.layer import adapted_layers
from forgetless.core.errors import UserError, first_few
from forgetless.core.tensors import read_tensors


@contextmanager
def dial(model: nn.Module, scale: float, *, base: nn.Module | None = None) -> Iterator[nn.Module]:
    """Within it, the model's trained update counts `scale` times.

    At 0 the model is the base bit for bit, at 1 the adapter as it is; at s each adapted layer is
    W + s · delta_W. A negative scale goes the other way. Where modules were trained in whole
    beside the adapter, they are mixed likewise, but for the new head of a classifier: that stays as
    it was trained, and the backbone alone is turned.

    Args:
        model: a PeftModel, whose active LoRA adapters are turned; or, with `base`, a model that
            was tuned in whole.
        scale: any finite number.
        base: the untouched model that a model tuned in whole came from; each of its weights W0
            becomes W0 + scale · (W - W0), as in WiSE-FT.

    Yields:
        The model. Afterwards all is as it was before, bit for bit.

    Raises:
        UserError: a scale that is no finite number, no LoRA adapter, adapters that are merged into
            the weights, or an adapter that trains more than a scale can turn.

    Reference:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UserError(f"scale must be a finite number, 0 for the base, got {scale!r}")
    with ExitStack() as undo:
        if base is None:
            _turn_adapters(model, scale, undo)
        else:
            _turn_weights(model, base, scale, undo)
        yield model
        if _merged(model):
            raise UserError(
                "the adapter was merged while it was dialled; call model.unmerge_adapter() before "
                "the dial ends, or keep the merged copy of model.merge_and_unload()"
            )


@contextmanager
def residual(model: PeftModel, adapter_name: str = "default") -> Iterator[PeftModel]:
    """Within it, the model is its base without the adapter's start: W - scaling · B0 A0.

    What the papers call the residual model: the weights that their methods freeze, alone.

    Raises:
        UserError: the adapter has no start to take away: its start is zero, or, where A or B is
            frozen, it was never kept.

    Reference:
        Tang et al. 2025, "LoRA-Null", arXiv:2503.02659, figure 5.
    """
    layers = adapted_layers(model, adapter_name).values()
    if not all(is_anchored(layer, adapter_name) for layer in layers):
        raise UserError(
            f"adapter {adapter_name!r} has no anchored start, so there is no residual to look at; "
            "those of pissa, milora, intermediate, lora_null_v1 and their like have one"
        )
    with ExitStack() as undo:
        for layer in layers:
            A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            undo.callback(setattr, A, "data", A.data)
            undo.callback(setattr, B, "data", B.data)
            # dB (A0 + dA) + B0 dA with dA = 0 and dB = -B0 is -B0 A0.
            A.data, B.data = torch.zeros_like(A), -layer.lora_anchor[adapter_name].anchor_B
        yield model


def scale_folder(folder: str | Path, scale: float) -> None:
    """Make the plain LoRA in a folder the one that `dial` gives at a scale, by its B.

    The new head of a classifier stays.

    Raises:
        UserError: a DoRA, or modules that were trained in whole: no scale of B turns those.
    """
    folder = Path(folder)
    state = read_tensors(folder / WEIGHTS_FILE, finite=True)
    whole = [key for key in state if ".lora_A." not in key and ".lora_B." not in key]
    more = without_new_head(whole, folder)
    if more:
        raise UserError(
            f"this adapter at the scale {scale:g} is no LoRA, for it has {first_few(more)}; use it "
            "with forgetless.dial, or merge it within the dial (merge_and_unload)"
        )
    scaled = {key: t * scale if ".lora_B." in key else t for key, t in state.items()}
    write_weights(scaled, folder)


def _turn_adapters(model: nn.Module, scale: float, undo: ExitStack) -> None:
    """Scale every active LoRA adapter, and what was trained in whole beside it."""
    layers = _lora_layers(model)
    _check_turnable(model, layers, scale)
    if scale == 1:
        return
    for layer in layers:
        for name in layer.active_adapters:
            if name in layer.scaling:
                _turn_layer(layer, name, scale, undo)
    if not _is_classifier(model):
        wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
        for wrapper in wrappers:
            for name in set(wrapper.active_adapters) & set(wrapper.modules_to_save):
                trained = wrapper.modules_to_save[name].parameters()
                _mix(zip(trained, wrapper.original_module.parameters(), strict=True), scale, undo)


def require_turnable(model: nn.Module) -> None:
    """Refuse a model whose adapters `dial` cannot turn to every scale.

    Raises:
        UserError: as `dial`.
    """
    _check_turnable(model, _lora_layers(model), 0)


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _check_turnable(model: nn.Module, layers: list[LoraLayer], scale: float) -> None:
    if not layers:
        raise UserError(
            "there is no LoRA adapter to turn on this model; for a model that was tuned in whole, "
            "pass base=, the model that it came from"
        )
    if _merged(model):
        raise UserError("adapters are merged into this model; call model.unmerge_adapter() first")
    problems = [
        f"{name!r} is a {type(module).__name__}"
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer)
    ]
    for name, config in (model.peft_config if isinstance(model, PeftModel) else {}).items():
        if getattr(config, "bias", "none") != "none":
            problems.append(f"adapter {name!r} replaces the base's own biases")
    if problems and scale != 1:
        raise UserError(
            f"only LoRA can be turned by a scale; this adapter has more: {first_few(problems)}; "
            "to repair it without measuring, give 'forgetless repair' the folder of 'forgetless "
            "stats' as --keep and a number as --strength"
        )


def _turn_layer(layer: LoraLayer, name: str, scale: float, undo: ExitStack) -> None:
    if scale == 0:
        # Off, not only times zero: so the layer's output is the base's own, whatever its dtype.
        # Times zero as well, for PEFT's disable_adapter turns all layers on again when it ends.
        undo.callback(setattr, layer, "_disable_adapters", layer._disable_adapters)
        layer._disable_adapters = True
    variant = layer.lora_variant.get(name)
    if variant is None or isinstance(variant, AnchoredVariant):
        undo.callback(layer.scaling.__setitem__, name, layer.scaling[name])
        layer.scaling[name] *= scale
    else:
        undo.callback(layer.lora_variant.__setitem__, name, variant)
        layer.lora_variant[name] = _Mixed(variant, scale)


class _Mixed(LoraVariant):
    """PEFT's hook for an adapter that no scaling turns: its output mixed with the base's."""

    def __init__(self, variant: LoraVariant, scale: float) -> None:
        self.variant, self.scale = variant, scale

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **more: Any
    ) -> Tensor:
        """The layer's output (..., out)."""
        moved: Tensor = self.variant.forward(
            module, active_adapter=active_adapter, x=x, result=result, **more
        )
        return result + self.scale * (moved - result)

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with so much of the update added, in its own dtype."""
        weight = orig_weight.float() if orig_weight.element_size() < 4 else orig_weight
        merged: Tensor = self.variant.merge_safe(module, active_adapter, weight)
        return (weight + self.scale * (merged - weight)).to(orig_weight.dtype)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """The same in place."""
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Not to be had: what was merged is no multiple of what the variant takes off again."""
        raise UserError(
            "an adapter of this kind cannot be unmerged while it is dialled; merge a copy of the "
            "model"
        )


def _turn_weights(model: nn.Module, base: nn.Module, scale: float, undo: ExitStack) -> None:
    """Mix every weight with the base's; a classifier keeps its trained head."""
    before = dict(base.named_parameters())
    prefix = getattr(model, "base_model_prefix", "")
    backbone = f"{prefix}." if _is_classifier(model) and hasattr(model, prefix) else ""
    pairs, problems = [], []
    for name, weight in model.named_parameters():
        if not name.startswith(backbone):
            continue
        if name not in before:
            problems.append(f"the base has no weight {name!r}")
        elif before[name].shape != weight.shape:
            shapes = tuple(before[name].shape), tuple(weight.shape)
            problems.append(f"{name!r} is {shapes[0]} in the base and {shapes[1]} in the model")
        else:
            pairs.append((weight, before[name]))
    if problems:
        raise UserError(f"the model did not come from this base: {first_few(problems)}")
    if scale != 1:
        _mix(pairs, scale, undo)


@torch.no_grad()
def _mix(pairs: Iterable[tuple[Tensor, Tensor]], scale: float, undo: ExitStack) -> None:
    """Let each trained weight be before + scale (trained - before) until the end."""
    for trained, before in pairs:
        kept = trained.data
        wide = torch.promote_types(kept.dtype, torch.float32)
        old = before.data.to(kept.device, wide)
        undo.callback(setattr, trained, "data", kept)
        trained.data = (old + scale * (kept.to(wide) - old)).to(kept.dtype)


def _is_classifier(model: nn.Module) -> bool:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return "Classification" in type(inner).__name__


def _merged(model: nn.Module) -> bool:
    return any(isinstance(m, BaseTunerLayer) and m.merged for m in model.modules())
