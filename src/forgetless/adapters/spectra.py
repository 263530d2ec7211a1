"""`spectra`: what a trained update is, layer by layer and by kind of module.

The numbers are those of `forgetless.core.spectra`, which says what each of them is. All ranks are
of singular values.
"""

from __future__ import annotations

import math
import statistics as numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from forgetless.adapters.anchored import is_anchored, plain_factors
from forgetless.adapters.dora import dora_update, is_dora
from forgetless.adapters.folders import CONFIG_FILE, load
from forgetless.adapters.foreign import require_usable
from forgetless.adapters.layer import adapted_layers
from forgetless.adapters.tuner import take_off
from forgetless.core import spectra as of
from forgetless.core.cache import shared_inputs
from forgetless.core.errors import UserError, first_few
from forgetless.core.method import Factors
from forgetless.core.progress import counted
from forgetless.models.hub import folder_of
from forgetless.models.load import load_model, load_tuned
from forgetless.models.parts import block_of, part_of
from forgetless.models.state import base_of
from forgetless.models.weights import is_linear, linear_weight, weight_shape
from forgetless.statistics.moments import Statistics

TENTHS = 10
"""Into how many parts the eigenbasis of the activations is cut, by position."""

TOP_K = 10
"""How many of the largest directions are looked at for intruders."""


@dataclass(frozen=True)
class Ranks:
    """Three ranks of one matrix, by its singular values.

    Attributes:
        effective: see `forgetless.core.spectra.effective_rank`.
        stable: see `stable_rank` there.
        at_90: directions that hold 90 % of the energy, see `rank_at_energy`.
    """

    effective: float
    stable: float
    at_90: int

    @classmethod
    def of(cls, S: Tensor) -> Ranks:
        """Those of singular values."""
        return cls(of.effective_rank(S), of.stable_rank(S), of.rank_at_energy(S, 0.9))


@dataclass(frozen=True)
class LayerSpectra:
    """What the update of one layer is.

    Attributes:
        module: its last part, such as "q_proj".
        part: "attention", "mlp", or None where neither is meant.
        block: number of its block; None outside of the blocks.
        out_features, in_features: of its weight.
        relative_update: ‖delta_W‖_F / ‖W‖_F.
        update: ranks of delta_W.
        weight: ranks of W; None where the weights were not decomposed, as the next three.
        rotation: share of the update that turns W's singular directions.
        intruders: positions of new directions among the `TOP_K` largest of W + delta_W.
        head_overlap: share of the update within W's largest directions, as many as the update has.
        activations: ranks of the inputs on the text to keep; None without statistics, as the rest.
        output_change: ‖delta_W X‖ / ‖W X‖ on the text to keep.
        update_on_inputs: share of what the update reads in each tenth of the eigenbasis of the
            inputs, the tenth with most activation first.
        A_on_inputs: the same of the adapter's A, which is LoRA-Null's figure 4; None for an update
            that has no A.
        shared_energy: share of the new task's activation energy in the space that holds 90 % of
            the kept text's; None without statistics of both.
    """

    layer: str
    module: str
    part: str | None
    block: int | None
    out_features: int
    in_features: int
    relative_update: float
    update: Ranks
    weight: Ranks | None = None
    rotation: float | None = None
    intruders: tuple[int, ...] | None = None
    head_overlap: float | None = None
    activations: Ranks | None = None
    output_change: float | None = None
    update_on_inputs: tuple[float, ...] | None = None
    A_on_inputs: tuple[float, ...] | None = None
    shared_energy: float | None = None

    def row(self) -> dict[str, Any]:
        """All of it as one row of a table, whatever was not measured as None."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("update", "weight", "activations"):
                ranks = Ranks(math.nan, math.nan, 0) if value is None else value
                for name, rank in asdict(ranks).items():
                    found[f"{field.name}_rank_{name}"] = None if value is None else rank
            elif field.name == "intruders":
                found["intruders"] = None if value is None else len(value)
            elif field.name.endswith("_on_inputs"):
                # The strongest and the weakest tenth tell most; all ten are in the JSON.
                for end, position in (("first", 0), ("last", -1)):
                    found[f"{field.name}_{end}"] = None if value is None else value[position]
            else:
                found[field.name] = value
        return found


class Spectra(Mapping[str, LayerSpectra]):
    """Layer name -> `LayerSpectra`, in the model's order."""

    def __init__(self, layers: Sequence[LayerSpectra]) -> None:
        self._layers = {layer.layer: layer for layer in layers}

    def __getitem__(self, layer: str) -> LayerSpectra:
        return self._layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row a layer, for a table."""
        return [layer.row() for layer in self.values()]

    @property
    def by_module(self) -> dict[str, dict[str, float | None]]:
        """For each kind of module the means over its layers, with the number of `layers`.

        A mean is over those layers in which the number was measured; None where it was in none.
        """
        kinds = dict.fromkeys(layer.module for layer in self.values())
        return {kind: _means([row for row in self.rows if row["module"] == kind]) for kind in kinds}

    @property
    def overall(self) -> dict[str, float | None]:
        """The means over all layers."""
        return _means(self.rows)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {
            "overall": self.overall,
            "modules": self.by_module,
            "layers": [asdict(layer) for layer in self.values()],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Spectra:
        """What `to_json` gave."""
        return cls([_layer_from_json(layer) for layer in content["layers"]])


def spectra(
    adapter: str | Path | nn.Module,
    base: nn.Module | str | None = None,
    stats: Statistics | None = None,
    *,
    task_stats: Statistics | None = None,
    of_weights: bool = True,
    adapter_name: str = "default",
) -> Spectra:
    """What a trained update is: its ranks, where it points, what it turned.

    Args:
        adapter: the folder of a LoRA, a PeftModel, or a model that was tuned in whole, or its
            folder, which may be given by its name on the Hugging Face hub. It is left as it is.
        base: the untouched model, or its name; None for the one that a PeftModel stands on.
        stats: activations on the text to keep, for what the update does to it.
        task_stats: those on the new task's text, for what the two share.
        of_weights: whether to decompose the base's weights too, which takes nearly all the time:
            without, a LoRA's own ranks come from its factors at once.
        adapter_name: of the adapter in a PeftModel.

    Returns:
        One entry a layer that the update changes.

    Raises:
        UserError: an adapter that is not for this base or changes nothing, or no base.

    Example:
        >>> found = fl.spectra("adapter/", base, fl.collect(base, old_text))  # doctest: +SKIP
        >>> found.by_module["q_proj"]["update_rank_at_90"]  # doctest: +SKIP
    """
    found: dict[str, LayerSpectra] = {}
    with torch.no_grad(), updates_of(adapter, base, adapter_name) as (model, updates):
        for group in counted(_by_input(updates, stats), "spectra", "inputs"):
            made = {name: updates[name]() for name in group}
            more: dict[str, dict[str, Any]] = {name: {} for name in group}
            if stats is not None and group[0] in stats:
                task = None
                if task_stats is not None and group[0] in task_stats:
                    task = task_stats[group[0]].second_moment
                more = _on_inputs(model, made, stats[group[0]].second_moment, task)
            for name, update in made.items():
                with shared_inputs():  # so that its weight is decomposed once
                    found[name] = _layer(model, name, update, of_weights, more[name])
        order = list(updates)
    if not any(layer.relative_update > 0 for layer in found.values()):
        raise UserError("there is nothing to look at: the update is zero in every linear layer")
    return Spectra([found[name] for name in order])


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one layer, and the adapter's A where it has one."""

    delta: of.Update
    A: Tensor | None = None


