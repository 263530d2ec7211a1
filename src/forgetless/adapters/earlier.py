"""Earlier adapters under a new one: beside it and frozen, or added to the base in memory."""

from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from forgetless.adapters.folders import load
from forgetless.adapters.layer import adapted_layers
from forgetless.adapters.plain import PlainLora, plain_lora

EARLIER = "earlier"
"""The name of all earlier adapters together."""


def on_earlier(
    base: nn.Module, folder: str | Path, between: Literal["stack", "merge"]
) -> tuple[Any, PlainLora]:
    """What a new adapter is put on, and the plain LoRA that the earlier ones are.

    ``stack`` leaves the earlier adapter, which a stack or a merge has written as one, beside the
    base, frozen and without dropout; ``merge`` adds it to the weights in memory, and switching the
    new adapter off then gives their sum.

    Raises:
        UserError: weights that nothing can be added to, such as quantised ones.
    """
    model: Any = load(base, folder, adapter_name=EARLIER)
    plain = plain_lora(model, EARLIER)
    if between == "merge":
        return model.merge_and_unload(), plain
    for layer in adapted_layers(model, EARLIER).values():
        layer.lora_dropout[EARLIER] = nn.Identity()
    _give_back_modules(model)
    return model, plain


def _give_back_modules(model: Any) -> None:
    """Put the modules that the earlier adapters trained whole in the place of the base's.

    A new adapter starts its own from these, and of several adapters PEFT uses one's alone.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.modules_to_save[EARLIER])
    model.peft_config[EARLIER].modules_to_save = None


def use_together(model: PeftModel, trainable: bool = False) -> PeftModel:
    """The model with a new adapter and, where they are beside it, the earlier ones in use."""
    if EARLIER in model.peft_config:
        new = model.active_adapter
        model.base_model.set_adapter([EARLIER, new], inference_mode=True)
        model.set_requires_grad(new, requires_grad=trainable)
    return model
