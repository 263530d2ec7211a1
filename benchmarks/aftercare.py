"""Repair and dial on the pocket world: what is kept at matched skill, arm by arm, with seeds.

    python benchmarks/aftercare.py --out DIR [--workers 2] [--tiny]

Every arm is trained once a seed, then repaired and turned down for three texts to keep: `named` has
all of the knowledge that is asked, `half` half of the countries and no element, `self` what the
base says of itself. One more arm is a LoRA that PEFT and transformers trained without this package.
With `named`, repair and dial are combined and further comparators are measured on the same
adapters; others are trained: other rates, replay, the KL penalty. It writes aftercare.json and
aftercare.md, and takes two hours in full; `--tiny` does every part in minutes, on too little for
any conclusion. What was done is not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from forgetless.adapters.folders import load
from forgetless.core.files import new_file, write_json, write_jsonl, write_text
from forgetless.data.batches import Padding, TokenRows
from forgetless.data.examples import load_examples
from forgetless.data.pocket.knowledge import questions, statement
from forgetless.data.tokens import tokenize
from forgetless.models.load import load_model, load_tokenizer
from forgetless.models.targets import find_targets
from forgetless.recipes.recipe import Recipe
from forgetless.studies.aftercare import TRAINED, Adjustable, Bench, Reading, Setting
from forgetless.studies.beside import settings_of
from forgetless.studies.study import study
from forgetless.tasks import make_task
from tables import interval, markdown, read

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

STRENGTHS = [0.01, 0.03, 0.1, 0.3, 1.0]
SCALES = [1.0, 0.85]
DIAL = [0.5, 0.6, 0.7, 0.8, 0.9]
COMPARATORS: list[dict[str, Any]] = [
    {"kind": "hard_projection", "energy": 0.99},
    {"kind": "oplora", "directions": 64},
    {"kind": "intruders", "keep": 0.25},
    {"kind": "dare", "drop": 0.5},
]
SHARES = (0.95, 0.9)
"""Of the skill as trained, at which the ways are compared."""

PEFT = "lora of PEFT"
LEARNED, KEPT = "pocket_problems", "pocket_recall"

BESIDE = ("repair", "dial", "comparators")

Row = dict[str, str]


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
            "strength": [0.1, 1.0] if tiny else STRENGTHS if keep == "named" else STRENGTHS[1:4],
            "scales": SCALES if keep == "named" and not tiny else [1.0],
            "keep": texts(folder)[keep],
        },
        "dial": {"scales": [0.5] if tiny else DIAL} if keep == "named" else None,
        "comparators": (COMPARATORS[:2] if tiny else COMPARATORS) if keep == "named" else [],
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
    recipe = {k: v for k, v in content["recipe"].items() if k not in BESIDE}
    recipe["adapter"] = {**recipe["adapter"], "method": "lora"}
    replay = [
        {"path": "pocket:problems", "weight": 0.9},
        {"path": "pocket:knowledge", "weight": 0.1},
    ]
    penalty = [{"kind": "kl", "weight": 0.1, "source": "pocket:knowledge"}]
    rates = [1e-3] if tiny else [3e-4, 1e-3]
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


# ---- an adapter from elsewhere -------------------------------------------------------------------


def peft_lora(folder: Path, seed: int, recipe: Mapping[str, Any]) -> Path:
    """The folder of the LoRA that PEFT and transformers' Trainer make of the same examples."""
    out = folder / "peft" / f"seed-{seed}"
    if (out / "adapter_config.json").exists():
        return out
    set_seed(seed)
    training, base = recipe["training"], load_model("pocket", dtype="float32")
    examples = load_examples(recipe["data"]["train"])
    length = recipe["data"]["max_length"]
    rows = TokenRows(tokenize(examples, load_tokenizer("pocket"), max_length=length))
    names = list(find_targets(base).layers)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    arguments = TrainingArguments(
        str(folder / "peft" / "trainer"),
        max_steps=training["steps"],
        per_device_train_batch_size=training["batch_size"],
        learning_rate=METHODS["lora"],
        lr_scheduler_type="cosine",
        warmup_steps=training["steps"] // 10,
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=Padding()).train()
    model.save_pretrained(str(out))
    return out


