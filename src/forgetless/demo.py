"""The demonstration: seven ways to teach the pocket model arithmetic, and what each forgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from forgetless import store
from forgetless.store import RunFolder

RATES: Mapping[str, float] = {
    "full": 3e-4,
    "lora": 3e-3,
    "pissa": 1e-3,
    "milora": 3e-3,
    "intermediate": 1e-3,
    "lora_null_v1": 3e-3,
    "lora_null_v2": 1e-2,
}
"""The learning rate of each method; `recipes/pocket-pilot.yaml` is the sweep that they are from."""

RECALL = "pocket_recall"
SHOWN = 3


def definition() -> dict[str, Any]:
    """The study, as `recipes/pocket-demo.yaml` has it."""
    return {
        "name": "pocket-demo",
        "recipe": {
            "base": "pocket",
            "adapter": {"rank": 16, "alpha": 16},
            "calibration": {"source": "pocket:knowledge"},
            "data": {"train": "pocket:problems", "max_length": 128},
            "training": {"steps": 300, "batch_size": 32, "checkpoint_every": 100},
            "tasks": {
                "learning": ["pocket_problems"],
                "forgetting": [RECALL, {"kind": "kl", "path": "pocket:held", "limit": 200}],
            },
        },
        "arms": [
            {"name": method, "adapter.method": method, "training.learning_rate": rate}
            for method, rate in RATES.items()
        ],
    }


def lost_and_kept(study_folder: str | Path) -> Iterator[str]:
    """What every arm forgot of what the base knew, by name, and what one kept that others lost."""
    runs = [run for run in store.run_folders(study_folder) if _answers(run, "final")]
    if not runs:
        return
    lost = {run: _lost(run) for run in runs}
    known = sum(item["score"] == 1 for item in _answers(runs[0], "base").values())
    yield f"The base knew {known} facts."
    for run, items in lost.items():
        examples = "; ".join(_wrong(item) for item in _spread(list(items.values())))
        yield f"{_name(run)} lost {len(items)}" + (f": {examples}" if examples else ".")
    best, worst = (pick(runs, key=lambda run: len(lost[run])) for pick in (min, max))
    kept = [item for key, item in lost[worst].items() if key not in lost[best]]
    if kept:
        named = "; ".join(f"{item['prompt']} {item['expected']}" for item in _spread(kept))
        yield f"{_name(best)} kept {len(kept)} that {_name(worst)} lost: {named}"


def _answers(run: RunFolder, phase: store.Phase) -> dict[str, dict[str, Any]]:
    return {item["id"]: item for item in store.read_jsonl(run.items(phase, RECALL))}


def _lost(run: RunFolder) -> dict[str, dict[str, Any]]:
    """The items that were right before and are wrong now, with the answers given now."""
    before = _answers(run, "base")
    return {
        key: item
        for key, item in _answers(run, "final").items()
        if item["score"] == 0 and before[key]["score"] == 1
    }


def _wrong(item: Mapping[str, Any]) -> str:
    return f"{item['prompt']} {item['expected']} (now {item['answer'] or 'nothing'!r})"


def _spread(items: list[Any]) -> list[Any]:
    """A few of the items, evenly spread over them."""
    count = min(SHOWN, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def _name(run: RunFolder) -> str:
    return str(store.read_json(run.record).get("name") or run.path.name)
