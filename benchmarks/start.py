"""Seconds of every method's start for one Llama-2-7B block, given what the method needs.

    python benchmarks/start.py                                  # an eighth of the widths, rank 16
    python benchmarks/start.py --full [--device cuda]           # the true widths, rank 128

The seven linear layers of a block (q, k, v, o; gate, up, down) with random weights; activations and
gradients are given, and their collection is not timed. `python docs/make.py` puts the seconds of
docs/results/start.json into docs/methods.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from forgetless import METHODS, decompose
from forgetless.core.cache import shared_inputs
from timing import report, timed

HIDDEN, INTERMEDIATE, RANK = 4096, 11008, 128
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")


def block(hidden: int, intermediate: int, device: str) -> dict[str, dict[str, Tensor]]:
    """Layer -> its weight, second moments of old and new text, and gradient.

    q, k, v and gate, up share their inputs, and so the very tensors of their moments.
    """
    inputs = {"qkv": hidden, "o": hidden, "gate/up": hidden, "down": intermediate}
    moments = {
        kind: {name: _moment(size, kind, device) for name, size in inputs.items()}
        for kind in ("second_moment", "task_moment")
    }
    read = dict(zip(LAYERS, ["qkv"] * 3 + ["o"] + ["gate/up"] * 2 + ["down"], strict=True))
    found = {}
    for layer, name in read.items():
        shape = (intermediate if layer in ("gate", "up") else hidden, inputs[name])
        found[layer] = {
            "W": torch.randn(shape, device=device) / shape[1] ** 0.5,
            "gradient": torch.randn(shape, device=device),
            **{kind: by_input[name] for kind, by_input in moments.items()},
        }
    return found


def _moment(size: int, kind: str, device: str) -> Tensor:
    """A second moment whose eigenvalues fall off by a power, and whose vectors are no axes."""
    generator = torch.Generator(device).manual_seed(torch.initial_seed() + size + len(kind))
    X = torch.randn(size, 256, generator=generator, device=device, dtype=torch.float64)
    energies = torch.arange(1, size + 1, device=device, dtype=torch.float64) ** -1.2
    order = torch.randperm(size, generator=generator, device=device)
    return torch.diag(energies[order]) + X @ X.mT / (256 * size)


def start(layers: dict[str, dict[str, Tensor]], method: str, rank: int) -> None:
    """The method's start on every layer; work on a shared input is done once, as in `attach`."""
    with shared_inputs():
        for layer in layers.values():
            needs: dict[str, Any] = {name: layer[name] for name in METHODS[method].needs}
            decompose(layer["W"], rank, method, **needs)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a method; each time with new matrices, so that nothing is remembered."""
    scale = 1 if options.full else 8
    rank = RANK // scale
    seconds: dict[str, list[float]] = {name: [] for name in options.methods}
    for repeat in range(options.repeats):
        for number, name in enumerate(options.methods):
            torch.manual_seed(100_000 * (repeat * len(METHODS) + number))
            layers = block(HIDDEN // scale, INTERMEDIATE // scale, options.device)
            seconds[name].append(timed(partial(start, layers, name, rank), options.device))
    return [{"method": name, "block s": median(taken)} for name, taken in seconds.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    attachable = [name for name, method in METHODS.items() if method.factors is not None]
    parser = argparse.ArgumentParser(description="The start of one block, by method.")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--methods", nargs="+", default=attachable, choices=attachable)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    rows = measure(options)
    settings = {"full": options.full, "rank": RANK if options.full else RANK // 8}
    report("start", "Start of one block, seconds", settings, rows, options.device)


if __name__ == "__main__":
    main()
