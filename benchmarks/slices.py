"""Where in the spectrum an adapter starts, and what is forgotten: "Least but not Last" on images.

    python benchmarks/slices.py --out DIR [--workers 2] [--tiny]
    python benchmarks/slices.py --out DIR --base ENCODER --data DATA [--steps 100] [--positions 5]
        [--ranks 8] [--rates 3e-4 1e-3 3e-3] [--seeds 1] [--side 70] [--tiny]

A classifier that knows digits and shapes learns letters under a new head, from slices of each
weight's singular components at nine positions (0 is PiSSA's, 1 is MiLoRA's; at rank 32 five), at
four rates, three seeds and two lengths, for the longer one at two ranks; LoRA, full fine-tuning,
LoRA-Null and a slice of the activations learn the same beside it. What it knew is asked under its
own head. It writes slices.csv (one row a run), slices.json and slices.md into DIR. What was done is
not done again.

The second line is a real ViT: ENCODER of `real_bases.py dinov2-small` with a probed head knows
CIFAR-10 and learns MNIST, both of DATA (cifar10/ and mnist/, see `probed.py`), with settings that
fit into half an hour on one core; for a GPU give more of each.

The comparisons were fixed before the first run: the two ends (positions 0 and 1) against the
positions from 1/4 to 3/4, paired by seed and rate, once for each length and rank.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from probed import COUNTS, image_files, probed
from tables import interval, markdown, read

KINDS = ("learning", "forgetting")
ENDS, MIDDLE = (0.0, 1.0), (0.25, 0.375, 0.5, 0.625, 0.75)

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


@dataclass(frozen=True)
class World:
    """What is known, what is learned, and how often it is tried.

    Attributes:
        recipe: what all runs share, without steps.
        lengths: name -> steps; what stands beside the slices has the first of them.
        slices: length and rank -> how many positions, from 0 to 1.
        beside: what else learns the same.
    """

    recipe: Row
    lengths: Mapping[str, int]
    slices: Mapping[tuple[str, int], int]
    rates: Sequence[float]
    seeds: Sequence[int]
    beside: Sequence[Row] = tuple(BESIDE)

    @property
    def tiny(self) -> World:
        """A few steps of a few of all."""
        first = next(iter(self.slices))
        return replace(
            self,
            lengths=dict.fromkeys(self.lengths, 4),
            slices={first: 3},
            rates=self.rates[:2],
            seeds=self.seeds[:1],
            beside=self.beside[:1],
        )


def recipe(base: str, train: str, keep: str, learning: Sequence[Row], known: Sequence[Row]) -> Row:
    """A recipe of which nothing but the tasks, the data and the base differs between the worlds."""
    return {
        "base": base,
        "adapter": {"method": "intermediate", "rank": 8, "alpha": 8, "head": "new"},
        "calibration": {"source": keep, "samples": 200},
        "data": {"train": train},
        "training": {"batch_size": 16, "learning_rate": 1e-3},
        "tasks": {"learning": list(learning), "forgetting": list(known)},
    }


def pocket() -> World:
    """The shipped classifier; what it knew is both halves of what it knows."""
    letters, *known = (
        {"kind": "image_accuracy", "name": name, "path": f"pocket:{name}:test", "limit": 250}
        for name in ("letters", "digits", "shapes")
    )
    return World(
        recipe=recipe("pocket-vision", "pocket:letters", "pocket:digits", [letters], known),
        lengths={"long": 300, "short": 50},
        slices={("long", 8): 9, ("short", 8): 9, ("long", 32): 5},
        rates=[3e-4, 1e-3, 3e-3, 1e-2],
        seeds=[0, 1, 2],
    )


def real(asked: argparse.Namespace) -> World:
    """A real encoder under a probed head, written into the folder of the results."""
    few = 20 if asked.tiny else 1
    files = image_files(asked.data, asked.out, {n: count // few for n, count in COUNTS.items()})
    base = asked.out / "base"
    probed(asked.base, files["known"], asked.side, base)
    mnist, cifar = (
        {"kind": "image_accuracy", "name": name, "path": files[file]}
        for name, file in (("mnist", "new-test"), ("cifar10", "known-test"))
    )
    shared = recipe(str(base), files["new"], files["known"], [mnist], [cifar])
    # The new head has one rate in all runs, so that only the adapters' differ.
    shared["training"]["head_learning_rate"] = 3e-3
    return World(
        recipe=shared,
        lengths={"real": asked.steps},
        slices={("real", rank): asked.positions for rank in asked.ranks},
        rates=asked.rates,
        seeds=range(asked.seeds),
        beside=[arm for arm in BESIDE if arm["name"] in ("lora", "lora_null_v2")],
    )


def studies(world: World) -> dict[str, dict[str, Any]]:
    """Name -> definition: one a length and rank, and one for what stands beside the first."""
    axes = {"training.learning_rate": list(world.rates), "seed": list(world.seeds)}
    arms = {
        f"slices-{length}-{rank}": [
            {
                "name": f"{position:g}",
                "adapter.options": {"position": position},
                "adapter.rank": rank,
                "adapter.alpha": rank,
            }
            for position in np.linspace(0, 1, count).tolist()
        ]
        for (length, rank), count in world.slices.items()
    }
    arms[f"beside-{next(iter(world.lengths))}"] = list(world.beside)
    found = {}
    for name, each in arms.items():
        steps = world.lengths[name.split("-")[1]]
        how = {**world.recipe["training"], "steps": steps, "checkpoint_every": steps}
        shared = {**world.recipe, "training": how}
        found[name] = {"name": name, "recipe": shared, "arms": each, "axes": axes}
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
    names = {kind: {r["task"] for r in table if r["kind"] == kind} for kind in KINDS}
    for run, found in by_run.items():
        found["learned"] = fmean(found[name] for name in names["learning"])
        found["known"] = fmean(found[name] for name in names["forgetting"])
        found["known_before"] = fmean(found[f"{name}_before"] for name in names["forgetting"])
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
    "accuracy": lambda row: float(row["learned"]),
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
    best = max(row["learned"] for row in rows)
    found: dict[float, Row] = {}
    for position in sorted({float(row["arm"]) for row in rows}):
        counts: dict[int, int] = defaultdict(int)
        for row in rows:
            if float(row["arm"]) == position:
                counts[row["seed"]] += row["learned"] >= LEARNED * best and row["forgotten"] <= SAFE
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
                for each in zip(*((r["learned"], 1 - r["forgotten"]) for r in here), strict=True)
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
    parser.add_argument("--base", type=Path, help="folder of an encoder, for a real ViT")
    parser.add_argument("--data", type=Path, help="folder with cifar10 and mnist, for a real ViT")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--positions", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--side", type=int, default=70, help="pixels")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    if (asked.base is None) != (asked.data is None):
        parser.error("a real ViT needs --base and --data")
    asked.out.mkdir(parents=True, exist_ok=True)
    world = pocket() if asked.base is None else real(asked)
    tables: dict[str, list[Row]] = {}
    for name, content in studies(world.tiny if asked.tiny else world).items():
        done = study(content, asked.out, workers=asked.workers)
        tables[name] = rows_of(Path(done.folder), world.recipe["base"])
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
