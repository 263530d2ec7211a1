"""Repair and dial on the pocket world: what is kept at matched skill, arm by arm, with seeds.

    python benchmarks/aftercare.py --out DIR [--workers 2] [--tiny]

Every arm is trained once a seed, then repaired and turned down for three texts to keep: `named` has
all of the knowledge that is asked, `half` half of the countries and no element, `self` what the
base says of itself. The comparators are trained: other rates, replay, the KL penalty. It writes
aftercare.json and aftercare.md, and takes hours in full; `--tiny` does every part in minutes, on
too little for any conclusion. What was done is not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from forgetless.core.files import write_json, write_jsonl, write_text
from forgetless.data.pocket.knowledge import questions, statement
from forgetless.studies.study import study

METHODS = {
    "lora": 3e-3,
    "pissa": 1e-3,
    "milora": 3e-3,
    "intermediate": 3e-3,
    "lora_null_v1": 3e-3,
    "lora_null_v2": 1e-2,
    "full": 1e-3,
}
"""Arm -> its learning rate, at which the pocket pilot saw it learn and forget."""

STRENGTHS = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
SCALES = [1.0, 0.9, 0.8, 0.7]
DIAL = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
SHARES = (0.99, 0.95, 0.9)
"""Of the skill as trained, at which the ways are compared."""

LEARNED, KEPT = "pocket_problems", "pocket_recall"

Row = Mapping[str, str]


def definition(keep: str, folder: Path, *, tiny: bool) -> dict[str, Any]:
    """The study of one text to keep; its trainings are those of the others."""
    limit = {"limit": 40} if tiny else {}
    recipe = {
        "base": "pocket",
        "adapter": {"rank": 16, "alpha": 16},
        "calibration": {"source": "pocket:knowledge", "samples": 32 if tiny else 256},
        "data": {"train": "pocket:problems", "max_length": 128},
        "training": {
            "steps": 10 if tiny else 200,
            "batch_size": 32,
            "learning_rate": 3e-3,
            "checkpoint_every": 200,
        },
        "repair": {
            "strength": [0.1, 1.0] if tiny else STRENGTHS,
            "scales": [1.0] if tiny else SCALES,
            "keep": texts(folder)[keep],
        },
        "dial": {"scales": [0.5] if tiny else DIAL},
        "tasks": {
            "learning": [{"kind": LEARNED, **limit}],
            "forgetting": [
                {"kind": KEPT, **limit},
                {"kind": "kl", "path": "pocket:held", "limit": 40 if tiny else 200},
            ],
        },
    }
    rates = METHODS if not tiny else {"lora": 3e-3, "full": 1e-3}
    arms = [
        {"adapter.method": method, "training.learning_rate": rate} for method, rate in rates.items()
    ]
    return {
        "name": "aftercare",
        "recipe": recipe,
        "arms": arms,
        "axes": {"seed": [0] if tiny else [0, 1, 2]},
    }


def trained_comparators(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Plain LoRA at other rates, with replay and with the KL penalty, without any aftercare."""
    content = definition("named", folder, tiny=tiny)
    recipe = {k: v for k, v in content["recipe"].items() if k not in ("repair", "dial")}
    recipe["adapter"] = {**recipe["adapter"], "method": "lora"}
    replay = [
        {"path": "pocket:problems", "weight": 0.9},
        {"path": "pocket:knowledge", "weight": 0.1},
    ]
    penalty = [{"kind": "kl", "weight": 0.1, "source": "pocket:knowledge"}]
    rates = [1e-3] if tiny else [3e-4, 1e-3, 3e-3]
    arms: list[dict[str, Any]] = [
        {"name": f"lora at {rate:g}", "training.learning_rate": rate} for rate in rates
    ]
    arms += [
        {"name": "lora with replay", "data.train": replay},
        {"name": "lora with KL", "penalties": penalty},
    ]
    return {**content, "name": "aftercare-trained", "recipe": recipe, "arms": arms}


def texts(folder: Path) -> dict[str, str]:
    """Name -> the text to keep; that of half the countries is written where it is not there."""
    half = folder / "half.jsonl"
    if not half.exists():
        seen = questions("seen")
        countries = sorted({q.fact.subject for q in seen if q.fact.relation == "capital"})
        named = set(countries[::2])
        rows = [{"text": statement(q)} for q in seen if q.fact.subject in named]
        write_jsonl(half, rows)
    return {"named": "pocket:knowledge", "half": str(half), "self": "self"}


