"""The plain PEFT LoRA, for the untouched base, that an adapter amounts to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.utils import get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from forgetless.adapters.anchored import plain_factors
from forgetless.adapters.dora import is_dora
from forgetless.adapters.layer import PREFIX, adapted_layers
from forgetless.core.errors import UserError, first_few, unknown
from forgetless.core.method import Factors

_A, _B = ".lora_A.weight", ".lora_B.weight"


def _paired(key: str) -> str:
    """The name of B beside that of A."""
    return key.removesuffix(_A) + _B


@dataclass(frozen=True)
class PlainLora:
    """A LoRA whose scaling is 1 in every layer, and what was lost on the way to it.

    Attributes:
        config: PEFT's, of one rank r = alpha for all layers: a layer of a smaller rank is filled
            up with zeros, because readers do not agree on what alpha means for it (PEFT divides
            the layer's alpha by the layer's rank, llama.cpp the common alpha by the layer's rank,
            vLLM the common alpha by the common rank).
        state: by PEFT's names without the adapter's, on the CPU.
        relative_error: ||plain - trained||_F / ||trained||_F over all layers; 0.0 when exact.
        layer_errors: the same for each layer.
    """

    config: LoraConfig
    state: dict[str, Tensor]
    relative_error: float = 0.0
    layer_errors: dict[str, float] = field(default_factory=dict)

    @property
    def factors(self) -> dict[str, Factors]:
        """A and B of every layer, by its name in the base."""
        return {
            key.removeprefix(PREFIX).removesuffix(_A): Factors(A, self.state[_paired(key)])
            for key, A in self.state.items()
            if key.endswith(_A)
        }

    def with_factors(self, factors: Mapping[str, Factors]) -> PlainLora:
        """The same with other factors of the same layers, all of one rank."""
        state = dict(self.state)
        for name, layer in factors.items():
            state[f"{PREFIX}{name}{_A}"] = layer.A.contiguous()
            state[f"{PREFIX}{name}{_B}"] = layer.B.contiguous()
        rank = len(next(iter(factors.values())).A)
        return PlainLora(replace(self.config, r=rank, lora_alpha=rank), state)


@torch.no_grad()
def plain_lora(
    model: PeftModel | LoraModel, adapter_name: str, rank: str | int = "exact"
) -> PlainLora:
    """The plain LoRA of an adapter, see `export`.

    Raises:
        UserError: no such adapter, a rank that is none, or more than a plain LoRA can say.
    """
    config = lora_config(model, adapter_name)
    layers = adapted_layers(model, adapter_name)
    state = _whole_modules(model, config, adapter_name)
    factors = {name: plain_factors(module, adapter_name) for name, module in layers.items()}
    kept = {
        name: _rank(rank, layers[name].r[adapter_name], len(A)) for name, (A, _) in factors.items()
    }
    is_exact = all(kept[name] == len(A) for name, (A, _) in factors.items())
    largest = max(kept.values())
    errors, norms = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    for name, (A, B) in factors.items():
        module = layers[name]
        B = B * module.scaling[adapter_name]
        if not is_exact:
            norms[name] = float(torch.linalg.matrix_norm(_core(A, B)[1]))
        if kept[name] < len(A):
            A, B, errors[name] = _truncated(A, B, kept[name])
        missing = largest - len(A)
        state[f"{PREFIX}{name}{_A}"] = F.pad(A, (0, 0, 0, missing)).contiguous().cpu()
        state[f"{PREFIX}{name}{_B}"] = F.pad(B, (0, missing)).contiguous().cpu()
        if is_dora(module, adapter_name):
            magnitude = module.lora_magnitude_vector[adapter_name].weight
            state[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude.detach().cpu()
    lost = sum(error**2 for error in errors.values()) ** 0.5
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    return PlainLora(
        config=_config(config, largest),
        state=state,
        relative_error=lost / total if lost else 0.0,
        layer_errors={name: errors[name] / norms[name] if errors[name] else 0.0 for name in layers},
    )


def summed(first: PlainLora, second: PlainLora) -> PlainLora:
    """The plain LoRA that does what two on the same base do together, of the sum of their ranks.

        A = [A1 ; A2],  B = [B1, B2]

    A module that both train whole is the second's.

    Raises:
        UserError: one of them is a DoRA, which no sum holds.
    """
    if first.config.use_dora or second.config.use_dora:
        raise UserError("a DoRA stretches the weights, so that no LoRA is a sum with it")
    parts = first.factors, second.factors
    ranks = first.config.r, second.config.r
    made: dict[str, Factors] = {}
    for name in dict.fromkeys([*parts[0], *parts[1]]):
        some = parts[0].get(name) or parts[1][name]
        whole = [
            layer.get(name)
            or Factors(some.A.new_zeros(rank, some.A.shape[1]), some.B.new_zeros(len(some.B), rank))
            for layer, rank in zip(parts, ranks, strict=True)
        ]
        made[name] = Factors(
            A=torch.cat([each.A for each in whole]), B=torch.cat([each.B for each in whole], dim=1)
        )
    targets = first.config.target_modules, second.config.target_modules
    both = replace(
        second.config,
        target_modules=targets[1] if targets[0] == targets[1] else sorted(made),
        modules_to_save=sorted(
            {*(first.config.modules_to_save or ()), *(second.config.modules_to_save or ())}
        )
        or None,
    )
    return PlainLora(both, first.state | second.state).with_factors(made)


def lora_config(model: PeftModel | LoraModel, adapter_name: str) -> LoraConfig:
    """The config of one of the model's adapters.

    Raises:
        UserError: there is none of that name, or it is no LoRA.
    """
    config = model.peft_config.get(adapter_name)
    if config is None:
        raise unknown("adapter", adapter_name, model.peft_config)
    if not isinstance(config, LoraConfig):
        raise UserError(f"adapter {adapter_name!r} is {config.peft_type}, not a LoRA")
    return config


def _whole_modules(
    model: PeftModel | LoraModel, config: LoraConfig, adapter_name: str
) -> dict[str, Tensor]:
    """The modules that are trained whole, such as a head; what a LoRA cannot say is refused."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    modules = dict(model.named_modules())
    wrapped = tuple(f"{n}." for n, m in modules.items() if isinstance(m, ModulesToSaveWrapper))
    whole = {
        n: tensor.detach().clone().cpu() for n, tensor in state.items() if n.startswith(wrapped)
    }
    plain = (_A, _B, ".lora_magnitude_vector")
    more = [
        name
        for name in state.keys() - whole.keys()
        if not name.endswith(plain) and ".lora_anchor." not in name
    ]
    kinds = ("alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config")
    for kind in (*kinds, "target_parameters"):  # under which A and B do not act as a plain LoRA's
        if getattr(config, kind, None):
            more.append(f"{kind} = {getattr(config, kind)}")
    if more:
        raise UserError(
            "this adapter has more than the A and B of linear layers, which an export would lose: "
            f"{first_few(sorted(more))}; keep the folder that PEFT wrote"
        )
    return whole


