"""The report of made-up studies: hand-worked answers in words, a complete page, safe text."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pandas
import pytest
import yaml
from rich.console import Console

from forgetless.core.errors import UserError
from forgetless.core.files import write_jsonl, write_text
from forgetless.core.metrics import (
    detectable_change,
    paired_difference,
    paired_proportions_interval,
)
from forgetless.reports import figures, report, summary, write_evaluation
from forgetless.reports.arms import gather
from forgetless.reports.changes import MAX_LISTED, find_changes
from forgetless.reports.durations import course
from forgetless.reports.evidence import RunFiles, read
from forgetless.reports.standing import standing
from forgetless.reports.words import Answer, answer
from forgetless.scores.comparison import Flip, compare
from forgetless.scores.files import Phase, read_scores
from forgetless.scores.seeds import effect
from forgetless.studies.folder import COLUMNS
from forgetless.tasks.base import Item, TaskResult

# ------------------------------------------------------------------------------ made-up studies

FLIPS: tuple[Flip, ...] = ("kept", "lost", "gained", "wrong")
METHODS = ["full", "lora", "pissa", "milora", "intermediate", "lora_null_v1", "lora_null_v2"]
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
    pictures: Sequence[str] = ()


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
        write_scores(
            run, sheet, min(max(final, 0.0), 1.0) if sheet.higher_is_better else final, rng
        )
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
        for i, (is_right, (prompt, expected)) in enumerate(
            zip(right, sheet.questions, strict=False)
        ):
            said = expected if is_right else rng.choice([a for a in answers if a != expected])
            line = {"id": str(i), "prompt": prompt, "expected": expected, "answer": said}
            if sheet.pictures and not is_right:
                line["picture"] = sheet.pictures[i]
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


# ------------------------------------------------------------------------- the answer, hand-worked


def words_of(folder: Path) -> Answer:
    """The answer of a study folder."""
    evidence = read(folder)
    arms = gather(evidence)
    return answer(evidence, arms, standing(evidence, arms))


def two_sheets(
    learned: Mapping[str, float], kept: Mapping[str, float], num_items: int = 1000
) -> list[Sheet]:
    """A base that solves 1 % of the problems and knows 90 % of the facts."""
    return [
        Sheet("problems", "learning", 0.01, learned, num_items),
        Sheet("recall", "forgetting", 0.90, kept, num_items),
    ]


def test_a_clear_winner_is_named_with_both_numbers(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.60, "pissa": 0.90}, {"lora": 0.81, "pissa": 0.45})
    words = words_of(make_study(tmp_path / "s", sheets, ["lora", "pissa"]))
    assert plain(words.title) == (
        "`lora` kept the most: 90.0 % of what the base knew, with 60.0 % on problems."
    )
    assert plain(words.sentences[0]) == (
        "`pissa` learned the most, 90.0 % on problems (base 1.0 %), "
        "at the cost of 50.0 % of what the base knew."
    )
    assert "`pissa` and `lora`" in words.sentences[1]
    assert "distinguishable" not in words.title + "".join(words.sentences)


def test_an_arm_that_is_best_at_both_is_said_to_be(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.90, "pissa": 0.50}, {"lora": 0.81, "pissa": 0.45})
    words = words_of(make_study(tmp_path / "s", sheets, ["lora", "pissa"]))
    assert plain(words.title).startswith("`lora` kept the most and learned the most: 90.0 %")
    assert any("no better on the other: `pissa` (by `lora`)" in s for s in words.sentences)


def test_overlapping_intervals_are_not_told_apart(tmp_path: Path) -> None:
    # 50 items: 0.80 +- 0.11 and 0.76 +- 0.12.
    sheets = two_sheets({"lora": 0.5, "pissa": 0.9}, {"lora": 0.80, "pissa": 0.76}, num_items=50)
    words = words_of(make_study(tmp_path / "s", sheets, ["lora", "pissa"]))
    assert plain(words.title) == (
        "`lora` and `pissa` kept the most and are not distinguishable: "
        "88.9 % and 84.4 % of what the base knew, with 50.0 % and 90.0 % on problems."
    )


def test_arms_alike_in_everything_have_no_winner(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.52, "pissa": 0.50}, {"lora": 0.8, "pissa": 0.81}, num_items=50)
    title = words_of(make_study(tmp_path / "s", sheets, ["lora", "pissa"])).title
    assert title == "The 2 arms are not distinguishable, in keeping or in learning."


def test_keeping_everything_by_learning_nothing_does_not_win(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.80, "pissa": 0.012}, {"lora": 0.45, "pissa": 0.90})
    words = words_of(make_study(tmp_path / "s", sheets, ["lora", "pissa"]))
    assert words.title.startswith("`lora` kept the most")
    assert any(s.startswith("`pissa` learned nothing that can be told") for s in words.sentences)


@pytest.mark.parametrize("with_facts", [True, False])
def test_where_no_arm_learned_none_is_said_to_have_learned_or_kept_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_facts: bool
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sheets = two_sheets({"lora": 0.012, "pissa": 0.014}, {"lora": 0.81, "pissa": 0.45})
    folder = make_study(tmp_path / "s", sheets[: 1 + with_facts], ["lora", "pissa"])
    words = words_of(folder)
    assert words.title == "No arm learned anything that can be told apart from the base."
    assert plain(words.sentences[0]) == (
        "The best score is that of `pissa`, 1.4 % on problems (base 1.0 %)."
    )
    page = report(folder).read_text()
    assert not re.search(r"(?i)(learned|kept) (the )?most", page.split("<section", 2)[1])


def test_arms_with_rates_of_their_own_have_dashes_at_the_others(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.9, "pissa": 0.9}, {"lora": 0.5, "pissa": 0.5})
    folder = make_study(tmp_path / "s", sheets, ["lora"], rates=(1e-3, 2e-3))
    other = write_run(folder, sheets, "pissa", (0, 8e-3), 0, 0.0)
    runs = json.loads((folder / "runs.json").read_text())["runs"] + [{"run_id": other}]
    write_json(folder / "runs.json", {"runs": runs})
    text = report(folder).read_text()
    table = text.split("Scores over the learning rates")[1].split("</table>")[0]
    assert table.count(">–</td>") == 2 * 3  # two rates that pissa has not, one that lora has not


def test_one_arm_is_not_compared(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.8}, {"lora": 0.45})
    words = words_of(make_study(tmp_path / "s", sheets, ["lora"]))
    assert plain(words.title) == (
        "`lora` kept 50.0 % of what the base knew and reached 80.0 % on problems (base 1.0 %)."
    )
    assert "most" not in words.title


def test_nothing_measured_is_said_so(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s", [], ["lora", "pissa"])
    mark_failed(folder / "lora-00", "out of memory")
    words = words_of(folder)
    assert words.title == "Nothing has been measured yet."
    assert "1 run of 2 failed" in " ".join(words.caveats)
    index = report(folder)
    assert "out of memory" in index.read_text()


def test_learning_alone_says_nothing_of_forgetting(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.8, "pissa": 0.5}, {})[:1]
    words = words_of(make_study(tmp_path / "s", sheets, ["lora", "pissa"]))
    assert plain(words.title) == "`lora` learned the most: 80.0 % on problems."
    assert "nothing is known of what was lost" in " ".join(words.sentences)


def test_forgetting_alone_says_nothing_of_learning(tmp_path: Path) -> None:
    sheets = two_sheets({}, {"lora": 0.81, "pissa": 0.45})[1:]
    words = words_of(make_study(tmp_path / "s", sheets, ["lora", "pissa"]))
    assert plain(words.title) == "`lora` kept the most: 90.0 % of what the base knew."


def test_losses_are_better_when_lower(tmp_path: Path) -> None:
    sheets = [
        Sheet("maths", "learning", 7.0, {"lora": 3.0, "pissa": 2.0}, 100, "loss", False),
        Sheet("stories", "forgetting", 1.2, {"lora": 1.5, "pissa": 2.5}, 100, "loss", False),
    ]
    words = words_of(make_study(tmp_path / "s", sheets, ["lora", "pissa"]))
    assert words.title == "`lora` kept the most: 1.500 loss on stories, with 3.000 loss on maths."
    assert words.sentences[0] == (
        "`pissa` learned the most, 2.000 loss on maths (base 7.000), with 2.500 loss on stories."
    )


def test_each_arm_stands_at_the_rate_that_kept_most_of_those_that_learned_as_much(
    tmp_path: Path,
) -> None:
    sheets = two_sheets({"lora": 0.8, "pissa": 0.5}, {"lora": 0.5, "pissa": 0.4})
    folder = make_study(tmp_path / "s", sheets, ["lora", "pissa"], rates=(1e-3, 2e-3, 4e-3))
    arms = gather(read(folder))
    assert [arm.label for arm in arms] == ["lora", "pissa"]
    assert [setting.learning_rate for setting in arms[0].settings] == [1e-3, 2e-3, 4e-3]
    # The made-up scores learn 0.06 less and keep more at each further rate: 0.74 is more than 90 %
    # of the gain from 0.01 to 0.8, and 0.44 is less than that of the gain to 0.5.
    assert [arm.best.learning_rate for arm in arms] == [2e-3, 1e-3]
    assert "of 3 tried" in " ".join(words_of(folder).caveats)


def test_one_seed_comes_with_a_warning(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.8, "pissa": 0.5}, {"lora": 0.5, "pissa": 0.4})
    assert "One seed an arm" in words_of(make_study(tmp_path / "a", sheets, ["lora"])).caveats[0]
    folder = make_study(tmp_path / "b", sheets, ["lora", "pissa"], seeds=(0, 1, 2), spread=0.01)
    assert words_of(folder).caveats[0].startswith("3 seeds an arm; intervals are 95 %, over")


def test_a_task_missing_in_one_seed_is_left_out_of_the_mean(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.8}, {"lora": 0.45})
    folder = make_study(tmp_path / "s", sheets, ["lora"], seeds=(0, 1, 2))
    (folder / "lora-01" / "scores" / "final" / "recall.json").unlink()
    [arm] = gather(read(folder))
    recall = arm.best.measured["recall"].final
    assert recall is not None
    assert recall.seeds == 2
    assert recall.value == pytest.approx(0.45)


def test_arms_of_one_method_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s", two_sheets({"lora": 0.8}, {"lora": 0.45}), ["lora"])
    twin = folder / "lora-wide"
    write_recipe(twin, two_sheets({}, {}), "lora", 1e-3, 0, rank=64)
    write_scores(twin, two_sheets({"lora": 0.8}, {})[0], 0.8, random.Random(0))
    assert [arm.label for arm in gather(read(folder))] == ["lora, rank 16", "lora, rank 64"]


def test_arms_that_differ_in_the_seed_alone_are_told_apart_by_their_names(tmp_path: Path) -> None:
    """As a study leaves them whose definition changed between two calls."""
    sheets = two_sheets({"lora": 0.8}, {"lora": 0.45})
    folder = make_study(tmp_path / "s", sheets, ["lora"], seeds=(0, 1))
    earlier = folder / "lora-earlier"
    write_recipe(earlier, sheets, "lora", 1e-3, 0, rank=64)
    write_scores(earlier, sheets[0], 0.8, random.Random(0))
    for run, name in {"lora-00": "plain", "lora-01": "other", "lora-earlier": "plain"}.items():
        recipe = folder / run / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("name: null", f"name: {name}"))
    labels = ["plain: lora, rank 16", "other: lora, rank 16", "lora, rank 64"]
    assert [arm.label for arm in gather(read(folder))] == labels
    assert report(folder).exists()


def test_names_that_read_like_lists_are_set_apart(tmp_path: Path) -> None:
    kept = {"full": 0.63, "lora": 0.63, "pissa": 0.63, "milora": 0.2}
    sheets = two_sheets(dict.fromkeys(kept, 0.8), kept)
    folder = make_study(tmp_path / "s", sheets, list(kept))
    names = {"full": "full, 10 %", "lora": "MLP and head, r=4"}
    for method in kept:
        recipe = folder / f"{method}-00" / "recipe.yaml"
        name = names.get(method, method)
        recipe.write_text(recipe.read_text().replace("name: null", f"name: {name}"))
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(summary(folder))
    said = "“full, 10 %”, “MLP and head, r=4” and pissa kept the most"
    assert plain(console.export_text()).startswith(said)
    headline = re.search(r'<h1 id="answer">(.*?)</h1>', report(folder).read_text())
    assert headline is not None
    assert plain(re.sub(r"<[^>]+>", "", headline[1])).startswith(said)


def plain(text: str) -> str:
    """Text with ordinary spaces."""
    return text.replace("\N{NO-BREAK SPACE}", " ")


def mark_failed(run: Path, reason: str) -> None:
    """Make a run one that failed."""
    record = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {**record, "status": "failed", "reason": reason})


# -------------------------------------------------------------------------------------- the page

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reported study as large as the demo with three seeds, with one hostile answer in it."""
    folder = make_study(
        tmp_path_factory.mktemp("runs") / "demo", three_tasks(), seeds=(0, 1, 2), spread=0.02
    )
    for items in folder.glob("*/items/final/pocket_recall.jsonl"):
        lines = [json.loads(line) for line in items.read_text().splitlines()]
        for line in lines[:40]:
            line.update(answer=HOSTILE, score=0.0)
        items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mark_failed(folder / "pissa-02", f"loss is NaN {HOSTILE}")
    report(folder)
    return folder


