"""A plan on the terminal: what is advised and why, and what it will cost."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from forgetless.recipes.plan.advice import ASKED, Advice
from forgetless.recipes.plan.fitting import show_bytes
from forgetless.recipes.plan.plan import Plan

_LABELS = {
    "adapter.method": "method",
    "adapter.rank": "rank",
    "adapter.alpha": "alpha",
    "adapter.target_modules": "targets",
    "training.learning_rate": "learning rate",
    "training.epochs": "epochs",
    "training.schedule": "schedule",
    "training.batch_size": "batch",
    "training.weight_decay": "weight decay",
    "data.train": "replay",
    "data.max_length": "max length",
    "data.pack": "packing",
    "training.precision": "precision",
    "dtype": "weights as",
    "training.gradient_checkpointing": "checkpointing",
    "calibration.memory_budget": "statistics in",
}
"""Key -> what it is called here, in the order in which they are shown; the others are left out."""

_KINDS = {
    "text": "texts",
    "prompt_completion": "prompts with answers",
    "messages": "conversations",
}


def render(plan: Plan) -> RenderableType:
    """The advice with numbered sources, the costs and the notes."""
    sources = list(dict.fromkeys(a.source for a in _shown(plan) if a.source != ASKED))
    legend = Table.grid(padding=(0, 1))
    for number, source in enumerate(sources, 1):
        legend.add_row(Text(f"[{number}]", style="dim"), Text(source, style="dim"))
    notes = [Text(f"• {note}", style="dim") for note in plan.notes]
    parts: list[RenderableType] = [
        _title(plan),
        Text(""),
        _advice(plan, sources),
        Text(""),
        _costs(plan),
        Text(""),
    ]
    return Group(*parts, legend, *([Text(""), *notes] if notes else []))


def _title(plan: Plan) -> Text:
    recipe = plan.recipe
    data = recipe.data.sources[0][0]
    text = Text(f"{recipe.base}: {_count(plan.parameters)} weights", style="bold")
    return text.append(f"   {data}: {plan.examples:,} {_KINDS[plan.kind]}")


def _shown(plan: Plan) -> list[Advice]:
    by_key = {each.key: each for each in plan.advice}
    return [by_key[key] for key in _LABELS if key in by_key]


def _advice(plan: Plan, sources: Sequence[str]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("setting", "advised", "why"):
        table.add_column(name, no_wrap=name != "why")
    for each in _shown(plan):
        mark = "" if each.source == ASKED else f" [dim]{escape(_mark(each, sources))}[/]"
        value = Text(_value(plan, each), style="bold cyan")
        table.add_row(_LABELS[each.key], value, escape(each.reason) + mark)
    return table


def _mark(each: Advice, sources: Sequence[str]) -> str:
    return f"[{sources.index(each.source) + 1}]"


def _value(plan: Plan, each: Advice) -> str:
    training = plan.recipe.training
    if each.key == "training.batch_size":
        return f"{training.batch_size} x {training.gradient_accumulation}"
    if each.key == "data.train":
        return f"{each.value:.0%}" if each.value else "none"
    if isinstance(each.value, bool):
        return "on" if each.value else "off"
    return f"{each.value:g}" if isinstance(each.value, float) else str(each.value)


def _costs(plan: Plan) -> Table:
    step, memory, disk = plan.memory.step, plan.memory, plan.disk
    share = step.trained / plan.parameters
    rows = [
        ("trains", _count(step.trained), f"{share:.2%} of {_count(plan.parameters)} weights"),
        ("steps", f"{plan.steps:,}", f"{_count(plan.tokens)} tokens of the new task"),
        (
            "memory, training",
            show_bytes(step.total),
            _sum(
                {
                    "weights": step.weights,
                    "adapter": step.adapter,
                    "gradients": step.gradients,
                    "optimiser": step.optimizer,
                    "activations": step.activations,
                }
            ),
        ),
    ]
    if memory.statistics:
        words = f"of which matrices {show_bytes(memory.matrices)}"
        rows.append(("memory, statistics", show_bytes(memory.statistics), words))
    if memory.start:
        rows.append(("memory, start", show_bytes(memory.start), "the base and the new adapter"))
    parts = {
        "checkpoints": disk.checkpoints,
        "result": disk.result,
        "statistics": disk.statistics,
    }
    rows.append(("disk", show_bytes(sum(parts.values())), _sum(parts)))
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("cost", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("tensors only; the program itself takes about 0.5 GB more")
    for row in rows:
        table.add_row(row[0], Text(row[1], style="bold"), row[2])
    return table


def _sum(parts: dict[str, int]) -> str:
    return " + ".join(f"{name} {show_bytes(size)}" for name, size in parts.items() if size)


def _count(number: float) -> str:
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:g}"
