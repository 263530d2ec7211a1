"""Fine-tuning measured before and after: TRL and lm-eval's commands, against `forgetless run`.

    python benchmarks/end_to_end.py --base SMOLLM2 --data DIR [--methods lora,lora_null_v2]
        [--tasks arc_easy,piqa] [--limit 20] [--steps 20] [--batch 2] [--length 128] [--rank 16]
        [--keep FILE] [--batch-sizes 8,32] [--threads 1] [--repeats 1] [--json]

Theirs are three commands: a script with TRL's SFTTrainer and PEFT's LoRA, and `lm_eval` on the base
and on the adapter, with the better of the batch sizes. Ours is one, of a recipe with these tasks;
before it the same recipe without them is run elsewhere, for the columns of the training alone.
Rows, their number, rank, batches, length, rates, optimiser and precision (float32) are the same,
and each row is learned once. Whole commands count, with the start of Python, as does each side's
own measuring of the base.

Memory is the most that the process of the training ever had. Seconds a step are of the processor,
from the end of one step to the end of the next, without the first three: both sides are
transformers' Trainer, whose handler of callbacks notes the time in either. `--keep` is the text
for the statistics of a method that needs some. Prints a table and writes
benchmarks/results/end_to_end.json; with --json prints the rows as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tokenizers import Tokenizer

from forgetless.tasks.harness import local
from timing import Used, report, used_by

OFFLINE = {"HF_HUB_OFFLINE": "1"}

FIRST = 3
"""Steps that do not count, in which memory is got and code is loaded."""

TRAINING = """\
import json
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

rows = [json.loads(line) for line in open({rows!r}, encoding="utf-8")]
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained({base!r}, dtype="float32"),
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(
        r={rank}, lora_alpha={rank}, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    args=SFTConfig(
        output_dir={out!r},
        max_length={length},
        num_train_epochs=1,
        per_device_train_batch_size={batch},
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps={warmup},
        logging_steps=10,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    ),
)
trainer.train()
trainer.save_model()
"""
"""As TRL has it in its documentation, without gradient checkpointing and bf16, which ours lacks."""

NOTING = """\
import os, runpy, sys, time
from transformers.trainer_callback import CallbackHandler

end = CallbackHandler.on_step_end

def noting(*given):
    with open(os.environ["STEP_TIMES"], "a") as file:
        file.write(f"{time.process_time()}\\n")
    return end(*given)

