"""PEFT's LoRA model with starts on it: one more adapter, and the methods that combine several.

PEFT reads lora_A and lora_B as if they were all of an adapter. Where its methods ask the hooks of
`anchored` they are right as they are; where they do not, they are put right here and in `layer`,
or refused with the way to do it.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from forgetless.adapters.layer import (
    ANCHORED_TYPE,
    PREFIX,
    Start,
    StartConfig,
    adapted_layers,
    copy_start,
)
from forgetless.adapters.plain import plain_lora
from forgetless.core.errors import UserError
from forgetless.models.state import base_of
from forgetless.models.weights import computing_device, hold_packing, untouched


class AnchoredLoraModel(LoraModel):
    """What `PeftModel.base_model` becomes when the first start is put on."""

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's; with the config of another adapter, as TRL makes a reference, its start too.

        The new adapter is then the base, and with the trained matrices of the other one it is that.
        """
        start = getattr(self.peft_config[adapter_name], "start", None)
        if start is not None:
            first = self._first_with_the_config_of(adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if start is not None or "low_cpu_mem_usage" not in kwargs:  # which PeftModel passes,
            self._cast_adapter_dtype(adapter_name)  # and does this itself, but after the start
        if start is not None:
            for module in adapted_layers(self, adapter_name).values():
                copy_start(module, first, adapter_name, Start.from_dict(start))

    def _first_with_the_config_of(self, adapter_name: str) -> str:
        config = self.peft_config[adapter_name]
        same = [name for name, each in self.peft_config.items() if each == config]
        # PEFT's reduction of intruders then writes plain factors over some layers' matrices.
        reduces = sys._getframe(3).f_code.co_name == "reduce_intruder_dimension"
        if same == [adapter_name] or (reduces and config.start["anchored"]):
            raise UserError(
                f"{adapter_name!r} was given the config of an adapter that starts by "
                f"{config.start['method']!r}, which PEFT cannot put on: attach a new one with "
                "forgetless.attach; or export that one and load the export, a plain LoRA for all "
                "of PEFT's tools"
            )
        first: str = next(name for name in same if name != adapter_name)
        return first

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, *args: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """PEFT's, of the plain LoRAs that the adapters amount to."""
        if adapter_name in self.peft_config:
            return  # as PEFT does
        _check_name(self.model, adapter_name)
        for name in adapters:
            config = self.peft_config.get(name)
            if getattr(config, "use_dora", False):
                raise UserError(
                    f"adapter {name!r} is a DoRA, which stretches the weights: no LoRA is a sum "
                    "with it; train it without use_dora, or merge it into the base"
                )
            if whole := getattr(config, "modules_to_save", None):
                raise UserError(
                    f"adapter {name!r} trains {', '.join(whole)} whole, which no sum of LoRAs "
                    "holds; merge the adapters into the base one after the other"
                )
        with self._plain_twins(adapters) as plain:
            super().add_weighted_adapter(plain, weights, adapter_name, *args, **kwargs)

    @contextmanager
    def _plain_twins(self, adapters: Sequence[str]) -> Iterator[list[str]]:
        """The names of adapters that do the same and are nothing but A, B and alpha / rank."""
        twins: dict[str, str] = {}
        try:
            for name in adapters:
                config = self.peft_config.get(name)
                if getattr(config, "start", None) or getattr(config, "use_rslora", False):
                    plain, twin = plain_lora(self, name), f"{name}-as-plain-lora"
                    self.peft_config[twin], twins[name] = plain.config, twin
                    with torch.random.fork_rng(devices=[]):
                        self.inject_adapter(self.model, twin)
                    for layer, module in adapted_layers(self, twin).items():
                        for part in ("lora_A", "lora_B"):
                            values = plain.state[f"{PREFIX}{layer}.{part}.weight"]
                            getattr(module, part)[twin].weight.data.copy_(values)
            yield [twins.get(name, name) for name in adapters]
        finally:
            for twin in twins.values():
                self.delete_adapter(twin)

    def subtract_mutated_init(
        self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: Any = None
    ) -> dict[str, Tensor]:
        """PEFT's conversion of starts that it took out of the base; none was taken out here."""
        if any(".lora_anchor." in name for name in output_state_dict):
            raise UserError(
                "an anchored adapter needs no initial adapter to become a plain LoRA: "
                "forgetless.export writes it"
            )
        found: dict[str, Tensor] = super().subtract_mutated_init(
            output_state_dict, adapter_name, kwargs
        )
        return found


class _OnlyHere(LoraConfig):
    """What PEFT finds for the type of anchored adapters, so that it says how to load one."""

    def __init__(self, **_: Any) -> None:
        """Refuse: so does transformers' `load_adapter`, which would leave the anchors out."""
        raise UserError(
            "this is an anchored adapter of forgetless: forgetless.load(base, folder) loads it, "
            "and forgetless.export makes a plain LoRA of it"
        )

    @classmethod
    def from_pretrained(cls, path: Any, *_: Any, **__: Any) -> NoReturn:
        """Refuse by name; PEFT's own answer is a KeyError."""
        raise UserError(
            f"{path} holds an anchored adapter of forgetless: forgetless.load(base, {str(path)!r}) "
            "loads it, and forgetless.export makes a plain LoRA of it"
        )


PEFT_TYPE_TO_CONFIG_MAPPING[ANCHORED_TYPE] = _OnlyHere

_PARTS = {"__base__", "base_layer", "base_model", "bias", "lora_A", "lora_B", "lora_anchor"} | {
    "lora_dropout", "lora_magnitude_vector", "modules_to_save", "original_module", "weight"
}  # fmt: skip
"""What PEFT itself calls the parts of a model."""


def check_addable(model: nn.Module, adapter_name: str) -> None:
    """Raise unless one more adapter of this name can be put on the model.

    Raises:
        UserError: a name that PEFT cannot use or has, another kind of adapter, or a model whose
            adapters were put on without a PeftModel.
    """
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise UserError(
                f"the model already has an adapter {adapter_name!r}; pass another adapter_name"
            )
        if type(model.base_model) not in (LoraModel, AnchoredLoraModel):
            raise UserError(
                f"the model has adapters of the type {model.peft_type.value}, and a LoRA cannot be "
                "put beside them; merge or unload them first"
            )
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError(
            "this model has adapters already, without the PeftModel that they belong to; pass that "
            "PeftModel itself, or the base without adapters"
        )
    _check_name(base_of(model), adapter_name)


def _check_name(base: nn.Module, adapter_name: object) -> None:
    """PyTorch and PEFT keep an adapter's tensors under its name, and find them again by it."""
    if not isinstance(adapter_name, str) or not adapter_name:
        raise UserError(f"adapter_name must be a name, got {adapter_name!r}")
    parts = {part for name, _ in base.named_modules() for part in name.split(".")}
    if (
        "." in adapter_name
        or adapter_name in parts | _PARTS
        or hasattr(nn.ModuleDict(), adapter_name)
    ):
        raise UserError(
            f"adapter_name {adapter_name!r} cannot be used: it must have no dot and be no name of "
            f"a part of the model, such as {adapter_name.replace('.', '_') + '_adapter'!r}"
        )


def add_adapter(model: nn.Module, config: StartConfig, adapter_name: str) -> PeftModel:
    """PEFT's wrapping, without its random start leaving a trace in the global generator."""
    hold_packing(model)
    start, config = config.start, replace(config, start=None)
    config.revision = getattr(base_of(model), "hub_revision", config.revision)
    with untouched(model), torch.random.fork_rng(devices=[]):
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            model.set_adapter(adapter_name)
        else:
            with warnings.catch_warnings():
                # PEFT asks for it by the name before transformers 5.23.
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                model = get_peft_model(model, config, adapter_name=adapter_name)
    made: Any = model
    made.base_model.__class__ = AnchoredLoraModel
    made.peft_config[adapter_name].start = start
    for module in adapted_layers(made, adapter_name).values():
        for part in (module.lora_A[adapter_name], module.lora_B[adapter_name]):
            if part.weight.is_meta:
                # PEFT puts it where the weight of an offloaded layer is: nowhere.
                part.to_empty(device=computing_device(module))
    return made


def take_off(model: Any, adapter_name: str, before: object) -> None:
    """Undo `add_adapter`, which made this model of the one before."""
    same: bool = model is before
    if same:
        with warnings.catch_warnings():  # the caller put it there, and knows
            warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
            model.delete_adapter(adapter_name)
    else:
        model.base_model.unload()