@pytest.fixture(scope="module")
def text(demo: Path) -> str:
    """The page of `demo`."""
    return (demo / "report" / "index.html").read_text("utf-8")


def test_the_page_asks_nothing_of_the_network(text: str) -> None:
    assert "://" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert "default-src 'none'" in text


def test_the_page_is_small(text: str) -> None:
    assert len(text.encode()) < 1_000_000


class Elements(HTMLParser):
    """Counts elements, and collects event handlers and the contents of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.handlers: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the element and any attribute that would run code."""
        self.counts[tag] += 1
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        """Keep what a script element holds."""
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def test_answers_of_models_stay_text(text: str) -> None:
    elements = Elements()
    elements.feed(text)
    assert elements.counts["script"] == 2
    assert elements.counts["img"] == 0
    assert not elements.handlers
    lost = json.loads(elements.scripts[0])["flips"][1]["arms"][0]["lost"]
    assert any(said == HOSTILE for _, said, _ in lost)
    assert HOSTILE in html.unescape(text[: text.index('id="data"')])
    assert HOSTILE not in text


def test_only_the_page_s_own_script_may_run(text: str) -> None:
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_every_number_of_results_csv_is_on_the_page(demo: Path, text: str) -> None:
    shown = set(re.findall(r'data-v="([^"]*)"', text))
    with (demo / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 * 3 * 3
    numbers = {v for row in rows for v in row.values() if re.fullmatch(r"-?[\d.]+(e-?\d+)?", v)}
    assert len(numbers) > 100
    assert numbers <= shown


def test_the_tables_stand_without_scripts(demo: Path, text: str) -> None:
    body = text[: text.index('id="data"')]
    for label in (*METHODS, "96.4\N{NO-BREAK SPACE}%", "What was lost", "Thimphu", "study.yaml"):
        assert label in body
    assert "Runs without a result" in body
    assert body.count("<noscript><svg") == 2


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.8, "pissa": 0.5}, {"lora": 0.45})
    folder = make_study(tmp_path / "s", sheets, ["lora", "pissa"])
    page = report(folder).read_text()
    scores = page[page.index('aria-label="Scores of every arm"') :]
    row = re.search(r'<tr><th scope="row" data-v="pissa">.*?</tr>', scores, re.DOTALL)
    assert row is not None
    assert row[0].count('class="num none">–') >= 2
    assert "`pissa` is not compared" not in page
    assert "is not compared: a task was not measured there" in page