def _layer(
    base: nn.Module, name: str, update: LayerUpdate, of_weights: bool, more: Mapping[str, Any]
) -> LayerSpectra:
    W, delta = linear_weight(base.get_submodule(name)).detach(), update.delta
    S = of.singular_values(delta)
    size, most = float(torch.linalg.matrix_norm(W.double())), min(W.shape)
    turned: dict[str, Any] = {}
    if of_weights:
        turned = {
            "weight": Ranks.of(of.weight_spectrum(W)),
            "rotation": of.rotation_ratio(W, delta),
            "intruders": tuple(of.intruder_dimensions(W, delta, min(TOP_K, most)).tolist()),
            "head_overlap": of.head_overlap(W, delta, min(max(1, _rank(S)), most)),
        }
    return LayerSpectra(
        layer=name,
        module=name.rpartition(".")[2],
        part=part_of(base, name),
        block=block_of(name),
        out_features=W.shape[0],
        in_features=W.shape[1],
        relative_update=float(S.norm()) / size if size else math.nan,
        update=Ranks.of(S),
        **turned,
        **more,
    )


def _on_inputs(
    base: nn.Module,
    updates: Mapping[str, LayerUpdate],
    second_moment: Tensor,
    task_moment: Tensor | None,
) -> dict[str, dict[str, Any]]:
    """What the second moment tells of the layers that read these inputs; decomposed once."""
    found = {}
    with shared_inputs():
        C = second_moment.double()
        activations = Ranks.of(of.activation_spectrum(C))
        shared = None if task_moment is None else of.shared_energy(C, task_moment)
        for name, update in updates.items():
            W, delta = linear_weight(base.get_submodule(name)).detach().to(C), update.delta
            found[name] = {
                "activations": activations,
                "shared_energy": shared,
                "output_change": of.output_change(W, _to(delta, C), C),
                "update_on_inputs": _tenths(of.energy_on_eigenbasis(_to(delta, C), C)),
            }
            if update.A is not None:
                found[name]["A_on_inputs"] = _tenths(of.energy_on_eigenbasis(update.A.to(C), C))
    return found


