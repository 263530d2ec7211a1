"""The demonstration: seven ways to teach the pocket model arithmetic, and what each forgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def definition() -> dict[str, Any]:
    """The study, as `recipes/pocket-demo.yaml` has it."""
    return {
        "name": "pocket-demo",
        "recipe": {
            "base": "pocket",
            "adapter": {"rank": 16, "alpha": 16},
            "calibration": {"source": "pocket:knowledge"},
            "data": {"train": "pocket:problems", "max_length": 128},
            "training": {"steps": 200, "batch_size": 32, "checkpoint_every": 100},
            "tasks": {
                "learning": ["pocket_problems"],
                "forgetting": [
                    "pocket_recall",
                    {"kind": "kl", "path": "pocket:held", "limit": 200},
                ],
            },
        },
        "arms": [
            {"name": method, "adapter.method": method, "training.learning_rate": rate}
            for method, rate in RATES.items()
        ],
    }