CallbackHandler.on_step_end = noting
sys.argv = sys.argv[1:]
if sys.argv[0] == "forgetless":
    runpy.run_module("forgetless", run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Starts the training of either side, and notes the processor's seconds after every step."""


def short_rows(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """As many rows of Dolly as are learned, of those that neither side would cut."""
    tokenizer = Tokenizer.from_file(str(Path(options.base) / "tokenizer.json"))
    (file,) = (options.data / "dolly").glob("*train*.jsonl")
    left = options.steps * options.batch
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, completion = row["prompt"], row["response"]
        if left and len(tokenizer.encode(prompt + completion)) < options.length:
            left -= 1
            yield {"prompt": prompt, "completion": completion}
    if left:
        raise SystemExit(f"{file} has {left} rows too few of at most {options.length} tokens")


class Sides:
    """Both sides' commands, in a folder with the rows and the tasks that they share."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.rows, self.noting = folder / "train.jsonl", folder / "noting.py"
        self.noting.write_text(NOTING)
        lines = (json.dumps(row) + "\n" for row in short_rows(options))
        self.rows.write_text("".join(lines), encoding="utf-8")
        (folder / "tasks").mkdir()
        for task in options.tasks.split(","):
            local.write(task, options.data, folder / "tasks")

    def trained(self, side: str, words: Sequence[str]) -> tuple[Used, float]:
        """What a training took, and its median seconds of the processor a step."""
        times = self.folder / f"{side}.times"
        command = [sys.executable, str(self.noting), *words]
        used = used_by(
            command, self.options.threads, **OFFLINE, **self.caches(side), STEP_TIMES=str(times)
        )
        ends = [float(line) for line in times.read_text().split()]
        assert len(ends) == self.options.steps, f"{side} did {len(ends)} steps"
        return used, median(b - a for a, b in zip(ends[FIRST:], ends[FIRST + 1 :], strict=False))

    def caches(self, side: str) -> dict[str, str]:
        """Where nothing is kept from another side or an earlier call."""
        return {"FORGETLESS_CACHE": str(self.folder / f"{side}.cache")}

    # ---- TRL and lm-eval

    def theirs(self) -> dict[str, Any]:
        """Train, and measure the base and the adapter."""
        options, out, script = self.options, self.folder / "trl", self.folder / "train_trl.py"
        own = {"rank": options.rank, "length": options.length, "batch": options.batch}
        files = {"rows": str(self.rows), "base": str(options.base), "out": str(out)}
        warmup = math.ceil(0.03 * options.steps)
        script.write_text(TRAINING.format(**own, **files, warmup=warmup))
        training, step = self.trained("trl", [str(script)])
        sizes = options.batch_sizes.split(",")
        bases = {size: self.lm_eval(size) for size in sizes}
        best = min(sizes, key=lambda size: bases[size][0].processor)
        (before, base), (after, final) = bases[best], self.lm_eval(best, out)
        everything = training + before + after
        return row(f"TRL, lm-eval (batch {best})", training, step, everything, base, final)

    def lm_eval(self, size: str, adapter: Path | None = None) -> tuple[Used, dict[str, float]]:
        """The base's scores, or the adapter's, by lm-eval's command."""
        options, out = self.options, self.folder / f"lm_eval-{size}-{adapter is None}"
        which = f"pretrained={options.base},dtype=float32" + (f",peft={adapter}" if adapter else "")
        words = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", which]
        words += ["--tasks", options.tasks, "--include_path", str(self.folder / "tasks")]
        words += ["--limit", str(options.limit), "--batch_size", size, "--device", "cpu"]
        used = used_by([*words, "--output_path", str(out)], options.threads, **OFFLINE)
        (file,) = out.rglob("results_*.json")
        found = json.loads(file.read_text())["results"]
        return used, {task: found[task]["acc_norm,none"] for task in options.tasks.split(",")}

    # ---- forgetless

    def ours(self, method: str) -> dict[str, Any]:
        """Train alone; then train and measure, by one command that finds nothing of the first."""
        recipe, out = self.folder / f"{method}.json", self.folder / f"{method}.runs"
        content = self.recipe(method)
        recipe.write_text(json.dumps(content))
        how = ["run", str(recipe), "--threads", str(self.options.threads), "--out"]
        training, step = self.trained(f"{method}.alone", ["forgetless", *how, f"{out}.alone"])
        names = self.options.tasks.split(",")
        own = {"data_dir": str(self.options.data), "limit": self.options.limit}
        content["tasks"] = {"forgetting": [{"kind": name, **own} for name in names]}
        recipe.write_text(json.dumps(content))
        everything = used_by(
            [sys.executable, "-m", "forgetless", *how, str(out)],
            self.options.threads,
            **OFFLINE,
            **self.caches(method),
        )
        (run,) = (out / method).glob("*/run.json")

        def scores(phase: str) -> dict[str, float]:
            files = {name: run.parent / "scores" / phase / f"{name}.json" for name in names}
            return {name: json.loads(file.read_text())["value"] for name, file in files.items()}

        side = f"forgetless, {method}"
        return row(side, training, step, everything, scores("base"), scores("final"))

    def recipe(self, method: str) -> dict[str, Any]:
        """The recipe without tasks; YAML is a superset of JSON."""
        options = self.options
        found: dict[str, Any] = {
            "name": method,
            "base": str(options.base),
            "dtype": "float32",
            "adapter": {"method": method, "rank": options.rank, "alpha": options.rank},
            "data": {
                "train": str(self.rows),
                "max_length": options.length,
                "chat_template": "off",  # prompts as they stand, as TRL has them
            },
            "training": {
                "learning_rate": 2e-4,
                "epochs": 1,
                "batch_size": options.batch,
                "gradient_accumulation": 1,
            },
        }
        if options.keep:
            found["calibration"] = {"source": str(options.keep), "samples": options.keep_samples}
        return found


def row(
    side: str,
    training: Used,
    step: float,
    everything: Used,
    base: dict[str, float],
    final: dict[str, float],
) -> dict[str, Any]:
    """One row of the table; the ratios come later."""
    return {
        "side": side,
        "training, clock s": training.clock,
        "processor s": training.processor,
        "all, clock s": everything.clock,
        "all, processor s": everything.processor,
        "step, ms": 1000 * step,
        "peak MB": training.peak / 1e6,
        "base": list(base.values()),
        "final": list(final.values()),
    }


def over(found: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The row, with its ratios to TRL's and lm-eval's."""
    ratios = {
        "all over theirs": "all, processor s",
        "clock over theirs": "all, clock s",
        "step over theirs": "step, ms",
        "peak over theirs": "peak MB",
    }
    return found | {name: found[column] / theirs[column] for name, column in ratios.items()}


def turn(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All sides once, one after the other, with nothing kept of an earlier turn."""
    with tempfile.TemporaryDirectory() as name:
        sides = Sides(Path(name), options)
        theirs = sides.theirs()
        ours = [sides.ours(method) for method in options.methods.split(",")]
    return [over(found, theirs) for found in (theirs, *ours)]


def median_row(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A side's row: of each number, a ratio too, the median of the turns; all else of the first."""
    return {
        name: median(row[name] for row in turns) if isinstance(value, float) else value
        for name, value in turns[0].items()
    }


def main() -> None:
    """Do all sides one after the other; print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", default="lora,lora_null_v2")
    parser.add_argument("--tasks", default="arc_easy,piqa", help="scored by acc_norm")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--keep", type=Path, help="text for the statistics; else the base's own")
    parser.add_argument("--keep-samples", type=int, default=32)
    parser.add_argument("--batch-sizes", default="8,32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    options.base, options.data = options.base.resolve(), options.data.resolve()
    options.keep = options.keep and options.keep.resolve()
    turns = [turn(options) for _ in range(options.repeats)]
    rows = [median_row(side) for side in zip(*turns, strict=True)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    names = "threads", "repeats", "steps", "batch", "length", "rank", "tasks", "limit"
    settings = {name: getattr(options, name) for name in names} | {"load": os.getloadavg()[0]}
    report("end_to_end", "Training and measuring by whole commands", settings, rows)


if __name__ == "__main__":
    main()
