"""Tasks that several processes measure together, against one process alone.

    python benchmarks/shared_measuring.py --base SMOLLM2 --data DIR [--tasks arc_easy,gsm8k]
        [--limit 48] [--new-tokens 64] [--processes 2] [--repeats 3] [--json]

The processes are started once, each with the model and one thread. They take turns: the first
measures alone while the others wait, then all measure. `equal` says of how many items the answers
and the scores are the same, to the last bit. Prints a table and writes
benchmarks/results/shared_measuring.json; with --json prints a line a task.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from forgetless.core.processes import Processes
from forgetless.models.load import load_model, load_tokenizer
from forgetless.tasks import Task, TaskResult, make_task
from forgetless.tasks.journal import sharing
from forgetless.tasks.lm_eval import LMEval
from timing import report

ALONE = Processes()


def task_of(name: str, options: argparse.Namespace) -> Task:
    """A task of lm-eval, or one of ours with its file: ``perplexity:FILE``."""
    kind, _, path = name.partition(":")
    if path:
        return make_task({"kind": kind, "path": path, "limit": options.limit})
    more = {"data_dir": options.data, "max_new_tokens": options.new_tokens}
    return LMEval(name, limit=options.limit, **more)


def measured(
    task: Task, model: Any, tokenizer: Any, processes: Processes
) -> tuple[float, TaskResult]:
    """Seconds, and what came of it."""
    started = time.perf_counter()
    with sharing(processes):
        found = task.evaluate(model, tokenizer)
    return time.perf_counter() - started, found


def compared(
    task: Task, model: Any, tokenizer: Any, processes: Processes, repeats: int
) -> dict[str, Any]:
    """One row of the table; what other processes than the first return says nothing."""
    alone, together, equal = [], [], 0
    for _ in range(repeats):
        expected = None
        if processes.is_first:
            seconds, expected = measured(task, model, tokenizer, ALONE)
            alone.append(seconds)
        processes.wait_for_everyone()
        seconds, found = measured(task, model, tokenizer, processes)
        together.append(seconds)
        if expected is not None:
            equal = sum(a == b for a, b in zip(expected.items, found.items, strict=True))
    return {
        "task": task.name,
        "items": len(found.items),
        "one, s": median(alone or [0.0]),
        "together, s": median(together),
        "share of the time": median(together) / median(alone or [1.0]),
        "equal": equal,
    }


def process(index: int, port: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=index, world_size=options.processes
    )
    processes = Processes.current()
    model, tokenizer = load_model(options.base), load_tokenizer(options.base)
    rows = []
    for name in options.tasks.split(","):
        task = task_of(name, options)
        rows.append(compared(task, model, tokenizer, processes, options.repeats))
        if processes.is_first and options.json:
            print(json.dumps(rows[-1]), flush=True)
    if processes.is_first and not options.json:
        settings = {"limit": options.limit, "processes": options.processes}
        report("shared_measuring", "Measured by several processes", settings, rows)
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default="arc_easy,hellaswag,gsm8k")
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(process, (port, options), nprocs=options.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
