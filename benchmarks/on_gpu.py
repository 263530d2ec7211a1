"""Everything that is to be measured on a GPU, by one command of at most twelve minutes on an H100.

    python benchmarks/on_gpu.py --out DIR [--base SMOLLM2] [--data GSM8K] [--keep TEXT]
    python benchmarks/on_gpu.py --out DIR --tiny          # every part on a CPU, on toy shapes

    llama-2-7b     `collect` against a bare forward, and every method's start, at its shapes
    llama-3.1-8b   the same at its shapes
    step           a training step, plain and anchored, against PEFT's LoRA
    repair         a rank-16 adapter on all linear layers of Llama-2-7B, from given moments
    adapters       four methods learn GSM8K on a small real base, at three rates with three seeds,
                   and are repaired; what is lost, by KL and loss on the text of --keep

A part is a process of its own with a limit of its own, and writes DIR/<part>.json as it goes: one
that fails or is cut off leaves its reason and what it had measured, and the next one begins. Parts
that are done are not done again. No network is used. DIR/summary.md has all of it in tables.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

import repair_speed
import start
import step
from forgetless.core.files import read_json, write_jsonl, write_text
from forgetless.recipes.recipe import Recipe
from forgetless.recipes.study import StudyRecipe
from forgetless.statistics.collection import collect
from forgetless.studies.folder import RunFolder, aftercare_rows
from forgetless.studies.study import study
from parts import Part, Row, Save, Skipped, measure, run_part
from shapes import random_batches, random_model, sizes_of
from statistics_speed import forward
from timing import interleaved, peak_gib, ratio, reset_peak, table

FIRST = ["lora_null_v1", "lora_null_v2", "pissa", "milora", "intermediate", "lora"]
"""Methods whose starts are measured before the others, should the time not do for all."""

RATES = {
    "full": [3e-5, 1e-4, 3e-4],
    "lora": [1e-3, 3e-3, 1e-2],
    "intermediate": [1e-3, 3e-3, 1e-2],
    "lora_null_v2": [3e-3, 1e-2, 3e-2],
}
"""Method -> its learning rates, the last of which is meant to be too high."""

SEEDS = [0, 1, 2]
TASKS = ["gsm8k", "kept", "kl"]
"""Mean loss on held-out answers, the same on the text to keep, and KL to the base on that text."""

WORKERS = 4
"""Runs at a time on one GPU: so small a model leaves most of it idle."""

PASSAGE = 200
"""Characters of a paragraph of the text to keep that is long enough to be measured on."""


# ---- the parts -----------------------------------------------------------------------------------


def at_shapes(model: str, asked: argparse.Namespace, save: Save) -> None:
    """Statistics of some blocks, then the starts of one block, method by method."""
    scale = 64 if asked.tiny else 1
    save(rows := statistics(model, scale, asked))
    methods = [*FIRST, *(name for name in start.ATTACHABLE if name not in FIRST)]
    for method in methods:
        row: Row = {"what": f"start of one block, rank {start.RANK // scale}, {method}"}
        try:
            found = next(start.measure(model, scale, [method], 1, asked.device))
            row |= {"seconds": found["block s"], "peak GiB": found["peak GiB"]}
        except (RuntimeError, ValueError) as error:  # out of memory too; the others have their turn
            row["what"] += f", failed: {error}".split("\n")[0]
        rows.append(dict.fromkeys(rows[0]) | row)
        save(rows)


def statistics(model: str, scale: int, asked: argparse.Namespace) -> list[Row]:
    """`collect` against the model's own forward, on some blocks at their true widths."""
    device = torch.device(asked.device)
    blocks, texts, length = (2, 8, 64) if asked.tiny else (4, 16, 2048)
    llama = random_model(model, device, blocks=blocks, scale=scale)
    vocabulary = sizes_of(model, scale)["vocab_size"]
    batches = random_batches(vocabulary, texts, length, 4, device)
    sides: dict[str, Callable[[], object]] = {
        "forward": partial(forward, llama, batches),
        "forward without the head": partial(forward, llama, batches, logits_to_keep=1),
        "collect": partial(collect, llama, batches),
    }
    peaks = {}
    for side, work in sides.items():  # also warms up
        reset_peak(device)
        work()
        peaks[side] = peak_gib(device)
    times = interleaved(sides, repeats=3, warmups=0, device=device)
    return [
        {
            "what": f"{side}, {blocks} blocks, {texts * length} tokens",
            "seconds": median(times[side]),
            "least": min(times[side]),
            "over forward": ratio(times, side, "forward"),
            "peak GiB": peaks[side],
        }
        for side in sides
    ]


