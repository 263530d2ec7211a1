"""`repair`: a trained adapter that forgets less of what is to be kept, in closed form.

Each layer's A is replaced by A T (T + strength C)⁻¹, see `forgetless.core.projection`; B, the rank,
the scaling and the names stay, so that the result is the plain LoRA that it was. Layers that read
the same inputs are solved for together, one group of them in memory at a time.
"""

import copy
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.anchored import is_anchored
from forgetless.adapters.attachment import task_type_of
from forgetless.adapters.folders import (
    _CHANGES_THE_BASE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    _read_config,
    export,
    load,
    save,
    without_new_head,
    write_weights,
)
from forgetless.adapters.foreign import AdapterCheck, require_usable
from forgetless.adapters.layer import PREFIX, StartConfig, adapted_layers
from forgetless.adapters.plain import lora_config
from forgetless.adapters.tuner import add_adapter, take_off
from forgetless.core.errors import UserError, first_few
from forgetless.core.method import Factors
from forgetless.core.progress import counted
from forgetless.core.projection import best_of_rank, repaired
from forgetless.core.spectra import Update, dense, output_energy, update_norm
from forgetless.core.tensors import read_tensors
from forgetless.models.hub import folder_of
from forgetless.models.load import load_model, load_tuned
from forgetless.models.state import base_of
from forgetless.models.weights import is_linear, linear_weight, weight_shape
from forgetless.statistics.moments import Statistics

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""The strengths that "auto" chooses among; half a decade apart."""

MISSED = 0.01
"""Most of the update's effect on the task, in energy, that "auto" gives away by its forecast."""

Strength = float | Literal["auto"]

_OTHER_KINDS = (
    *("alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config"),
    "target_parameters",
)
"""Settings of PEFT under which A and B do not act as a plain LoRA's."""


@dataclass(frozen=True)
class Forecast:
    """What a strength does to the update of a layer, by the second moments alone.

    Attributes:
        kept: ‖delta_W' X‖² / ‖delta_W X‖² on the text to keep: the share of the disturbance left.
        missed: ‖(delta_W' - delta_W) X‖² / ‖delta_W X‖² on the task's text: the share of what the
            update did for the task that it no longer does.
    """

    kept: float
    missed: float


@dataclass(frozen=True)
class Earlier:
    """What an adapter was before its last task, whose effect on earlier tasks is to stay.

    Attributes:
        factors: A and B of every layer, the scaling within B.
        inputs: activations on the earlier tasks.
        share: of these in the statistics to keep, in 0..1.
    """

    factors: Mapping[str, Factors]
    inputs: Statistics
    share: float


