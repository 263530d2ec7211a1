"""`attach`: a method's start on every target layer, checked before anything is changed."""

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.layer import Start, StartConfig, adapted_layers, at_step_zero, install
from forgetless.adapters.ranks import LayerRank, layer_ranks, narrowed, patterns
from forgetless.adapters.tuner import add_adapter, check_addable, take_off
from forgetless.core.cache import shared_inputs
from forgetless.core.errors import UserError, first_few
from forgetless.core.linalg import eigen_top
from forgetless.core.method import Decomposition, Factors, Method
from forgetless.core.progress import counted
from forgetless.data.modality import modality_of
from forgetless.methods import decompose, find
from forgetless.models.heads import find_new_head, new_modules
from forgetless.models.state import as_base, base_of, source_of
from forgetless.models.targets import Targets, find_targets
from forgetless.models.weights import is_offloaded, linear_weight, unreadable, weight_shape
from forgetless.statistics.collection import collect
from forgetless.statistics.gradients import Gradients
from forgetless.statistics.moments import Statistics


@dataclass(frozen=True)
class Source:
    """One of a method's needs, by layer name; KeyError where there is nothing.

    Attributes:
        read: gives the matrix.
        shape: gives its shape, without reading what lies on disk.
    """

    read: Callable[[str], Tensor]
    shape: Callable[[str], tuple[int, ...]]


_WRAPPED = ("base_layer", "original_module")
"""What PEFT calls a module of the base inside of its own."""

_HOW_TO_GET = {
    "second_moment": "statistics of the knowledge to keep; "
    "run 'forgetless stats' or pass stats=forgetless.collect(model, batches)",
    "task_moment": "statistics of the new task (stats= are those of the knowledge to keep); "
    "pass task_stats=forgetless.collect(model, batches) on its data",
    "gradient": "the gradients of the new task's loss; "
    "pass gradients=forgetless.statistics.gradients.collect_gradients(model, batches)",
}


def attach(
    model: nn.Module,
    method: str | Method = "lora_null_v1",
    rank: int = 16,
    alpha: float = 16,
    target_modules: str | Sequence[str] = "all-linear",
    stats: Statistics | None = None,
    *,
    keep: str | Path | None = None,
    task_stats: Statistics | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    adapter_name: str = "default",
    use_rslora: bool = False,
    use_dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    **options: Any,
) -> PeftModel:
    """The model with a trainable adapter on it; its output is still the base's, bit for bit.

    Args:
        model: any transformers model, or a PeftModel that gets one more adapter, which becomes
            the active one. Its weights are never written. The new head of a classifier, of
            `forgetless.models.heads.add_head` or one that transformers drew because what the model
            was loaded from has none, is the adapter's and trained beside it.
        method: how the adapter starts: a name of METHODS other than `full`, or a `Method`.
        rank: r. A layer whose shorter side is less gets that, at the same scaling.
        alpha: scaling = alpha / rank, or alpha / √rank with `use_rslora`.
        target_modules: "all-linear" (see `models.target_layers`), a list of name
            endings, or one regular expression, as in PEFT; or "attention" or "mlp", of all linear
            layers those inside of that part of every block.
        stats: activations of the knowledge to keep, from `collect`. This and the next two are
            ignored by methods that do not need them.
        keep: instead of `stats`, what is to be kept: a text itself, a file, or
            another source of `forgetless.data.texts.batches`; 256 pieces of it are run through the
            base, which must have a name by which its processor is found.
        task_stats: activations on the new task's data, for `eva`, `corda_ipm`, `sc_lora` and
            `inflora`.
        gradients: layer name -> gradient of the new task's loss, (out, in), for `lora_ga`.
        dropout: probability, on the adapter's input while training.
        seed: of random starts; every layer draws from a generator of its own.
        adapter_name: PEFT's name for the adapter.
        use_rslora: scaling = alpha / √rank, so that larger ranks do not learn more slowly.
        use_dora: train the length of every row of the weight beside its direction, see
            `forgetless.adapters.dora`; every method still starts at the base, bit for bit.
        rank_pattern: ranks of single layers, by name, name ending or regular expression, as in
            PEFT: {"q_proj": 32, "layers.0.mlp.*": 4}.
        alpha_pattern: the same for alpha.
        options: the method's own, for instance position=0.25 for `intermediate`.

    Raises:
        UserError: unknown method or option, no layer matches, a rank that does not fit, weights
            that cannot be read (offloaded, sharded, packed), or statistics that are missing or of
            another model; all layers' problems at once.
    """
    method = find(method)
    if method.factors is None:
        raise UserError(
            f"method {method.name!r} trains the weights themselves: there is no adapter to attach. "
            "Train the model as it is, or choose another method."
        )
    check_addable(model, adapter_name)
    find_new_head(model)
    targets = find_targets(model, target_modules)
    layers = targets.layers
    asked = layer_ranks(layers, rank, alpha, rank_pattern, alpha_pattern, use_rslora)
    ranks = narrowed(asked, layers, rank_pattern)
    if keep is not None and "second_moment" in method.needs:
        if stats is not None:
            raise UserError("give stats= or keep=, not both: both say what is to be kept")
        stats = _statistics_of(keep, model, target_modules)
    sources = _sources(method, stats, task_stats, gradients)
    _check_layers(method, layers, ranks, sources, options, use_dora)
    _warn_of_the_rest(model, targets)
    given = {"rank_pattern": dict(rank_pattern or {}), "alpha_pattern": dict(alpha_pattern or {})}
    if narrow := [name for name in ranks if ranks[name] != asked[name]]:
        warnings.warn(
            f"{len(narrow)} layers are narrower than rank {rank} and get the rank of their shorter "
            f"side: {narrow[0]!r} has {ranks[narrow[0]].rank}",
            stacklevel=2,
        )
        given = patterns(ranks, rank, alpha)
    names = targets.given
    if method.share_ranks is not None and options.get("rho", 1) > 1:
        ranks = _shared_out(method, layers, ranks, sources, options["rho"])
        layers = {name: layer for name, layer in layers.items() if name in ranks}
        given, names = patterns(ranks, rank, alpha), list(layers)
    factors: dict[str, Factors] = {}
    with shared_inputs():  # what follows from the input of q, k and v alone is computed once
        for name, layer in counted(layers.items(), "decomposing", "layers"):
            made = _decompose_layer(name, layer, method, ranks[name], sources, seed, options)
            factors[name] = Factors(made.A.float(), made.B.float())  # and not the weight's copy
    start = Start(
        method=method.name,
        trains=method.trains,
        anchored=method.trains == ("A", "B")
        and any(bool(each.A.any()) and bool(each.B.any()) for each in factors.values()),
        seed=seed,
        options=options,
    )
    config = StartConfig(
        r=rank,
        lora_alpha=alpha,
        **given,
        use_rslora=use_rslora,
        use_dora=use_dora,
        target_modules=names,
        lora_dropout=dropout,
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in layers.values()),
        task_type=task_type_of(base_of(model)),
        modules_to_save=new_modules(model) or None,
        start=asdict(start),
    )
    adapted = add_adapter(model, config, adapter_name)
    try:
        for name, module in adapted_layers(adapted, adapter_name).items():
            A, B = factors[name].A, factors[name].B
            install(module, adapter_name, start, *at_step_zero(A, B, start))
    except UserError:
        take_off(adapted, adapter_name, model)
        raise
    return adapted