def _rank(rank: str | int, requested: int, exact: int) -> int:
    if rank == "exact":
        return exact
    if rank == "requested":
        return min(requested, exact)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"rank must be 'exact', 'requested' or a number from 1, got {rank!r}")
    return min(rank, exact)


def _config(config: LoraConfig, rank: int) -> LoraConfig:
    """A config that PEFT alone reads. The scaling is already in B, so alpha = rank."""
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        use_dora=config.use_dora,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
        lora_dropout=config.lora_dropout,
        fan_in_fan_out=config.fan_in_fan_out,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q_B (out, k), a small core (k, j) and Q_A (in, j), in float64: B A = Q_B core Q_A^T."""
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    return Q_B, R_B @ R_A.T, Q_A


def _truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best A (rank, in), B (out, rank) for the product B A, and the norm of what is lost.

    The SVD is that of a core no larger than twice the rank, never of an (out, in) matrix. Of a
    layer smaller than the rank there are fewer components.
    """
    Q_B, core, Q_A = _core(A, B)
    U, S, Vh = torch.linalg.svd(core)
    root = S[:rank].sqrt()
    A_cut = root[:, None] * (Vh[:rank] @ Q_A.T)
    B_cut = (Q_B @ U[:, :rank]) * root
    return A_cut.to(A.dtype), B_cut.to(B.dtype), float(S[rank:].norm())
