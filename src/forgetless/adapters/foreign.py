"""Adapters from elsewhere: whether a folder is for this base, does anything, and holds LoRA alone.

Adapters that people share often name another base than they were trained on, or were saved before
they were trained; measured all the same, they give a number that means nothing.
"""

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.adapters.folders import (
    CONFIG_FILE,
    REPLICATES_LAYERS,
    WEIGHTS_FILE,
    stacked_experts,
)
from forgetless.adapters.layer import PREFIX
from forgetless.core.errors import UserError, first_few
from forgetless.core.files import read_json
from forgetless.core.method import Factors
from forgetless.core.spectra import update_norm
from forgetless.core.tensors import read_tensors
from forgetless.models.state import base_of, unwrapped
from forgetless.models.weights import is_linear, linear_weight, unreadable, weight_shape

OLD_EXPERTS = (0, 19)
"""The version of PEFT that changed the order of the factors of stacked experts."""

_HARDLY = 1e-6
"""A relative update below which an adapter was hardly trained."""

_LORA = re.compile(
    r"\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(\.weight)?|lora_anchor\..*)$"
)


@dataclass(frozen=True)
class AdapterCheck:
    """What the folder of an adapter is for a base.

    Attributes:
        layers: the adapted layers that the base has, with the norm of the update of each.
        besides: tensors that are trained beside A and B of linear layers: heads, embeddings,
            biases. `repair` and `export` know nothing of them.
        problems: why it cannot be used on this base; empty where it can.
        notes: what is odd about it, in sentences.
    """

    layers: Mapping[str, float]
    besides: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def norm(self) -> float:
        """‖delta_W‖_F over all layers, without the scaling."""
        return math.hypot(*self.layers.values())


def check_adapter(folder: str | Path, base: nn.Module) -> AdapterCheck:
    """Look at an adapter's folder beside the base that it is to be used on; nothing is changed.

    Raises:
        UserError: the folder is no adapter, or its files cannot be read.
    """
    folder, base = Path(folder), base_of(base)
    config, state = _config(folder), _state(folder)
    found = _Layers(state, base)
    norms = {name: found.norm(name) for name in found.matched}
    problems = [*_problems(folder, config, state, found, base)]
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        problems.append(f"A or B holds NaN or infinity in {first_few(broken)}")
    elif norms and not any(norms.values()):
        problems.append(
            "its update is zero in every layer: it was saved before it was trained, or without "
            "its weights"
        )
    besides = tuple(key for key in state if not _LORA.search(key))
    return AdapterCheck(norms, besides, tuple(problems), tuple(_notes(config, norms, found, base)))


def require_usable(folder: str | Path, base: nn.Module) -> AdapterCheck:
    """What `check_adapter` finds, where nothing stands against using it.

    Raises:
        UserError: everything that does.
    """
    found = check_adapter(folder, base)
    if found.problems:
        raise UserError(f"{folder} cannot be used on this base: {first_few(found.problems)}")
    return found


def require_within(folder: str | Path, base: nn.Module, layers: Container[str]) -> None:
    """Refuse an adapter that cannot be used, or changes other layers than these.

    Raises:
        UserError: why.
    """
    if more := [name for name in require_usable(folder, base).layers if name not in layers]:
        raise UserError(
            f"{folder} changes layers that are not trained here: {first_few(more)}; name them as "
            "target_modules"
        )


class _Layers:
    """The adapted layers of a folder, beside the base's."""

    def __init__(self, state: Mapping[str, Tensor], base: nn.Module) -> None:
        self.state = state
        modules = dict(base.named_modules())
        names = [
            key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            for key in state
            if key.endswith(".lora_A.weight")
        ]
        self.modules = {name: modules.get(name) for name in names}
        self.matched = [name for name, module in self.modules.items() if self._fits(name, module)]
        self.unmatched = [name for name in names if name not in set(self.matched)]

    def factors(self, name: str) -> Factors:
        """A and B of the plain LoRA that a layer's adapter amounts to, without the scaling."""
        key = f"{PREFIX}{name}.lora_"
        A, B = self.state[f"{key}A.weight"], self.state[f"{key}B.weight"]
        A0, B0 = (self.state.get(f"{key}anchor.anchor_{factor}") for factor in "AB")
        if A0 is None or B0 is None:
            return Factors(A=A, B=B)
        return Factors(A=torch.cat([A0 + A, A]), B=torch.cat([B, B0], dim=1))

    def norm(self, name: str) -> float:
        """Of the layer's update; nan where a factor holds one."""
        factors = self.factors(name)
        finite = bool(factors.A.isfinite().all()) and bool(factors.B.isfinite().all())
        return update_norm(factors) if finite else float("nan")

    def told(self, name: str) -> str:
        """A layer's name, and what it is where no adapter of linear layers can be for it."""
        module = self.modules[name]
        if module is None or is_linear(inner := unwrapped(module)):
            return name
        return f"{name}, a {type(inner).__name__} and not linear"

    @torch.no_grad()
    def size(self, name: str) -> float:
        """‖W‖_F of the base's layer; 0 where its weight cannot be read."""
        module = self.modules[name]
        if module is None or unreadable(module) is not None:
            return 0.0
        return float(torch.linalg.vector_norm(linear_weight(module), dtype=torch.float32))

    def _fits(self, name: str, module: nn.Module | None) -> bool:
        if module is None or not is_linear(getattr(module, "base_layer", module)):
            return False
        B = self.state.get(f"{PREFIX}{name}.lora_B.weight")
        A = self.state[f"{PREFIX}{name}.lora_A.weight"]
        return B is not None and weight_shape(module) == (B.shape[0], A.shape[1])


