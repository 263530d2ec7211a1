"""Where in the spectrum an adapter starts, and what is forgotten: "Least but not Last" on images.

    python benchmarks/slices.py --out DIR [--workers 2] [--base pocket-vision] [--tiny]

A classifier that knows digits and shapes learns letters under a new head, from slices of each
weight's singular components at nine positions (0 is PiSSA's, 1 is MiLoRA's; at rank 32 five), at
four rates, three seeds and two lengths, for the longer one at two ranks; LoRA, full fine-tuning,
LoRA-Null and a slice of the activations learn the same beside it. What it knew is asked under its
own head. It writes slices.csv (one row a run), slices.json and slices.md into DIR. What was done is
not done again.

The comparisons were fixed before the first run: the two ends (positions 0 and 1) against the
positions from 1/4 to 3/4, paired by seed and rate, once for each length and rank.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from forgetless.adapters.folders import load
from forgetless.adapters.spectra import spectra
from forgetless.core.files import new_file, read_json, write_json, write_text
from forgetless.models.load import load_model
from forgetless.studies.folder import RunFolder
from forgetless.studies.study import study
from tables import interval, markdown, read

POSITIONS = {8: [number / 8 for number in range(9)], 32: [number / 4 for number in range(5)]}
"""Rank -> where its slices begin, as a share of the way from the first to the last."""
ENDS, MIDDLE = (0.0, 1.0), (0.25, 0.375, 0.5, 0.625, 0.75)
RATES = [3e-4, 1e-3, 3e-3, 1e-2]
LENGTHS = {"long": 300, "short": 50}
SEEDS = [0, 1, 2]

SAFE = 0.1
"""Most that may be forgotten, as a share of what was known, at a rate that counts as safe."""
LEARNED = 0.95
"""Least accuracy there, as a share of the best of all runs of the same length and rank."""

BESIDE: list[dict[str, Any]] = [
    {"name": "lora", "adapter.method": "lora"},
    {"name": "full", "adapter.method": "full"},
    {"name": "lora_null_v1", "adapter.method": "lora_null_v1"},
    {"name": "lora_null_v2", "adapter.method": "lora_null_v2"},
    {
        "name": "activations at 0.5",
        "adapter.method": "activation_slice",
        "adapter.options": {"position": 0.5},
    },
]

Row = dict[str, Any]


def recipe(base: str, steps: int) -> dict[str, Any]:
    """What all runs share; what it knew is both halves of what the shipped classifier knows."""
    kinds = [("letters", "learning"), ("digits", "forgetting"), ("shapes", "forgetting")]
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, part in kinds:
        path = f"pocket:{name}:test"
        tasks[part].append({"kind": "image_accuracy", "name": name, "path": path, "limit": 250})
    return {
        "base": base,
        "adapter": {"method": "intermediate", "rank": 8, "alpha": 8, "head": "new"},
        "calibration": {"source": "pocket:digits", "samples": 200},
        "data": {"train": "pocket:letters"},
        "training": {
            "steps": steps,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "checkpoint_every": steps,
        },
        "tasks": dict(tasks),
    }


def studies(base: str, *, tiny: bool) -> dict[str, dict[str, Any]]:
    """Name -> definition: one a length and rank, and one for what stands beside the long ones."""
    found: dict[str, dict[str, Any]] = {}
    rates, seeds = (RATES[1:3], SEEDS[:1]) if tiny else (RATES, SEEDS)
    axes = {"training.learning_rate": rates, "seed": seeds}
    shared = {length: recipe(base, 4 if tiny else steps) for length, steps in LENGTHS.items()}
    for length, rank in (("long", 8), ("short", 8), ("long", 32)):
        positions = POSITIONS[rank][:: 4 if tiny else 1]
        arms = [
            {
                "name": f"{position:g}",
                "adapter.options": {"position": position},
                "adapter.rank": rank,
                "adapter.alpha": rank,
            }
            for position in positions
        ]
        name = f"slices-{length}-{rank}"
        found[name] = {"name": name, "recipe": shared[length], "arms": arms, "axes": axes}
    arms = BESIDE[:1] if tiny else BESIDE
    found["beside-long"] = {
        "name": "beside-long",
        "recipe": shared["long"],
        "arms": arms,
        "axes": axes,
    }
    return found


def rows_of(folder: Path, base: str) -> list[Row]:
    """One row a run: accuracy on the new task, what is left of what was known, rotation."""
    table = [row for row in read(folder / "report" / "results.csv") if row["status"] == "done"]
    by_run: dict[str, Row] = {}
    for row in table:
        found = by_run.setdefault(
            row["run_id"],
            {
                "study": row["study"],
                "run": row["run_id"],
                "arm": row["arm"].partition(" learning_rate=")[0],
                "rank": int(row["rank"]) if row["method"] != "full" else None,
                "rate": float(row["learning_rate"]),
                "seed": int(row["seed"]),
                "steps": int(row["steps"]),
                "relative_update": row["relative_update"],
            },
        )
        found[row["task"]] = float(row["score"])
        found[f"{row['task']}_before"] = float(row["base_score"])
    for run, found in by_run.items():
        known = ["digits", "shapes"]
        found["known"] = fmean(found[name] for name in known)
        found["known_before"] = fmean(found[f"{name}_before"] for name in known)
        found["forgotten"] = 1 - found["known"] / found["known_before"]
        found |= turned(RunFolder(folder / run), base)
    return list(by_run.values())


def turned(run: RunFolder, base: str) -> Row:
    """How far the update turns the weight's singular directions, as means over the layers."""
    cache = run.path / "rotation.json"
    if not run.adapter.exists():
        return {"rotation": None, "head_overlap": None}
    if not cache.exists():
        model = load_model(base, dtype="float32", device="cpu")
        layers = spectra(load(model, run.native), model).values()
        names = ("rotation", "head_overlap")
        write_json(cache, {name: fmean(getattr(e, name) for e in layers) for name in names})
    found: Row = read_json(cache)
    return found


