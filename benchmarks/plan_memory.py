"""The memory that `forgetless plan` tells against what its recipe takes when it is run.

    python benchmarks/plan_memory.py                        # about 10, 50 and 120 M weights
    python benchmarks/plan_memory.py --sizes 10M --methods lora_null_v1

A Llama with random weights is written to a folder, planned for, and the planned recipe is run by a
process of its own, for two steps: from the second on the optimiser has its state. Measured is the
peak of that process's resident memory over what it held before the run, everything imported. So
the interpreter and its libraries are not counted, and weights mapped from their file are. glibc
keeps freed memory for itself by default, and is told here to give it back.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless.data.examples import load_examples
from forgetless.models.load import load_tokenizer
from forgetless.recipes.plan.advice import Wishes
from forgetless.recipes.plan.plan import plan
from forgetless.recipes.plan.showing import recipe_text
from forgetless.studies.run import run
from timing import report

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 1536},
    "10M": {"hidden_size": 256, "num_hidden_layers": 10, "vocab_size": 8000},
    "50M": {"hidden_size": 512, "num_hidden_layers": 13, "vocab_size": 16000},
    "120M": {"hidden_size": 768, "num_hidden_layers": 14, "vocab_size": 32000},
}
METHODS = ("lora", "full")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
STATUS = Path("/proc/self/status")


def base(size: str, folder: Path) -> Path:
    """A Llama of a size with random weights, and the pocket model's tokenizer."""
    shapes = SIZES[size]
    config = LlamaConfig(
        **shapes,
        intermediate_size=shapes["hidden_size"] * 8 // 3,
        num_attention_heads=max(4, shapes["hidden_size"] // 64),
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer("pocket").save_pretrained(folder)
    return folder


def texts(folder: Path) -> Path:
    """Raw text, and so rows that are all as long as the plan takes them to be."""
    examples = load_examples("pocket:problems", limit=400)
    text = "\n".join(record["prompt"] + record["completion"] for record in examples)
    file = folder / "text.txt"
    file.write_text(text, encoding="utf-8")
    return file


def resident(name: str) -> int:
    """Bytes of a line of this process's status; VmHWM is the peak."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def measured(recipe: Path, out: Path) -> int:
    """Bytes that a run adds at its peak to what a process held before, in a process of its own."""
    context = get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_run, args=(recipe, out, answers))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"the run of {recipe} ended with {child.exitcode}")
    found: int = answers.get()
    return found


def _run(recipe: Path, out: Path, answers: Any) -> None:
    libc = ctypes.CDLL(None)
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        libc.mallopt(parameter, 65536)
    torch.set_num_threads(1)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run(recipe, out, evaluate=False, threads=1)
    answers.put(resident("VmHWM") - before)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a size and method."""
    rows = []
    with TemporaryDirectory() as temporary:
        place = Path(temporary)
        data, bases = texts(place), {}
        for size in ("tiny", *options.sizes):
            bases[size] = base(size, place / size)
        for method in options.methods:
            for size in ("tiny", *options.sizes):
                planned = plan(str(bases[size]), str(data), Wishes(method=method, rank=16))
                recipe = place / f"{size}-{method}.yaml"
                text = recipe_text(planned, "benchmarks/plan_memory.py")
                recipe.write_text(text.replace("epochs: 1.0", "steps: 2"), encoding="utf-8")
                if size == "tiny":  # so that everything is imported that a run imports
                    run(recipe, place / "runs", evaluate=False, threads=1)
                    continue
                found, told = measured(recipe, place / "runs"), planned.memory.peak
                rows.append(
                    {
                        "weights": planned.parameters,
                        "method": method,
                        "batch": planned.recipe.training.batch_size,
                        "tokens": planned.recipe.data.max_length,
                        "told MB": told / 1e6,
                        "measured MB": found / 1e6,
                        "told / measured": told / found,
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Told and measured memory of a run.")
    parser.add_argument("--sizes", nargs="+", default=["10M", "50M", "120M"], choices=SIZES)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args(arguments)
    rows = measure(options)
    report("plan_memory", "Peak memory of a run, told and measured", {"rank": 16}, rows)


if __name__ == "__main__":
    main()