def _statistics_of(
    keep: str | Path, model: nn.Module, target_modules: str | Sequence[str]
) -> Statistics:
    """The activations of the base on a text, or on what a source of texts holds."""
    name, modality = source_of(model), modality_of(model)
    if not name:
        raise UserError(
            f"keep= needs the base's {modality.processor_name}, and this model was loaded from "
            "nowhere; pass "
            "stats=forgetless.collect(model, batches)"
        )
    source, processor = str(keep), modality.load_processor(name)
    named = os.path.exists(source) or re.search(r"\.(txt|jsonl?|csv|parquet)\Z", source)
    with TemporaryDirectory() as folder, as_base(model) as base:
        if isinstance(keep, str) and len(keep.split()) > 1 and not named:
            source = str(Path(folder) / "keep.txt")
            Path(source).write_text(keep, encoding="utf-8")
        texts = modality.batches(source, base, processor)
    return collect(model, texts, target_modules)


def _sources(
    method: Method,
    stats: Statistics | None,
    task_stats: Statistics | None,
    gradients: Mapping[str, Tensor] | None,
) -> dict[str, Source]:
    """Where each of the method's needs is read from."""
    given: dict[str, Source] = {}
    for need, found in (("second_moment", stats), ("task_moment", task_stats)):
        if found is not None:
            given[need] = _moments(found)
    if isinstance(gradients, Gradients):
        given["gradient"] = Source(gradients.__getitem__, gradients.shape)
    elif gradients is not None:
        given["gradient"] = Source(gradients.__getitem__, lambda n: tuple(gradients[n].shape))
    for need in sorted(method.needs - given.keys()):
        raise UserError(f"method {method.name!r} needs {_HOW_TO_GET[need]}")
    return {need: given[need] for need in sorted(method.needs)}


def _moments(stats: Statistics) -> Source:
    """The second moments; those on disk are read once for neighbours that share one."""
    first = {name: group[0] for group in stats.shared_inputs for name in group}
    read = lru_cache(maxsize=1)(lambda name: stats[name].second_moment)
    return Source(lambda name: read(first[name]), stats.shape)