def _to(delta: of.Update, C: Tensor) -> of.Update:
    """An update where the second moment is."""
    return Factors(delta.A.to(C), delta.B.to(C)) if isinstance(delta, Factors) else delta.to(C)


def _rank(S: Tensor) -> int:
    """How many singular values of an update are more than rounding."""
    return int((1e-6 * S.max() < S).sum()) if len(S) else 0


def _tenths(shares: Tensor) -> tuple[float, ...]:
    """Sums of shares over ten parts of their positions, of which none is empty if there are ten."""
    cuts = [round(i * len(shares) / TENTHS) for i in range(TENTHS + 1)]
    return tuple(float(shares[a:b].sum()) for a, b in pairwise(cuts))


def _by_input(names: Mapping[str, Any], stats: Statistics | None) -> list[list[str]]:
    """The layers that share a matrix of the statistics together; the others by themselves."""
    groups = [] if stats is None else stats.shared_inputs
    first = {name: group[0] for group in groups for name in group}
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(first.get(name, name), []).append(name)
    return list(found.values())


@contextmanager
def updates_of(
    adapter: str | Path | nn.Module, base: nn.Module | str | None, adapter_name: str = "default"
) -> Iterator[tuple[nn.Module, dict[str, Callable[[], LayerUpdate]]]]:
    """The base, and a function of each layer that gives its update, scaling and all.

    An adapter that is put on the base for it comes off again; which one is active may have changed.
    """
    model = load_model(base) if isinstance(base, str) else base
    if isinstance(adapter, PeftModel):
        yield base_of(adapter), _of_layers(adapter, adapter_name)
        return
    if model is None:
        raise UserError("give the base that the adapter is for")
    if isinstance(adapter, nn.Module):
        yield base_of(model), _differences(adapter, base_of(model))
        return
    folder = folder_of(adapter)
    if not (folder / CONFIG_FILE).is_file() and (folder / "config.json").is_file():
        yield base_of(model), _differences(load_tuned(folder, model), base_of(model))
        return
    require_usable(folder, model)
    name = "measured"
    loaded = load(model, folder, adapter_name=name)
    try:
        yield base_of(loaded), _of_layers(loaded, name)
    finally:
        take_off(loaded, name, model)


def _of_layers(model: PeftModel, adapter_name: str) -> dict[str, Callable[[], LayerUpdate]]:
    layers = adapted_layers(model, adapter_name)
    if not layers:
        raise UserError(f"this model has no adapter {adapter_name!r} on a linear layer")
    return {name: partial(_of_layer, layer, adapter_name) for name, layer in layers.items()}


def _of_layer(layer: Any, adapter_name: str) -> LayerUpdate:
    """The update of one adapted layer, and A as it is: A0 + dA of an anchored one."""
    A, B = plain_factors(layer, adapter_name)
    own = A[: layer.r[adapter_name]] if is_anchored(layer, adapter_name) else A
    if is_dora(layer, adapter_name):
        return LayerUpdate(dora_update(layer, adapter_name, linear_weight(layer)), own)
    return LayerUpdate(Factors(A=A, B=B * layer.scaling[adapter_name]), own)


def _differences(tuned: nn.Module, base: nn.Module) -> dict[str, Callable[[], LayerUpdate]]:
    """The update of every linear layer of a model that was tuned in whole."""
    before, after = dict(base.named_modules()), dict(tuned.named_modules())
    layers = [name for name, module in before.items() if name and is_linear(module)]
    different = [
        name
        for name in layers
        if name not in after or weight_shape(after[name]) != weight_shape(before[name])
    ]
    if different or not layers:
        raise UserError(f"the model was not tuned from this base: {first_few(different)}")

    def difference(name: str) -> LayerUpdate:
        return LayerUpdate(
            linear_weight(after[name]).double() - linear_weight(before[name]).double()
        )

    return {name: partial(difference, name) for name in layers}


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean of every number over the rows in which it is one, and the number of rows."""
    found: dict[str, float | None] = {"layers": len(rows)}
    names = ("layer", "module", "part", "block", "out_features", "in_features")
    for column in rows[0] if rows else ():
        if column not in names:
            values = [row[column] for row in rows if row[column] is not None]
            finite = [value for value in values if math.isfinite(value)]
            found[column] = numbers.fmean(finite) if finite else None
    return found


def _layer_from_json(content: Mapping[str, Any]) -> LayerSpectra:
    values = dict(content)
    for name in ("update", "weight", "activations"):
        values[name] = None if values[name] is None else Ranks(**values[name])
    for name in ("intruders", "update_on_inputs", "A_on_inputs"):
        values[name] = None if values[name] is None else tuple(values[name])
    return LayerSpectra(**values)