def test_counts_of_lost_and_kept_add_up(demo: Path) -> None:
    changes = {
        of_task.task.name: of_task for of_task in find_changes(read(demo), gather(read(demo)))
    }
    assert [task for task in changes if changes[task].counted] == [
        "pocket_problems",
        "pocket_recall",
    ]
    for arm in changes["pocket_recall"].counted:
        kept, lost, *others = (arm.count(flip) or 0.0 for flip in FLIPS)
        assert kept + lost + sum(others) == pytest.approx(1100)
        assert kept + lost == pytest.approx(round(0.964 * 1100))
        assert not {item.id for item in arm.flipped("lost")} & set(arm.kept_items)
        assert max(item.seeds for item in arm.flipped("lost")) == len(arm.rows)


def test_a_report_is_the_same_when_made_again(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.8, "pissa": 0.5}, {"lora": 0.45, "pissa": 0.3})
    folder = make_study(tmp_path / "s", sheets, ["lora", "pissa"])
    first, again = report(folder).read_bytes(), report(folder).read_bytes()
    assert first == again


# ----------------------------------------------------------------------------- beside the page


def test_tables_and_figures_lie_beside_the_page(demo: Path) -> None:
    folder = demo / "report"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.{kind}" for name in ("plane", "curves") for kind in ("png", "svg")}
    assert names == {"index.html", "results.csv", "results.parquet", *figures}
    table = pandas.read_parquet(folder / "results.parquet")
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == 7 * 3 * 3


