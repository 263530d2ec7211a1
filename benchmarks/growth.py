"""How cost grows with size: the exponents of starts, statistics, steps, studies and reports.

    python benchmarks/growth.py [--only NAME ...] [--repeats 3] [--json]

A row is one cost against one size. Cost is the processor's seconds of one thread, children
included, since a busy machine stretches these less than those of the clock: a median over the
repeats. `exponent` is the slope of log cost over log size by least squares, with its standard
error; `at the end` that between the two largest sizes, where what does not grow weighs least.

The models are Llama blocks with random weights (step.py), the second moments those of
init_speed.py; a step is of an anchored start. The runs of a study do nothing, so that its journal
is left. Reports are of made-up studies and sequences, as the tests have them: five methods at two
rates with more and more seeds, then arms of one run each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import forgetless
from forgetless.core.files import write_json
from forgetless.reports import report as write_report
from forgetless.statistics.collection import collect
from forgetless.statistics.moments import LayerStatistics, Statistics
from forgetless.studies import study as studies
from forgetless.studies.folder import RunFolder
from init_speed import moment
from step import anchored, blocks, stepper
from timing import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.reports.test_page import Sheet, facts, make_study, sums
from tests.sequences import scored

WIDE = {"hidden": 128, "layers": 1, "rank": 16, "tokens": 512}
"""What the sizes of a model are where they do not grow."""
GROWING = {
    "hidden": (128, 192, 320, 512, 768, 1024),
    "layers": (1, 2, 4, 8, 16),
    "rank": (4, 8, 16, 32, 64),
    "tokens": (256, 512, 1024, 2048, 4096),
}
RUNS = (30, 60, 120, 250, 500, 1000)
ARMS = (15, 30, 60, 120)
TASKS = (3, 5, 8, 12, 17, 24)
LENGTH = 128
"""Tokens of a text."""
INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The layers of a block, those with the same input together."""

Work = Callable[[], object]


def processor() -> float:
    """Seconds of the processor that this process and its children have had."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def slope(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """The exponent of cost in size by least squares of the logarithms, and its standard error."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    centre, mean = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - centre) ** 2 for a in x)
    found = sum((a - centre) * (b - mean) for a, b in zip(x, y, strict=True)) / spread
    left = sum((b - mean - found * (a - centre)) ** 2 for a, b in zip(x, y, strict=True))
    return found, math.sqrt(left / (len(x) - 2) / spread)


# ------------------------------------------------------------------------------ models that grow


def model_of(size: Mapping[str, int]) -> nn.Module:
    return blocks(size["hidden"], size["layers"], "cpu", torch.float32)


def start(method: str, size: Mapping[str, int]) -> Iterator[Work]:
    """Putting an adapter on a model, which each repeat has a new one of."""
    stats = statistics_of(size) if method.startswith("lora_null") else None
    rank = size["rank"]
    while True:
        model = model_of(size)
        yield partial(forgetless.attach, model, method, rank=rank, alpha=rank, stats=stats)


