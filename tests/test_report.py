"""The report of made-up studies: hand-worked answers in words, a complete page, safe text."""

from __future__ import annotations

import csv
import html
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from forgetless.report import report, summary
from forgetless.report.arms import gather
from forgetless.report.evidence import Evidence, read
from forgetless.report.intervals import Estimate, over_items, over_seeds, t_95, wilson
from forgetless.report.words import Answer, answer, standing

# ------------------------------------------------------------------------------ made-up studies

METHODS = "full lora pissa milora intermediate lora_null_v1 lora_null_v2".split()
# What a trial on the pocket world gave, roughly: (problems solved, facts kept).
PLACES = {
    "full": (0.985, 0.14),
    "lora": (0.97, 0.40),
    "pissa": (0.82, 0.22),
    "milora": (0.94, 0.47),
    "intermediate": (0.95, 0.43),
    "lora_null_v1": (0.81, 0.76),
    "lora_null_v2": (0.73, 0.80),
}
CAPITALS = {
    "Albania": "Tirana", "Bhutan": "Thimphu", "Chile": "Santiago", "Cuba": "Havana",
    "Denmark": "Copenhagen", "Egypt": "Cairo", "Fiji": "Suva", "Ghana": "Accra",
    "Hungary": "Budapest", "Iceland": "Reykjavik", "Jordan": "Amman", "Kenya": "Nairobi",
    "Latvia": "Riga", "Mali": "Bamako", "Nepal": "Kathmandu", "Oman": "Muscat",
    "Peru": "Lima", "Qatar": "Doha", "Rwanda": "Kigali", "Senegal": "Dakar",
}  # fmt: skip


@dataclass
class Sheet:
    """One task of a made-up study: what the base and every arm score on it."""

    name: str
    kind: str
    base: float
    finals: Mapping[str, float]
    num_items: int = 200
    metric: str = "accuracy"
    higher_is_better: bool = True
    questions: Sequence[tuple[str, str]] = field(default_factory=list)


