"""The layers of a model that an adapter may sit on."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    _check_lora_target_modules_mamba,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from forgetless.core.errors import UserError
from forgetless.models.heads import new_modules
from forgetless.models.parts import PARTS, part_of, shortest_endings
from forgetless.models.state import base_modules, base_of
from forgetless.models.text import unread_by_text
from forgetless.models.weights import is_linear, require_readable


def target_layers(
    model: nn.Module, target_modules: str | Sequence[str] = "all-linear"
) -> dict[str, nn.Module]:
    """The linear layers that an adapter goes on, by name, in the model's own order.

    PEFT's own matching decides: "all-linear" is every Linear and Conv1D but a language model's
    output head (a classifier's is taken, unless it has a new head beside it, see
    `forgetless.models.heads`); without layers that only pictures or sounds pass through and routers
    of experts, and of a state-space mixer its in_proj alone. A list holds whole names or their
    endings ("q_proj"), of which each must have a layer; any other string is a regular expression
    for the whole name. The out_proj of torch's `MultiheadAttention`, whose weight is read past any
    adapter, is taken by its whole name alone. Of our own are "attention" and "mlp": of all linear
    layers those inside of the attention, or of the feed-forward part, of every block.

    Args:
        model: a plain model or a PeftModel; both give the same names, those of the plain model.
        target_modules: "all-linear", "attention", "mlp", a list, or one regular expression.

    Returns:
        name -> layer, for instance "model.layers.0.self_attn.q_proj". For a PeftModel the layer
        is the one below the adapters.

    Raises:
        UserError: nothing matches one of the names, something matches that is not a linear layer,
            or it cannot be told which layers of this model are the attention or the MLP.
    """
    return find_targets(model, target_modules).layers


@dataclass(frozen=True)
class Targets:
    """What `target_modules` come to on one model.

    Attributes:
        layers: name -> linear layer, see `target_layers`.
        given: what PEFT's config must hold so that PEFT adapts these layers and nothing else.
        skipped: the expert tensors of a mixture of experts that "all-linear" and "mlp" do not
            reach, with a star for layer numbers.
        unread: the linear layers that those three do not take because no text passes through them.
    """

    layers: dict[str, nn.Module]
    given: str | list[str]
    skipped: list[str]
    unread: list[str]


def find_targets(model: nn.Module, target_modules: str | Sequence[str] = "all-linear") -> Targets:
    """The target layers, how to name them to PEFT, and what is left out; see `target_layers`."""
    if isinstance(target_modules, str) and target_modules in PARTS:
        return _part_targets(model, target_modules)
    base = base_of(model)
    require_readable(base)
    wanted = target_modules if isinstance(target_modules, str) else list(target_modules)
    everything = dict(base_modules(base))
    # They are not adapted: the own one stays, the new one is trained whole.
    heads = tuple(f"{name.removesuffix('.new')}." for name in new_modules(base))
    modules = {n: m for n, m in everything.items() if not f"{n}.".startswith(heads)}
    unread = set(unread_by_text(base, modules))
    experts = _expert_tensors(modules, unread)
    _refuse_experts(wanted, experts)
    config, given = _peft_targets(base, wanted)
    try:
        matched = {n: m for n, m in modules.items() if check_target_module_exists(config, n)}
    except re.error as problem:
        raise UserError(f"target_modules {wanted!r} is no regular expression: {problem}") from None
    by_torch = set(_read_by_torch(modules)) - set([] if isinstance(wanted, str) else wanted)
    found = {name: module for name, module in matched.items() if name not in by_torch}
    linear = {n for n, module in modules.items() if is_linear(module) and n not in by_torch}
    missing = [] if isinstance(wanted, str) else _without_match(wanted, found)
    if missing or not found:
        raise UserError(
            f"target_modules {missing or wanted!r} match no layer; give all-linear, attention, "
            f"mlp, endings or a regular expression. {_what_there_is(linear)}"
        )
    if not _is_all_linear(wanted):
        for name, module in found.items():
            if name not in linear:
                raise UserError(
                    f"target_modules {wanted!r} match {name!r}, which is a "
                    f"{type(module).__name__}; only linear layers can be adapted. "
                    f"{_what_there_is(linear)}"
                )
        if bypassed := [name for name in found if _is_refused(config, base, name)]:
            raise UserError(
                f"target_modules {wanted!r} match {bypassed[0]!r}, whose weight this state-space "
                "model reads past any adapter; name other layers, or use 'all-linear', which "
                "leaves it out"
            )
        fewer = heads or len(found) < len(matched)
        given = shortest_endings(found, everything) if fewer else given
        return Targets(found, given, [], [])
    kept = linear - {*unread, *_read_past_adapters(modules)}
    layers = {name: layer for name, layer in found.items() if name in kept}
    if heads or len(layers) < len(matched):
        given = shortest_endings(layers, [*everything, *experts])
    return Targets(layers, given, experts, [name for name in found if name in unread])


def _without_match(endings: Sequence[str], found: Mapping[str, object]) -> list[str]:
    """The endings of names that no layer has."""
    return [e for e in endings if not any(n == e or n.endswith(f".{e}") for n in found)]


def _part_targets(model: nn.Module, part: str) -> Targets:
    """The targets of "attention" or "mlp"."""
    everything, base = find_targets(model, "all-linear"), base_of(model)
    found = everything.layers.items()
    layers = {name: layer for name, layer in found if part_of(base, name) == part}
    if not layers:
        stacked = f" (its experts are stacked tensors: {', '.join(everything.skipped)})"
        raise UserError(
            f"target_modules {part!r}: no linear layer of this model can be told to belong to that "
            f"part of a block{stacked if everything.skipped else ''}; name the layers. "
            + _what_there_is(set(everything.layers))
        )
    modules = [name for name, _ in base_modules(base)]
    given = shortest_endings(layers, [*modules, *everything.skipped])
    skipped = everything.skipped if part == "mlp" else []
    unread = [name for name in everything.unread if part_of(base, name) == part]
    return Targets(layers, given, skipped, unread)


def _is_all_linear(wanted: str | list[str]) -> bool:
    return isinstance(wanted, str) and wanted.lower() == "all-linear"


def _peft_targets(base: nn.Module, wanted: str | list[str]) -> tuple[LoraConfig, str | list[str]]:
    """PEFT's own reading of `wanted`, and what to write into the adapter's config.

    PEFT rewrites the targets of some mixtures of experts, because transformers 5 fuses the
    experts' linear layers into one tensor: "up_proj" then means that tensor, on which no start is
    defined. Those names are left out of "all-linear" and refused where they are given.
    """
    config = LoraConfig(target_modules=wanted)
    try:
        convert_peft_config_for_transformers(config, base, None)
        fused = sorted(config.target_parameters or ())
    except ValueError:  # one of two names that are fused into the same tensor
        fused = ["experts"]
    if not fused:
        return _maybe_include_all_linear_layers(LoraConfig(target_modules=wanted), base), wanted
    if not _is_all_linear(wanted):
        raise _reaches_experts(wanted, fused)
    given = sorted(config.target_modules)
    return LoraConfig(target_modules=given), given


def _refuse_experts(wanted: str | list[str], experts: list[str]) -> None:
    """A list may name a stacked tensor as if it were a layer; PEFT would pass over it."""
    if not isinstance(wanted, str):
        named = [e for e in experts if any(f".{e}".endswith(f".{name}") for name in wanted)]
        if named:
            raise _reaches_experts(wanted, named)


def _reaches_experts(wanted: str | list[str], experts: list[str]) -> UserError:
    return UserError(
        f"target_modules {wanted!r} reach the stacked expert tensors of this mixture of experts "
        f"({', '.join(experts)}), on which no adapter can start; name other layers, or use "
        "'all-linear', which leaves them out"
    )


def _expert_tensors(modules: Mapping[str, nn.Module], unread: Collection[str]) -> list[str]:
    """The stacked weights of experts, (experts, out, in), which are no linear layers.

    Their names or classes say that they are experts; gates and tables of places have three
    dimensions too.
    """
    names = [
        f"{name}.{parameter}"
        for name, module in modules.items()
        if name not in unread and re.search(r"expert|moe", f"{name} {type(module).__name__}", re.I)
        for parameter, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3
    ]
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def _read_past_adapters(modules: Mapping[str, nn.Module]) -> list[str]:
    """The layers of state-space mixers (Mamba and its kin) behind the first.

    Their kernels take the weights and not the layers, so an adapter on these would be trained by
    nothing, or only on some machines.
    """
    # DeltaNet's mixers have an A_log without a D; their layers are called.
    own = ("A_log", "D", "in_proj")
    mixers = {n for n, module in modules.items() if all(hasattr(module, part) for part in own)}
    parts = (name.rpartition(".") for name in modules)
    return [
        f"{above}.{ending}" for above, _, ending in parts if above in mixers and ending != own[2]
    ]


def _read_by_torch(modules: Mapping[str, nn.Module]) -> list[str]:
    """The layers whose weights torch's own attention reads, without calling them."""
    attentions = [n for n, module in modules.items() if isinstance(module, nn.MultiheadAttention)]
    return [f"{name}.out_proj" for name in attentions]


def _is_refused(config: LoraConfig, base: nn.Module, name: str) -> bool:
    """Whether PEFT has something against this layer of such a mixer."""
    try:
        _check_lora_target_modules_mamba(config, base, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _what_there_is(linear: set[str]) -> str:
    endings = sorted({name.rpartition(".")[2] for name in linear})
    if not endings:
        return "The model has no linear layers."
    return f"Linear layers of this model end in: {', '.join(endings[:20])}"