def test_missing_packages_are_noted_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("pandas", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)
    sheets = two_sheets({"lora": 0.8}, {"lora": 0.45})
    index = report(make_study(tmp_path / "s", sheets, ["lora"]))
    assert {path.name for path in index.parent.iterdir()} == {"index.html", "results.csv"}
    page = index.read_text()
    assert "No results.parquet" in page
    assert "No figures" in page


def test_the_summary_ends_with_facts_lost_and_kept(demo: Path) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary(demo))
    shown = console.export_text()
    assert "kept the most" in shown
    assert "Lost by full" in shown
    assert "Kept by lora_null_v2" in shown
    assert shown.index("Kept by") > shown.index("Lost by") > shown.index("pocket_problems")


@pytest.mark.parametrize("width", [50, 90, 160])
def test_no_number_is_cut_off_however_narrow_the_terminal(tmp_path: Path, width: int) -> None:
    folder = make_study(tmp_path / "s", three_tasks(40, 20), ["full", "lora_null_v1"])
    wide, console = (
        Console(width=columns, record=True, file=io.StringIO()) for columns in (400, width)
    )
    wide.print(summary(folder))
    console.print(summary(folder))
    shown = console.export_text()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    (table,) = re.findall(r"^front .*?(?=^•)", wide.export_text(), re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"[\w.,–%-]+", table)) <= set(re.findall(r"[\w.,–%-]+", shown))


def test_answers_cannot_colour_the_terminal(tmp_path: Path) -> None:
    sheet = three_tasks(40, 20)
    folder = make_study(tmp_path / "s", sheet, ["full", "lora_null_v1"])
    items = folder / "full-00" / "items" / "final" / "pocket_recall.jsonl"
    items.write_text(items.read_text().replace('"answer": "', '"answer": "[bold]\\u001b[31m'))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary(folder))
    shown = console.export_text()
    assert "[bold]" in shown
    assert "\x1b[31m" not in shown


def test_folders_that_hold_no_study_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no study folder"):
        report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        report(tmp_path)
    folder = make_study(tmp_path / "s", two_sheets({"lora": 0.8}, {}), ["lora"])
    with pytest.raises(FileNotFoundError, match="is one run; give the study"):
        report(folder / "lora-00")


def test_the_report_needs_no_torch() -> None:
    code = "import sys, forgetless.reports; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------ before and after, probes


