"""The rank and the scaling of every layer, from one rank, one alpha and their exceptions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from forgetless.core.errors import UserError
from forgetless.models.weights import weight_shape


@dataclass(frozen=True)
class LayerRank:
    """Rank r, alpha, and the scaling of one layer: alpha / r, or alpha / √r in rsLoRA.

    rsLoRA: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
    arXiv:2312.03732.
    """

    rank: int
    alpha: float
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """What multiplies B A."""
        return self.alpha / self._divisor

    def resized(self, rank: int) -> LayerRank:
        """Another rank with the same scaling."""
        other = replace(self, rank=rank)
        return replace(other, alpha=self.scaling * other._divisor)

    @property
    def _divisor(self) -> float:
        return math.sqrt(self.rank) if self.use_rslora else self.rank


def layer_ranks(
    names: Iterable[str],
    rank: int,
    alpha: float,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
) -> dict[str, LayerRank]:
    """The rank and the scaling of every layer.

    Args:
        names: the layers' names.
        rank: of layers that no pattern matches.
        alpha: likewise.
        rank_pattern: name, its ending ("q_proj") or a regular expression for either -> rank. The
            first that matches counts, as in PEFT.
        alpha_pattern: the same for alpha. A layer's own rank leaves its alpha as it is, as in
            PEFT, so that its scaling changes.
        use_rslora: scaling = alpha / √rank.

    Raises:
        UserError: a pattern that is no regular expression or matches no layer, a rank that is no
            whole number from 1, or an alpha that is not positive.
    """
    names = list(names)
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    _check_pattern("rank_pattern", ranks, names)
    _check_pattern("alpha_pattern", alphas, names)
    for layer, value in ranks.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"rank_pattern {layer!r} must be a whole number from 1, got {value!r}")
    for layer, number in {"alpha": alpha, **alphas}.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            where = "alpha" if layer == "alpha" else f"alpha_pattern {layer!r}"
            raise UserError(f"{where} must be a number above 0, got {number!r}")
    return {
        name: LayerRank(
            ranks.get(get_pattern_key(ranks, name), rank),
            alphas.get(get_pattern_key(alphas, name), alpha),
            use_rslora,
        )
        for name in names
    }


def narrowed(
    ranks: Mapping[str, LayerRank],
    layers: Mapping[str, nn.Module],
    pattern: Mapping[str, int] | None,
) -> dict[str, LayerRank]:
    """The ranks, of which none exceeds its layer's: an update has no more than the shorter side.

    The scaling of every layer stays. A rank that `pattern` gives is left, and so are all where no
    layer holds its own, since then it is a mistake.
    """
    kept = dict(pattern or {})
    limits = {name: min(weight_shape(layer)) for name, layer in layers.items()}
    narrow = {
        name: ranks[name].resized(limit)
        for name, limit in limits.items()
        if limit < ranks[name].rank and get_pattern_key(kept, name) not in kept
    }
    return {**ranks, **narrow} if len(narrow) < len(ranks) else dict(ranks)


def patterns(ranks: Mapping[str, LayerRank], rank: int, alpha: float) -> dict[str, Any]:
    """`rank_pattern` and `alpha_pattern` by which PEFT gives every layer its own.

    Longer names come first: PEFT takes the first key that a name ends in. So a layer whose name
    ends in that of an exception is listed too, whatever it has.
    """
    names = sorted(ranks, key=len, reverse=True)

    def exceptions(value: Callable[[LayerRank], float], usual: float) -> dict[str, float]:
        apart = {name for name in names if value(ranks[name]) != usual}
        return {
            re.escape(name): value(ranks[name])
            for name in names
            if name in apart or any(name.endswith(f".{other}") for other in apart)
        }

    return {
        "rank_pattern": exceptions(lambda layer: layer.rank, rank),
        "alpha_pattern": exceptions(lambda layer: layer.alpha, alpha),
    }


def _check_pattern(kind: str, pattern: Mapping[str, object], names: list[str]) -> None:
    for key in pattern:
        try:
            found = any(re.match(rf"(.*\.)?({key})$", name) for name in names)
        except re.error as problem:
            raise UserError(f"{kind} {key!r} is no regular expression: {problem}") from None
        if not found:
            raise UserError(
                f"{kind} {key!r} matches no target layer; the layers are {names[0]!r}"
                + (f" to {names[-1]!r}" if len(names) > 1 else "")
            )
