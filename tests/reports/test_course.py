"""Scores over the steps and at matched learning, chosen rates, and the pages made of them."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from forgetless.reports import report
from forgetless.reports.arms import gather, gather_rows
from forgetless.reports.durations import (
    Course,
    Matched,
    course,
    course_of_rows,
    matched,
    matched_over_steps,
    round_numbers,
)
from forgetless.reports.evidence import read, read_csv
from forgetless.reports.standing import standing
from forgetless.reports.words import answer
from forgetless.studies.folder import CURVE_COLUMNS, curve, results, write_csv

from .test_page import Sheet, make_study, plain, two_sheets, write_json

DOCS = Path(__file__).parents[2] / "docs"

# ------------------------------------------------------------------------------ made-up rows


def rows_of(
    arm: str,
    seed: int,
    scores: Mapping[int, Mapping[str, float | None]],
    losses: Sequence[str] = (),
    **more: Any,
) -> list[dict[str, Any]]:
    """The rows of one run by step and task; a task that is called new is the learning task."""
    blank = dict.fromkeys(CURVE_COLUMNS)
    common = {"run_id": f"{arm}-{seed}", "arm": f"{arm} learning_rate=0.001", "method": arm,
              "learning_rate": 0.001, "seed": seed, "steps": max(scores), "n": 100,
              "stderr": 0.01, "status": "done", **more}  # fmt: skip
    return [
        blank | common | {
            "step": step, "tokens": 10 * step, "task": task, "score": score,
            "kind": "learning" if task == "new" else "forgetting",
            "metric": "loss" if task in losses else "accuracy",
            "higher_is_better": task not in losses, "base_score": scores[min(scores)].get(task),
        }
        for step, at in scores.items()
        for task, score in at.items()
    ]  # fmt: skip


def path(*points: tuple[float, float]) -> dict[int, dict[str, float | None]]:
    """(learned, kept) at steps 0, 10, 20 ..."""
    return {10 * i: {"new": learned, "old": kept} for i, (learned, kept) in enumerate(points)}


def chosen_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The learning rate at which each arm of a results.csv stands."""
    return {arm.label: arm.best.learning_rate for arm in gather_rows(rows)}


def found(rows: Sequence[Mapping[str, Any]]) -> Course:
    """The course of rows that have one."""
    over_steps = course_of_rows(rows)
    assert over_steps is not None
    return over_steps


def equal(rows: Sequence[Mapping[str, Any]]) -> Matched:
    """What is kept at matched learning, of rows that have it."""
    at_levels = matched_over_steps(found(rows))
    assert at_levels is not None
    return at_levels


def kept(at_levels: Matched, level: float) -> dict[str, float]:
    """The means at a level, by arm, of the arms that reached it."""
    place = at_levels.levels.index(level)
    return {arm: at[place].value for arm, at in at_levels.kept_at.items() if at[place]}  # type: ignore[union-attr]


TWO_ARMS = [
    *rows_of("lora", 0, path((0.0, 1.0), (0.5, 0.8), (1.0, 0.4))),
    *rows_of("lora", 1, path((0.0, 1.0), (0.5, 0.9), (1.0, 0.5))),
    *rows_of("full", 0, path((0.0, 1.0), (0.6, 0.6), (0.7, 0.2))),
    *rows_of("full", 1, path((0.0, 1.0), (0.6, 0.6), (0.9, 0.0))),
]

# ------------------------------------------------------------------------------ over the steps


def test_a_moment_is_the_mean_of_its_seeds_with_students_interval() -> None:
    paths = [path((0.0, 1.0), (value, 0.9), (0.8, 0.8)) for value in (0.5, 0.6, 0.7)]
    rows = [row for seed, one in enumerate(paths) for row in rows_of("lora", seed, one)]
    [track] = found(rows).tracks
    base, first, _ = track.moments
    assert (first.step, first.tokens) == (10, 100)
    # Standard deviation 0.1, t(2) = 4.3027: 0.6 -/+ 0.2484.
    assert first.scores["new"].ends == pytest.approx((0.3516, 0.8484), abs=1e-4)
    # Seeds that agree, as at the base, have the interval over the questions.
    assert first.scores["old"].ends == pytest.approx((0.8804, 0.9196), abs=1e-4)
    assert base.scores["new"].seeds == 1
    assert track.label == "lora"