def cells_of(page: str, task: str, arm: str) -> list[str]:
    """The cells of an arm's row in the table of what changed on a task, as text."""
    table = page[page.index(f'aria-label="Changes on {task}"') :]
    rows = re.findall(r"<tr>.*?</tr>", table[: table.index("</table>")])
    row = next(row for row in rows if f">{arm}<" in row or f"{arm}</span>" in row)
    return [html.unescape(re.sub(r"<[^>]+>", " ", cell)).split() for cell in row.split("</td>")]  # type: ignore[misc]


def test_what_changed_stands_with_interval_test_and_words(tmp_path: Path) -> None:
    """100 facts, 96 known, 57 after: 39 lost."""
    sheets = [
        Sheet("recall", "forgetting", 0.96, {"lora": 0.57}, 100, questions=facts(100)),
        Sheet("kl", "forgetting", 0.0, {"lora": 0.7}, 100, "kl", higher_is_better=False),
    ]
    folder = make_study(tmp_path / "s", sheets, ["lora"])
    scores = folder / "lora-00" / "scores" / "final" / "kl.json"
    extra = {"reverse_kl": 0.9, "top1_agreement": 0.625, "perplexity_ratio": 1.5}
    write_json(scores, {**json.loads(scores.read_text()), "extra": extra})
    page = plain(report(folder).read_text())
    row = [" ".join(cell) for cell in cells_of(page, "recall", "lora")]
    expected = paired_proportions_interval(39, 0, 100)
    ends = f"{100 * expected.low:+.1f} to {100 * expected.high:+.1f}".replace("-", "−")
    assert row[:8] == [
        "lora 96.0 → 57.0 %",
        f"−39.0 {ends}",
        "clearly worse",
        "59.4 %",
        "39",
        "0",
        "< 0.001",
        f"{100 * detectable_change(100, 0.39):.1f}",
    ]
    distance = [" ".join(cell) for cell in cells_of(page, "kl", "lora")]
    assert distance[0].startswith("lora 0.700")
    assert distance[1:4] == ["0.900", "62.5 %", "× 1.50"]


def write_distances(run: Path, task: str, count: int, step: int = 0) -> None:
    """Items of a distance with their mean: at the base, where all are 0, and at the end or step."""
    rng = random.Random(step)
    for phase in ("base", "final"):
        place = run / "points" / str(step) if step and phase == "final" else run
        gaps = [rng.gammavariate(0.5, 0.1) if phase == "final" else 0.0 for _ in range(count)]
        lines = [Item(str(i), "", "", "", gap).to_json() for i, gap in enumerate(gaps)]
        write_jsonl(place / "items" / phase / f"{task}.jsonl", lines)
        known = json.loads((run / "scores" / phase / f"{task}.json").read_text())
        mean, stderr = fmean(gaps), stdev(gaps) / count**0.5
        score = {**known, "value": mean, "stderr": stderr, "n": count}
        write_json(place / "scores" / phase / f"{task}.json", score)


@pytest.fixture
def distances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of one run whose distance from the base is known item by item, also on the way."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures take the longest
    sheets = [
        Sheet("maths", "learning", 7.0, {"lora": 3.0}, 100, "loss", False),
        Sheet("kl", "forgetting", 0.0, {"lora": 0.1}, 30, "kl", False),
    ]
    run = make_study(tmp_path / "s", sheets, ["lora"]) / "lora-00"
    for step in (0, 150):
        write_distances(run, "kl", 30, step)
    maths = (run / "scores" / "final" / "maths.json").read_text()
    write_json(run / "points" / "150" / "scores" / "final" / "maths.json", json.loads(maths))
    return run.parent


def scores_of(run: RunFiles, phase: Phase, task: str, step: int | None = None) -> list[float]:
    """The scores of the items."""
    result = run.result(phase, task, step)
    assert result is not None
    return [item.score for item in result.items]


def test_a_distance_has_one_interval_wherever_it_stands(distances: Path) -> None:
    run = distances / "lora-00"
    row = compare(read_scores(run, "base").scores, read_scores(run).scores)["kl"]
    evidence = read(distances)
    arms = gather(evidence)
    estimate = arms[0].best.final(evidence.tasks[1])
    assert estimate is not None
    assert estimate.ends == pytest.approx(row.interval)
    assert estimate.high - estimate.value > 1.2 * (estimate.value - estimate.low)  # a bootstrap's
    over_steps = course(evidence, arms)
    assert over_steps is not None
    [_, middle, end] = (moment.scores["kl"] for moment in over_steps.tracks[0].moments)
    gaps = scores_of(evidence.runs[0], "final", "kl", 150)
    assert middle.ends == pytest.approx(paired_difference([0.0] * 30, gaps).interval)
    assert end.ends == estimate.ends
    page = report(distances).read_text()
    low, high, *on_the_way = (f"{end:.3f}" for end in (*row.interval, *middle.ends))
    assert list(cells_of(page, "kl", "lora")[0][-3:]) == [low, "to", high]
    spans = set(re.findall(r'<span class="interval">(0\.\d+.{1,4}0\.\d+)</span>', page))
    assert spans == {f"{low} to {high}", f"{low}–{high}", "–".join(on_the_way)}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary(distances))
    assert f"{low}–{high}" in console.export_text()


