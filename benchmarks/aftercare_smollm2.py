"""Repair and dial on a real base, SmolLM2-135M-Instruct, with two skills.

    python benchmarks/real_bases.py smollm2-135m --out BASE
    python benchmarks/aftercare_smollm2.py --base BASE --data DATA --out DIR [--tiny]

DATA holds `gsm8k/train.jsonl` and `test.jsonl`, `code_alpaca/code_alpaca_2k.json`,
`wikitext2/valid.txt`, `lambada/*.jsonl` and `arc/*Easy*`. The skill is the loss on held-out
answers; what is kept is KL and loss on WikiText-2, LAMBADA and ARC-Easy. Plain LoRA is repaired and
turned down, and stands beside a lower rate, replay, the KL penalty and `lora_null_v2`. The text to
keep of all of them is sampled from the base itself, as somebody has it who has nothing else. It
writes aftercare-smollm2.json and .md; about two hours on one core, and what was done is not done
again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetless.core.files import (
    load_yaml,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)
from forgetless.core.metrics import mean_stderr, paired_difference
from forgetless.data.modality import load_processor, modality_of
from forgetless.data.sources import read_rows
from forgetless.models.load import load_model
from forgetless.studies.folder import planned
from forgetless.studies.study import study
from tables import markdown

RATES = {"gsm8k": [3e-3, 1e-2], "code": [1e-2]}
"""Skill -> the rates of plain LoRA that is repaired and turned down; on GSM8K one that learns and
one that overshoots. The first is that of the arms with replay or KL."""

LOWER = {"gsm8k": [1e-3], "code": []}
"""Rates at which plain LoRA is trained instead."""

NULL_RATE = 1e-2
"""Of `lora_null_v2`, which needs a higher one than plain LoRA."""

STRENGTHS, SCALES, DIAL = [0.1, 1.0], [1.0, 0.85], [0.7]
KEPT = ("kl", "wikitext", "lambada_openai", "arc_easy")
EXAMPLES = {"held": 20, "wikitext": 8, "lambada": 40, "arc": 40}
"""Of each task; a tenth of it with --tiny."""


def data(source: Path, out: Path, skill: str) -> tuple[Path, Path]:
    """The training examples of a skill and the held-out ones, as prompts and responses."""
    if skill == "gsm8k":
        rows = {
            part: [
                {"prompt": row["question"], "response": row["answer"]}
                for _, row in read_rows(source / f"gsm8k/{part}.jsonl")
            ]
            for part in ("train", "test")
        }
    else:
        told = [
            {
                "prompt": f"{row['instruction']}\n{row['input']}".strip(),
                "response": row["output"],
            }
            for _, row in read_rows(source / "code_alpaca/code_alpaca_2k.json")
            if row["output"].strip()
        ]
        rows = {"train": told[:-200], "test": told[-200:]}
    short = {
        part: [row for row in found if len(row["prompt"]) + len(row["response"]) < 700]
        for part, found in rows.items()
    }
    paths = out / f"{skill}-train.jsonl", out / f"{skill}-test.jsonl"
    for path, part in zip(paths, short.values(), strict=True):
        write_jsonl(path, part)
    write_jsonl(out / f"{skill}-moments.jsonl", short["train"][-30:])
    return paths


def wikitext(source: Path, out: Path) -> Path:
    """The paragraphs of WikiText-2's validation part that are long enough, without headings."""
    text = (source / "wikitext2/valid.txt").read_text("utf-8")
    long = [line.strip() for line in text.splitlines() if 500 < len(line) < 1100]
    path = out / "wikitext.jsonl"
    write_jsonl(path, [{"text": line} for line in long[::9]])
    return path


def said(base: Path, out: Path, *, tiny: bool) -> Path:
    """Texts that the base says of itself, which every arm has to keep what it knows by."""
    path = out / "said.jsonl"
    if not path.exists():
        model = load_model(str(base), dtype="float32")
        own_texts = modality_of(model).own_texts
        assert own_texts is not None
        found = own_texts(model, load_processor(str(base)), *((16, 64) if tiny else (64, 128)), 0)
        write_jsonl(path, [{"text": text} for text in found if text.strip()])
    return path