def peft_rows(folder: Path, content: Mapping[str, Any]) -> list[Row]:
    """The rows of that arm, in the columns of aftercare.csv that are read here."""
    recipe = Recipe.model_validate(content["recipe"])
    found: list[Row] = []
    for seed in content["axes"]["seed"]:
        adapter = peft_lora(folder, seed, content["recipe"])
        base, tokenizer = load_model("pocket", dtype="float32"), load_tokenizer("pocket")
        layers = list(find_targets(base).layers)
        model = load(base, adapter)
        how = recipe.calibration, recipe.data, seed
        reading = Reading(model, tokenizer, layers, *how, trained=model)
        assert recipe.repair is not None
        keep = reading.keep(str(recipe.repair.keep), folder / "peft" / "keep").statistics
        task = reading.task(recipe.data.train, folder / "peft" / "task").statistics
        repairs, turned = settings_of(recipe)
        strengths = [setting.strength for setting in repairs]
        trained = Adjustable(model, base, keep, task, strengths, recipe.comparators)
        others = [Setting(comparator=label) for label in trained.comparators]
        tasks = [make_task(each) for each in content["recipe"]["tasks"]["learning"]]
        tasks += [make_task(each) for each in content["recipe"]["tasks"]["forgetting"][:1]]
        for point in Bench(trained, tokenizer).curve([TRAINED, *repairs, *turned, *others], tasks):
            where = point.setting
            for task_name, result in point.scores.items():
                found.append(
                    {
                        "method": PEFT,
                        "seed": str(seed),
                        "setting": where.label,
                        "strength": "" if where.comparator else str(where.strength),
                        "scale": "" if where.comparator else str(where.scale),
                        "task": task_name,
                        "score": str(result.value),
                    }
                )
    return found


# ---- what came of it -----------------------------------------------------------------------------