def statistics_of(size: Mapping[str, int]) -> Statistics:
    """Second moments for every layer; every block has the same."""
    widths = [size["hidden"]] * 3 + [11 * size["hidden"] // 4]
    moments = [moment(width, size["rank"], seed, "cpu")[0] for seed, width in enumerate(widths)]
    of_layer: dict[str, LayerStatistics] = {}
    for block in range(size["layers"]):
        for C, layers in zip(moments, INPUTS, strict=True):
            shared = LayerStatistics(C.clone(), 10**6)
            for layer in layers:
                part = "mlp" if layer in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                of_layer[f"model.layers.{block}.{part}.{layer}"] = shared
    return Statistics(of_layer)


def statistics(size: Mapping[str, int]) -> Iterator[Work]:
    model = model_of(size)
    ids = torch.randint(3, 256, (size["tokens"] // LENGTH, LENGTH))
    pairs = [ids[first : first + 2] for first in range(0, len(ids), 2)]
    batches = [{"input_ids": pair, "attention_mask": torch.ones_like(pair)} for pair in pairs]
    while True:
        yield partial(collect, model, batches)


def step(size: Mapping[str, int]) -> Iterator[Work]:
    """Forward, backward and AdamW, after one that is not counted."""
    model = anchored(model_of(size), size["rank"])
    work = stepper(model, torch.randint(256, (size["tokens"] // LENGTH, LENGTH)), autocast=False)
    work()
    while True:
        yield work


# --------------------------------------------------------------- studies and sequences that grow


def scheduling(runs: int) -> Iterator[Work]:
    """All runs of a study from a journal, one after the other, where each is done at once."""

    def nothing(run: RunFolder, **_: Any) -> None:
        run.update(status="done", requested=False)

    def work(folder: Path) -> None:
        with patch.object(studies, "execute_run", nothing):
            studies.take_part(folder, storage=None, threads=1, listen=lambda event: None)

    while True:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "study"
            names = [f"run{number:05}" for number in range(runs)]
            for run in names:
                write_json(folder / run / "run.json", {"status": "pending", "requested": True})
            write_json(folder / "runs.json", {"runs": [{"run_id": run} for run in names]})
            yield partial(work, folder)


def sheets(methods: Sequence[str]) -> list[Sheet]:
    """A task to learn and one to keep, with the answers to 40 questions each."""
    learned = {method: 0.5 + 0.4 * i / len(methods) for i, method in enumerate(methods)}
    kept = {method: 0.9 - 0.4 * i / len(methods) for i, method in enumerate(methods)}
    return [
        Sheet("problems", "learning", 0.0, learned, 40, questions=sums(40)),
        Sheet("recall", "forgetting", 0.95, kept, 40, questions=facts(40)),
    ]


def reported(folder: Path) -> Iterator[Work]:
    while True:
        yield partial(write_report, folder)


def report_of_seeds(runs: int) -> Iterator[Work]:
    """Five methods at two rates, with a tenth as many seeds as there are runs."""
    methods = ["lora", "pissa", "milora", "lora_null_v1", "lora_null_v2"]
    with tempfile.TemporaryDirectory() as name:
        how = {"seeds": range(runs // 10), "rates": (1e-3, 3e-3), "spread": 0.03}
        yield from reported(make_study(Path(name) / "study", sheets(methods), methods, **how))  # type: ignore[arg-type]


def report_of_arms(arms: int) -> Iterator[Work]:
    methods = [f"method{number:03}" for number in range(arms)]
    with tempfile.TemporaryDirectory() as name:
        yield from reported(make_study(Path(name) / "study", sheets(methods), methods))


def report_of_sequence(tasks: int) -> Iterator[Work]:
    """The matrices and the page of two arms with two seeds each, after the last of the tasks."""
    R = [[0.9 - 0.01 * (row + column) for column in range(tasks + 1)] for row in range(tasks + 1)]
    with tempfile.TemporaryDirectory() as name:
        yield from reported(scored(Path(name) / "sums", {"lora": R, "pissa": R}))


# ------------------------------------------------------------------------------------ the series


def of_model(make: Callable[[Mapping[str, int]], Iterator[Work]], name: str, fixed: int) -> Any:
    """Of one size that grows while the others stay; `fixed` is the hidden size that stays."""
    return lambda size: make({**WIDE, "hidden": fixed, name: size})


def all_series() -> dict[tuple[str, str], tuple[Sequence[int], Callable[[int], Iterator[Work]]]]:
    """(Cost, size) -> the sizes, and what gives the work at one of them, prepared each time."""
    makers: dict[str, Callable[[Mapping[str, int]], Iterator[Work]]] = {
        "start of lora_null_v1": partial(start, "lora_null_v1"),
        "start of pissa": partial(start, "pissa"),
        "statistics": statistics,
        "training step": step,
    }
    series = {}
    for cost, make in makers.items():
        for name, sizes in GROWING.items():
            is_start = cost.startswith("start")
            if (name == "tokens" and is_start) or (name == "rank" and cost == "statistics"):
                continue
            # Wide enough for the largest rank to be a small one.
            fixed = 512 if name == "rank" else WIDE["hidden"]
            series[cost, name] = sizes, of_model(make, name, fixed)
    return series | {  # type: ignore[return-value]
        ("scheduling of a study", "runs"): (RUNS, scheduling),
        ("report of a study", "runs"): (RUNS, report_of_seeds),
        ("report of a study", "arms"): (ARMS, report_of_arms),
        ("report of a sequence", "tasks"): (TASKS, report_of_sequence),
    }


def seconds_of(make: Iterator[Work], repeats: int) -> float:
    """Median of the processor's seconds that a work takes."""
    taken = []
    for _ in range(repeats):
        work = next(make)
        before = processor()
        work()
        taken.append(processor() - before)
    make.close()  # type: ignore[attr-defined]
    return median(taken)


def row_of(cost: str, name: str, sizes: Sequence[int], make: Any, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    seconds_of(make(sizes[0]), 1)  # imports, and what is made once
    seconds = [seconds_of(make(size), repeats) for size in sizes]
    exponent, error = slope(sizes, seconds)
    return {
        "cost": cost,
        "against": name,
        "sizes": " ".join(map(str, sizes)),
        "first, s": seconds[0],
        "last, s": seconds[-1],
        "exponent": exponent,
        "error": error,
        "at the end": slope_of_two(sizes, seconds),
        "load": os.getloadavg()[0],
        "seconds": [round(value, 4) for value in seconds],
    }


def slope_of_two(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The exponent between the two largest sizes."""
    return math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2])


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="How cost grows with size.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="costs that begin so")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print a line a row")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of fewer tokens than inputs
    torch.set_num_threads(1)
    rows = []
    for (cost, name), (sizes, make) in all_series().items():
        if options.only and not cost.startswith(tuple(options.only)):
            continue
        rows.append(row_of(cost, name, sizes, make, options.repeats))
        if options.json:
            print(json.dumps(rows[-1]), flush=True)
    if not options.json:
        settings = {"repeats": options.repeats, "processor s": round(processor())}
        report("growth", "Cost against size, seconds of the processor", settings, rows)


if __name__ == "__main__":
    main()
