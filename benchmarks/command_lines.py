"""lm-eval's tasks by two whole command lines: its own, and `forgetless eval`.

    python benchmarks/command_lines.py --base SMOLLM2 --data DIR [--tasks arc_easy,hellaswag,piqa]
        [--limit 100] [--new-tokens 64] [--batch-sizes 8,32] [--threads 2] [--repeats 3] [--json]

Everything counts: the start of Python, the search for the task, loading, scoring, writing. lm-eval
counts with its best batch size; both read the same local files, from which a task is written for
lm-eval. The sides take turns. `values` are the two scores; seconds are of the clock, and `cpu` is
the ratio of the processor's. Prints a table and writes benchmarks/results/command_lines.json; with
--json prints a line a task.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from forgetless.tasks.harness import local
from timing import Used, report, used_by


def theirs(task: str, size: str, options: argparse.Namespace, folder: Path) -> list[str]:
    model = ["--model", "hf", "--model_args", f"pretrained={options.base},dtype=float32"]
    what = ["--tasks", task, "--include_path", str(folder / "tasks"), "--limit", str(options.limit)]
    how = ["--batch_size", size, "--device", "cpu", "--output_path", str(folder / "theirs.json")]
    length = ["--gen_kwargs", f"max_gen_toks={options.new_tokens}"] if options.generates else []
    return [sys.executable, "-m", "lm_eval", "run", *model, *what, *how, *length]


def ours(task: str, options: argparse.Namespace, folder: Path) -> list[str]:
    what = ["--tasks", task, "--data-dir", str(options.data), "--limit", str(options.limit)]
    how = ["--cache", str(folder / "cache"), "--out", str(folder / "ours.json")]
    length = ["--max-new-tokens", str(options.new_tokens)] if options.generates else []
    return [sys.executable, "-m", "forgetless", "eval", options.base, *what, *how, *length]


def values(task: str, folder: Path) -> list[float]:
    """The score of each side under the name that both have for it."""
    (found,) = json.loads((folder / "ours.json").read_text()).values()
    name = next(iter(found))
    theirs_of = json.loads(max(folder.glob("theirs_*.json"), key=os.path.getmtime).read_text())
    return [found[name]["value"], theirs_of["results"][task][name]]


def compared(task: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    (folder / "tasks").mkdir()
    local.write(task, options.data, folder / "tasks")
    sizes = options.batch_sizes.split(",")
    taken: dict[str, list[Used]] = {name: [] for name in ["ours", *sizes]}
    for repeat in range(options.repeats):
        for size in sizes:
            taken[size].append(used_by(theirs(task, size, options, folder), options.threads))
        place = folder / str(repeat)  # where nothing is measured yet
        place.mkdir()
        taken["ours"].append(used_by(ours(task, options, place), options.threads))
    (place / "theirs_.json").symlink_to(max(folder.glob("theirs_*.json"), key=os.path.getmtime))
    clock = {name: median(each.clock for each in found) for name, found in taken.items()}
    cpu = {name: median(each.processor for each in found) for name, found in taken.items()}
    best = min(sizes, key=lambda size: clock[size])
    return {
        "task": task,
        "documents": options.limit,
        "its batch": int(best),
        "lm_eval, s": clock[best],
        "ours, s": clock["ours"],
        "times faster": clock[best] / clock["ours"],
        "cpu": cpu[best] / cpu["ours"],
        "values": values(task, place),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default="arc_easy,hellaswag,piqa")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--generates", action="store_true", help="the tasks' answers are written")
    parser.add_argument("--batch-sizes", default="8,32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    options.data = options.data.resolve()
    rows = []
    for task in options.tasks.split(","):
        with tempfile.TemporaryDirectory() as name:
            rows.append(compared(task, options, Path(name)))
        if options.json:
            print(json.dumps(rows[-1]), flush=True)
    if not options.json:
        settings = {"threads": options.threads, "new tokens": options.new_tokens}
        report("command_lines", "lm-eval's tasks by two command lines", settings, rows)


if __name__ == "__main__":
    main()
