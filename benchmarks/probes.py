"""What probes cost a training: the same steps on the pocket base with and without them.

    python benchmarks/probes.py [--steps 200] [--method lora] [--repeats 3]

Prints a table and writes benchmarks/results/probes.json. The probes are ForgettingCallback's
defaults, KL on the pocket world's held questions and the loss on held problems. The trainings take
turns; the share is the time of the probes over that of the steps of the same training.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from forgetless.adapters.attachment import attach
from forgetless.data.examples import load_examples
from forgetless.data.texts import batches
from forgetless.data.tokens import tokenize
from forgetless.models.load import load_model, load_tokenizer
from forgetless.statistics.collection import collect
from forgetless.training.forgetting import ForgettingCallback
from forgetless.training.loop import TrainingResult, train
from forgetless.training.settings import TrainingSettings
from timing import report


def trained(method: str, steps: int, probes: ForgettingCallback | None) -> TrainingResult:
    """One training of 32 problems a step, in a folder that is thrown away."""
    model: Any = load_model("pocket")
    tokenizer = load_tokenizer("pocket")
    if method != "full":
        keep = batches("pocket:knowledge", model, tokenizer, samples=64, max_length=64)
        stats = collect(model, keep) if "null" in method else None
        model = attach(model, method, rank=16, alpha=16, stats=stats)
    data = tokenize(load_examples("pocket:problems"), tokenizer, max_length=128)
    settings = TrainingSettings(steps=steps, learning_rate=1e-3, checkpoint_every=10 * steps)
    with tempfile.TemporaryDirectory() as folder:
        return train(model, tokenizer, data, settings, folder, probes=probes)


def pair(method: str, steps: int) -> Mapping[str, float]:
    """One training without probes and one with them."""
    plain = trained(method, steps, None)
    probes = ForgettingCallback("pocket:held", "pocket:problems:test")
    probed = trained(method, steps, probes)
    return {
        "seconds without": plain.train_seconds,
        "seconds with": probed.train_seconds,
        "of these probes": probed.probe_seconds,
        "probes": len(probes.history),
        "share %": 100 * probed.probe_seconds / (probed.train_seconds - probed.probe_seconds),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = [pair(chosen.method, chosen.steps) for _ in range(chosen.repeats)]
    report("probes", "Probes while training", vars(chosen), rows)
    print(f"median share of the probes: {median(row['share %'] for row in rows):.2f} %")


if __name__ == "__main__":
    main()
