"""A plan's recipe as YAML with the reasons beside the settings."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from forgetless.recipes.plan.fitting import show_bytes
from forgetless.recipes.plan.plan import Plan
from forgetless.recipes.recipe import Recipe

WIDTH = 96


def recipe_text(plan: Plan, command: str) -> str:
    """The recipe; what is left out has its default.

    Args:
        plan: whose recipe is written.
        command: that made it.
    """
    values, defaults = plan.recipe.model_dump(), _defaults(plan.recipe)
    reasons = {each.key: f"{each.reason} [{each.source}]" for each in plan.advice}
    lines = [
        f"# Written by: {command}",
        f"# {plan.parameters:,} weights, {plan.memory.step.trained:,} trained; {plan.steps} steps; "
        f"about {show_bytes(plan.memory.peak)} of tensors at the peak",
        "#",
        "#     forgetless run THIS --check      # says what is wrong; loads no weights",
        "#     forgetless run THIS --find-lr    # tries learning rates briefly, then runs",
        *[f"# {line}" for note in plan.notes for line in textwrap.wrap(note, WIDTH)],
        "",
    ]
    for name, value in values.items():
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if _matters(f"{name}.{k}", v, defaults, reasons)}
            if kept:
                lines += ["", f"{name}:"]
                for key, setting in kept.items():
                    lines += _setting(key, setting, reasons.get(f"{name}.{key}"), "  ")
        elif _matters(name, value, defaults, reasons):
            lines += _setting(name, value, reasons.get(name), "")
    return "\n".join(lines) + "\n"


def _defaults(recipe: Recipe) -> Mapping[str, Any]:
    """Dotted key -> the default of a recipe that says nothing but what it must."""
    least = Recipe(base="x", data={"train": "x"}, training={"epochs": 1.0})  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for name, value in least.model_dump().items():
        nested = value.items() if isinstance(value, dict) else ()
        found |= {f"{name}.{key}": setting for key, setting in nested} or {name: value}
    return found | {"training.epochs": None}


def _matters(key: str, value: Any, defaults: Mapping[str, Any], reasons: Mapping[str, str]) -> bool:
    return key in reasons or value != defaults.get(key)


def _setting(key: str, value: Any, reason: str | None, indent: str) -> list[str]:
    room = WIDTH - len(indent) - 2
    comment = [f"{indent}# {line}" for line in textwrap.wrap(reason, room)] if reason else []
    if isinstance(value, list) and value and isinstance(value[0], dict):
        items = [f"{indent}  - {_flow(item)}" for item in value]
        return [*comment, f"{indent}{key}:", *items]
    return [*comment, f"{indent}{key}: {_flow(value)}"]


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")
