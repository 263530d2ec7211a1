"""What there is to say of every method, gathered from the code: for people, for tools, for docs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from forgetless.core.method import Method
from forgetless.methods import METHODS, decompose

_NEEDS = {
    "second_moment": "activations",
    "task_moment": "activations of the new task",
    "gradient": "gradients of the new task",
}
_HEAD = """\
# Methods

Written by `python docs/make.py` from the code and from `docs/results/start.json`. In a terminal:
`forgetless methods`, for programs `forgetless methods --json`.
"""
_COLUMNS = (
    "method",
    "what the adapter starts from",
    "paper",
    "needs",
    "trains",
    "on quantised bases",
    "rank of the export",
    "start of a 7B block",
)
_NOTES = """
- **needs**: `activations` are second moments of the knowledge to keep, from `forgetless.collect` or
  `forgetless stats` (`stats=` of `attach`); those of the new task are of its data (`task_stats=`).
- **on quantised bases**: `exact` means that the start comes from a dequantised copy of each weight
  (bitsandbytes 4 and 8 bit, torchao), that the stored weights stay as they are, bit for bit, and
  that step 0 and adapter-off are the base.
- **rank of the export**: of the plain LoRA that the trained adapter of rank r amounts to, without
  any error. 2r can be cut back to r, with the error reported.
- **start of a 7B block**: seconds for the seven linear layers of one Llama-2-7B block at rank 128,
  given what the method needs (`benchmarks/start.py --full`).
- rsLoRA (`use_rslora`), DoRA (`use_dora`), LoRA+ (`loraplus_ratio`) and ranks of single layers
  (`rank_pattern`, `alpha_pattern`) combine with every method that trains an adapter; LoRA+ needs
  one that trains both A and B.
"""


@dataclass(frozen=True)
class Entry:
    """One method, in words.

    Attributes:
        name: in METHODS.
        summary: what the adapter starts from.
        paper: authors, title and arXiv id, or "—".
        needs: what must be collected first.
        options: names and defaults.
        trains: the matrices that training moves.
        on_quantised: "exact", or "–" where there is no adapter.
        export_rank: "r" or "2r", or "–".
    """

    name: str
    summary: str
    paper: str
    needs: tuple[str, ...]
    options: dict[str, Any]
    trains: tuple[str, ...]
    on_quantised: str
    export_rank: str


def entries() -> list[Entry]:
    """Every method, in the order of METHODS."""
    return [
        Entry(
            name=name,
            summary=method.summary,
            paper=method.paper,
            needs=tuple(_NEEDS.get(need, need) for need in sorted(method.needs)),
            options=method.options,
            trains=method.trains,
            on_quantised="exact" if method.factors else "–",
            export_rank=_export_rank(method),
        )
        for name, method in METHODS.items()
    ]


def _export_rank(method: Method) -> str:
    """2r where the start adds something to the base and both factors move; tried on a matrix."""
    if method.factors is None:
        return "–"
    if method.trains != ("A", "B"):
        return "r"
    drawn = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    W, gradient, X = drawn
    moments = {"second_moment": X @ X.mT, "task_moment": W @ W.mT, "gradient": gradient}
    start = decompose(W, 2, method, **{need: moments[need] for need in method.needs})
    return "r" if start.starts_at_zero else "2r"


def as_text(width: int = 80) -> str:
    """All methods as paragraphs of lines no longer than `width`."""
    return "\n\n".join("\n".join(_paragraph(entry, width)) for entry in entries())


def _paragraph(entry: Entry, width: int) -> list[str]:
    options = ", ".join(f"{name}={value}" for name, value in entry.options.items())
    facts = {
        "needs": ", ".join(entry.needs) or "nothing",
        "trains": " and ".join(entry.trains),
        "options": options,
        "exports": f"a plain LoRA of rank {entry.export_rank}" if entry.on_quantised != "–" else "",
        "paper": entry.paper if entry.paper != "—" else "",
    }
    lines = [entry.name, *textwrap.wrap(entry.summary, width - 2)]
    for label, value in facts.items():
        if value:
            indent = " " * 9
            lines += textwrap.wrap(f"{label:<8} {value}", width - 2, subsequent_indent=indent)
    return [lines[0], *(f"  {line}" for line in lines[1:])]


def as_markdown(seconds: Mapping[str, float]) -> str:
    """The page of all methods; `seconds` of a start by method, where it was measured."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *(_row(e, seconds) for e in entries())]
    table = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([_HEAD, *table, _NOTES])


def _row(entry: Entry, seconds: Mapping[str, float]) -> tuple[str, ...]:
    took = seconds.get(entry.name)
    return (
        f"`{entry.name}`",
        entry.summary,
        entry.paper,
        ", ".join(entry.needs) or "–",
        ", ".join(entry.trains),
        entry.on_quantised,
        entry.export_rank,
        "–" if took is None else f"{float(f'{took:.2g}'):g} s",
    )
