"""Scores of lm-eval's tasks: its own `HFLM` on a model in memory, against ours.

    python benchmarks/measuring.py --base SMOLLM2 --data DIR [--tasks arc_easy,hellaswag,piqa]
        [--limit 50] [--new-tokens 64] [--batch-sizes 8,32] [--threads 1] [--repeats 3] [--json]

Loading and making requests count on neither side, and neither does lm-eval's start, so its command
line takes longer than `HFLM` here. The sides take turns. Seconds are of the processor, which a busy
machine stretches less than those of the clock. `HFLM` counts with its best batch size.
`equal` says of how many requests the answers are the same, `apart` how far log-probabilities are.
Prints a table and writes benchmarks/results/measuring.json; with --json prints a line a task.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from forgetless.models.load import load_model, load_tokenizer
from forgetless.tasks.harness.model import InMemory
from forgetless.tasks.lm_eval import LMEval
from timing import report

Answers = Sequence[Any]


def requests_of(task: LMEval) -> list[Any]:
    """What lm-eval asks of a model for a task."""
    (loaded,) = task._loaded.tasks.values()
    loaded.set_fewshot_seed(seed=1234)
    loaded.build_all_requests(limit=task.limit, rank=0, world_size=1)
    return list(loaded.instances)


def answered(model: HFLM, requests: Sequence[Any]) -> Answers:
    """Log-probabilities or texts, whichever the requests are for."""
    answers: Answers = getattr(model, requests[0].request_type)(list(requests), disable_tqdm=True)
    return answers


def timed(work: Callable[[], Answers]) -> tuple[float, float, Answers]:
    """Seconds of the processor and of the clock, and what came of it."""
    processor, clock = time.process_time(), time.perf_counter()
    found = work()
    return time.process_time() - processor, time.perf_counter() - clock, found


def apart(ours: Answers, theirs: Answers) -> tuple[int, float | None]:
    """How many answers are the same, and the largest difference of log-probabilities."""
    if isinstance(ours[0], str):
        return sum(a == b for a, b in zip(ours, theirs, strict=True)), None
    pairs = list(zip(ours, theirs, strict=True))
    return sum(a[1] == b[1] for a, b in pairs), max(abs(a[0] - b[0]) for a, b in pairs)


def compared(
    model: Any, tokenizer: Any, task: LMEval, sizes: list[int], repeats: int
) -> dict[str, Any]:
    """One row of the table."""
    requests = requests_of(task)

    def made(side: str) -> HFLM:
        if side == "ours":
            return InMemory(model, tokenizer, None)
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=int(side))

    sides = ["ours", *map(str, sizes)]
    processor: dict[str, list[float]] = {name: [] for name in sides}
    clock: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, Answers] = {}
    for _ in range(repeats):
        for name in sides:
            seconds, passed, answers[name] = timed(partial(answered, made(name), requests))
            processor[name].append(seconds)
            clock[name].append(passed)
    best = min(map(str, sizes), key=lambda name: median(processor[name]))
    equal, difference = apart(answers["ours"], answers[best])
    return {
        "task": task.task,
        "requests": len(requests),
        "best batch": int(best),
        "HFLM s": median(processor[best]),
        "ours s": median(processor["ours"]),
        "times faster": median(processor[best]) / median(processor["ours"]),
        "by the clock": median(clock[best]) / median(clock["ours"]),
        "equal": equal,
        "apart": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default="arc_easy,hellaswag,piqa,triviaqa")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--shots", type=int)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", default="8,32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.base), load_tokenizer(options.base)
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    rows = []
    for name in options.tasks.split(","):
        task = LMEval(
            name,
            limit=options.limit,
            num_fewshot=options.shots,
            data_dir=options.data,
            max_new_tokens=options.new_tokens,
        )
        rows.append(compared(model, tokenizer, task, sizes, options.repeats))
        if options.json:
            print(json.dumps(rows[-1]), flush=True)
    settings = {
        "limit": options.limit,
        "new tokens": options.new_tokens,
        "threads": options.threads,
    }
    if not options.json:
        report("measuring", "lm-eval's tasks, seconds of the processor", settings, rows)


if __name__ == "__main__":
    main()