def training_step(asked: argparse.Namespace, save: Save) -> None:
    """A few blocks at two ranks, the sides in turns."""
    hidden, ranks = (256, [8]) if asked.tiny else (4096, [16, 128])
    given = ["--device", asked.device, "--repeats", "3" if asked.tiny else "20", "--layers", "3"]
    if not asked.tiny:
        given += ["--dtype", "bfloat16", "--autocast", "--length", "1024"]
    options, rows = step.options_of(given), []
    size = {"layers": options.layers, "tokens": options.batch * options.length}
    for rank in ranks:
        rows.append(size | {"dtype": options.dtype} | step.compare(hidden, rank, options))
        save(rows)


def repair(asked: argparse.Namespace, save: Save) -> None:
    """Every kind of input of a block, and the sum over the model's blocks."""
    scale, repeats = (64, 1) if asked.tiny else (1, 3)
    found = repair_speed.measure("llama-2-7b", scale, 16, repeats, asked.device)
    whole: Row = {
        "inputs": f"all of {found['blocks']} blocks",
        "layers": found["blocks"] * sum(group["layers"] for group in found["groups"]),
        "seconds": found["whole_model_seconds"],
        "cpu_seconds": found["whole_model_cpu_seconds"],
        "peak_gib": found["peak_gib"],
        "gpu_peak_gib": found["gpu_peak_gib"],
    }
    save([*found["groups"], whole])