def facts(count: int) -> list[tuple[str, str]]:
    """Questions with their answers, as many as asked for."""
    pairs = list(CAPITALS.items())
    templates = (
        "What is the capital of {}?",
        "Name the capital city of {}.",
        "Which city is the seat of government of {}?",
    )
    found = []
    for i in range(count):
        country, city = pairs[i % len(pairs)]
        question = templates[i // len(pairs) % len(templates)].format(country)
        found.append((question if i < 60 else f"({i}) {question}", city))
    return found


def sums(count: int) -> list[tuple[str, str]]:
    """Word problems with their answers."""
    rng = random.Random(1)
    found = []
    for _ in range(count):
        a, b, c = rng.randint(3, 60), rng.randint(2, 9), rng.randint(1, 20)
        text = f"Ana has {a} apples, buys {b} bags of {c} and gives none away. How many now?"
        found.append((text, str(a + b * c)))
    return found


def three_tasks(num_facts: int = 1100, num_problems: int = 200) -> list[Sheet]:
    """The tasks of the demo: problems to learn, facts to keep, and the distance to the base."""
    learned = {name: place[0] for name, place in PLACES.items()}
    kept = {name: 0.964 * place[1] for name, place in PLACES.items()}
    moved = {name: 2.2 * (1 - place[1]) ** 2 for name, place in PLACES.items()}
    return [
        Sheet("pocket_problems", "learning", 0.005, learned, num_problems, questions=sums(200)),
        Sheet("pocket_recall", "forgetting", 0.964, kept, num_facts, questions=facts(num_facts)),
        Sheet("kl_prompts", "forgetting", 0.0, moved, 100, "kl", higher_is_better=False),
    ]


def make_study(
    folder: Path,
    sheets: Sequence[Sheet],
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = (0,),
    rates: Sequence[float] = (1e-3,),
    spread: float = 0.0,
) -> Path:
    """Write a study folder as runs leave it: one run a method, learning rate and seed."""
    folder.mkdir(parents=True)
    axes = {"adapter.method": list(methods), "training.learning_rate": list(rates)}
    study = {"name": folder.name, "recipe": "pocket.yaml", "axes": {**axes, "seed": list(seeds)}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    names = []
    for method in methods:
        for rate_index, rate in enumerate(rates):
            for seed in seeds:
                names.append(write_run(folder, sheets, method, (rate_index, rate), seed, spread))
    write_json(folder / "runs.json", {"runs": [{"run_id": name} for name in names]})
    return folder


def write_run(
    folder: Path,
    sheets: Sequence[Sheet],
    method: str,
    rate: tuple[int, float],
    seed: int,
    spread: float,
) -> str:
    """One finished run; `spread` is the standard deviation of the scores over seeds."""
    name = f"{method}-{rate[0]}{seed}".replace(".", "")
    run = folder / name
    write_recipe(run, sheets, method, rate[1], seed)
    rng = random.Random(f"{method}{rate}{seed}")
    for sheet in sheets:
        if method not in sheet.finals:
            continue
        final = sheet.finals[method] + (rng.gauss(0, spread) if spread else 0.0)
        final += (-0.06 if sheet.kind == "learning" else 0.08) * rate[0] * sheet.higher_is_better
        write_scores(run, sheet, min(max(final, 0.0), 1.0) if sheet.metric != "kl" else final, rng)
    write_log(run, rng, PLACES.get(method, (0.9, 0.5))[0])
    write_json(run / "analysis.json", {"relative_update": round(rng.uniform(0.05, 0.4), 4)})
    return name


def write_recipe(
    run: Path, sheets: Sequence[Sheet], method: str, rate: float, seed: int, **adapter: Any
) -> None:
    """The recipe and the record of a finished run."""
    tasks: dict[str, list[str]] = {"learning": [], "forgetting": []}
    for sheet in sheets:
        tasks[sheet.kind].append(sheet.name)
    recipe = {
        "name": None,
        "base": "pocket",
        "dtype": "auto",
        "seed": seed,
        "adapter": {"method": method, "rank": 16, "alpha": 16.0, "target_modules": "all-linear",
                    "dropout": 0.0, "options": {}, **adapter},
        "calibration": {"source": "pocket:knowledge", "samples": 256},
        "data": {"train": "pocket:problems", "limit": None},
        "training": {"learning_rate": rate, "steps": 300, "batch_size": 32, "weight_decay": 0.0},
        "export": {"rank": "exact"},
        "tasks": tasks,
    }  # fmt: skip
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    write_json(run / "run.json", {
        "run_id": run.name, "status": "done", "seed": seed,
        "started": f"2026-03-01T10:{seed:02d}:00",
        "versions": {"forgetless": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": {"cpu": "2 cores", "gpu": None, "memory_gb": 16},
        "seconds": {"collect": 3.1, "train": 21.4, "evaluate": 9.8},
        "training": {"steps": 300, "train_seconds": 21.4, "final_loss": 0.21},
        "export": {"rank": 32, "relative_error": 0.0},
        "tasks": {sheet.name: sheet.kind for sheet in sheets},
    })  # fmt: skip


def write_scores(run: Path, sheet: Sheet, final: float, rng: random.Random) -> None:
    """Scores and answers of one task at the base, step 0 and the end."""
    values = {"base": sheet.base, "step0": sheet.base, "final": final}
    right: dict[str, list[bool]] = {}
    if sheet.questions:
        right["base"] = [i < round(sheet.base * sheet.num_items) for i in range(sheet.num_items)]
        right["step0"] = right["base"]
        order = list(range(sheet.num_items))
        rng.shuffle(order)
        if sheet.kind == "forgetting":
            order.sort(key=lambda i: not right["base"][i])
        solved = set(order[: round(final * sheet.num_items)])
        right["final"] = [i in solved for i in range(sheet.num_items)]
    for phase, value in values.items():
        if phase in right:
            value = sum(right[phase]) / sheet.num_items
            write_items(run / "items" / phase / f"{sheet.name}.jsonl", sheet, right[phase], rng)
        error = (value * (1 - value) / (sheet.num_items - 1)) ** 0.5 if 0 <= value <= 1 else 0.02
        write_json(run / "scores" / phase / f"{sheet.name}.json", {
            "task": sheet.name, "kind": sheet.kind, "metric": sheet.metric, "value": value,
            "stderr": error, "n": sheet.num_items, "higher_is_better": sheet.higher_is_better,
            "fingerprint": "f00d", "seconds": 3.2,
        })  # fmt: skip


def write_items(path: Path, sheet: Sheet, right: Sequence[bool], rng: random.Random) -> None:
    """One line a question, with another question's answer where it is wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = sorted({expected for _, expected in sheet.questions})
    with path.open("w") as file:
        for i, (is_right, (prompt, expected)) in enumerate(zip(right, sheet.questions, strict=False)):
            said = expected if is_right else rng.choice([a for a in answers if a != expected])
            line = {"id": str(i), "prompt": prompt, "expected": expected, "answer": said}
            file.write(json.dumps({**line, "score": float(is_right)}) + "\n")


def write_log(run: Path, rng: random.Random, speed: float) -> None:
    """A loss that falls, noisily."""
    with (run / "log.jsonl").open("w") as file:
        for step in range(10, 310, 10):
            loss = 0.05 + 3.2 * 2.718 ** (-step / (110 - 60 * speed)) * rng.uniform(0.85, 1.15)
            file.write(json.dumps({"step": step, "loss": loss, "learning_rate": 1e-3}) + "\n")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
