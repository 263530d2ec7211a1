"""Which part of a transformer block a layer belongs to: the attention or the MLP."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


PARTS = ("attention", "mlp")

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|dense_?(relu|act|gated)|moe|expert|intermediate|\boutput|\bfc",
    re.IGNORECASE,
)
_ROUTER = re.compile("(.*_)?(gate|router)")


def part_of(base: nn.Module, name: str) -> str | None:
    """The part of a block that a linear layer belongs to, of `PARTS`; None outside of both.

    The modules between the block and the layer tell, by their names and classes; for the MLP also
    the layer's own name, since some models have its layers directly in the block. The mixers of
    state-space models, routers of experts and what lies outside of the blocks are in neither. The
    first number in the name is that of the block.
    """
    *path, own = name.split(".")
    block = next((i for i, word in enumerate(path) if word.isdigit()), len(path))
    within = range(block + 1, len(path))
    classes = [type(base.get_submodule(".".join(path[: i + 1]))).__name__ for i in within]
    # A block in a block, such as Zamba2's AttentionDecoderLayer, tells nothing by its class.
    telling = [kind for kind in classes if not kind.endswith("DecoderLayer")]
    above = " ".join([*path[block + 1 :], *telling])
    if _ATTENTION.search(above):
        return "attention"
    if block < len(path) and _MLP.search(f"{above} {own}") and not _ROUTER.fullmatch(own):
        return "mlp"
    return None


def block_of(name: str) -> int | None:
    """The number of the block that a layer lies in, the first in its name; None outside of them."""
    return next((int(word) for word in name.split(".") if word.isdigit()), None)


def shortest_endings(chosen: Iterable[str], everything: Iterable[str]) -> list[str]:
    """The shortest endings that the chosen names have, and no other name has, in order.

    >>> shortest_endings(["0.attn.out"], ["0.attn.in", "0.attn.out", "0.mlp.out"])
    ['attn.out']
    """
    chosen = list(chosen)
    wanted = Counter(ending for name in chosen for ending in _endings(name))
    found = Counter(ending for name in everything for ending in _endings(name))
    shortest = (next(e for e in _endings(name) if wanted[e] == found[e]) for name in chosen)
    return sorted(set(shortest))


def _endings(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[-count:]) for count in range(1, len(words) + 1)]
