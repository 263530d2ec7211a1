"""`export`, `save` and `load`: an adapter as a folder of safetensors and JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from forgetless.adapters.anchored import Anchor, plain_factors
from forgetless.adapters.card import write_export_card
from forgetless.adapters.dora import is_dora
from forgetless.adapters.layer import (
    ANCHORED_TYPE,
    PREFIX,
    Start,
    StartConfig,
    adapted_layers,
    add_adapter,
    install,
)
from forgetless.adapters.ranks import LayerRank, patterns
from forgetless.core.errors import UserError, first_few, unknown
from forgetless.models.weights import is_linear, weight_shape

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
START_FILE = "forgetless.json"

_CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""What PEFT's `init_lora_weights` begins with where it subtracts the start from the base."""


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote.

    Attributes:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`, a plain PEFT LoRA.
        rank: rank of the exported adapter; the largest where layers differ.
        relative_error: ||exported - trained||_F / ||trained||_F over all layers, 0.0 when exact.
        layer_errors: the same for each layer.
    """

    folder: Path
    rank: int
    relative_error: float
    layer_errors: dict[str, float]

    @property
    def exact(self) -> bool:
        """Whether nothing was cut off."""
        return self.relative_error == 0.0

    def __str__(self) -> str:
        error = "exact" if self.exact else f"relative error {self.relative_error:.3g}"
        return f"{self.folder}: rank {self.rank}, {error}"


@torch.no_grad()
def export(
    model: PeftModel,
    folder: str | Path,
    rank: Literal["exact", "requested"] | int = "exact",
    adapter_name: str = "default",
) -> ExportReport:
    """Write the adapter as a plain PEFT LoRA for the untouched base, with a model card.

    Args:
        model: a PeftModel made by `attach` or `load`, or any PEFT LoRA.
        folder: where to; created.
        rank: "exact" keeps everything (rank 2r for an anchored adapter, r otherwise); "requested"
            cuts back to the adapter's own rank r, and a number to that rank, by the best
            approximation of B A in the Frobenius norm. A layer of a smaller rank keeps its own.
        adapter_name: which adapter.

    Returns:
        The rank that was written and the error of cutting, measured per layer.

    Raises:
        UserError: rank is not one of these, or the adapter has more than a plain LoRA can say.
    """
    config = _lora_config(model, adapter_name)
    layers = adapted_layers(model, adapter_name)
    _require_plain(model, config, adapter_name)
    factors = {name: plain_factors(module, adapter_name) for name, module in layers.items()}
    kept = {
        name: _export_rank(rank, layers[name].r[adapter_name], len(A))
        for name, (A, _) in factors.items()
    }
    is_exact = all(kept[name] == len(A) for name, (A, _) in factors.items())
    state, errors, norms = {}, dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    for name, (A, B) in factors.items():
        module = layers[name]
        B = B * module.scaling[adapter_name]
        if not is_exact:
            norms[name] = _product_norm(A, B)
        if kept[name] < len(A):
            A, B, errors[name] = _truncated(A, B, kept[name])
        state[f"{PREFIX}{name}.lora_A.weight"] = A.contiguous().cpu()
        state[f"{PREFIX}{name}.lora_B.weight"] = B.contiguous().cpu()
        if is_dora(module, adapter_name):
            magnitude = module.lora_magnitude_vector[adapter_name].weight
            state[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude.detach().cpu()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _plain_config(config, kept).save_pretrained(str(folder))
    lost = sum(error**2 for error in errors.values()) ** 0.5
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    report = ExportReport(
        folder=folder,
        rank=max(kept.values()),
        relative_error=lost / total if lost else 0.0,
        layer_errors={name: errors[name] / norms[name] if errors[name] else 0.0 for name in layers},
    )
    _write_card(config, report)
    return report


def _write_card(config: LoraConfig, report: ExportReport) -> None:
    """The README.md beside the weights, for whoever finds the folder."""
    write_export_card(
        report.folder,
        config.base_model_name_or_path or "",
        start=getattr(config, "start", None),
        error=report.relative_error,
    )


def _lora_config(model: PeftModel, adapter_name: str) -> LoraConfig:
    config = model.peft_config.get(adapter_name)
    if config is None:
        raise unknown("adapter", adapter_name, model.peft_config)
    if not isinstance(config, LoraConfig):
        raise UserError(f"adapter {adapter_name!r} is {config.peft_type}, not a LoRA")
    return config


def _require_plain(model: PeftModel, config: LoraConfig, adapter_name: str) -> None:
    """Refuse what would be lost: whole layers, embeddings, biases, other kinds of LoRA."""
    plain = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    more = [name for name in state if not name.endswith(plain) and ".lora_anchor." not in name]
    more += [f"{key} = {value}" for key, value in _other_kinds(config).items()]
    if more:
        raise UserError(
            "this adapter has more than the A and B of linear layers, which an export would lose: "
            f"{first_few(more)}; keep the folder that PEFT wrote"
        )


def _other_kinds(config: LoraConfig) -> dict[str, object]:
    """Settings of PEFT under which A and B do not act as a plain LoRA's or DoRA's."""
    kinds = ("alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config")
    found = {kind: getattr(config, kind, None) for kind in (*kinds, "target_parameters")}
    return {kind: value for kind, value in found.items() if value}


def _export_rank(rank: str | int, requested: int, exact: int) -> int:
    if rank == "exact":
        return exact
    if rank == "requested":
        return min(requested, exact)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"rank must be 'exact', 'requested' or a number from 1, got {rank!r}")
    return min(rank, exact)


def _plain_config(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """A config that PEFT alone reads. The scaling is already in B, so alpha = rank everywhere.

    r is the largest rank, since that is what servers make room for, and what other layers have
    stands in the patterns.
    """
    largest = max(ranks.values())
    layers = {name: LayerRank(rank, rank) for name, rank in ranks.items()}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        **patterns(layers, largest, largest),
        use_dora=config.use_dora,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        lora_dropout=config.lora_dropout,
        fan_in_fan_out=config.fan_in_fan_out,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )


def _core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q_B (out, k), a small core (k, j) and Q_A (in, j), in float64: B A = Q_B core Q_A^T."""
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    return Q_B, R_B @ R_A.T, Q_A


def _product_norm(A: Tensor, B: Tensor) -> float:
    return float(torch.linalg.matrix_norm(_core(A, B)[1]))


def _truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best A (rank, in), B (out, rank) for the product B A, and the norm of what is lost.

    The SVD is that of a core no larger than twice the rank, never of an (out, in) matrix.
    """
    Q_B, core, Q_A = _core(A, B)
    U, S, Vh = torch.linalg.svd(core)
    root = S[:rank].sqrt()
    A_cut = root[:, None] * (Vh[:rank] @ Q_A.T)
    B_cut = (Q_B @ U[:, :rank]) * root
    missing = rank - len(A_cut)
    if missing > 0:  # a layer smaller than the rank: PEFT wants the same rank everywhere
        A_cut, B_cut = F.pad(A_cut, (0, 0, 0, missing)), F.pad(B_cut, (0, missing))
    return A_cut.to(A.dtype), B_cut.to(B.dtype), float(S[rank:].norm())


def save(
    model: PeftModel,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the adapter as it is, anchor and moves, so that `load` continues without any loss.

    Args:
        model: a PeftModel made by `attach` or `load`, or any PEFT LoRA.
        folder: where to; created.
        adapter_name: which adapter.
        weights: the model's by name where it has only shards of them itself.

    Returns:
        The folder. `adapter_model.safetensors` and `adapter_config.json` are PEFT's (an anchored
        adapter names a type of its own there, which PEFT alone refuses); `forgetless.json` says
        how the adapter started.
    """
    config = _lora_config(model, adapter_name)
    start = config.start if isinstance(config, StartConfig) else None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, state_dict=weights, adapter_name=adapter_name)
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if start is not None:
        (folder / START_FILE).write_text(json.dumps(start, indent=2) + "\n")
    config.save_pretrained(str(folder))
    return folder


def load(
    base: nn.Module, folder: str | Path, trainable: bool = False, adapter_name: str = "default"
) -> PeftModel:
    """The base with the adapter of `folder` on it, exactly as it was saved.

    Args:
        base: the model that the adapter was made for, or a PeftModel on it.
        folder: written by `save`, by `export`, by a Trainer's checkpoint or by PEFT.
        trainable: whether training goes on; what the method froze stays frozen.
        adapter_name: PEFT's name for the adapter.

    Raises:
        UserError: the folder is no LoRA adapter, or its tensors do not fit the base.
    """
    folder = Path(folder)
    config = _read_config(folder)
    state = load_file(folder / WEIGHTS_FILE)
    _check_fits(folder, state, base)
    _name_base(folder, config, base)
    config.inference_mode = not trainable
    model = add_adapter(base, config, adapter_name)
    if config.start:
        start = Start.from_dict(config.start)
        for name, module in adapted_layers(model, adapter_name).items():
            install(module, adapter_name, start, *_saved_parameters(state, name, start.anchored))
    _require_complete(folder, set_peft_model_state_dict(model, state, adapter_name=adapter_name))
    model.set_requires_grad(adapter_name, requires_grad=trainable)
    return model.train(trainable)


def _saved_parameters(
    state: Mapping[str, Tensor], name: str, anchored: bool
) -> tuple[Tensor, Tensor, Anchor | None]:
    key = f"{PREFIX}{name}.lora_"
    A, B = state[f"{key}A.weight"], state[f"{key}B.weight"]
    if not anchored:
        return A, B, None
    return A, B, Anchor(state[f"{key}anchor.anchor_A"], state[f"{key}anchor.anchor_B"])


def down_projections(folder: str | Path) -> dict[str, Tensor]:
    """Layer name -> A (rank, in) of the plain LoRA that the adapter of a folder amounts to.

    For an anchored adapter that is [A0 + dA ; dA], of twice its rank.

    Raises:
        UserError: the folder is no LoRA adapter.
    """
    folder = Path(folder)
    _read_config(folder)  # refuses what is no LoRA
    state = load_file(folder / WEIGHTS_FILE)
    found = {}
    for key, A in state.items():
        name, is_A, _ = key.partition(".lora_A.")
        if is_A:
            A0 = state.get(f"{name}.lora_anchor.anchor_A")
            found[name.removeprefix(PREFIX)] = A if A0 is None else torch.cat([A0 + A, A])
    return found


def _read_config(folder: Path) -> StartConfig:
    try:
        values = json.loads((folder / CONFIG_FILE).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is no adapter: it has no {CONFIG_FILE}") from None
    except json.JSONDecodeError as problem:
        raise UserError(f"{folder / CONFIG_FILE} is not valid JSON: {problem}") from None
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "; its adapter_model.bin is a pickle, so save it with safetensors" if pickled else ""
        raise UserError(f"{folder} is no complete adapter: it has no {WEIGHTS_FILE}{hint}")
    kind = values.pop("peft_type", None)
    if kind not in (ANCHORED_TYPE, "LORA"):
        raise UserError(f"{folder} holds an adapter of type {kind!r}; only LoRA can be loaded")
    if (folder / START_FILE).is_file():
        values["start"] = json.loads((folder / START_FILE).read_text())
    if str(values.get("init_lora_weights")).startswith(_CHANGES_THE_BASE):
        raise UserError(
            f"{folder} was saved with init_lora_weights={values['init_lora_weights']!r}: it is for "
            "a base that PEFT changes as it loads; in the tool that trained it, save it with "
            "path_initial_model_for_weight_conversion, which makes it a LoRA for the original base"
        )
    known = StartConfig.__dataclass_fields__
    if ignored := sorted(key for key in values.keys() - known.keys() if values[key]):
        warnings.warn(f"{folder}: this PEFT does not know {', '.join(ignored)}", stacklevel=3)
    return StartConfig(**{key: value for key, value in values.items() if key in known})


def _require_complete(folder: Path, loaded: Any) -> None:
    """Every tensor has its place in the model, and every adapted layer its tensors."""
    missing = [key for key in loaded.missing_keys if ".lora_" in key]
    for keys, problem in ((loaded.unexpected_keys, "fit nowhere"), (missing, "are missing")):
        if keys:
            raise UserError(
                f"the tensors and {CONFIG_FILE} of {folder} do not belong together: these "
                f"{problem}: {first_few(keys)}"
            )


def _name_base(folder: Path, config: LoraConfig, base: nn.Module) -> None:
    """Name this base in the config, and say so where it was another; that may be a copy of it."""
    inner: Any = base.get_base_model() if isinstance(base, PeftModel) else base
    given, wanted = getattr(inner, "name_or_path", ""), config.base_model_name_or_path
    if not given:
        return
    config.base_model_name_or_path = given
    if wanted and _model_name(given) != _model_name(wanted):
        warnings.warn(
            f"{folder} says that it is for the base {wanted}, and this is {given}; on another "
            "base than its own an adapter does something else",
            stacklevel=3,
        )


def _model_name(path: str) -> str:
    """The last part of a hub id or a path; the model's name in the hub's cache."""
    parts = Path(path).parts
    if "snapshots" in parts[:-1]:
        return parts[parts.index("snapshots") - 1].split("--")[-1]
    return parts[-1] if parts else ""


def _check_fits(folder: Path, state: Mapping[str, Tensor], base: nn.Module) -> None:
    """Every adapted layer must be in the base, with the shape that the adapter was made for."""
    inner = base.get_base_model() if isinstance(base, PeftModel) else base
    problems = []
    for key, A in state.items():
        name, is_A, _ = key.removeprefix(PREFIX).partition(".lora_A.")
        if not is_A:
            continue
        try:
            layer = inner.get_submodule(name)
        except AttributeError:
            problems.append(f"this model has no layer {name!r}")
            continue
        layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        if not is_linear(layer):
            problems.append(f"{name!r} is a {type(layer).__name__}, not a linear layer")
            continue
        shape = weight_shape(layer)
        wanted = (state[key.replace(".lora_A.", ".lora_B.")].shape[0], A.shape[1])
        if shape != wanted:
            problems.append(f"layer {name!r} is {shape}, the adapter was made for {wanted}")
    if problems:
        raise UserError(f"{folder} does not fit this base: {first_few(problems)}")