def test_a_distance_of_a_few_items_has_no_interval_anywhere(distances: Path) -> None:
    write_distances(distances / "lora-00", "kl", 4)
    evidence = read(distances)
    estimate = gather(evidence)[0].best.final(evidence.tasks[1])
    assert estimate is not None
    assert estimate.ends == (estimate.value, estimate.value)
    assert cells_of(report(distances).read_text(), "kl", "lora")[0][-1] == "–"


def test_several_seeds_get_the_interval_of_their_differences(tmp_path: Path) -> None:
    sheets = [Sheet("recall", "forgetting", 0.9, {"lora": 0.5}, 100, questions=facts(100))]
    folder = make_study(tmp_path / "s", sheets, ["lora"], seeds=(0, 1, 2), spread=0.05)
    evidence = read(folder)
    [of_task] = find_changes(evidence, gather(evidence))
    [change] = of_task.changes
    finals = np.array([scores_of(run, "final", "recall") for run in evidence.runs])
    x = finals - scores_of(evidence.runs[0], "base", "recall")
    assert len(set(x.mean(1))) > 1
    assert change.interval == effect(x, distance=1.0).interval()
    assert "McNemar" not in report(folder).read_text()


def test_scores_of_two_versions_of_a_task_are_not_compared(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s", two_sheets({"lora": 0.8}, {"lora": 0.45}), ["lora"])
    scores = folder / "lora-00" / "scores" / "final" / "recall.json"
    write_json(scores, {**json.loads(scores.read_text()), "fingerprint": "other"})
    evidence = read(folder)
    assert [found.task.name for found in find_changes(evidence, gather(evidence))] == ["problems"]


def test_the_averages_of_the_papers_name_what_is_missing(tmp_path: Path) -> None:
    names = ("hellaswag", "arc_challenge", "winogrande", "triviaqa")
    sheets = [Sheet(name, "forgetting", 0.6, {"lora": 0.3}) for name in names]
    page = report(make_study(tmp_path / "s", sheets, ["lora"])).read_text()
    table = page[page.index('aria-label="Averages of the papers"') :]
    table = table[: table.index("</table>")]
    assert "Biderman mean" in table
    assert "0.6000" in table
    assert "0.3000" in table
    assert "no nq_open, webqs" in table


def test_several_answers_to_each_question_stand_beside_those_of_the_base(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s", two_sheets({"lora": 0.8}, {"lora": 0.45}), ["lora"])
    for phase, share in (("base", 0.125), ("final", 0.25)):
        scores = folder / "lora-00" / "scores" / phase / "problems.json"
        extra = {"pass@10": 3 * share, "pass@2": share, "distinct_1": 0.5, "tokens": 9}
        write_json(scores, {**json.loads(scores.read_text()), "extra": extra})
    page = report(folder).read_text()
    section = page[page.index("Several answers to each question") :]
    section = re.sub(r"<[^>]+>", " ", section[: section.index("</table>")])
    told = " ".join(section.split("differ.")[1].split())
    expected = "problems arm distinct 1 pass@2 pass@10 base 0.5 0.125 0.375 lora 0.5 0.25 0.75"
    assert told == expected


def probed(folder: Path, **event: Any) -> Path:
    """A study of one run that was probed on its way, and ended by its budget if one is given."""
    make_study(folder, two_sheets({"lora": 0.8}, {"lora": 0.45}), ["lora"])
    run = folder / "lora-00"
    with (run / "log.jsonl").open("a") as log:
        for step in (0, 100, 200):
            values = {"learning/loss": 3.0 - step / 100, "forgetting/kl": step / 1000}
            log.write(json.dumps({"step": step, "probe": values, "probe_seconds": 0.1}) + "\n")
    record = json.loads((run / "run.json").read_text())
    record["training"]["exceeded"] = event or None
    write_json(run / "run.json", record)
    return folder


def test_probes_are_drawn_and_do_not_stand_in_the_loss(tmp_path: Path) -> None:
    folder = probed(tmp_path / "s")
    index = report(folder)
    page = index.read_text()
    content = json.loads(page[page.index('id="data">') + 10 :].split("</script>")[0])
    [run] = content["probes"]["runs"]
    kl = [(point["step"], point["values"]["forgetting/kl"]) for point in run["points"]]
    assert kl == [(0, 0.0), (100, 0.1), (200, 0.2)]
    assert len(content["curves"][0]["points"]) == 30
    assert 'id="probes-chart"' in page
    assert (index.parent / "figures" / "probes.svg").exists()
    assert "budget of forgetting" not in page
    without = report(make_study(tmp_path / "t", two_sheets({"lora": 0.8}, {}), ["lora"]))
    assert 'id="probes-chart"' not in without.read_text()


def test_a_budget_that_ended_a_training_is_told(tmp_path: Path) -> None:
    event = {
        "limit": "max_kl", "allowed": 0.15, "probe": "kl", "value": 0.2,
        "step": 200, "action": "rollback", "kept_step": 100,
    }  # fmt: skip
    folder = probed(tmp_path / "s", **event)
    assert (
        "`lora` went over its budget of forgetting at step 200, with a distance from the base of "
        "0.200 on kl where 0.15 was allowed, and went back to step 100, the last one inside."
    ) in words_of(folder).sentences


def test_probes_without_a_budget_tell_no_arms_apart(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s", two_sheets({"lora": 0.8}, {"lora": 0.4}), ["lora"], (0, 1))
    recipe = folder / "lora-01" / "recipe.yaml"
    watched = yaml.safe_load(recipe.read_text()) | {"probes": {"forgetting": ["a"], "every": 5}}
    recipe.write_text(yaml.safe_dump(watched))
    assert len(gather(read(folder))) == 1
    watched["probes"]["max_kl"] = 0.1
    recipe.write_text(yaml.safe_dump(watched))
    assert len(gather(read(folder))) == 2


def test_the_question_of_a_prompt_is_shown_and_not_its_examples(tmp_path: Path) -> None:
    capitals = {"Chile": "Santiago", "Peru": "Lima"}.items()
    asked = [(f"Q: One?\nA: 1\n\nQ: What is {c}'s capital?\nA:", a) for c, a in capitals]
    sheet = Sheet("recall", "forgetting", 1.0, {"lora": 0.5}, 2, questions=asked)
    evidence = read(make_study(tmp_path / "s", [sheet], ["lora"]))
    [of_task] = find_changes(evidence, gather(evidence))
    assert of_task.questions["0"] == ("What is Chile's capital?", "Santiago")


def scored(right: Sequence[bool]) -> dict[str, TaskResult]:
    """Scores of one task, right and wrong as told."""
    items = tuple(
        Item(str(i), question, answer, answer if ok else "Atlantis", float(ok))
        for i, (ok, (question, answer)) in enumerate(zip(right, facts(len(right)), strict=True))
    )
    value = sum(right) / len(right)
    result = TaskResult("recall", "accuracy", value, 0.1, len(right), True, "f", 1.0, items)
    return {"recall": result}


def with_pictures(folder: Path, sources: Sequence[str]) -> Path:
    """A study of two arms on pictures of two classes, of which each arm loses most."""
    asked = [(f"{i % 2}/{i:02}.png", ("bars", "dots")[i % 2]) for i in range(len(sources))]
    sheets = [
        Sheet("new", "learning", 0.2, {"lora": 0.9, "pissa": 0.8}, len(asked), questions=asked),
        Sheet("old", "forgetting", 1.0, {"lora": 0.2, "pissa": 0.1}, len(asked), questions=asked,
              pictures=sources),
    ]  # fmt: skip
    return make_study(folder, sheets, ["lora", "pissa"])


def sources(count: int) -> list[str]:
    """So many data URIs, each another."""
    made = (base64.b64encode(f"picture number {i:03}".encode()).decode() for i in range(count))
    return [f"data:image/png;base64,{each}" for each in made]


def test_a_picture_lies_in_the_page_once_whichever_arms_lost_it(tmp_path: Path) -> None:
    made = sources(30)
    made[3] = 'data:image/png;base64,A"/><script>alert(1)</script>'
    made[4] = "data:text/html;base64,AAAA"
    page = report(with_pictures(tmp_path / "s", made)).read_text()
    lost = Counter(found for source in made for found in re.findall(re.escape(source), page))
    assert set(lost.values()) == {1}
    assert len(lost) >= 25
    assert made[3] not in lost
    assert made[4] not in lost
    assert "Pictures that the base recognises" in page
    names = re.findall(r'<image id="(picture-\d+)"', page)
    used = set(re.findall(r'href="#(picture-\d+)"', page))
    assert used <= set(names)
    assert len(names) == len(lost)
    data = json.loads(_scripts(page)[0])["flips"]
    assert data[0]["pictures"] is None
    shown = [place for place in data[1]["pictures"] if place is not None]
    assert sorted(shown) == list(range(len(names)))


def test_pictures_take_no_more_than_their_bound_and_every_arm_has_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = sources(60)
    monkeypatch.setattr("forgetless.reports.changes.MAX_PICTURES_BYTES", 10 * len(made[0]))
    page = report(with_pictures(tmp_path / "s", made)).read_text()
    assert len(re.findall("<image id=", page)) == 10
    of_task = json.loads(_scripts(page)[0])["flips"][1]
    for arm in of_task["arms"]:
        assert of_task["pictures"][arm["lost"][0][0]] is not None
        assert len(arm["lost"]) == arm["totals"]["lost"] > 20
    monkeypatch.setitem(MAX_LISTED, "pictures", 20)
    listed = json.loads(_scripts(report(tmp_path / "s").read_text())[0])["flips"]
    assert {len(arm["lost"]) for arm in listed[1]["arms"]} == {20}
    assert max(len(arm["gained"]) for arm in listed[0]["arms"]) > 20


def _scripts(page: str) -> list[str]:
    elements = Elements()
    elements.feed(page)
    return elements.scripts


def test_an_evaluation_becomes_a_page_that_names_what_was_lost(tmp_path: Path) -> None:
    before, after = scored([True] * 20), scored([i >= 8 for i in range(20)])
    command = "forgetless eval pocket --adapter tuned --tasks recall --report page"
    write_evaluation(
        tmp_path / "page", "pocket", tmp_path / "tuned", before, after, command=command
    )
    page = plain(report(tmp_path / "page").read_text())
    assert "kept 60.0 % of what the base knew." in page
    assert "Atlantis" in page
    assert command in re.sub(r"<[^>]+>", "", page)
    for absent in ('id="plane"', 'id="curves"', "forgetless run", " seed"):
        assert absent not in page[: page.index('id="data"')]
    # A second adapter stands beside the first; the first one's scores may be written again.
    for name in ("tuned", "other"):
        write_evaluation(tmp_path / "page", "pocket", tmp_path / name, before, before)
    evidence = read(tmp_path / "page")
    assert sorted(arm.label for arm in gather(evidence)) == ["other", "tuned"]


def test_an_evaluation_is_not_written_into_a_study(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "s", two_sheets({"lora": 0.8}, {}), ["lora"])
    with pytest.raises(UserError, match="holds something else; give a new folder"):
        write_evaluation(folder, "pocket", "tuned", scored([True]), scored([True]))


# ------------------------------------------------------------------ damaged files, runs going on


def test_damaged_files_are_named_on_the_page_and_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures take the longest
    methods = ["full", "lora", "pissa", "milora", "lora_null_v1"]
    folder = make_study(tmp_path / "s", three_tasks(40, 20), methods)
    damaged = {
        "full-00": "run.json",
        "lora-00": "scores/final/pocket_recall.json",
        "pissa-00": "items/final/pocket_recall.jsonl",
        "milora-00": "recipe.yaml",
    }
    for run, file in damaged.items():
        content = (folder / run / file).read_text()
        (folder / run / file).write_text(content[: len(content) // 2] + "\n{")
    page = html.unescape(report(folder).read_text())
    foot = page[page.index("<footer") : page.index('id="data"')]
    for run in ("lora-00", "pissa-00", "milora-00"):
        assert f"{run}/{damaged[run]}" in foot or f"{run} is left out" in foot
    assert str(tmp_path) not in foot
    assert "run.json is damaged" in page[page.index("Runs without a result") :]
    assert {arm.label for arm in gather(read(folder))} == {"lora", "pissa", "lora_null_v1"}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary(folder))
    assert "lora_null_v1" in console.export_text()


def test_a_score_that_came_after_the_arms_were_read_is_left_for_the_next_report(
    tmp_path: Path,
) -> None:
    folder = make_study(tmp_path / "s", three_tasks(40, 20), ["lora", "pissa"])
    late = folder / "pissa-00" / "scores" / "final" / "pocket_recall.json"
    content = late.read_text()
    late.unlink()
    evidence = read(folder)
    arms = gather(evidence)
    late.write_text(content)
    changes = {of_task.task.name: of_task for of_task in find_changes(evidence, arms)}
    assert [change.label for change in changes["pocket_recall"].changes] == ["lora"]
    assert [change.label for change in changes["pocket_problems"].changes] == ["lora", "pissa"]


def test_a_report_can_be_made_while_runs_are_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source = make_study(tmp_path / "source", three_tasks(40, 20), ["lora", "pissa", "milora"])
    folder = tmp_path / "s"
    folder.mkdir()
    shutil.copy(source / "study.yaml", folder)
    shutil.copy(source / "runs.json", folder)
    files = sorted(path for path in source.glob("*/**/*") if path.is_file())
    files.sort(key=lambda path: (path.parts[len(source.parts)], path.name != "recipe.yaml"))
    is_done = threading.Event()

    def write() -> None:
        for file in files:
            target = folder / file.relative_to(source)
            if file.name == "log.jsonl":  # is appended to, the others are whole or absent
                target.write_text(file.read_text()[:-9])
            write_text(target, file.read_text())
        is_done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not list(folder.glob("*/recipe.yaml")):
        time.sleep(0.01)
    while True:
        was_done = is_done.is_set()
        page = report(folder).read_text()
        assert "is damaged" not in page
        if was_done:
            break
    thread.join()
    assert "·  3 arms" in page


def test_a_name_is_placed_by_as_many_calls_among_many_points_as_among_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matplotlib.transforms import Bbox

    calls: list[object] = []
    real = Bbox.intersection

    def counted(*boxes: Bbox) -> Any:
        calls.append(boxes)
        return real(*boxes)

    monkeypatch.setattr(Bbox, "intersection", staticmethod(counted))
    per_name = []
    for number in (3, 12):
        figure, [axes] = figures._figure(7.6, 4.2)
        names = [(i / number, i % 3 / 3, f"arm {i}") for i in range(number)]
        calls.clear()
        figures._place_names(figure, axes, names, [])
        per_name.append(len(calls) / number)
    assert per_name[0] == per_name[1]