def test_a_course_needs_two_steps_besides_the_base() -> None:
    assert course_of_rows(rows_of("lora", 0, path((0.0, 1.0), (0.5, 0.8)))) is None
    assert course_of_rows([]) is None
    assert course_of_rows([row for row in TWO_ARMS if row["task"] == "old"]) is None


def test_what_is_kept_is_the_average_of_shares_where_there_are_several() -> None:
    at: dict[int, dict[str, float | None]] = {
        0: {"new": 0.0, "a": 0.8, "b": 0.6, "kl": 0.0},
        10: {"new": 0.4, "a": 0.6, "b": 0.5, "kl": 0.7},
        20: {"new": 0.5, "a": 0.5, "b": None, "kl": 0.9},
    }
    over_steps = found(rows_of("lora", 0, at, losses=["kl"]))
    mean = over_steps.forgetting[0]
    assert [task.name for task in over_steps.forgetting] == ["2 tasks", "a", "b", "kl"]
    assert mean.mean_of == ("a", "b")
    _, first, last = over_steps.tracks[0].moments
    assert first.scores["2 tasks"].value == pytest.approx(0.55)
    # Two independent standard errors of 0.01: sqrt(2) * 0.01 / 2.
    half = 1.96 * math.sqrt(2) * 0.01 / 2
    assert first.scores["2 tasks"].low == pytest.approx(0.55 - half, abs=1e-5)
    assert "2 tasks" not in last.scores
    assert last.scores["a"].value == 0.5


def test_unfinished_runs_and_other_rates_do_not_mix() -> None:
    more = rows_of("lora", 2, path((0.0, 1.0), (0.1, 0.1), (0.1, 0.1)), status="failed")
    assert found([*TWO_ARMS, *more]) == found(TWO_ARMS)
    other = rows_of("full", 0, path((0.0, 1.0), (0.2, 0.9), (0.3, 0.9)), learning_rate=0.01)
    labels = [track.label for track in found([*TWO_ARMS, *other]).tracks]
    assert labels == ["lora", "full at 0.001", "full at 0.01"]


# ------------------------------------------------------------------------------ matched learning