class Repairs:
    """The factors of an adapter at several strengths, solved for with each moment read once.

    No model is needed, and one group of layers is in memory at a time: two moments, their sum and
    its Cholesky factor, four float64 matrices of (in, in).

    Args:
        factors: A and B of every layer, without the scaling, see `factors_of`.
        keep: activations on text to keep.
        task: those on the new task's text.
        strengths: which to solve for; 0, the adapter as it is, is always there.
        device: to solve on; None for where the factors are.
        earlier: what the adapter did before; its factors and the others have the same scaling.

    Attributes:
        forecasts: strength -> layer -> what the strength does to it; without layers whose update is
            zero, such as one that no input reaches, which need no statistics.

    Raises:
        UserError: layers without statistics or with those of another model, or a strength out of
            range.
    """

    def __init__(
        self,
        factors: Mapping[str, Factors],
        keep: Statistics,
        task: Statistics | None = None,
        strengths: Iterable[float] = STRENGTHS,
        *,
        device: torch.device | None = None,
        earlier: Earlier | None = None,
    ) -> None:
        self._earlier = earlier
        wanted = sorted({checked_strength(strength) for strength in strengths} - {0.0})
        self._device = device
        moving = [name for name, layer in factors.items() if layer.A.any() and layer.B.any()]
        require_statistics(moving, keep, task)
        self._A = {0.0: {name: layer.A.detach().clone() for name, layer in factors.items()}}
        self.forecasts = {0.0: dict.fromkeys(moving, Forecast(1.0, 0.0))}
        for strength in wanted:
            self._A[strength], self.forecasts[strength] = dict(self._A[0.0]), {}
        groups = list(_groups(moving, keep, task)) if wanted else []
        for group in counted(groups, "repairing", "inputs"):
            self._solve({name: factors[name] for name in group}, keep, task, wanted)

    @property
    def strengths(self) -> list[float]:
        """All of them, ascending, 0 among them."""
        return sorted(self._A)

    def A(self, strength: float) -> dict[str, Tensor]:
        """A' of every layer, (rank, in), in its own dtype; at 0 the adapter's own, bit for bit."""
        return self._A[strength]

    def forecast(self, strength: float) -> Forecast:
        """What a strength does, as the mean over layers."""
        return mean_of(self.forecasts[strength].values())

    def foreseen(self, missed: float = MISSED) -> float:
        """The largest strength whose forecast misses no more than so much of the task's energy."""
        return max(s for s in self.strengths if self.forecast(s).missed <= missed)

    @torch.no_grad()
    def _solve(
        self,
        group: Mapping[str, Factors],
        keep: Statistics,
        task: Statistics | None,
        strengths: Sequence[float],
    ) -> None:
        """All strengths for layers that read the same inputs, whose moments are read once."""
        stacked = torch.cat([layer.A for layer in group.values()]).to(self._device)
        rows = _where_float64_is(stacked).double()
        C, T = _moments(next(iter(group)), keep, task, rows.shape[1])
        # Once, and not for every layer and strength.
        C, T = C.to(rows), None if T is None else T.to(rows)
        ranks = [len(layer.A) for layer in group.values()]
        towards = self._towards(group, rows)
        for strength in strengths:
            made = repaired(rows, C, T, strength, towards)
            parts = zip(group, torch.split(rows, ranks), torch.split(made, ranks), strict=True)
            for name, before, after in parts:
                B = group[name].B.to(rows)
                told = forecast_of(Factors(A=before, B=B), Factors(A=after, B=B), C, T)
                self.forecasts[strength][name] = told
                self._A[strength][name] = after.to(group[name].A)

    def _towards(self, group: Mapping[str, Factors], rows: Tensor) -> Tensor | None:
        """The `towards` of a group: its A₀ is B⁺ B₀ A₀, with B₀ A₀ the earlier update."""
        if self._earlier is None:
            return None
        parts = []
        for name, layer in group.items():
            before = self._earlier.factors.get(name)
            if before is None:  # a layer that was not adapted before
                parts.append(rows.new_zeros(layer.A.shape))
                continue
            B = torch.linalg.pinv(layer.B.to(rows)) @ before.B.to(rows)
            parts.append(B @ before.A.to(rows))
        E = self._earlier.inputs[next(iter(group))].second_moment.to(rows)
        return self._earlier.share * torch.cat(parts) @ E


def factors_of(model: PeftModel, adapter_name: str = "default") -> dict[str, Factors]:
    """A and B of every layer of a plain LoRA on a model, without the scaling."""
    return {
        name: Factors(A=layer.lora_A[adapter_name].weight, B=layer.lora_B[adapter_name].weight)
        for name, layer in adapted_layers(model, adapter_name).items()
    }


@torch.no_grad()
def put(model: PeftModel, A: Mapping[str, Tensor], adapter_name: str = "default") -> PeftModel:
    """The model, whose adapter now has these A."""
    for name, layer in adapted_layers(model, adapter_name).items():
        layer.lora_A[adapter_name].weight.copy_(A[name])
    return model


