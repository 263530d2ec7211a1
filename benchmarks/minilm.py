"""A real sentence encoder learns news: what becomes of its similarities, and of its topics.

    python benchmarks/real_bases.py minilm --out ENCODER
    python benchmarks/minilm.py --encoder ENCODER --data DATA --out DIR [--tiny]

DATA has agnews/ and dbpedia/, JSON lists of rows with `label` and `sentence`. all-MiniLM-L6-v2 has
no head, so it is given one that reads what the encoder knows: a linear probe of DBpedia's 14 topics
on its features. That classifier is the base of a study that learns AG News under a new head. Before
and after, it is asked DBpedia's topics under the probed head, by nearest neighbours without a head,
and, as a sentence encoder (the mean of the last hidden states), which text a title belongs to.
Writes minilm.json into DIR; what was done is not done again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from forgetless.adapters.folders import load
from forgetless.core.files import new_folder, write_json, write_jsonl
from forgetless.core.metrics import mean_stderr
from forgetless.models.load import load_model
from forgetless.models.state import base_of
from forgetless.studies.folder import RunFolder
from forgetless.studies.study import study
from tables import read

LENGTH = 96
"""Tokens of a text."""

METHODS = {"lora": 1e-3, "lora_null_v1": 1e-3, "lora_null_v2": 1e-2, "full": 5e-5}
"""Arm -> its learning rate."""


def rows_of(data: Path, name: str, part: str, count: int) -> list[dict[str, str]]:
    """So many rows of a file, drawn at random, always the same."""
    rows: list[dict[str, str]] = json.loads((data / name / f"{part}.json").read_text())
    return random.Random(0).sample(rows, count)


@torch.no_grad()
def hidden(model: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Last hidden states (texts, tokens, width) of an encoder, and their mask."""
    given = {"truncation": True, "max_length": LENGTH, "padding": True, "return_tensors": "pt"}
    batch = tokenizer(list(texts), **given)
    return model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)


def in_parts(texts: Sequence[str], size: int = 32) -> list[Sequence[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def probed(encoder: Path, rows: Sequence[dict[str, str]], out: Path) -> None:
    """Write the encoder as a classifier whose head is a logistic regression on its features."""
    if out.exists():
        return
    names = sorted({row["label"] for row in rows})
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        encoder,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    parts = []
    with torch.no_grad():
        for texts in in_parts([row["sentence"] for row in rows]):
            states, _ = hidden(model.base_model, tokenizer, texts)
            parts.append(model.base_model.pooler(states))
    features = torch.cat(parts)
    labels = torch.tensor([names.index(row["label"]) for row in rows])
    head = model.classifier
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer: Any = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def loss() -> Any:
        optimizer.zero_grad()
        found = cross_entropy(head(features), labels) + 1e-4 * head.weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def retrieved(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> list[float]:
    """For each title, whether the most similar of all texts is its own; cosine of mean states."""

    def vectors(texts: Sequence[str]) -> Tensor:
        found = []
        for part in in_parts(texts):
            states, mask = hidden(model, tokenizer, part)
            found.append(normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)

    titles, texts = zip(*(row["sentence"].split("\nText:", 1) for row in rows), strict=True)
    similar = vectors([title.removeprefix("Title: ") for title in titles]) @ vectors(texts).T
    return (similar.argmax(1) == torch.arange(len(rows))).double().tolist()


def definition(base: Path, files: dict[str, str], *, tiny: bool) -> dict[str, Any]:
    """The study: AG News under a new head, DBpedia as what is known."""
    kept = {"path": files["known-test"]}
    return {
        "name": "minilm",
        "recipe": {
            "base": str(base),
            "adapter": {"rank": 8, "alpha": 8, "head": "new", "target_modules": "all-linear"},
            "calibration": {"source": files["known"], "samples": 256, "max_length": LENGTH},
            "data": {"train": files["new"], "max_length": LENGTH},
            "training": {
                "steps": 3 if tiny else 120,
                "batch_size": 16,
                "learning_rate": 1e-3,
                "head_learning_rate": 3e-3,
                "checkpoint_every": 120,
            },
            "tasks": {
                "learning": [
                    {"kind": "sentence_accuracy", "name": "agnews", "path": files["new-test"]}
                ],
                "forgetting": [
                    {"kind": "sentence_accuracy", "name": "dbpedia", **kept},
                    {"kind": "neighbours", **kept},
                    {"kind": "class_kl", **kept},
                ],
            },
        },
        "arms": [
            {"adapter.method": method, "training.learning_rate": rate}
            for method, rate in list(METHODS.items())[: 1 if tiny else None]
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    out, few = asked.out, 10 if asked.tiny else 1
    out.mkdir(parents=True, exist_ok=True)
    known = rows_of(asked.data, "dbpedia", "test", 1700 // few)
    parts = {
        "known": known[: 1400 // few],
        "known-test": known[1400 // few :],
        "new": rows_of(asked.data, "agnews", "train", 1920 // few),
        "new-test": rows_of(asked.data, "agnews", "test", 300 // few),
    }
    files = {name: str(out / f"{name}.jsonl") for name in parts}
    for name, rows in parts.items():
        write_jsonl(Path(files[name]), rows)
    base = out / "base"
    probed(asked.encoder, parts["known"], base)
    done = Path(study(definition(base, files, tiny=asked.tiny), out, workers=1).folder)
    table = [row for row in read(done / "report" / "results.csv") if row["status"] == "done"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked_of = parts["known-test"]
    before = retrieved(AutoModel.from_pretrained(base).eval(), tokenizer, asked_of)
    found: dict[str, Any] = {"tiny": asked.tiny, "arms": {}}
    for run in dict.fromkeys(row["run_id"] for row in table):
        rows = [row for row in table if row["run_id"] == run]
        folder = RunFolder(done / run)
        if rows[0]["method"] == "full":
            model: Any = load_model(str(folder.model), dtype="float32", device="cpu")
        else:
            plain = load_model(str(base), dtype="float32", device="cpu")
            model = base_of(load(plain, folder.native))
        after = retrieved(model.base_model, tokenizer, asked_of)
        pairs = zip(after, before, strict=True)
        change = mean_stderr([now - then for now, then in pairs])
        scores: dict[str, dict[str, Any]] = {
            row["task"]: {"before": row["base_score"], "after": row["score"], "kind": row["kind"]}
            for row in rows
        }
        scores["titles"] = {
            "before": sum(before) / len(before),
            "after": sum(after) / len(after),
            "change": change.value,
            "stderr": change.stderr,
            "n": len(after),
        }
        found["arms"][rows[0]["method"]] = {"rate": rows[0]["learning_rate"], "scores": scores}
    write_json(out / "minilm.json", found)
    print(json.dumps(found["arms"], indent=1))


if __name__ == "__main__":
    main()
