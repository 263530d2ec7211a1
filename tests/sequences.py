"""Sequences on the tiny model, small enough for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetless.core.files import write_json, write_jsonl
from forgetless.scores.files import score_file
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


def scored(folder: Path, arms: Mapping[str, Sequence[Sequence[float]]], seeds: int = 2) -> Path:
    """A folder as a finished sequence of the tasks "a", "b", ... leaves it, by its matrices.

    ``arms`` have R with the base as row and column 0; every further seed scores 0.01 more. Every
    run has ten steps, and two lines in its log.
    """
    names = [chr(ord("a") + i) for i in range(len(next(iter(arms.values()))) - 1)]
    chains, runs = [], []
    for arm, R in arms.items():
        for seed in range(seeds):
            ids = [f"{arm}-{seed}-{name}" for name in names]
            chains.append({"arm": arm, "order": " > ".join(names), "seed": seed})
            chains[-1] |= {"tasks": names, "runs": ids}
            for place, run in enumerate(ids):
                for phase, row in (("base", R[0]), ("final", R[place + 1])):
                    for task, value in zip(("facts", *names), row, strict=True):
                        score = {"value": value + 0.01 * seed, "higher_is_better": True}
                        write_json(score_file(folder / run, phase, task), score)  # type: ignore[arg-type]
                runs.append({"run_id": run, "name": run})
                training = {"steps": 10}
                write_json(folder / run / "run.json", {"status": "done", "training": training})
                losses = [{"step": step, "loss": 2.0 + place - step / 10} for step in (5, 10)]
                write_jsonl(folder / run / "log.jsonl", losses)
    index = {"runs": runs, "sequences": chains, "knowledge": "facts"}
    write_json(folder / "runs.json", index | {"measured_by": {name: name for name in names}})
    return folder
