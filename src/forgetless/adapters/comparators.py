"""The comparators of a recipe on a trained adapter or a tuned model: their updates, put in place.

Each layer's trained update delta_W is replaced, as a whole, by what a formula of
`forgetless.core.comparators` makes of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from forgetless.adapters.foreign import require_within
from forgetless.adapters.repair import Forecast, forecast_of, mean_of, require_statistics
from forgetless.adapters.settings import Comparator, Dare, HardProjection, Intruders, OPLoRA, Ties
from forgetless.adapters.spectra import updates_of
from forgetless.core.cache import shared_inputs
from forgetless.core.comparators import (
    dare,
    hard_projection,
    intruders_reduced,
    lost_at_rank,
    oplora,
    ties,
)
from forgetless.core.method import Factors
from forgetless.core.progress import counted
from forgetless.core.spectra import Update, dense
from forgetless.models.state import base_of
from forgetless.models.weights import linear_weight
from forgetless.statistics.moments import Statistics


@dataclass(frozen=True)
class Compared:
    """What a comparator makes of a trained update.

    Attributes:
        updates: delta_W of every layer, (out, in), or its factors, with the scaling.
        forecast: what that does by the moments, as the mean over layers.
        lost_at_rank: of the reduced intruders of an adapter, whose factors have more than its
            rank: the share ‖lost‖_F / ‖delta_W‖_F, mean over layers, that cutting them would lose.
    """

    updates: Mapping[str, Update]
    forecast: Forecast
    lost_at_rank: float | None = None


@torch.no_grad()
def compared(
    wanted: Comparator,
    adapter: nn.Module,
    base: nn.Module,
    keep: Statistics,
    task: Statistics | None = None,
    adapter_name: str = "default",
) -> Compared:
    """What a comparator makes of the update of every layer.

    The adapter is a PeftModel, which is its own `base`, or a model tuned in whole, of which the
    layers with statistics count.

    Raises:
        UserError: layers without statistics, or a further adapter that is not for this base or
            changes other layers.
        ValueError: more directions than a layer has.
    """
    is_adapter = isinstance(adapter, PeftModel)
    with updates_of(adapter, base, adapter_name) as (on, found):
        own = {name: make().delta for name, make in found.items() if is_adapter or name in keep}
    require_statistics(own or found, keep, task)
    others: list[Mapping[str, Update]] = []
    for folder in wanted.adapters if isinstance(wanted, Ties) else ():
        require_within(folder, base, own)
        with updates_of(folder, base) as (_, theirs):
            others.append({name: make().delta for name, make in theirs.items()})
    draw = torch.Generator().manual_seed(wanted.seed if isinstance(wanted, Dare) else 0)
    made: dict[str, Update] = {}
    forecasts, lost = [], []
    for name in counted(list(own), wanted.kind, "layers"):
        W, delta = linear_weight(on.get_submodule(name)).detach(), own[name]
        C = keep[name].second_moment.to(W.device)
        T = None if task is None else task[name].second_moment.to(W.device)
        with shared_inputs():
            after = _made(wanted, W, delta, C, [each.get(name) for each in others], draw)
        forecasts.append(forecast_of(delta, after, C, T))
        if isinstance(wanted, Intruders) and isinstance(delta, Factors):
            lost.append(lost_at_rank(after, len(delta.A)))
        made[name] = after if isinstance(after, Factors) else after.float()
    return Compared(made, mean_of(forecasts), fmean(lost) if lost else None)


def _made(
    wanted: Comparator,
    W: Tensor,
    delta: Update,
    C: Tensor,
    others: Sequence[Update | None],
    draw: torch.Generator,
) -> Update:
    """What becomes of one layer's update."""
    match wanted:
        case HardProjection():
            return hard_projection(delta, C, wanted.energy)
        case OPLoRA():
            return oplora(W, delta, wanted.directions)
        case Dare():
            return dare(delta, wanted.drop, draw)
        case Intruders():
            top_k = min(wanted.top_k, *W.shape)
            return intruders_reduced(W, delta, wanted.keep, top_k, wanted.threshold)
        case Ties():
            theirs = [W.new_zeros(W.shape) if each is None else each for each in others]
            return ties([delta, *theirs], wanted.keep)


# ---- in place of the trained update --------------------------------------------------------------


@contextmanager
def updated(
    model: nn.Module, updates: Mapping[str, Update], base: nn.Module | None = None
) -> Iterator[nn.Module]:
    """Within it, the updates of the model's layers are these, and nothing else of it changes.

    An adapter's layers add them to the base's output, as its own was, so that the adapter switched
    off is still the base; in a model tuned in whole the weights are W + delta_W.

    Args:
        model: a PeftModel with one active adapter; or, with `base`, a model tuned in whole.
        updates: by layer; layers that are not named stay as they are.
        base: the untouched model that a model tuned in whole came from.

    Yields:
        The model. Afterwards all is as it was before, bit for bit.
    """
    with ExitStack() as undo, torch.no_grad():
        for name, update in updates.items():
            layer: Any = base_of(model).get_submodule(name)
            if base is None:
                [active] = layer.active_adapters
                undo.callback(setattr, layer, "lora_variant", layer.lora_variant)
                variant = _Instead(update, layer.lora_A[active].weight)
                layer.lora_variant = {**layer.lora_variant, active: variant}
            else:
                W = linear_weight(base.get_submodule(name)).double() + dense(update)
                undo.callback(setattr, layer.weight, "data", layer.weight.data)
                W = W.T if isinstance(layer, Conv1D) else W
                layer.weight.data = W.to(layer.weight).contiguous()
        yield model


class _Instead(LoraVariant):
    """PEFT's hook for an adapter: this update in place of its own, in the adapter's dtype."""

    def __init__(self, update: Update, like: Tensor) -> None:
        matrices = (update.A, update.B) if isinstance(update, Factors) else (update,)
        self.matrices = [matrix.to(like) for matrix in matrices]

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """The layer's output (..., out)."""
        for matrix in self.matrices:
            x = F.linear(x, matrix)
        return result + x