def definition(skill: str, base: Path, source: Path, out: Path, *, tiny: bool) -> dict[str, Any]:
    """The study of a skill."""
    train, test = data(source, out, skill)
    kept, own = wikitext(source, out), str(said(base, out, tiny=tiny))
    limit = {name: max(4, count // 10) if tiny else count for name, count in EXAMPLES.items()}
    few = {"data_dir": str(source.resolve())}
    recipe = {
        "base": str(base.resolve()),
        "adapter": {"method": "lora", "rank": 16, "alpha": 16},
        "calibration": {"source": own, "samples": 64, "max_length": 128},
        "data": {"train": str(train), "max_length": 256, "chat_template": "off"},
        "training": {"steps": 2 if tiny else 20, "batch_size": 8, "learning_rate": 3e-3},
        "tasks": {
            "learning": [
                {
                    "kind": "perplexity",
                    "name": skill,
                    "path": str(test),
                    "limit": limit["held"],
                    "chat_template": "off",
                }
            ],
            "forgetting": [
                {"kind": "kl", "path": str(kept), "limit": limit["wikitext"]},
                {
                    "kind": "perplexity",
                    "name": "wikitext",
                    "path": str(kept),
                    "limit": limit["wikitext"],
                },
                {"kind": "lambada_openai", "limit": limit["lambada"], **few},
                {"kind": "arc_easy", "limit": limit["arc"], **few},
            ],
        },
    }
    first, *others = RATES[skill][:1] if tiny else RATES[skill]
    aftercare = {
        "repair": {
            "strength": STRENGTHS[:1] if tiny else STRENGTHS,
            "scales": SCALES[:1] if tiny else SCALES,
            "keep": own,
            "task": str(out / f"{skill}-moments.jsonl"),
        },
        "dial": {"scales": DIAL[:1] if tiny else DIAL},
    }
    replay = [{"path": str(train), "weight": 0.9}, {"path": own, "weight": 0.1}]
    changes: dict[str, dict[str, Any]] = {
        f"lora at {rate:g}": {"training.learning_rate": rate, **aftercare}
        for rate in (first, *others)
    }
    changes |= {
        **{f"lora at {rate:g}": {"training.learning_rate": rate} for rate in LOWER[skill]},
        "lora with replay": {"training.learning_rate": first, "data.train": replay},
        "lora with KL": {
            "training.learning_rate": first,
            "penalties": [{"kind": "kl", "weight": 0.1, "source": own}],
        },
        f"lora_null_v2 at {NULL_RATE:g}": {
            "adapter.method": "lora_null_v2",
            "training.learning_rate": NULL_RATE,
        },
    }
    arms = [{"name": name, **own_changes} for name, own_changes in changes.items()]
    return {"name": f"smollm2-{skill}", "recipe": recipe, "arms": arms, "axes": {"seed": [0]}}


# ---- what came of it -----------------------------------------------------------------------------


def results(folder: Path, skill: str) -> list[dict[str, Any]]:
    """One row a run, setting and task: the score, its change from the base and from training."""
    rows: list[dict[str, Any]] = []
    for run in [each.path for each in planned(folder)]:
        places = {"base": run / "items/base", "trained": run / "items/final"}
        if (run / "aftercare.json").exists():
            for label in read_json(run / "aftercare.json")["scored"]:
                places[label] = run / "points" / label / "items/final"
        arm = load_yaml(run / "recipe.yaml")["name"]
        for task in (skill, *KEPT):
            items = {label: read_jsonl(place / f"{task}.jsonl") for label, place in places.items()}
            scores = {label: [item["score"] for item in own] for label, own in items.items()}
            weights = [item.get("weight", 1.0) for item in items["base"]]
            for label, values in scores.items():
                row: dict[str, Any] = {"arm": arm, "setting": label, "task": task}
                row |= {
                    "skill": skill,
                    "n": len(values),
                    "score": mean_stderr(values, weights).value,
                }
                for other in ("base", "trained"):
                    shares = task in ("lambada_openai", "arc_easy")
                    before = mean_stderr(scores[other], weights).value
                    found = paired_difference(scores[other], values, weights, shares=shares)
                    low, high = found.interval
                    row[f"from_{other}"] = {"mean": row["score"] - before, "low": low, "high": high}
                rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]], skill: str) -> str:
    """A skill's arms and settings in Markdown, with changes and their 95 % intervals."""
    heads = ["arm", "setting", "held-out loss", "given up", "KL"]
    heads += ["WikiText loss, change", "LAMBADA, change", "ARC-Easy, change"]
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row["arm"], row["setting"]][row["task"]] = row
    lines = [heads, ["---"] * len(heads)]
    for number, ((arm, setting), by_task) in enumerate(found.items()):
        if setting == "base" and number:  # the same for all arms
            continue
        is_base = setting == "base"
        cells = ["" if is_base else arm, setting, f"{by_task[skill]['score']:.3f}"]
        cells.append("" if is_base else _change(by_task[skill]["from_trained"], 3))
        cells.append(_change(by_task["kl"]["from_base"], 3))
        cells.append(_change(by_task["wikitext"]["from_base"], 3))
        cells += [_change(by_task[name]["from_base"], 2) for name in KEPT[2:]]
        lines.append(cells)
    return markdown(lines)


def _change(found: Mapping[str, float], digits: int) -> str:
    mean, low, high = (f"{found[each]:.{digits}f}" for each in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    out: Path = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    parts = ["# Repair and dial on SmolLM2-135M-Instruct"]
    for skill in RATES:
        made = study(definition(skill, asked.base, asked.data, out, tiny=asked.tiny), out)
        rows += (found := results(Path(made.folder), skill))
        parts += [f"## {skill}", table(found, skill)]
        write_json(out / "aftercare-smollm2.json", rows)
        write_text(out / "aftercare-smollm2.md", "\n\n".join(parts) + "\n")
    print(json.dumps({"wrote": [str(out / f"aftercare-smollm2.{e}") for e in ("json", "md")]}))


if __name__ == "__main__":
    main()
