"""Seconds of every method's start for one block of a large model, given what the method needs.

    python benchmarks/start.py                        # Llama-2-7B, an eighth of the widths, rank 16
    python benchmarks/start.py --full [--device cuda] [--model llama-3.1-8b]      # the true widths

The seven linear layers of a block (q, k, v, o; gate, up, down) with random weights; activations and
gradients are given, and their collection is not timed. At the true widths the rank is 128. `python
docs/make.py` puts the seconds of docs/results/start.json into docs/methods.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from forgetless import METHODS, decompose
from forgetless.core.cache import shared_inputs
from shapes import SHAPES, Inputs, inputs_of
from timing import peak_gib, report, reset_peak, timed

RANK = 128
"""At the true widths; it is divided as they are."""

FIRST_CALL = 64
"""Scale of a start that is not timed: libraries are loaded when they are called first."""

ATTACHABLE = [name for name, method in METHODS.items() if method.factors is not None]


def block(inputs: Inputs, device: str | torch.device) -> dict[str, dict[str, Tensor]]:
    """Layer -> its weight, second moments of old and new text, and gradient.

    q, k, v and gate, up share their inputs, and so the very tensors of their moments.
    """
    moments = {
        kind: {name: _moment(size, kind, device) for name, (size, _) in inputs.items()}
        for kind in ("second_moment", "task_moment")
    }
    return {
        layer: {
            "W": torch.randn(out, size, device=device) / size**0.5,
            "gradient": torch.randn(out, size, device=device),
            **{kind: by_input[name] for kind, by_input in moments.items()},
        }
        for name, (size, layers) in inputs.items()
        for layer, out in layers.items()
    }


def _moment(size: int, kind: str, device: str | torch.device) -> Tensor:
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


def measure(
    model: str, scale: int, methods: Sequence[str], repeats: int, device: str | torch.device
) -> Iterator[dict[str, Any]]:
    """One row a method; each time with new matrices, so that nothing is remembered.

    `peak GiB` is of a GPU, with the weights and all that was given.
    """
    for number, name in enumerate(methods):
        start(block(inputs_of(model, FIRST_CALL), device), name, RANK // FIRST_CALL)
        seconds: list[float] = []
        peak: float | None = None
        for repeat in range(repeats):
            torch.manual_seed(100_000 * (repeat * len(METHODS) + number))
            layers = block(inputs_of(model, scale), device)
            reset_peak(device)
            seconds.append(timed(partial(start, layers, name, RANK // scale), device))
            peak = peak_gib(device)
            del layers  # before the next ones are made
        yield {"method": name, "block s": median(seconds), "peak GiB": peak}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="The start of one block, by method.")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--model", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--methods", nargs="+", default=ATTACHABLE, choices=ATTACHABLE)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    scale = 1 if options.full else 8
    rows = list(measure(options.model, scale, options.methods, options.repeats, options.device))
    settings = {"model": options.model, "full": options.full, "rank": RANK // scale}
    report("start", "Start of one block, seconds", settings, rows, options.device)


if __name__ == "__main__":
    main()
