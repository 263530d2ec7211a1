"""Sequences on the tiny model, small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import recipe_of

TASKS = {"two": 2, "three": 3, "four": 4}


def definition_of(base: Path, files: Path, **changes: Any) -> dict[str, Any]:
    """Sums of three numbers each, learned in two steps; ``changes`` are dotted ones of the recipe.

    The prose of `tests.tiny` is the knowledge.
    """
    for name, number in TASKS.items():
        rows = [{"prompt": f"{a}+{number}=", "completion": f"{a + number}"} for a in range(12)]
        (files / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(base, files, **{"training.steps": 2, **changes})
    recipe["data"].pop("train")
    recipe["tasks"] = {"forgetting": recipe["tasks"]["forgetting"][:1]}
    return {
        "name": "sums",
        "recipe": recipe,
        "tasks": [
            {
                "name": name,
                "data": str(files / f"{name}.jsonl"),
                "measure": {
                    "kind": "perplexity",
                    "name": f"sums-of-{name}",
                    "path": str(files / f"{name}.jsonl"),
                },
            }
            for name in TASKS
        ],
    }