def test_kept_at_matched_learning_by_hand() -> None:
    at_levels = equal(TWO_ARMS)
    # Every seed of full reaches 0.7, one does not reach more; of lora all reach 1.
    assert at_levels.levels == (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    # lora: 0.8 - 0.4 * 0.2 / 0.5 = 0.64 and 0.9 - 0.4 * 0.4 = 0.74; full: 0.2, 0.6 - 0.6 / 3.
    assert kept(at_levels, 0.7) == pytest.approx({"lora": 0.69, "full": 0.3})
    estimate = at_levels.kept_at["lora"][-1]
    assert estimate is not None
    # Standard deviation 0.0707 over sqrt(2) is 0.05; t(1) = 12.7062.
    assert estimate.low == pytest.approx(0.69 - 12.7062 * 0.05, abs=1e-4)


def test_seeds_that_all_keep_everything_have_the_interval_of_their_items() -> None:
    whole = [
        row
        for seed in (0, 1)
        for row in rows_of("null", seed, path((0.0, 1.0), (0.5, 1.0), (1.0, 1.0)))
    ]
    estimate = equal([*TWO_ARMS, *whole]).kept_at["null"][-1]
    assert estimate is not None
    # Wilson's interval of 100 right answers of 100.
    assert estimate.ends == pytest.approx((100 / (100 + 1.96**2), 1.0), abs=1e-4)


def test_a_level_that_a_seed_did_not_reach_is_missing() -> None:
    third = rows_of("pissa", 0, path((0.0, 1.0), (0.5, 0.9), (0.9, 0.8)))
    at_levels = equal([*TWO_ARMS, *third])
    assert at_levels.levels == (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    reached = {label: [bool(e) for e in at] for label, at in at_levels.kept_at.items()}
    assert reached["lora"] == [True] * 6
    assert reached["full"] == [True] * 4 + [False] * 2
    alone = at_levels.kept_at["pissa"][0]
    assert alone is not None
    assert not alone.has_error


def test_learning_is_matched_where_lower_is_better() -> None:
    one = path((7.0, 1.0), (3.0, 0.8), (2.0, 0.4))
    other = path((7.0, 1.0), (4.0, 0.7), (2.5, 0.1))
    at_levels = equal(
        [*rows_of("lora", 0, one, losses=["new"]), *rows_of("full", 0, other, losses=["new"])]
    )
    assert at_levels.levels == (5.0, 4.5, 4.0, 3.5, 3.0, 2.5)
    assert kept(at_levels, 2.5) == pytest.approx({"lora": 0.6, "full": 0.1})


def test_of_several_passes_of_a_level_the_one_that_moved_least_counts() -> None:
    back = path((0.0, 0.0), (0.6, 0.1), (0.2, 0.9))
    on = path((0.0, 0.0), (0.3, 0.2), (0.6, 0.4))
    at_levels = equal(
        [*rows_of("lora", 0, back, losses=["old"]), *rows_of("full", 0, on, losses=["old"])]
    )
    assert kept(at_levels, 0.4) == pytest.approx({"lora": 0.4 / 6, "full": 0.8 / 3})


def test_one_arm_is_matched_with_nothing() -> None:
    assert matched_over_steps(found(TWO_ARMS[:12])) is None


def test_round_numbers() -> None:
    assert round_numbers(0.0, 0.95, 10) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert round_numbers(-7.0, -2.0, 5) == [-6.0, -5.0, -4.0, -3.0, -2.0]
    assert round_numbers(0.31, 0.34, 4) == [0.32, 0.33, 0.34]
    assert round_numbers(1.0, 1.0) == []


# ---------------------------------------------------------------------------------- the page


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are made without figures, which take the longest."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def write_points(folder: Path, sheets: Sequence[Sheet], steps: Sequence[int] = (75, 150)) -> None:
    """Scores on the way, as runs of 300 steps leave them."""
    for recipe in folder.glob("*/recipe.yaml"):
        rng = random.Random(recipe.parent.name)
        for step in steps:
            for sheet in sheets:
                name = f"{sheet.name}.json"
                score = json.loads((recipe.parent / "scores" / "final" / name).read_text())
                share = step / 300 if sheet.kind == "forgetting" else (step / 300) ** 0.5
                value = sheet.base + share * (score["value"] - sheet.base) + rng.gauss(0, 0.002)
                place = recipe.parent / "points" / str(step) / "scores" / "final" / name
                write_json(place, {**score, "value": min(max(value, 0.0), 1.0)})


def study(
    folder: Path,
    seeds: Sequence[int] = (0, 1, 2),
    kept: tuple[float, float] = (0.6, 0.3),
    learned: tuple[float, float] = (0.81, 0.79),
) -> Path:
    """Two arms that learn nearly alike and keep so much."""
    pair = ("lora", "pissa")
    sheets = two_sheets(dict(zip(pair, learned, strict=True)), dict(zip(pair, kept, strict=True)))
    make_study(folder, sheets, ["lora", "pissa"], seeds=seeds, spread=0.003)
    write_points(folder, sheets)
    return folder


def words_of(folder: Path) -> str:
    """The sentences of the answer."""
    evidence = read(folder)
    arms = gather(evidence)
    at_levels = matched(evidence, arms, course(evidence, arms))
    return plain(" ".join(answer(evidence, arms, standing(evidence, arms), at_levels).sentences))


def test_the_page_shows_the_steps_and_what_is_kept_at_matched_learning(tmp_path: Path) -> None:
    folder = study(tmp_path / "s")
    index = report(folder)
    page = index.read_text()
    content = json.loads(page[page.index('id="data">') + 10 :].split("</script>")[0])
    rows = [dict(point["rows"]) for point in content["course"]["points"] if point["arm"] == 0]
    assert [row["step"] for row in rows] == ["0", "75", "150", "300"]
    assert (index.parent / "figures" / "course.svg").exists()
    assert read_csv(index.parent / "curve.csv") == curve(folder)
    table = page[page.index('aria-label="Scores over the training"') :]
    table = table[: table.index("</table>")]
    assert re.findall(r"step \d+", table) == ["step 75", "step 150", "step 300"]
    evidence = read(folder)
    over_steps = course(evidence, gather(evidence))
    assert over_steps is not None
    last = over_steps.tracks[1].moments[-1].scores["recall"].value
    assert f'data-v="{last!r}"' in table
    assert 'aria-label="Forgetting at matched learning"' in page


def test_words_on_equal_learning_need_several_seeds(tmp_path: Path) -> None:
    told = words_of(study(tmp_path / "three"))
    assert re.search(
        r"At equal learning, 70 % on problems, `lora` kept the most of the 2 arms that got there "
        r"with several seeds: 6\d\.\d % on recall \(\d\d\.\d–\d\d\.\d\)\.",
        told,
    )
    assert "At equal learning" not in words_of(study(tmp_path / "one", seeds=(0,)))


def test_arms_alike_at_equal_learning_are_not_told_apart(tmp_path: Path) -> None:
    told = words_of(study(tmp_path / "s", kept=(0.6, 0.6), learned=(0.8, 0.8)))
    assert re.search(r"At equal learning.*, not distinguishable from `(lora|pissa)`\.", told)


@pytest.mark.usefixtures("no_figures")
def test_runs_scored_at_their_end_alone_have_no_steps(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.8, "pissa": 0.5}, {"lora": 0.45, "pissa": 0.3})
    index = report(make_study(tmp_path / "s", sheets, ["lora", "pissa"]))
    page = index.read_text()
    assert 'id="course"' not in page
    assert "Forgetting at matched learning" not in page
    assert not (index.parent / "curve.csv").exists()


# ------------------------------------------------------------------------------ learning rates


@pytest.mark.usefixtures("no_figures")
def test_rates_are_chosen_from_rows_as_the_report_chooses(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.8, "pissa": 0.5}, {"lora": 0.5, "pissa": 0.4})
    folder = make_study(tmp_path / "s", sheets, ["lora", "pissa"], rates=(1e-3, 2e-3, 4e-3))
    rates = chosen_rates(results(folder))
    assert rates == {"lora": 2e-3, "pissa": 1e-3}
    assert rates == {arm.label: arm.best.learning_rate for arm in gather(read(folder))}
    index = report(folder)
    assert chosen_rates(read_csv(index.parent / "results.csv")) == rates
    page = index.read_text()
    table = page[page.index('aria-label="Scores over the learning rates"') :]
    rows = re.findall(r"<tr>.*?</tr>", table[: table.index("</table>")])[-2:]
    marked = [["best rate" in cell for cell in row.split("</td>")[:-1:2]] for row in rows]
    assert marked == [[False, True, False], [True, False, False]]


