"""What `plan --forecast` foretells, on the pocket world: which facts a training will cost.

    python benchmarks/forecast.py --out DIR [--workers 2] [--tiny]

Plain LoRA learns each of three skills with three seeds. Before that, the share of the skill's
activation energy within the space of each kind of fact is taken of the base alone; afterwards, how
many facts of that kind are lost. If the forecast is worth having, kinds with more of it are lost
more: within a skill (which facts?), and over the skills (which training?). Writes forecast.json and
forecast.md into DIR; what was done is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr

from forgetless.adapters.settings import AdapterSettings
from forgetless.core.files import read_jsonl, write_json, write_jsonl, write_text
from forgetless.data.pocket.knowledge import questions, statement
from forgetless.data.settings import CalibrationSettings, DataSettings
from forgetless.models.load import load_model, load_tokenizer
from forgetless.statistics.moments import Statistics
from forgetless.studies.forecast import shared_energies
from forgetless.studies.inputs import Collecting
from forgetless.studies.study import study
from tables import markdown, read

SKILLS = ("problems", "functions", "series")
KEPT = "pocket_recall"


def trainings(*, tiny: bool) -> dict[str, Any]:
    """Plain LoRA on each skill."""
    recipe = {
        "base": "pocket",
        "adapter": {"method": "lora", "rank": 16, "alpha": 16},
        "data": {"train": "pocket:problems", "max_length": 128},
        "training": {
            "steps": 4 if tiny else 200,
            "batch_size": 32,
            "learning_rate": 3e-3,
            "checkpoint_every": 200,
        },
        "tasks": {"learning": ["pocket_problems"], "forgetting": [KEPT]},
    }
    arms = [
        {"name": skill, "data.train": f"pocket:{skill}", "tasks.learning": [f"pocket_{skill}"]}
        for skill in SKILLS
    ]
    return {
        "name": "forecast",
        "recipe": recipe,
        "arms": arms,
        "axes": {"seed": [0] if tiny else [0, 1, 2]},
    }


def foretold(out: Path) -> dict[str, dict[str, float]]:
    """Skill -> kind of fact -> shared energy, as the mean over the inputs of all linear layers."""
    base, tokenizer = load_model("pocket", dtype="float32", device="cpu"), load_tokenizer("pocket")
    texts: dict[str, list[dict[str, str]]] = defaultdict(list)
    for question in questions("seen"):
        texts[question.fact.relation].append({"text": statement(question)})

    def collected(need: str, source: str) -> Statistics:
        collecting = Collecting(
            AdapterSettings(),
            CalibrationSettings(source=source),
            DataSettings(train=source, max_length=128),
        )
        found = collecting.collect(need, base, tokenizer)
        assert isinstance(found, Statistics)
        return found

    keep: dict[str, Statistics] = {}
    for relation, rows in texts.items():
        write_jsonl(out / f"{relation}.jsonl", rows)
        keep[relation] = collected("second_moment", str(out / f"{relation}.jsonl"))
    found: dict[str, dict[str, float]] = {}
    for skill in SKILLS:
        task = collected("task_moment", f"pocket:{skill}")
        found[skill] = {
            relation: fmean(shared_energies(statistics, task).values())
            for relation, statistics in keep.items()
        }
    return found


def lost(folder: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Skill -> kind of fact -> seed -> the share of the facts known before that are wrong now."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    runs = [row for row in read(folder / "report" / "results.csv") if row["task"] == KEPT]
    for run in runs:
        place = folder / run["run_id"] / "items"
        before, after = (
            {row["id"]: row["score"] for row in read_jsonl(place / phase / f"{KEPT}.jsonl")}
            for phase in ("base", "final")
        )
        kinds: dict[str, list[bool]] = defaultdict(list)
        for item, score in before.items():
            if score:
                kinds[item.partition(":")[0]].append(not after[item])
        for kind, wrong in kinds.items():
            found[run["arm"]][kind][int(run["seed"])] = fmean(wrong)
    return found


def correlated(
    forecast: Mapping[str, Mapping[str, float]],
    losses: Mapping[str, Mapping[str, Mapping[int, float]]],
) -> dict[str, Any]:
    """Spearman's rank correlation of the two, by skill and over all, seeds averaged."""
    pairs = {
        skill: [(forecast[skill][kind], fmean(seeds.values())) for kind, seeds in kinds.items()]
        for skill, kinds in losses.items()
    }
    everything = {"all": [pair for several in pairs.values() for pair in several]}
    skills = {
        "skills": [tuple(map(fmean, zip(*several, strict=True))) for several in pairs.values()]
    }
    found = {}
    for name, several in (pairs | everything | skills).items():
        result = spearmanr(*zip(*several, strict=True))
        found[name] = {
            "rho": float(result.statistic),
            "p": float(result.pvalue),
            "points": len(several),
        }
    return found


def table(
    forecast: Mapping[str, Mapping[str, float]],
    losses: Mapping[str, Mapping[str, Mapping[int, float]]],
) -> str:
    """Forecast and loss by kind of fact, in percent."""
    kinds = list(next(iter(losses.values())))
    out = [["facts", *(f"{skill}: shared / lost" for skill in losses)]]
    out.append(["---"] * len(out[0]))
    for kind in kinds:
        cells = [
            f"{100 * forecast[skill][kind]:.1f} / {100 * fmean(losses[skill][kind].values()):.1f}"
            for skill in losses
        ]
        out.append([kind, *cells])
    return markdown(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    forecast = foretold(asked.out)
    done = study(trainings(tiny=asked.tiny), asked.out, workers=asked.workers)
    losses = lost(Path(done.folder))
    spearman = correlated(forecast, losses)
    found = {"forecast": forecast, "lost": losses, "spearman": spearman}
    write_json(asked.out / "forecast.json", {"tiny": asked.tiny, **found})
    lines = [
        f"- {name}: {each['rho']:.2f} (p = {each['p']:.3f}, {each['points']} points)"
        for name, each in spearman.items()
    ]
    parts = ["# What the forecast foretells", table(forecast, losses), "## Rank correlation"]
    parts.append("\n".join(lines))
    write_text(asked.out / "forecast.md", "\n\n".join(parts) + "\n")
    print(json.dumps({"wrote": [str(asked.out / "forecast.json"), str(asked.out / "forecast.md")]}))


if __name__ == "__main__":
    main()
