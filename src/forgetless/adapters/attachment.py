"""`attach`: a method's start on every target layer, checked before anything is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.layer import (
    Anchor,
    Start,
    StartConfig,
    adapted_layers,
    add_adapter,
    install,
)
from forgetless.core import Decomposition, Method, decompose
from forgetless.errors import UserError, first_few, unknown
from forgetless.methods import METHODS
from forgetless.models import linear_weight, target_layers
from forgetless.statistics import Statistics

Source = Callable[[str], Tensor]
"""Layer name -> what a method needs of it; KeyError where there is nothing."""

_HOW_TO_GET = {
    "second_moment": "statistics of the knowledge to keep; "
    "run 'forgetless stats' or pass stats=forgetless.collect(model, batches)",
    "task_moment": "statistics of the new task; "
    "pass task_stats=forgetless.collect(model, batches) on its data",
    "gradient": "the gradients of the new task's loss; pass gradients={layer name: gradient}",
}


def attach(
    model: nn.Module,
    method: str = "lora_null_v1",
    rank: int = 16,
    alpha: float = 16,
    target_modules: str | Sequence[str] = "all-linear",
    stats: Statistics | None = None,
    *,
    task_stats: Statistics | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    adapter_name: str = "default",
    **options: Any,
) -> PeftModel:
    """The model with a trainable adapter on it; its output is still the base's, bit for bit.

    Args:
        model: any transformers model, or a PeftModel that gets one more adapter, which becomes
            the active one. Its weights are never written.
        method: how the adapter starts, a name of METHODS other than `full`.
        rank: r, in 1..min(out, in) of every target layer.
        alpha: scaling = alpha / rank.
        target_modules: "all-linear" (every linear layer but the output head), a list of name
            endings, or one regular expression, as in PEFT.
        stats: activations of the knowledge to keep, from `collect`. This and the next two are
            ignored by methods that do not need them.
        task_stats: activations on the new task's data, for `eva` and the like.
        gradients: layer name -> gradient of the new task's loss, (out, in), for `lora_ga`.
        dropout: probability, on the adapter's input while training.
        seed: of random starts; every layer draws from a generator of its own.
        adapter_name: PEFT's name for the adapter.
        options: the method's own, for instance position=0.25 for `intermediate`.

    Raises:
        UserError: unknown method or option, no layer matches, a rank that does not fit, or
            statistics that are missing or of another model; all layers' problems at once.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if METHODS[method].factors is None:
        raise UserError(
            f"method {method!r} trains the weights themselves: there is no adapter to attach. "
            "Train the model as it is, or choose another method."
        )
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise UserError(
            f"the model already has an adapter {adapter_name!r}; pass another adapter_name"
        )
    layers = target_layers(model, target_modules)
    sources = _sources(METHODS[method], stats, task_stats, gradients)
    _check_layers(METHODS[method], layers, rank, sources, options)
    starts = {
        name: _decompose_layer(name, layer, method, rank, alpha / rank, sources, seed, options)
        for name, layer in layers.items()
    }
    start = Start(
        method=method,
        trains=METHODS[method].trains,
        anchored=any(_needs_anchor(decomposition) for decomposition in starts.values()),
        seed=seed,
        options=options,
    )
    config = _config(model, layers, rank, alpha, target_modules, dropout, start)
    model = add_adapter(model, config, adapter_name)
    for name, module in adapted_layers(model, adapter_name).items():
        install(module, adapter_name, start, *_parameters(starts[name], start.anchored))
    return model


def _sources(
    method: Method,
    stats: Statistics | None,
    task_stats: Statistics | None,
    gradients: Mapping[str, Tensor] | None,
) -> dict[str, Source]:
    """Where each of the method's needs is read from."""
    given = {
        "second_moment": _moments(stats),
        "task_moment": _moments(task_stats),
        "gradient": None if gradients is None else gradients.__getitem__,
    }
    sources: dict[str, Source] = {}
    for need in sorted(method.needs):
        source = given[need]
        if source is None:
            raise UserError(f"method {method.name!r} needs {_HOW_TO_GET[need]}")
        sources[need] = source
    return sources


def _moments(stats: Statistics | None) -> Source | None:
    return None if stats is None else lambda name: stats[name].second_moment


def _check_layers(
    method: Method,
    layers: Mapping[str, nn.Module],
    rank: int,
    sources: Mapping[str, Source],
    options: Mapping[str, Any],
) -> None:
    problems = []
    for name, layer in layers.items():
        weight = linear_weight(layer)
        out_features, in_features = weight.shape
        try:
            method.check(rank, (out_features, in_features), options, layer=name)
        except ValueError as problem:
            problems.append(str(problem))
            continue
        if weight.is_meta:
            problems.append(f"layer {name!r} has no weights: it is on the meta device")
        for need, source in sources.items():
            wanted = (out_features if need == "gradient" else in_features, in_features)
            problems += _source_problems(name, need, source, wanted)
    if problems:
        raise UserError(first_few(problems))


def _source_problems(name: str, need: str, source: Source, wanted: tuple[int, int]) -> list[str]:
    try:
        shape = tuple(source(name).shape)
    except KeyError:
        return [f"there is no {need} of layer {name!r}; collect it on this model"]
    if shape != wanted:
        return [f"the {need} of layer {name!r} is {shape}, the layer needs {wanted}"]
    return []


def layer_seed(seed: int, name: str) -> int:
    """A seed of the layer's own, so that a start does not depend on the order of the layers."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


@torch.no_grad()
def _decompose_layer(
    name: str,
    layer: nn.Module,
    method: str,
    rank: int,
    scaling: float,
    sources: Mapping[str, Source],
    seed: int,
    options: Mapping[str, Any],
) -> Decomposition:
    inputs: dict[str, Any] = {need: source(name) for need, source in sources.items()}
    try:
        return decompose(
            linear_weight(layer).detach(),
            rank,
            method,
            scaling=scaling,
            seed=layer_seed(seed, name),
            **inputs,
            **options,
        )
    except (TypeError, ValueError) as problem:
        raise UserError(f"layer {name!r}: {problem}") from problem


def _needs_anchor(start: Decomposition) -> bool:
    return start.trains == ("A", "B") and not start.starts_at_zero


def _parameters(start: Decomposition, anchored: bool) -> tuple[Tensor, Tensor, Anchor | None]:
    """Values of lora_A and lora_B at step 0, and the anchor; see the table at the top."""
    A, B = start.A.float(), start.B.float()
    if anchored:
        return torch.zeros_like(A), torch.zeros_like(B), Anchor(A, B)
    if start.trains == ("B",):
        return A, torch.zeros_like(B), None
    if start.trains == ("A",):
        return torch.zeros_like(A), B, None
    return A, B, None


def _config(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    rank: int,
    alpha: float,
    target_modules: str | Sequence[str],
    dropout: float,
    start: Start,
) -> StartConfig:
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    return StartConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=dropout,
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in layers.values()),
        task_type=_task_type(model),
        start=asdict(start),
    )


def _task_type(model: nn.Module) -> TaskType | None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel) or not base.can_generate():
        return None
    return TaskType.SEQ_2_SEQ_LM if base.config.is_encoder_decoder else TaskType.CAUSAL_LM
