"""The demonstrations: ways to teach a pocket model arithmetic or letters, and what each forgets."""

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

IMAGE_RATES: Mapping[str, float] = {
    "full": 1e-4,
    "lora": 1e-3,
    "pissa": 3e-4,
    "intermediate": 1e-3,
    "lora_null_v1": 1e-3,
    "lora_null_v2": 3e-2,
}
"""Likewise with images; `recipes/pocket-images-pilot.yaml` is the sweep."""


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
        "arms": _arms(RATES),
    }


def images_definition() -> dict[str, Any]:
    """The study of `demo --images`, as `recipes/pocket-images-demo.yaml` has it."""
    letters, digits = (
        {"kind": "image_accuracy", "name": name, "path": f"pocket:{name}:test"}
        for name in ("letters", "digits")
    )
    return {
        "name": "pocket-images-demo",
        "recipe": {
            "base": "pocket-vision",
            "adapter": {"rank": 8, "alpha": 8, "head": "new"},
            "calibration": {"source": "pocket:digits"},
            "data": {"train": "pocket:letters"},
            "training": {"steps": 150, "batch_size": 32, "head_learning_rate": 1e-2},
            "tasks": {"learning": [letters], "forgetting": [digits]},
        },
        "arms": _arms(IMAGE_RATES),
    }


def _arms(rates: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {"name": method, "adapter.method": method, "training.learning_rate": rate}
        for method, rate in rates.items()
    ]
