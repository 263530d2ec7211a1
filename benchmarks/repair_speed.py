"""Repair at true sizes: seconds and memory for single inputs, and what a whole model comes to.

    python benchmarks/repair_speed.py                 # a sixty-fourth of the widths
    python benchmarks/repair_speed.py --model llama-2-7b --scale 1 --out repair.json

The second moments are made up, written to a file each and read from there one group at a time, as
`forgetless repair` does; the time of making them is not counted. Every kind of input of the model
is solved for once or `--repeat` times, for all layers that read it, and the whole model's time is
the sum over its blocks. On a busy machine the seconds of CPU say more than those of the clock: on
quiet cores the clock shows them divided by the threads. Peak memory is the process's own, and that
of a GPU, of the largest group.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetless.adapters.repair import Repairs
from forgetless.core.method import Factors
from forgetless.statistics.moments import OnDisk, Statistics
from shapes import SHAPES, inputs_of, sizes_of
from timing import peak_gib, reset_peak, wait


def made_up_moment(size: int, seed: int, file: Path, name: str) -> None:
    """Of falling energy, as activations have; full rank. Written without a copy in memory."""
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(size // 8, size, generator=draw)
    X *= torch.arange(1, size + 1) ** -0.5
    C = (X.T @ X / len(X)).double()
    C.diagonal().add_(1e-3 * C.diagonal().mean())
    save_file({name: C}, file)


def statistics(folder: Path, size: int, names: list[str], seed: int) -> Statistics:
    """One input that all these layers read, on the disk."""
    file = folder / f"{seed}.safetensors"
    made_up_moment(size, seed, file, names[0])
    return Statistics.of(
        OnDisk({names[0]: file}), dict.fromkeys(names, names[0]), dict.fromkeys(names, 1), {}
    )


def factors(size: int, outs: Iterable[int], rank: int) -> Iterator[tuple[str, Factors]]:
    """A and B of every layer that reads one input."""
    for number, out in enumerate(outs):
        A: Tensor = torch.randn(rank, size) / size**0.5
        yield f"layer {number}", Factors(A=A, B=torch.randn(out, rank))


def measure(
    model: str, scale: int, rank: int, repeats: int, device: str | torch.device
) -> dict[str, Any]:
    """The seconds and the memory of every group of layers, and what the whole model comes to."""
    rows: list[dict[str, Any]] = []
    seconds: dict[int, float] = {}
    cpu_seconds: dict[int, float] = {}
    torch.manual_seed(0)
    reset_peak(device)
    inputs = inputs_of(model, scale).values()
    for size, outs in inputs:
        layers = dict(factors(size, outs.values(), rank))
        for _ in range(repeats if size not in seconds else 0):
            with tempfile.TemporaryDirectory() as folder:
                keep = statistics(Path(folder), size, list(layers), 0)
                task = statistics(Path(folder), size, list(layers), 1)
                began, worked = time.perf_counter(), time.process_time()
                Repairs(layers, keep, task, [0.1], device=torch.device(device))
                wait(device)
                took = time.perf_counter() - began
            worked = time.process_time() - worked
            seconds[size] = min(took, seconds.get(size, took))
            cpu_seconds[size] = min(worked, cpu_seconds.get(size, worked))
        rows.append({"inputs": size, "layers": len(outs), "seconds": seconds[size],
                     "cpu_seconds": cpu_seconds[size], **_peaks(device)})  # fmt: skip
        print(f"{size:6} inputs, {len(outs)} layers: {seconds[size]:7.2f} s", file=sys.stderr)
    blocks = sizes_of(model)["num_hidden_layers"]
    total, worked = (blocks * sum(of[size] for size, _ in inputs) for of in (seconds, cpu_seconds))
    return {
        "model": model,
        "scale": scale,
        "rank": rank,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "groups": rows,
        "blocks": blocks,
        "whole_model_seconds": total,
        "whole_model_cpu_seconds": worked,
        **_peaks(device),
    }


def _peaks(device: str | torch.device) -> dict[str, float | None]:
    """The most memory so far, of the process and on a GPU."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"peak_gib": own, "gpu_peak_gib": peak_gib(device)}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the result, write it where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--scale", type=int, default=64, help="what the widths are divided by")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    found = measure(asked.model, asked.scale, asked.rank, asked.repeat, asked.device)
    print(json.dumps(found, indent=2))
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