def _problems(
    folder: Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    found: _Layers,
    base: nn.Module,
) -> Iterator[str]:
    kind = config.get("peft_type")
    if kind is not None and "LORA" not in str(kind):
        yield f"it is of type {kind}, not a LoRA"
    if config.get("layer_replication"):
        yield f"it {REPLICATES_LAYERS}"
        return
    version = _version(config)
    if config.get("target_parameters") and (version is None or version < OLD_EXPERTS):
        written = "a PEFT before 0.18" if version is None else f"PEFT {config['peft_version']}"
        yield (
            f"it adapts stacked experts and was written by {written}, which had their two factors "
            "in another order; load it with that PEFT, and save it with 0.19 or later"
        )
        return
    total, few = len(found.modules), first_few([found.told(n) for n in found.unmatched])
    if not total:
        yield f"its {WEIGHTS_FILE} holds no LoRA of any layer"
    elif found.unmatched and config.get("target_parameters"):
        yield f"it {stacked_experts(config['target_parameters'])}"
    elif found.unmatched:
        yield (
            f"{len(found.matched)} of its {total} layers are in this base, with the same shapes; "
            f"not so: {few}{_hint(found.unmatched, base)}"
        )
    rows = _embedding_rows(base)
    for key, tensor in state.items():
        if (
            rows
            and re.search(r"(embed_tokens|lm_head|wte)[^/]*\.weight$", key)
            and (not _LORA.search(key) and tensor.ndim == 2 and len(tensor) != rows)
        ):
            yield f"its {key} has {len(tensor)} tokens, the base {rows}"
    tokens = _largest_token(folder)
    if rows and tokens is not None and tokens >= rows:
        yield f"the tokenizer beside it has token {tokens}, and the base knows only 0..{rows - 1}"


def _notes(
    config: Mapping[str, Any], norms: Mapping[str, float], found: _Layers, base: nn.Module
) -> Iterator[str]:
    trained_on = (config.get("auto_mapping") or {}).get("base_model_class")
    if trained_on and trained_on != type(base).__name__:
        yield f"it was made for a {trained_on}, and this base is a {type(base).__name__}"
    zero = [name for name, norm in norms.items() if norm == 0]
    if zero and len(zero) < len(norms):
        yield f"{len(zero)} of its {len(norms)} layers change nothing: {first_few(zero)}"
    moved = math.hypot(*(norm for norm in norms.values() if math.isfinite(norm)))
    size = math.hypot(*map(found.size, found.matched)) if moved else 0.0
    if 0 < moved < _HARDLY * size:
        yield f"it moves the weights by {moved / size:.1g} of their size: it was hardly trained"


def _hint(names: list[str], base: nn.Module) -> str:
    """What a wrong beginning of all names, or the number of an expert, gives away."""
    known = {name for name, _ in base.named_modules()}
    endings = {name: [k for k in known if k.endswith(_after_first(name))] for name in names}
    near = next(((name, kin[0]) for name, kin in endings.items() if len(kin) == 1), None)
    if near is not None:
        return f"; {near[0]!r} is called {near[1]!r} here: was it trained inside another model?"
    if any(re.search(r"\.experts\.\d+\.", name) for name in names):
        return (
            "; this base has its experts in stacked tensors: load the adapter with "
            "PeftModel.from_pretrained, which knows older layouts, and save it again"
        )
    return ""


def _after_first(name: str) -> str:
    """The name from its first number on, which says which block it is in."""
    match = re.search(r"\.[a-z_]+\.\d+\..*", f".{name}")
    return match[0] if match else f".{name}"


def _config(folder: Path) -> dict[str, Any]:
    found = read_json(folder / CONFIG_FILE)
    if not found:
        raise UserError(f"{folder} is no adapter: it has no {CONFIG_FILE}")
    return found


def _state(folder: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(folder / WEIGHTS_FILE)
    except FileNotFoundError:
        raise UserError(f"{folder} is no complete adapter: it has no {WEIGHTS_FILE}") from None


def _version(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The PEFT that wrote the config; it says so since 0.18."""
    match = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return (int(match[1]), int(match[2])) if match else None


def _embedding_rows(base: nn.Module) -> int | None:
    """The tokens that the base knows; None for a model of something else."""
    try:
        weight: Any = base.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return len(weight) if weight.ndim == 2 else None


def _largest_token(folder: Path) -> int | None:
    """Of the tokenizer that lies beside the adapter; None where there is none."""
    content = read_json(folder / "tokenizer.json")
    known = content.get("model", {}).get("vocab", {})
    numbers = list(known.values()) if isinstance(known, dict) else range(len(known))
    added = [token["id"] for token in content.get("added_tokens", ())]
    return max([*numbers, *added], default=None)