# ---- what came of it -----------------------------------------------------------------------------


Quantity = Callable[[Row], float]

QUANTITIES: dict[str, Quantity] = {
    "forgotten": lambda row: float(row["forgotten"]),
    "accuracy": lambda row: float(row["letters"]),
    "rotation": lambda row: float(row["rotation"]),
    "head_overlap": lambda row: float(row["head_overlap"]),
}


def contrast(rows: Sequence[Row], quantity: Quantity, ends: Sequence[float]) -> Row:
    """A quantity at these ends less that in the middle: the mean over rates, paired by seed."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for rate in sorted({row["rate"] for row in rows}):
        for seed in sorted({row["seed"] for row in rows}):
            here = [row for row in rows if (row["rate"], row["seed"]) == (rate, seed)]
            parts = [
                [quantity(row) for row in here if float(row["arm"]) in among]
                for among in (ends, MIDDLE)
            ]
            by_seed[seed].append(fmean(parts[0]) - fmean(parts[1]))
    return interval([fmean(values) for values in by_seed.values()])


def slope(rows: Sequence[Row]) -> dict[float, Row]:
    """Position -> how much more is forgotten at ten times the rate, by a straight line, by seed."""
    found: dict[float, Row] = {}
    for position in sorted({float(row["arm"]) for row in rows}):
        slopes = []
        for seed in sorted({row["seed"] for row in rows}):
            here = [r for r in rows if float(r["arm"]) == position and r["seed"] == seed]
            x = np.log10([row["rate"] for row in here])
            y = [row["forgotten"] for row in here]
            slopes.append(float(np.polyfit(x, y, 1)[0]))
        found[position] = interval(slopes)
    return found


def safe_rates(rows: Sequence[Row]) -> dict[float, Row]:
    """Position -> at how many of the rates enough is learned and little forgotten, by seed."""
    best = max(row["letters"] for row in rows)
    found: dict[float, Row] = {}
    for position in sorted({float(row["arm"]) for row in rows}):
        counts: dict[int, int] = defaultdict(int)
        for row in rows:
            if float(row["arm"]) == position:
                counts[row["seed"]] += row["letters"] >= LEARNED * best and row["forgotten"] <= SAFE
        found[position] = interval([float(count) for count in counts.values()])
    return found


def grid(rows: Sequence[Row]) -> str:
    """Accuracy / what is left of what was known, in percent: arms by rates, means of the seeds."""
    rates = sorted({row["rate"] for row in rows})
    out = [["start", *(f"{rate:g}" for rate in rates)], ["---"] * (1 + len(rates))]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [arm]
        for rate in rates:
            here = [row for row in rows if (row["arm"], row["rate"]) == (arm, rate)]
            learned, kept = (
                100 * fmean(each)
                for each in zip(*((r["letters"], 1 - r["forgotten"]) for r in here), strict=True)
            )
            cells.append(f"{learned:.1f} / {kept:.1f}")
        out.append(cells)
    return markdown(out)


def shown(found: Row, factor: float = 100) -> str:
    """Mean and interval; in points by default."""
    numbers = [found["mean"], found["low"], found["high"]]
    mean, low, high = ("–" if n is None else f"{factor * n:.1f}" for n in numbers)
    return f"{mean} ({low} to {high})"


def compared(rows: Sequence[Row]) -> Row:
    """All comparisons of one length and rank."""
    found: Row = {
        name: {
            "both ends": contrast(rows, quantity, ENDS),
            "first": contrast(rows, quantity, ENDS[:1]),
            "last": contrast(rows, quantity, ENDS[1:]),
        }
        for name, quantity in QUANTITIES.items()
    }
    found["slope"] = {f"{p:g}": each for p, each in slope(rows).items()}
    found["safe_rates"] = {f"{p:g}": each for p, each in safe_rates(rows).items()}
    return found


def report(tables: Mapping[str, Sequence[Row]], found: Mapping[str, Row]) -> str:
    """All of it in Markdown."""
    parts = ["# Slices of the spectrum"]
    heads = ["length, rank", "quantity", "both ends", "first", "last"]
    lines = [heads, ["---"] * len(heads)]
    for name, all_of_it in found.items():
        for quantity in QUANTITIES:
            cells = [shown(each) for each in all_of_it[quantity].values()]
            lines.append([name.removeprefix("slices-"), quantity, *cells])
    parts += ["## The ends less the middle, in points", markdown(lines)]
    for name, rows in tables.items():
        parts += [f"## {name}: accuracy / what is left of what was known, in percent", grid(rows)]
        if name in found:
            heads = ["position", "safe rates", "forgotten more at ten times the rate"]
            lines = [heads, ["---"] * len(heads)]
            for position, safe in found[name]["safe_rates"].items():
                lines.append([position, shown(safe, 1), shown(found[name]["slope"][position])])
            parts.append(markdown(lines))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="pocket-vision")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    tables: dict[str, list[Row]] = {}
    for name, content in studies(asked.base, tiny=asked.tiny).items():
        done = study(content, asked.out, workers=asked.workers)
        tables[name] = rows_of(Path(done.folder), asked.base)
    found = {name: compared(rows) for name, rows in tables.items() if name.startswith("slices")}
    write_json(asked.out / "slices.json", {"tiny": asked.tiny, "comparisons": found})
    rows = [row for each in tables.values() for row in each]
    with new_file(asked.out / "slices.csv") as new, new.open("w", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    write_text(asked.out / "slices.md", report(tables, found))
    print(json.dumps({"wrote": [str(asked.out / f"slices.{e}") for e in ("csv", "json", "md")]}))


if __name__ == "__main__":
    main()