def repair(
    adapter: str | Path | PeftModel | nn.Module,
    base: nn.Module | str,
    keep: Statistics,
    task: Statistics | None = None,
    strength: Strength = 0.1,
    *,
    rank: int | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """The base with the adapter on it, repaired: it does to the text to keep as little as it can.

    Every layer's update delta_W = scaling · B A becomes delta_W T (T + strength C)⁻¹, the minimiser
    of ‖(delta_W' - delta_W) T^½‖² + strength ‖delta_W' C^½‖², by changing A alone; nothing is
    trained. C and T are second moments as they were collected, not divided by anything.

    Args:
        adapter: the folder of a LoRA, whoever trained it, or a PeftModel; an anchored one is
            exported first, exactly, at twice its rank. Also a model that was tuned in whole, or
            its folder. A folder may be given by its name on the Hugging Face hub.
        base: the untouched model that gets the repaired adapter, or its name or folder. Where it
            is the model that a given PeftModel stands on, the repaired adapter comes beside the
            old one, as "repaired", and is the active one.
        keep: activations of the base on text to keep, from `collect`; of every adapted layer.
        task: those of the trained model on the new task's text, from ``collect(model, text,
            adapters_on=True)``; without it every direction of the inputs counts alike.
        strength: 0 or more. 0 gives the adapter back, bit for bit; 0.1 is a good start, 1 keeps
            more and learns less. "auto" takes the largest of `STRENGTHS` that by the moments leaves
            99 % of what the update does on the task's text.
        rank: for a model that was tuned in whole: of the LoRA that comes out, the best of that
            rank. None gives the repaired model itself.
        adapter_name: of the adapter in a PeftModel, and in the result.

    Returns:
        A PeftModel in evaluation mode, which `save` and `export` write as a plain LoRA; for a
        model tuned in whole and no rank, that model with repaired linear layers.

    Raises:
        UserError: an adapter that is not for this base or changes nothing, a DoRA or another kind
            of LoRA, layers without statistics, or a strength out of range.

    Example:
        >>> model = fl.load(base, "adapter/")  # doctest: +SKIP
        >>> keep = fl.collect(model, old_text)  # doctest: +SKIP
        >>> task = fl.collect(model, new_text, adapters_on=True)  # doctest: +SKIP
        >>> healed = fl.repair(model, base, keep, task)  # doctest: +SKIP
        >>> fl.save(healed, "healed/", adapter_name="repaired")  # doctest: +SKIP
    """
    adapter = adapter if isinstance(adapter, nn.Module) else folder_of(adapter)
    given = STRENGTHS if strength == "auto" else (checked_strength(strength),)
    if is_tuned(adapter):
        if strength == "auto":
            raise UserError("strength 'auto' is for adapters; give a number for a tuned model")
        return _repair_tuned(
            adapter, base, keep, task, checked_strength(strength), rank, adapter_name
        )
    if rank is not None:
        raise UserError("rank is for models that were tuned in whole; an adapter keeps its own")
    model, name = on_base(adapter, base, adapter_name)
    made = Repairs(factors_of(model, name), keep, task, given)
    chosen = made.foreseen() if strength == "auto" else checked_strength(strength)
    return put(model, made.A(chosen), name)


def checked_strength(strength: object) -> float:
    """The strength as a number, if it can be one.

    Raises:
        UserError: it is no finite number from 0.
    """
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not number or not 0 <= strength < float("inf"):  # type: ignore[operator]
        raise UserError(f"strength must be a number from 0, or 'auto', got {strength!r}")
    return float(strength)  # type: ignore[arg-type]


def _where_float64_is(M: Tensor) -> Tensor:
    """The matrix itself, or on the CPU where its device has no float64."""
    return M.cpu() if M.device.type == "mps" else M


def forecast_of(
    before: Update, after: Update, second_moment: Tensor, task_moment: Tensor | None = None
) -> Forecast:
    """What becomes of the effects of an update when another takes its place.

    Without a moment of the task's text every direction of its inputs counts alike.
    """
    device = (before.A if isinstance(before, Factors) else before).device
    C = second_moment.to(device, torch.float64)
    T = None if task_moment is None else task_moment.to(C)

    def learned_by(M: Update) -> float:
        if T is None:  # the identity at C's mean diagonal, without a second matrix of its size
            return float(C.diagonal().mean()) * update_norm(M) ** 2
        return output_energy(M, T)

    if isinstance(before, Factors) and isinstance(after, Factors):
        moved: Update = Factors(
            A=torch.cat([after.A, before.A.to(after.A)]),
            B=torch.cat([after.B, -before.B.to(after.B)], dim=1),
        )
        if after.B is before.B:
            moved = Factors(A=after.A - before.A, B=before.B)
    else:
        moved = dense(after) - dense(before)
    disturbed, learned = output_energy(before, C), learned_by(before)
    return Forecast(
        kept=output_energy(after, C) / disturbed if disturbed else 0.0,
        missed=learned_by(moved) / learned if learned else 0.0,
    )


def mean_of(forecasts: Collection[Forecast]) -> Forecast:
    """The mean over layers; of none, that nothing is left."""
    count = max(1, len(forecasts))
    return Forecast(
        kept=sum(each.kept for each in forecasts) / count,
        missed=sum(each.missed for each in forecasts) / count,
    )


def _groups(
    layers: Iterable[str], keep: Statistics, task: Statistics | None
) -> Iterator[list[str]]:
    """The layers that read the same inputs in both statistics, in the model's order."""
    firsts = [
        {name: group[0] for group in statistics.shared_inputs for name in group}
        for statistics in (keep, task)
        if statistics is not None
    ]
    found: dict[tuple[str, ...], list[str]] = {}
    for name in layers:
        found.setdefault(tuple(first[name] for first in firsts), []).append(name)
    yield from found.values()


def _moments(
    name: str, keep: Statistics, task: Statistics | None, size: int
) -> tuple[Tensor, Tensor | None]:
    """C and T of a layer; read from the disk where they lie there."""
    C = keep[name].second_moment
    T = None if task is None else task[name].second_moment
    for moment in (C, T):
        if moment is not None and len(moment) != size:
            raise UserError(
                f"the statistics of layer {name!r} are of {len(moment)} inputs, and it has "
                f"{size}; collect them on this base"
            )
    return C, T


def require_statistics(layers: Iterable[str], keep: Statistics, task: Statistics | None) -> None:
    """Refuse statistics in which a layer is missing.

    Raises:
        UserError: naming the first few.
    """
    problems = [
        f"there are no statistics of the {kind} for layer {name!r}"
        for kind, statistics in (("text to keep", keep), ("new task", task))
        for name in layers
        if statistics is not None and name not in statistics
    ]
    if problems:
        raise UserError(
            f"{first_few(problems)}; collect them on this base with target_modules= the adapter's "
            "layers"
        )


# --- the adapter, as a plain LoRA on the base ---------------------------------------------------


def on_base(
    adapter: str | Path | PeftModel, base: nn.Module | str, adapter_name: str = "default"
) -> tuple[PeftModel, str]:
    """The base with a plain copy of the adapter on it, and its name there; see `repair`."""
    model = load_model(base) if isinstance(base, str) else base
    if isinstance(adapter, PeftModel) and base_of(adapter) is base_of(model):
        model = adapter
    with tempfile.TemporaryDirectory(prefix="forgetless-repair-") as place:
        folder = _plain_folder(adapter, model, adapter_name, Path(place))
        _look_at(folder, model)
        taken = isinstance(model, PeftModel) and adapter_name in model.peft_config
        name = "repaired" if taken else adapter_name
        loaded = load(model, folder, adapter_name=name)
    loaded.peft_config[name].start = None  # it is no start of a training any more
    return loaded, name


def _look_at(folder: Path, base: nn.Module) -> AdapterCheck:
    """Refuse an adapter that cannot be used, and say what is odd about one that can."""
    found = require_usable(folder, base)
    for note in found.notes:
        warnings.warn(f"{folder}: {note}", stacklevel=4)
    if besides := without_new_head(found.besides, folder):
        warnings.warn(
            "what is trained beside the A and B of linear layers is left as it is: "
            + first_few(besides),
            stacklevel=4,
        )
    return found


def _plain_folder(
    adapter: str | Path | PeftModel, base: nn.Module, adapter_name: str, place: Path
) -> Path:
    """A folder with the plain LoRA that the adapter is."""
    if isinstance(adapter, PeftModel):
        _require_repairable(lora_config(adapter, adapter_name))
        layers = adapted_layers(adapter, adapter_name).values()
        anchored = any(is_anchored(layer, adapter_name) for layer in layers)
        (export if anchored else save)(adapter, place, adapter_name=adapter_name)
        return place
    folder = Path(adapter)
    config = _read_config(folder)
    _require_repairable(config)
    if not (config.start or {}).get("anchored"):
        return folder
    loaded = load(base, folder, adapter_name="native")
    export(loaded, place, adapter_name="native")
    take_off(loaded, "native", base)
    return place


def _require_repairable(config: LoraConfig) -> None:
    """Refuse adapters whose update is no B A on this base, with what can be done instead."""
    if config.use_dora:
        raise UserError(
            "a DoRA adapter stretches the rows of the weight, so that its update is no B A and no "
            "A can repair it; merge it into the base (merge_and_unload, save_pretrained) and "
            "repair that model, with rank= for a LoRA; or turn it down by forgetless.dial"
        )
    if str(config.init_lora_weights).startswith(_CHANGES_THE_BASE):
        raise UserError(
            f"init_lora_weights={config.init_lora_weights!r} has changed the base of this adapter; "
            "save it with path_initial_model_for_weight_conversion, and repair that folder on "
            "the original base"
        )
    more = [f"{kind} = {value}" for kind in _OTHER_KINDS if (value := getattr(config, kind, None))]
    if more:
        raise UserError(
            f"this adapter is more than a plain LoRA: {', '.join(more)}; what cannot be exported "
            "cannot be repaired"
        )


def repair_folder(
    source: str | Path,
    out: str | Path,
    base: nn.Module,
    keep: Statistics,
    task: Statistics | None = None,
    strength: Strength = 0.1,
) -> tuple[Repairs, float]:
    """Repair the folder of a plain LoRA into a new one, without a weight of the base.

    The base may be on the meta device, for only its names and shapes are asked. The rest is as in
    `repair`.

    Returns:
        What was solved, and the strength that was taken.

    Raises:
        UserError: as `repair`, or an anchored adapter, which `export` makes a plain one of.
    """
    source, out = Path(source), Path(out)
    config = _read_config(source)
    _require_repairable(config)
    if (config.start or {}).get("anchored"):
        raise UserError(f"{source} is an anchored adapter; 'forgetless export' makes it a LoRA")
    layers = _look_at(source, base).layers
    state = read_tensors(source / WEIGHTS_FILE, finite=True)
    keys = {name: f"{PREFIX}{name}.lora_" for name in layers}
    factors = {
        name: Factors(A=state[f"{key}A.weight"], B=state[f"{key}B.weight"])
        for name, key in keys.items()
    }
    given = STRENGTHS if strength == "auto" else (checked_strength(strength),)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    made = Repairs(factors, keep, task, given, device=accelerator)
    chosen = made.foreseen() if strength == "auto" else checked_strength(strength)
    state |= {f"{keys[name]}A.weight": A for name, A in made.A(chosen).items()}
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / CONFIG_FILE, out / CONFIG_FILE)
    write_weights(state, out)
    return made, chosen


