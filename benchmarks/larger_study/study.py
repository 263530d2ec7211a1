"""The larger study: a base of 100 M weights made from local text, fine-tuned in four ways.

    python benchmarks/larger_study --data DIR --out runs/larger       # one H100, under half an hour
    python benchmarks/larger_study --data DIR --out runs/tiny --tiny  # two cores, some minutes

No hub is needed. The base learns from text and facts for twelve minutes; GSM8K is the new task, and
what the base knew is measured by its facts, by text that it never saw, and by KL. Four methods,
three learning rates each. A call that finds its folder half done goes on, also after a kill.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from corpus import read_corpus, write_files
from pretraining import Plan, make_base
from transformers.utils import logging

from forgetless import cli
from forgetless.core.errors import UserError
from forgetless.core.files import write_text
from forgetless.data.pocket.pretrain import Settings

RATES: Mapping[str, Sequence[float]] = {
    "full": (1e-4, 3e-5, 3e-4),
    "lora": (1e-3, 3e-4, 3e-3),
    "intermediate": (1e-3, 3e-4, 3e-3),
    "lora_null_v2": (3e-3, 1e-3, 1e-2),
}
"""Rates of each method, around the best ones of the pocket world."""

FILES = {
    "text": ("corpora/openstax.txt.xz", "corpora/novels100.txt.xz"),
    "facts_file": ("corpora/facts.jsonl.xz",),
    "train": ("gsm8k/train.jsonl",),
    "test": ("gsm8k/test.jsonl",),
}
"""What is looked for in the data folder where no option names another file."""

WEIGHT_DECAY = 0.1
FACT_SHARE = 0.2
"""Of the rows of a pre-training batch that hold facts."""

ASSUMED_FLOPS = 2e14
ASSUMED_STEP_SECONDS = 0.05
ASSUMED_RUN_SECONDS = 25.0
"""A fifth of an H100's dense bfloat16; a step of fine-tuning so small a model, which waits for the
CPU; loading, starting and measuring a run. None of the three is measured."""


@dataclass(frozen=True)
class Size:
    """How large everything is; each field is an option of the command.

    Attributes:
        minutes: of pre-training; 0 for a number of steps.
        steps: of pre-training, where `minutes` is 0.
        rows: of a pre-training batch.
        length: tokens of a row, and the model's context.
        hidden, layers, heads, vocabulary: of the model.
        learning_rate: the largest of the pre-training.
        characters: of each text, from its beginning; 0 for all.
        facts: that are trained.
        questions: facts that are asked.
        passages: of each text that was held out.
        train_rows, test_rows: of the new task's files, from their beginning; 0 for all.
        tuning_steps, batch_size: of each run.
        rank: of the adapters.
        samples: of the calibration text.
    """

    minutes: float = 12.0
    steps: int = 10_000
    rows: int = 64
    length: int = 512
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    vocabulary: int = 16384
    learning_rate: float = 6e-4
    characters: int = 0
    facts: int = 20_000
    questions: int = 1_000
    passages: int = 300
    train_rows: int = 0
    test_rows: int = 0
    tuning_steps: int = 468
    batch_size: int = 32
    rank: int = 16
    samples: int = 512

    @property
    def plan(self) -> Plan:
        """What decides the base."""
        sizes = Settings(
            steps=self.steps,
            batch_size=self.rows,
            length=self.length,
            learning_rate=self.learning_rate,
            warmup=200 if self.minutes else max(1, self.steps // 10),
            weight_decay=WEIGHT_DECAY,
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            intermediate_size=8 * self.hidden // 3,
            context=self.length,
        )
        return Plan(sizes, self.minutes or None, FACT_SHARE)

    @property
    def weights(self) -> int:
        """Of the model, embeddings included, norms not."""
        block = 4 * self.hidden**2 + 3 * self.hidden * (8 * self.hidden // 3)
        return self.vocabulary * self.hidden + self.layers * block


TINY = Size(
    minutes=0,
    steps=200,
    rows=5,
    length=256,
    hidden=96,
    layers=2,
    heads=4,
    vocabulary=2048,
    learning_rate=3e-3,
    characters=1_000_000,
    facts=20,
    questions=20,
    passages=20,
    train_rows=200,
    test_rows=20,
    tuning_steps=20,
    batch_size=8,
    rank=4,
    samples=32,
)
"""Small enough for a CPU, and too small for its numbers to mean anything."""


def definition(
    base: Path,
    files: Path,
    train: Path,
    test: Path,
    size: Size,
    arms: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """The study as its YAML holds it.

    Args:
        base: the model's folder.
        files: what `corpus.write_files` wrote.
        train: the new task.
        test: the same, held out.
        size: of everything.
        arms: learning rates of each method.
    """
    held = sorted(files.glob("held_*.jsonl"))
    return {
        "name": "larger-local",
        "recipe": {
            "base": str(base),
            "adapter": {"rank": size.rank, "alpha": size.rank},
            "calibration": {
                "source": str(files / "calibration.jsonl"),
                "samples": size.samples,
                "max_length": size.length // 2,
                "batch_size": 32,
            },
            "data": {
                "train": str(train),
                "max_length": size.length,
                "limit": size.train_rows or None,
            },
            "training": {
                "steps": size.tuning_steps,
                "batch_size": size.batch_size,
                "precision": "float32" if device().type == "cpu" else "bf16",
                "measure_at": [0.25],
                "checkpoint_every": 1000,
            },
            "tasks": {
                "learning": [_loss("new_task", test) | {"limit": size.test_rows or None}],
                "forgetting": [
                    _cloze(files / "facts.jsonl"),
                    *(_loss(path.stem, path) for path in held),
                    {"kind": "kl", "path": str(files / "held.jsonl"), "limit": size.passages},
                ],
            },
        },
        "arms": [
            {"adapter.method": method, "axes": {"training.learning_rate": sorted(rates)}}
            for method, rates in arms.items()
        ],
    }


def _loss(name: str, path: Path) -> dict[str, Any]:
    return {"kind": "perplexity", "name": name, "path": str(path)}


def _cloze(path: Path) -> dict[str, Any]:
    """The facts; an answer ends with its sentence, so a model that goes on talking still knows."""
    return {
        "kind": "generate",
        "name": "facts",
        "path": str(path),
        "question": "prompt",
        "prompt": "{question}",
        "pattern": r"^\s*([^.\n]+)",
        "max_new_tokens": 16,
    }


def device() -> torch.device:
    """The first accelerator, or the CPU; where `forgetless` itself computes."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def expected(size: Size, runs: int, workers: int) -> list[str]:
    """How long the study should take on a GPU, with what that assumes."""
    step = max(
        ASSUMED_STEP_SECONDS,
        6 * size.weights * size.batch_size * size.length / ASSUMED_FLOPS,
    )
    tuning = runs * (size.tuning_steps * step + ASSUMED_RUN_SECONDS) / 60
    a_step = 6 * size.weights * size.rows * size.length
    making = size.minutes or size.steps * a_step / ASSUMED_FLOPS / 60
    tokens = making * 60 * ASSUMED_FLOPS / (6 * size.weights)
    return [
        f"pre-training of {size.weights / 1e6:.1f} M weights: {making:.1f} min, "
        f"{tokens / 1e6:.0f} M tokens by 6 x weights x tokens at "
        f"{ASSUMED_FLOPS / 1e12:.0f} TFLOP/s",
        f"fine-tuning: {runs} runs of {size.tuning_steps} steps, {tuning:.1f} min one after the "
        f"other, at {step:.2f} s a step and {ASSUMED_RUN_SECONDS:.0f} s besides ({workers} at a "
        "time)",
        "the speeds are assumed for one H100, not measured",
    ]


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with `size` and `arms` made of it."""
    parser = argparse.ArgumentParser(prog="larger_study", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add: Callable[..., Any] = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="folder with corpora/ and gsm8k/")
    add("--text", type=Path, nargs="+", help="text files instead, .txt or .txt.xz")
    add("--facts-file", type=Path, help="rows with a prompt and an answer, .jsonl or .jsonl.xz")
    add("--train", type=Path, help="the new task")
    add("--test", type=Path, help="the same, held out")
    add("--out", type=Path, default=Path("runs/larger"), help="folder for everything that is made")
    add("--tiny", action="store_true", help="sizes for a CPU instead")
    add("--methods", nargs="+", choices=RATES, default=list(RATES))
    add("--rates", type=int, choices=(1, 2, 3), default=3, help="of each method")
    add("--workers", type=int, default=1, help="runs at a time, on the same GPU")
    add("--compile", action="store_true", help="torch.compile for the pre-training")
    add("--plan", action="store_true", help="only say how long it should take")
    sizes = parser.add_argument_group("sizes, by default those of the large or the tiny study")
    for field in fields(Size):
        kind = float if isinstance(field.default, float) else int
        text = f"{field.default:g}, {getattr(TINY, field.name):g} with --tiny"
        sizes.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help=text)
    given = parser.parse_args(arguments)
    changed = {f.name: v for f in fields(Size) if (v := getattr(given, f.name)) is not None}
    given.size = replace(TINY if given.tiny else Size(), **changed)
    given.arms = {method: RATES[method][: given.rates] for method in given.methods}
    for name, usual in FILES.items():
        if getattr(given, name) is None:
            found = [given.data / path for path in usual]
            setattr(given, name, found if name == "text" else found[0])
    return given


def prepare(options: argparse.Namespace, say: Callable[[str], None]) -> Path:
    """Make the base and write the study's YAML, from where an earlier call left off."""
    size, out = options.size, options.out
    for path in (options.train, options.test):
        if not path.is_file():
            raise UserError(f"no such file: {path}; see --help for what is read")
    corpus = read_corpus(
        options.text,
        options.facts_file,
        characters=size.characters or None,
        fact_limit=size.facts,
    )
    files = out / "data"
    write_files(corpus, files, passages=size.passages, questions=size.questions)
    base = make_base(
        out, corpus, size.plan, device=device(), compile_model=options.compile, say=say
    )
    study = definition(base, files, options.train, options.test, size, options.arms)
    write_text(out / "study.yaml", yaml.safe_dump(study, sort_keys=False))
    return Path(out / "study.yaml")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the base, then call `forgetless study` with the YAML; ends with its exit code."""
    options = options_of(arguments)
    say = partial(print, flush=True)
    logging.disable_progress_bar()
    runs = len(options.methods) * options.rates
    for line in [] if options.tiny else expected(options.size, runs, options.workers):
        say(line)
    if options.plan:
        return
    try:
        study = prepare(options, say)
    except UserError as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(cli.STOPPED) from None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    out = str(options.out / "runs")
    say(f"forgetless study {study} --out {out} --workers {options.workers}")
    cli.main(["study", str(study), "--out", out, "--workers", str(options.workers)])