def points(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """(Arm, seed) -> setting -> its strength and scale (None of a comparator) and its scores."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        place = found[row["method"], row["seed"]].setdefault(row["setting"], {})
        place["strength"] = float(row["strength"]) if row["strength"] else None
        place["scale"] = float(row["scale"]) if row["scale"] else None
        place[row["task"]] = float(row["score"])
    return found


def ways(settings: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Way -> the settings that it has; as trained, and so at no cost, is among all of them."""
    trained, own = settings["trained"], list(settings.values())
    found = {
        "as trained": [trained],
        "dial": [p for p in own if p["strength"] == 0],
        "repair": [p for p in own if p["scale"] == 1],
        "both": [p for p in own if p["scale"] is not None],
    }
    for label, point in settings.items():
        if point["scale"] is None:
            found.setdefault(label.partition("-")[0], [trained]).append(point)
    return found


def most_kept(among: Sequence[Mapping[str, Any]], skill: float) -> float | None:
    """The most that is kept among settings with at least this skill."""
    return max((p[KEPT] for p in among if p[LEARNED] >= skill), default=None)


def matched(rows: Sequence[Row], share: float) -> dict[str, dict[str, dict[str, float | None]]]:
    """Arm -> way -> seed -> the most that is kept among settings with this share of the skill."""
    found: dict[str, dict[str, dict[str, float | None]]] = defaultdict(lambda: defaultdict(dict))
    for (arm, seed), settings in points(rows).items():
        level = share * settings["trained"][LEARNED]
        for way, among in ways(settings).items():
            found[arm][way][seed] = most_kept(among, level)
    return found


def against(rows: Sequence[Row], trained: Sequence[Row]) -> list[dict[str, Any]]:
    """What was trained otherwise, and how much more plain LoRA keeps at 90 % of its skill."""
    own = {seed: way for (arm, seed), way in points(rows).items() if arm == "lora"}
    others: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in trained:
        if row["score"] and row["task"] in (LEARNED, KEPT):
            others[row["arm"]][row["seed"]][row["task"]] = float(row["score"])
    lines = []
    for arm, seeds in others.items():
        line: dict[str, Any] = {"arm": arm}
        for task in (LEARNED, KEPT):
            line[task] = interval([scores[task] for scores in seeds.values()])
        for way in ("dial", "repair", "both"):
            pairs = [
                (most_kept(ways(own[seed])[way], SHARES[-1] * scores[LEARNED]), scores[KEPT])
                for seed, scores in seeds.items()
            ]
            paired = [a - b for a, b in pairs if a is not None]
            line[way] = interval(paired) if len(paired) == len(pairs) else None
        lines.append(line)
    return lines


def compared(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row an arm and share: what each way keeps, and how much more than the dial, paired."""
    lines = []
    for share in SHARES:
        for arm, found in matched(rows, share).items():
            line: dict[str, Any] = {"arm": arm, "share": share, "more": {}}
            for way, seeds in found.items():
                known = [value for value in seeds.values() if value is not None]
                line[way] = interval(known) if known else None
                pairs = [(value, found["dial"][seed]) for seed, value in seeds.items()]
                paired = [a - b for a, b in pairs if a is not None and b is not None]
                line["more"][way] = interval(paired) if paired else None
            lines.append(line)
    return lines


def table(lines: Sequence[Mapping[str, Any]], heads: Sequence[str]) -> str:
    """The rows in Markdown, in percent of the facts; what is `heads` and "- dial" is paired."""
    out = [["arm", "skill left", *heads], ["---"] * (2 + len(heads))]
    for line in lines:
        cells = [str(line["arm"]), f"{100 * line['share']:.0f} %"]
        for head in heads:
            way, _, less = head.partition(" - ")
            cells.append(_cell(line["more"].get(way) if less else line.get(way)))
        out.append(cells)
    return markdown(out)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    shown = f"{100 * found['mean']:.1f}"
    if found["low"] is None:
        return shown
    return f"{shown} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def comparators_table(rows: Sequence[Row]) -> str:
    """What each comparator leaves of the skill as trained, and what is kept, over the seeds."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for (arm, _), settings in points(rows).items():
        for label, point in settings.items():
            if label == "trained" or point["scale"] is None:
                learned = settings["trained"][LEARNED]
                skill = point[LEARNED] / learned if learned else math.nan
                found[arm][label].append((skill, point[KEPT]))
    labels = list(dict.fromkeys(label for by_label in found.values() for label in by_label))
    out = [["arm", *labels], ["---"] * (1 + len(labels))]
    for arm, by_label in found.items():
        means = [
            [100 * fmean(column) for column in zip(*by_label[at], strict=True)] for at in labels
        ]
        out.append([arm, *(f"{skill:.0f} / {kept:.1f}" for skill, kept in means)])
    return markdown(out)


def texts_table(keep: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What the repair keeps by the text to keep, at the first of the shares of skill."""
    out = [["arm", "as trained", "dial", *keep], ["---"] * (3 + len(keep))]
    for line in next(iter(keep.values())):
        if line["share"] == SHARES[0]:
            cells = [str(line["arm"]), _cell(line["as trained"]), _cell(line["dial"])]
            for lines in keep.values():
                same = [x for x in lines if (x["arm"], x["share"]) == (line["arm"], line["share"])]
                cells.append(_cell(same[0]["repair"]))
            out.append(cells)
    return markdown(out)


def trained_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """What was trained otherwise, and what is kept more than by it at its own skill."""
    heads = ["trained", "skill", "facts kept", "lora, dial", "lora, repair", "lora, both"]
    out = [heads, ["---"] * len(heads)]
    for line in lines:
        cells = [_cell(line[column]) for column in (LEARNED, KEPT, "dial", "repair", "both")]
        out.append([str(line["arm"]), *cells])
    return markdown(out)


COLUMNS = ("method", "seed", "setting", "strength", "scale", "task", "score")
HEADS = ["as trained", "dial", "repair", "both", "repair - dial", "both - dial"]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The columns that are read here."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


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
    named: list[Row] = []
    for keep in texts(out):
        content = definition(keep, out, tiny=asked.tiny)
        copy = out / f"aftercare-{keep}.csv"
        if not copy.exists():
            made = study(content, out, workers=asked.workers)
            rows = read(Path(made.folder) / "report" / "aftercare.csv")
            write_rows(copy, [*rows, *peft_rows(out, content)])
        rows = read(copy)
        named = named or rows
        if keep != "named":  # the dial looks at no text, so it is the same for each
            rows += [row for row in named if row["strength"] == "0.0" and row["scale"] != "1.0"]
        found["keep"][keep] = lines = compared(rows)
        parts += [f"## Text to keep: {keep}", table(lines, HEADS)]
        if keep == "named":
            parts.append(
                "### Comparators on the same adapters: skill left / facts kept, in percent"
            )
            parts.append(comparators_table(rows))
        write_json(out / "aftercare.json", found)
    parts += [f"## Repair by the text to keep, {SHARES[0]:.0%} of the skill left"]
    parts += [texts_table(found["keep"])]
    trained = study(trained_comparators(out, tiny=asked.tiny), out, workers=asked.workers)
    others = read(Path(trained.folder) / "report" / "results.csv")
    others += [row | {"arm": row["method"]} for row in named if row["setting"] == "trained"]
    found["trained"] = lines = against(named, others)
    write_json(out / "aftercare.json", found)
    parts += ["## Trained otherwise", trained_table(lines)]
    write_text(out / "aftercare.md", "\n\n".join(parts) + "\n")
    print(json.dumps({"wrote": [str(out / "aftercare.json"), str(out / "aftercare.md")]}))


if __name__ == "__main__":
    main()