@pytest.mark.parametrize("loss", [False, True])
def test_a_rate_whose_seeds_scatter_does_not_pass_for_one_that_learns(loss: bool) -> None:
    # The intervals over the seeds overlap, and the rate that scatters kept more.
    learned = {1e-3: (0.30, 0.90, 0.60), 2e-3: (0.95, 0.96, 0.94)}
    kept = {1e-3: 0.9, 2e-3: 0.5}
    rows = [
        {"arm": "lora", "method": "lora", "learning_rate": rate, "seed": seed, "task": task,
         "kind": kind, "metric": "loss" if loss else "accuracy", "higher_is_better": not loss,
         "base_score": 1.0 * (loss != (kind == "forgetting")), "score": 1 - x if loss else x,
         "stderr": 0.01, "n": 100, "retention": x, "status": "done"}
        for rate, scores in learned.items()
        for seed, score in enumerate(scores)
        for task, kind, x in (("new", "learning", score), ("old", "forgetting", kept[rate]))
    ]  # fmt: skip
    assert chosen_rates(rows) == {"lora": 2e-3}


@pytest.mark.usefixtures("no_figures")
def test_matched_learning_follows_the_rates_where_nothing_was_scored_on_the_way(
    tmp_path: Path,
) -> None:
    sheets = two_sheets({"lora": 0.8, "pissa": 0.76}, {"lora": 0.5, "pissa": 0.4})
    folder = make_study(tmp_path / "s", sheets, ["lora", "pissa"], rates=(1e-3, 2e-3, 4e-3))
    evidence = read(folder)
    at_levels = matched(evidence, gather(evidence), None)
    assert at_levels is not None
    assert at_levels.along == "learning rates"
    # Each rate learns 0.06 less and keeps 0.08 more: 0.72 lies a third of the way from 0.74, and
    # two thirds of the way from 0.76.
    assert kept(at_levels, 0.72) == pytest.approx(
        {"lora": 0.58 + 0.08 / 3, "pissa": 0.4 + 0.16 / 3}
    )
    assert "between the learning rates at which it was scored" in report(folder).read_text()