# ---- what came of it -----------------------------------------------------------------------------


def matched(rows: Sequence[Row], share: float) -> dict[str, dict[str, dict[str, float | None]]]:
    """Arm -> way -> seed -> the most that is kept among settings with this share of the skill."""
    points: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        place = points[row["method"], row["seed"]].setdefault(row["setting"], {})
        place |= {"strength": float(row["strength"]), "scale": float(row["scale"])}
        place[row["task"]] = float(row["score"])
    found: dict[str, dict[str, dict[str, float | None]]] = defaultdict(lambda: defaultdict(dict))
    for (arm, seed), settings in points.items():
        level = share * settings["trained"][LEARNED]
        own = list(settings.values())
        ways = {
            "as trained": [settings["trained"]],
            "dial": [p for p in own if p["strength"] == 0],
            "repair": [p for p in own if p["scale"] == 1],
            "both": own,
        }
        for way, among in ways.items():
            kept = [p[KEPT] for p in among if p[LEARNED] >= level]
            found[arm][way][seed] = max(kept, default=None)
    return found


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and Student's 95 % interval over the seeds."""
    mean, n = fmean(values), len(values)
    half = stats.t.ppf(0.975, n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None
    return {
        "mean": mean,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "seeds": n,
    }


def compared(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row an arm and share: what each way keeps, and repair less dial, paired by seed."""
    lines = []
    for share in SHARES:
        for arm, ways in matched(rows, share).items():
            line: dict[str, Any] = {"arm": arm, "share": share}
            for way, seeds in ways.items():
                known = [value for value in seeds.values() if value is not None]
                line[way] = interval(known) if known else None
            pairs = [
                (repaired, ways["dial"][seed])
                for seed, repaired in ways["repair"].items()
                if repaired is not None and ways["dial"][seed] is not None
            ]
            paired = [a - b for a, b in pairs if b is not None]
            line["repair - dial"] = interval(paired) if paired else None
            lines.append(line)
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown, in percent of the facts."""
    heads = ["arm", "skill left", "as trained", "dial", "repair", "both", "repair - dial"]
    out = [heads, ["---"] * len(heads)]
    for line in lines:
        cells = [str(line["arm"]), f"{100 * line['share']:.0f} %"]
        out.append([*cells, *(_cell(line[head]) for head in heads[2:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in out)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    shown = f"{100 * found['mean']:.1f}"
    if found["low"] is None:
        return shown
    return f"{shown} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def trained_table(rows: Sequence[Row]) -> str:
    """The comparators as they were trained."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["score"]:
            scores[row["arm"]][row["task"]].append(float(row["score"]))
    lines = [["arm", "skill", "facts kept"], ["---"] * 3]
    for arm, by_task in scores.items():
        cells = [_cell(interval(by_task[task])) for task in (LEARNED, KEPT)]
        lines.append([arm, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    out: Path = asked.out
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"tiny": asked.tiny, "keep": {}}
    parts = ["# Repair and dial on the pocket world"]
    if asked.tiny:
        parts.append("A try of the script: ten steps and one seed, on which nothing can be built.")
    for keep in texts(out):
        made = study(definition(keep, out, tiny=asked.tiny), out, workers=asked.workers)
        copy = out / f"aftercare-{keep}.csv"
        shutil.copyfile(Path(made.folder) / "report" / "aftercare.csv", copy)
        found["keep"][keep] = lines = compared(read(copy))
        parts += [f"## Text to keep: {keep}", table(lines)]
        write_json(out / "aftercare.json", found)
    trained = study(trained_comparators(out, tiny=asked.tiny), out, workers=asked.workers)
    rows = read(Path(trained.folder) / "report" / "results.csv")
    parts += ["## Trained otherwise", trained_table(rows)]
    write_text(out / "aftercare.md", "\n\n".join(parts) + "\n")
    print(json.dumps({"wrote": [str(out / "aftercare.json"), str(out / "aftercare.md")]}))


if __name__ == "__main__":
    main()
