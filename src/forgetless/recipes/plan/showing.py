"""A plan on the terminal and as a recipe: what is advised and why, and what it will cost."""

import textwrap
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from forgetless.core.progress import duration
from forgetless.recipes.plan.advice import ASKED, Advice
from forgetless.recipes.plan.plan import Plan, show_bytes
from forgetless.recipes.recipe import Recipe

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
    "repair.strength": "repair",
    "data.max_length": "max length",
    "data.pack": "packing",
    "training.precision": "precision",
    "dtype": "weights as",
    "quantise": "packed in",
    "training.gradient_checkpointing": "checkpointing",
    "calibration.memory_budget": "statistics in",
}
"""Key -> what it is called here, in the order in which they are shown; the others are left out."""

_KINDS = {"text": "texts", "prompt_completion": "prompts with answers", "messages": "conversations"}


# ---- on the terminal -----------------------------------------------------------------------------


def render(plan: Plan) -> RenderableType:
    """The advice with numbered sources, the costs and the notes."""
    by_key = {each.key: each for each in plan.advice}
    shown = [by_key[key] for key in _LABELS if key in by_key]
    sources = list(dict.fromkeys(each.source for each in shown if each.source != ASKED))
    title = Text(f"{plan.recipe.base}: {_count(plan.parameters)} weights", style="bold")
    data = plan.recipe.data.sources[0][0]
    title.append(f"   {data}: {plan.examples:,} {_KINDS[plan.kind]}")
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("setting", "advised", "why"):
        table.add_column(name, no_wrap=name != "why")
    for each in shown:
        mark = "" if each.source == ASKED else f"[{sources.index(each.source) + 1}]"
        reason = escape(each.reason) + (f" [dim]{escape(mark)}[/]" if mark else "")
        table.add_row(_LABELS[each.key], Text(_value(plan, each), style="bold cyan"), reason)
    legend = Table.grid(padding=(0, 1))
    for number, source in enumerate(sources, 1):
        legend.add_row(Text(f"[{number}]", style="dim"), Text(source, style="dim"))
    notes = [Text(f"• {note}", style="dim") for note in plan.notes]
    parts: list[RenderableType] = [title, Text(""), _costs(plan)]
    if plan.advice:
        parts[2:2] = [table, Text("")]
        parts += [Text(""), legend]
    return Group(*parts, *([Text(""), *notes] if notes else []))


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
    def summed(**parts: int) -> tuple[str, str]:
        words = (f"{name} {show_bytes(size)}" for name, size in parts.items() if size)
        return show_bytes(sum(parts.values())), " + ".join(words)

    step, memory, disk = plan.memory.step, plan.memory, plan.disk
    share = f"{step.trained / plan.parameters:.2%} of {_count(plan.parameters)} weights"
    training = summed(
        weights=step.weights,
        adapter=step.adapter,
        gradients=step.gradients,
        optimiser=step.optimizer,
        activations=step.activations,
    )
    rows = [
        ("trains", _count(step.trained), share),
        ("steps", f"{plan.steps:,}", f"{_count(plan.tokens)} tokens of the new task"),
        ("time, training", duration(plan.seconds), "or more here: its matrix products alone"),
        ("memory, training", *training),
    ]
    if memory.statistics:
        words = f"of which matrices {show_bytes(memory.matrices)}"
        rows.append(("memory, statistics", show_bytes(memory.statistics), words))
    if memory.start:
        rows.append(("memory, start", show_bytes(memory.start), "the base and the new adapter"))
    on_disk = {"checkpoints": disk.checkpoints, "result": disk.result}
    rows.append(("disk", *summed(**on_disk, statistics=disk.statistics)))
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("cost", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("tensors only; the program itself takes about 0.5 GB more")
    for name, number, words in rows:
        table.add_row(name, Text(number, style="bold"), words)
    return table


def _count(number: float) -> str:
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:g}"


# ---- as a recipe ---------------------------------------------------------------------------------

WIDTH = 96


def recipe_text(plan: Plan, command: str) -> str:
    """The recipe as YAML with the reasons beside the settings; what is left out has its default."""
    least = Recipe(base="x", data={"train": "x"}, training={"epochs": 1.0})  # type: ignore[arg-type]
    defaults = least.model_dump()
    defaults["training"]["epochs"] = None
    reasons = {each.key: f"{each.reason} [{each.source}]" for each in plan.advice}
    costs = (
        f"{plan.parameters:,} weights, {plan.memory.step.trained:,} trained; {plan.steps} steps, "
        f"{duration(plan.seconds)} or more here; about {show_bytes(plan.memory.peak)} of tensors "
        "at the peak"
    )
    lines = [
        f"# Written by: {command}",
        *[f"# {line}" for line in textwrap.wrap(costs, WIDTH)],
        "#",
        "#     forgetless run THIS --check      # says what is wrong; loads no weights",
        "#     forgetless run THIS --find-lr    # tries learning rates briefly, then runs",
        *[f"# {line}" for note in plan.notes for line in textwrap.wrap(note, WIDTH)],
        "",
    ]
    for name, value in plan.recipe.model_dump().items():
        if not isinstance(value, dict):
            if name in reasons or value != defaults[name]:
                lines += _setting(name, value, reasons.get(name), "")
            continue
        kept = {
            key: setting
            for key, setting in value.items()
            if f"{name}.{key}" in reasons or setting != (defaults[name] or {}).get(key)
        }
        lines += ["", f"{name}:"] if kept else []
        for key, setting in kept.items():
            lines += _setting(key, setting, reasons.get(f"{name}.{key}"), "  ")
    return "\n".join(lines) + "\n"


def _setting(key: str, value: Any, reason: str | None, indent: str) -> list[str]:
    def flow(value: Any) -> str:
        text = yaml.safe_dump(
            value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000
        )
        return text.removesuffix("\n").removesuffix("\n...")

    room = WIDTH - len(indent) - 2
    comment = [f"{indent}# {line}" for line in textwrap.wrap(reason, room)] if reason else []
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [*comment, f"{indent}{key}:", *[f"{indent}  - {flow(item)}" for item in value]]
    return [*comment, f"{indent}{key}: {flow(value)}"]