def test_arms_that_a_study_names_apart_may_differ_in_the_rate_alone(tmp_path: Path) -> None:
    sheets = two_sheets({"lora": 0.8}, {"lora": 0.5})
    folder = make_study(tmp_path / "s", sheets, ["lora"], rates=(1e-3, 2e-3, 4e-3))
    names = {1e-3: "lora", 2e-3: "lora learning_rate=0.002", 4e-3: "lora, high rate"}
    for recipe in folder.glob("*/recipe.yaml"):
        content = yaml.safe_load(recipe.read_text())
        content["name"] = names[content["training"]["learning_rate"]]
        recipe.write_text(yaml.safe_dump(content))
    arms = {arm.label: len(arm.settings) for arm in gather(read(folder))}
    assert arms == {"lora": 2, "lora, high rate": 1}
    assert list(chosen_rates(results(folder))) == list(arms)


def test_the_pilot_s_rates_follow_from_its_rows() -> None:
    told = (DOCS / "results" / "pocket-pilot.md").read_text("utf-8")
    chosen = re.findall(r"^\| (\w+) \| (\S+) \*\*chosen\*\* \|", told, re.MULTILINE)
    assert len(chosen) == 7
    rows = read_csv(DOCS / "results" / "pocket-pilot.csv")
    assert chosen_rates(rows) == {arm: float(rate) for arm, rate in chosen}


# ---------------------------------------------------------------------------- pages of results


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """docs/make.py."""
    spec = importlib.util.spec_from_file_location("docs_make", DOCS / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_put_between_their_marks_and_words_stay(
    make: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "two.csv"
    write_csv(file, TWO_ARMS, CURVE_COLUMNS)
    page = "# Curves\n\nBefore.\n\n<!-- two.csv -->\nold\n<!-- /two.csv -->\n\nAfter.\n"
    written = plain(make.with_tables(page, [file]))
    assert written.startswith("# Curves\n\nBefore.\n\n<!-- two.csv -->\n\n![")
    assert written.endswith("<!-- /two.csv -->\n\nAfter.\n")
    assert "old\n" not in written
    assert "| lora | 50.0 % (48.0–52.0) | 100.0 % (96.3–100.0) |" in written
    assert make.with_tables(make.with_tables("# Curves", [file]), [file]).count("two.csv -->") == 2
    make.draw(file)
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_rates_marks_the_chosen(make: ModuleType) -> None:
    written = make.tables(DOCS / "results" / "pocket-pilot.csv")
    assert written.count("**chosen**") == 7
    assert re.search(r"\| lora \| 0\.003 \*\*chosen\*\* \| 93\.0", written)


def test_committed_pages_hold_the_tables_of_their_files(make: ModuleType) -> None:
    for name, pattern in make.PAGES.items():
        files = sorted(make.RESULTS.glob(pattern))
        if files:
            page = (make.RESULTS / name).read_text("utf-8")
            assert make.with_tables(page, files) == page