def adapters(asked: argparse.Namespace, save: Save) -> None:
    """The study of four methods; runs are saved as they end, a seed's before the next one's."""
    definition = StudyRecipe.parse(the_study(asked))
    folder, recipes = asked.out / definition.name, definition.recipes()
    lock = threading.Lock()  # events of several workers come in several threads

    def heard(event: Any) -> None:
        if event.stage in ("done", "failed"):
            with lock:
                save(run_rows(folder, recipes))

    workers = 1 if asked.tiny else WORKERS
    threads = None if asked.tiny else max(1, (os.cpu_count() or 1) // WORKERS)
    study(definition, asked.out, workers=workers, threads=threads, listen=heard)
    save(run_rows(folder, recipes))


def the_study(asked: argparse.Namespace) -> Row:
    """Its definition, with the seeds outermost, so that a cut-off study has whole ones."""
    train = test = "pocket:problems"
    if not asked.tiny and (asked.base is None or asked.data is None):
        raise Skipped("it needs --base, as benchmarks/real_bases.py makes it, and --data")
    if asked.data is not None:
        train, test = (str(asked.data / f"{part}.jsonl") for part in ("train", "test"))
    for path in (asked.base, asked.data and train, asked.data and test, asked.keep):
        if path is not None and not Path(path).exists():
            raise Skipped(f"there is no {path}")
    kept, limit = "pocket:held", 8 if asked.tiny else 64
    if asked.keep is not None:
        kept = str(asked.out / "kept.jsonl")
        paragraphs = asked.keep.read_text(encoding="utf-8").splitlines()
        write_jsonl(Path(kept), [{"text": p} for p in paragraphs if len(p) >= PASSAGE])
    recipe = {
        "base": str(asked.base or "pocket"),
        "dtype": "float32",
        "adapter": {"rank": 16, "alpha": 16},
        # Of the base's own words, so that what is measured on is nowhere given to a method.
        "calibration": {"source": "self", "samples": 32 if asked.tiny else 128, "batch_size": 32,
                        "max_length": 64 if asked.tiny else 128},
        "data": {"train": train, "max_length": 384, "limit": 64 if asked.tiny else 1500},
        "training": {
            "steps": 4 if asked.tiny else 60,
            "batch_size": 4 if asked.tiny else 16,
            "precision": "float32" if asked.tiny else "bf16",
            "checkpoint_every": 1000,
        },
        "repair": {"strength": [0.1] if asked.tiny else [0.1, 1.0]},
        "tasks": {
            "learning": [{"kind": "perplexity", "name": "gsm8k", "path": test,
                          "limit": 8 if asked.tiny else 128}],
            "forgetting": [
                {"kind": "perplexity", "name": "kept", "path": kept, "limit": limit},
                {"kind": "kl", "path": kept, "limit": limit},
            ],
        },
    }  # fmt: skip
    arms = [
        {"adapter.method": method, "seed": seed, "axes": {"training.learning_rate": rates}}
        for seed in SEEDS[: 2 if asked.tiny else None]
        for method, rates in _rates(asked).items()
    ]
    return {"name": "adapters-tiny" if asked.tiny else "adapters", "recipe": recipe, "arms": arms}


def _rates(asked: argparse.Namespace) -> dict[str, list[float]]:
    return {method: rates[: 1 if asked.tiny else None] for method, rates in RATES.items()}


def run_rows(folder: Path, recipes: Mapping[str, Recipe]) -> list[Row]:
    """One row a run that is over and a setting of it, as trained or repaired."""
    rows: list[Row] = []
    for run_id, recipe in recipes.items():
        run = RunFolder(folder / run_id)
        record = run.read()
        common: Row = {"seed": recipe.seed, "method": recipe.adapter.method,
                       "learning_rate": recipe.training.learning_rate}  # fmt: skip
        if record.get("status") == "failed":
            setting = f"failed: {record.get('reason')}"
            rows.append(common | {"setting": setting} | dict.fromkeys(TASKS))
        settings: dict[str, Row] = defaultdict(dict)
        for row in aftercare_rows(run) if record.get("status") == "done" else ():
            settings[row["setting"]][row["task"]] = row["score"]
            settings["base"][row["task"]] = row["base_score"]
        rows += [common | {"setting": name} | scores for name, scores in settings.items()]
    return rows


def means(rows: Sequence[Row], runs_a_seed: int) -> list[Row]:
    """Over the seeds all of whose runs are over: mean ± standard deviation of every task."""
    over: dict[int, set[tuple[str, float]]] = defaultdict(set)
    for row in rows:
        over[row["seed"]].add((row["method"], row["learning_rate"]))
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if len(over[row["seed"]]) == runs_a_seed:
            base = row["setting"] == "base"
            own = row["method"], row["learning_rate"], row["setting"]
            key = ("base", None, "–") if base else own
            groups[key].append(row)
    found = []
    for (method, rate, setting), of_seeds in groups.items():
        seeds = {row["seed"] for row in of_seeds}
        cells: Row = {"method": method, "rate": rate, "setting": setting, "seeds": len(seeds)}
        for task in TASKS:
            values = [row[task] for row in of_seeds if row[task] is not None]
            spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
            cells[task] = f"{fmean(values):.4f}{spread}" if values else "–"
        found.append(cells)
    return found


PARTS = {
    "llama-2-7b": Part(partial(at_shapes, "llama-2-7b"), 115),
    "llama-3.1-8b": Part(partial(at_shapes, "llama-3.1-8b"), 115),
    "step": Part(training_step, 45),
    "repair": Part(repair, 60),
    "adapters": Part(adapters, 325, tiny_limit=100),
}


def summary(asked: argparse.Namespace) -> str:
    """All parts so far, in Markdown; the study's as means over whole seeds."""
    lines = ["# On a GPU" if asked.device == "cuda" else "# On a CPU, which says nothing of a GPU"]
    around: Row = {}
    for name in PARTS:
        record = read_json(asked.out / f"{name}.json")
        if not record:
            continue
        around = record.get("surroundings", around)
        reason = f", {record['reason']}" if "reason" in record else ""
        rows = record["rows"]
        if name == "adapters":
            rows = means(rows, sum(map(len, _rates(asked).values())))
        head = f"{record['status']} after {record.get('seconds', '?')} s{reason}"
        lines += [f"## {name}", head, f"```\n{table(rows)}\n```"]
    lines.insert(1, f"```\n{json.dumps(around, indent=2)}\n```")
    return "\n\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the parts one after the other, and sum up what there is after each."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--base", type=Path, help="folder of SmolLM2-135M, as benchmarks/real_bases.py makes it")
    add("--data", type=Path, help="folder with train.jsonl and test.jsonl of GSM8K")
    add("--keep", type=Path, help="plain text such as WikiText's; else the pocket world's")
    add("--tiny", action="store_true", help="toy shapes, on the CPU")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--part", choices=PARTS, help=argparse.SUPPRESS)  # the process of one part
    asked = parser.parse_args(given)
    asked.out.mkdir(parents=True, exist_ok=True)
    asked.device = "cuda" if torch.cuda.is_available() and not asked.tiny else "cpu"
    if asked.device == "cpu" and not asked.tiny:
        parser.error("there is no GPU here; --tiny does every part on the CPU")
    if asked.part:
        if asked.tiny:
            torch.set_num_threads(1)  # toy shapes are slower on several
        measure(asked.part, partial(PARTS[asked.part].work, asked), asked.out, asked.device)
        return
    # Ended from outside, the part that is running is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    for name in asked.parts:
        if read_json(asked.out / f"{name}.json", damaged_as_missing=True).get("status") != "done":
            command = [sys.executable, __file__, *given, "--part", name]
            limit = PARTS[name].tiny_limit if asked.tiny else PARTS[name].limit
            run_part(name, command, limit, asked.out, hide_gpus=asked.tiny)
        write_text(asked.out / "summary.md", summary(asked))
    print(summary(asked))


if __name__ == "__main__":
    main()