# --- models that were tuned in whole ------------------------------------------------------------


def is_tuned(adapter: str | Path | nn.Module) -> bool:
    if isinstance(adapter, nn.Module):
        return not isinstance(adapter, PeftModel)
    folder = Path(adapter)
    return (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file()


@torch.no_grad()
def _repair_tuned(
    tuned: str | Path | nn.Module,
    base: nn.Module | str,
    keep: Statistics,
    task: Statistics | None,
    strength: float,
    rank: int | None,
    adapter_name: str,
) -> Any:
    """The tuned model with repaired linear layers, or the base with a LoRA that is nearly that."""
    model = load_model(base) if isinstance(base, str) else base_of(base)
    other: Any = copy.deepcopy(tuned) if isinstance(tuned, nn.Module) else load_tuned(tuned, model)
    before, after = _linear_layers(model, keep), _linear_layers(other, keep)
    different = [
        n for n in before if n not in after or weight_shape(before[n]) != weight_shape(after[n])
    ]
    if different or not before:
        raise UserError(
            f"the model was not tuned from this base: {first_few(different or list(keep))}"
        )
    require_statistics(before, keep, task)
    factors: dict[str, Factors] = {}
    for group in counted(list(_groups(before, keep, task)), "repairing", "inputs"):
        C, T = _moments(group[0], keep, task, weight_shape(before[group[0]])[1])
        for name in group:
            old, new = linear_weight(before[name]), linear_weight(after[name])
            delta = _where_float64_is(new).double() - _where_float64_is(old).double()
            if rank is not None:
                most = min(rank, *delta.shape)
                factors[name] = best_of_rank(delta, most, C, T, strength)
            elif strength > 0:
                made = repaired(delta, C, T, strength).to(new.device)
                new.copy_(old.double().to(made) + made)
    if rank is None:
        return other.eval()
    _warn_of_lost(model, other, before)
    return _with_factors(model, factors, rank, adapter_name)


def _linear_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    return {name: modules[name] for name in names if name in modules and is_linear(modules[name])}


def _warn_of_lost(base: nn.Module, tuned: nn.Module, layers: Iterable[str]) -> None:
    """Name what was tuned and is in no linear layer, which an adapter does not hold."""
    weights, held = dict(base.named_parameters()), {f"{name}.weight" for name in layers}
    lost = [
        name
        for name, weight in tuned.named_parameters()
        if name not in held and not torch.equal(weight, weights[name].to(weight))
    ]
    if lost:
        warnings.warn(
            f"the adapter holds linear layers alone; {len(lost)} other tuned weights are the "
            f"base's again: {first_few(lost)}",
            stacklevel=4,
        )


def _with_factors(
    base: nn.Module, factors: Mapping[str, Factors], rank: int, adapter_name: str
) -> PeftModel:
    """The base with a LoRA of these factors, whose scaling is 1.

    A layer that is smaller than the rank is filled up with zeros, since readers of adapters do not
    agree on what a layer's own rank means for its scaling.
    """
    config = StartConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(factors),
        fan_in_fan_out=any(isinstance(base.get_submodule(name), Conv1D) for name in factors),
        task_type=task_type_of(base),
        inference_mode=True,
    )
    model = add_adapter(base, config, adapter_name)
    for name, module in adapted_layers(model, adapter_name).items():
        A, B = factors[name].A, factors[name].B
        missing = rank - len(A)
        module.lora_A[adapter_name].weight.copy_(F.pad(A, (0, 0, 0, missing)))
        module.lora_B[adapter_name].weight.copy_(F.pad(B, (0, missing)))
    model.set_requires_grad(adapter_name, requires_grad=False)
    return model.eval()