def _check_layers(
    method: Method,
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, LayerRank],
    sources: Mapping[str, Source],
    options: Mapping[str, Any],
    use_dora: bool,
) -> None:
    problems = _obstacles(layers)
    if problems:
        raise UserError(first_few(problems))
    for name, layer in layers.items():
        out_features, in_features = weight_shape(layer)
        try:
            method.check(ranks[name].rank, (out_features, in_features), options, layer=name)
        except ValueError as problem:
            problems.append(str(problem))
            continue
        if use_dora and is_offloaded(layer):
            problems.append(
                f"layer {name!r} is offloaded, and DoRA needs its weight at any time; leave "
                "use_dora off, or load the model whole"
            )
        elif use_dora and not linear_weight(layer).any(dim=1).all():
            problems.append(
                f"layer {name!r} has a row of zeros, whose direction DoRA cannot train; leave "
                "the layer out of target_modules or use_dora off"
            )
        for need, source in sources.items():
            wanted = (out_features if need == "gradient" else in_features, in_features)
            try:
                shape = source.shape(name)
            except KeyError:
                problems.append(
                    f"there is no {need} of layer {name!r}; collect it on this model, or leave "
                    "the layer out of target_modules where no input reaches it"
                )
                continue
            if shape != wanted:
                problems.append(
                    f"the {need} of layer {name!r} is {shape}, the layer needs {wanted}"
                )
    if problems:
        raise UserError(first_few(problems))


def _shared_out(
    method: Method,
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, LayerRank],
    sources: Mapping[str, Source],
    rho: float,
) -> dict[str, LayerRank]:
    """The ranks after the method has moved them between layers; a layer with none is left out.

    The scaling of every layer stays. Only the eigenvalues that a layer may get ranks for are
    computed; the others stand together at the end, so that their sum is right.
    """
    assert method.share_ranks is not None
    eigenvalues = {}
    for name, layer in layers.items():
        moment = sources["task_moment"].read(name)
        most = min(round(rho * ranks[name].rank), *weight_shape(layer))
        first = eigen_top(moment, most).values
        padding = first.new_zeros(round(rho * ranks[name].rank) - most)
        eigenvalues[name] = torch.cat([first, padding, moment.trace()[None] - first.sum()])
    asked = {name: rank.rank for name, rank in ranks.items()}
    shared = method.share_ranks(eigenvalues, asked, rho)
    limits = {name: min(weight_shape(layer)) for name, layer in layers.items()}
    return {
        name: ranks[name].resized(min(rank, limits[name]))
        for name, rank in shared.items()
        if rank > 0
    }


def _obstacles(layers: Mapping[str, nn.Module]) -> list[str]:
    """One sentence for all layers whose weights cannot be read for the same reason."""
    unread: dict[str, list[str]] = {}
    for name, layer in layers.items():
        reason = unreadable(layer)
        if reason is not None:
            unread.setdefault(reason, []).append(name)
    return [
        f"layer {first!r}{f' (and {len(others)} more)' if others else ''} {reason}"
        for reason, (first, *others) in unread.items()
    ]


def layer_seed(seed: int, name: str) -> int:
    """A seed of the layer's own, so that a start does not depend on the order of the layers."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


@torch.no_grad()
def _decompose_layer(
    name: str,
    layer: nn.Module,
    method: Method,
    rank: LayerRank,
    sources: Mapping[str, Source],
    seed: int,
    options: Mapping[str, Any],
) -> Decomposition:
    inputs: dict[str, Any] = {need: source.read(name) for need, source in sources.items()}
    try:
        return decompose(
            linear_weight(layer).detach(),
            rank.rank,
            method,
            scaling=rank.scaling,
            seed=layer_seed(seed, name),
            **inputs,
            **options,
        )
    except (TypeError, ValueError) as problem:
        raise UserError(f"layer {name!r}: {problem}") from problem


def _warn_of_the_rest(model: nn.Module, targets: Targets) -> None:
    """Say which tensors an adapter on all linear layers does not reach, and what is used twice."""
    if targets.skipped:
        warnings.warn(
            "the experts of this model are stacked tensors, which 'all-linear' does not adapt: "
            + ", ".join(targets.skipped),
            stacklevel=3,
        )
    if targets.unread:
        warnings.warn(
            f"{len(targets.unread)} linear layers through which no text passes are left out, "
            f"{targets.unread[0]!r} among them; name them in target_modules to adapt them",
            stacklevel=3,
        )
    base, again = base_of(model), []
    first = {module: name for name, module in targets.layers.items()}
    for name, module in base.named_modules(remove_duplicate=False):
        name = ".".join(part for part in name.split(".") if part not in _WRAPPED)
        adapted = first.get(module, name)
        # A layer inside of a shared block has several names too, but the adapter then is shared.
        if name != adapted:
            here, there = (base.get_submodule(n.rpartition(".")[0]) for n in (name, adapted))
            again += [(name, adapted)] if here is not there else []
    if again:
        name, adapted = again[0]
        warnings.warn(
            f"layer {name!r} is the same module as {adapted!r}; PEFT adapts it under that name "
            "alone, and merging would change both",
            stacklevel=3,
        )


def task_type_of(base: nn.Module) -> TaskType | None:
    """What PEFT calls the work of a model that generates text; None of any other."""
    if not isinstance(base, PreTrainedModel) or not base.can_generate():
        return None
    return TaskType.SEQ_2_SEQ_LM if base.config.is_encoder_decoder else TaskType.CAUSAL_LM
