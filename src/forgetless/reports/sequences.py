"""The page of sequences: every matrix as a heat map with numbers, the metrics, what was lost."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forgetless
from forgetless.core.files import write_json, write_text
from forgetless.reports.numbers import NOT_MEASURED, three_decimals
from forgetless.reports.page import inlined
from forgetless.reports.words import environment
from forgetless.studies.folder import results, write_csv, write_tables
from forgetless.studies.sequence import (
    COMPARED,
    MAIN_METRICS,
    METRIC_COLUMNS,
    matrices,
    metric_rows,
    row_names,
)


@dataclass(frozen=True)
class Cell:
    """A score of a matrix.

    Attributes:
        text: the score, in words.
        share: how good it is among all of its column, in 0..1.
        kind: "own" for a task right after it was learned, "seen" after that and for what the base
            knew, "new" before.
    """

    text: str
    share: float
    kind: str


def write_sequences(folder: str | Path) -> Path:
    """Write the page of sequences, sequence.json and the tables; the path of index.html.

    The tables are results.csv, one row a run and task, and sequences.csv, one row a sequence.

    Raises:
        FileNotFoundError: there are no sequences in the folder.
    """
    folder = Path(folder)
    found = matrices(folder)
    place = folder / "report"
    write_json(place / "sequence.json", found)
    write_tables(folder, results(folder), [])
    write_csv(place / "sequences.csv", metric_rows(found), METRIC_COLUMNS)
    content = _content(found)
    scripts = ("page", "chart", "charts", "sequence") if content["courses"] else ()
    text = (
        environment()
        .get_template("sequence.html")
        .render(
            found=found,
            parts=list(_parts(found)),
            metrics=MAIN_METRICS,
            mean=_mean,
            unfinished=sum(s != "done" for each in found["sequences"] for s in each["status"]),
            version=forgetless.__version__,
            places={column: place for place, column in enumerate(content["arms"])},
            figures={},
            **inlined(scripts, content),
        )
    )
    write_text(place / "index.html", text)
    return place / "index.html"


def _content(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the chart of the courses draws: of every arm and order the mean over seeds.

    Its "arms" are the columns.
    """
    columns = list(
        dict.fromkeys(c for each in found["sequences"] for c in _columns(found, each["tasks"]))
    )
    cases: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for each in found["sequences"]:
        if each["course"] is not None and each["course"]["ends"]:
            cases.setdefault((each["arm"], each["order"]), []).append(each)
    courses = []
    for (arm, order), own in cases.items():
        learned = own[0]["tasks"] if own[0].get("bound") is None else ["all together"]
        ends = list(zip(own[0]["course"]["ends"], learned, strict=False))
        lines = [line for line in _lines(found, own, ends, columns) if line["points"]]
        courses.append({"arm": arm, "order": order, "ends": ends, "lines": lines})
    return {"arms": columns, "courses": courses}


def _lines(
    found: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
    ends: Sequence[tuple[int, str]],
    columns: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """The lines of one arm and order; columns of shares have one view, any other has its own."""
    told = [each["course"] for each in own]
    for place, column in enumerate(_columns(found, own[0]["tasks"])):
        points = _mean_line([(s, values[place]) for s, values in one["scores"]] for one in told)
        is_share = own[0]["higher_is_better"][place] and all(0 <= v <= 1 for _, v in points)
        view = "scores" if is_share else column
        yield {"view": view, "arm": columns.index(column), "points": points}
    loss, start = _mean_line(one["loss"] for one in told), 0
    for end, task in ends:
        arm = columns.index(task) if task in columns else 0
        part = [point for point in loss if start < point[0] <= end]
        yield {"view": "training loss", "arm": arm, "points": part}
        start = end
    for name in told[0]["probes"]:
        points = _mean_line(one["probes"].get(name, ()) for one in told)
        yield {"view": f"probe {name}", "arm": 0, "points": points}


def _mean_line(parts: Iterable[Iterable[Sequence[Any]]]) -> list[list[float]]:
    """The mean value of each step over the seeds that have it."""
    by_step: dict[int, list[float]] = {}
    for points in parts:
        for step, value in points:
            if value is not None:
                by_step.setdefault(step, []).append(value)
    return [[step, sum(values) / len(values)] for step, values in sorted(by_step.items())]


def _parts(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the page shows: of classifiers that share a head both ways to tell classes apart."""
    by_task = found.get("task_incremental")
    says = "Class-incremental: every answer is one of all classes of the head." if by_task else ""
    yield _part(found, "", says)
    if by_task:
        says = "Task-incremental: every answer is one of the classes of its own task."
        yield _part({**found, **by_task}, "-by-task", says)


def _part(found: Mapping[str, Any], id: str, says: str) -> dict[str, Any]:
    return {
        "id": id,
        "says": says,
        "arms": found["arms"],
        "ahead": {metric: list(standings(found["pairs"], metric)) for metric in COMPARED},
        "maps": {arm["arm"]: list(_maps(found, arm)) for arm in found["arms"]},
        "lost": {
            arm["arm"]: list(_lost(found, arm["arm"]))
            for arm in found["arms"]
            if not any(order.get("bound") for order in arm["orders"].values())
        },
    }


def standings(
    pairs: Sequence[Mapping[str, Any]], metric: str
) -> Iterator[tuple[str, str, str, str]]:
    """For each arm those that it is better than, level with and worse than, in words."""
    mirrored = {"better": "worse", "worse": "better", "level": "level"}
    told: dict[str, dict[str, list[str]]] = {}
    for pair in pairs:
        if pair["metric"] == metric and pair["difference"] is not None:
            for arm, other, verdict in (
                (pair["arm"], pair["other"], pair["verdict"]),
                (pair["other"], pair["arm"], mirrored[pair["verdict"]]),
            ):
                told.setdefault(arm, {}).setdefault(verdict, []).append(other)
    for arm, others in told.items():
        better, level, worse = (
            ", ".join(others.get(verdict, ())) or "none" for verdict in ("better", "level", "worse")
        )
        yield arm, better, level, worse


def _mean(metric: Mapping[str, Any]) -> tuple[str, str]:
    """The mean of a metric and the ends of its interval, in words."""
    if metric["mean"] is None:
        return NOT_MEASURED, ""
    ends = "" if metric["low"] is None else f"{metric['low']:.3f} to {metric['high']:.3f}"
    return three_decimals(metric["mean"]), ends


def _maps(found: Mapping[str, Any], arm: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The mean matrix of an arm in every order."""
    known = found["knowledge"] is not None
    seen: dict[str, list[float]] = {}
    for each in found["arms"]:
        for order in each["orders"].values():
            for column in _columns(found, order["tasks"]):
                place = _columns(found, order["tasks"]).index(column)
                seen.setdefault(column, []).extend(
                    row[place] for row in order["R"] if row[place] is not None
                )
    higher = {
        column: is_higher
        for each in found["sequences"]
        for column, is_higher in zip(
            _columns(found, each["tasks"]), each["higher_is_better"], strict=True
        )
    }
    for name, order in arm["orders"].items():
        columns, rows = _columns(found, order["tasks"]), []
        for i, (label, row) in enumerate(zip(row_names(order), order["R"], strict=True)):
            if label is None:
                continue
            kinds = ["seen" if j == 0 or j < i else "own" if j == i else "new"
                     for j in range(len(row))]  # fmt: skip
            cells = [
                Cell(
                    NOT_MEASURED if value is None else three_decimals(value),
                    _share(value, seen.get(column, []), higher[column]),
                    kind,
                )
                for value, column, kind in zip(row, columns, kinds, strict=True)
            ]
            rows.append((label, cells[not known :]))
        yield {
            "order": name, "seeds": len(order["seeds"]), "heads": columns[not known :], "rows": rows
        }  # fmt: skip


def _columns(found: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    return [f"knowledge: {found['knowledge']}", *tasks]


def _share(value: float | None, seen: Sequence[float], higher: bool) -> float:
    """Shares as they are; anything else by where it lies between the least and the most."""
    if value is None or not seen:
        return 0.0
    low, high = min(seen), max(seen)
    if higher and low >= 0 and high <= 1:
        return value
    place = (value - low) / (high - low) if high > low else 0.0
    return place if higher else 1 - place


def _lost(found: Mapping[str, Any], arm: str) -> Iterator[tuple[str, str, str]]:
    """Of every column: how much is lost since its best score, and after which task most went."""
    own = [each for each in found["sequences"] if each["arm"] == arm]
    lost: dict[str, list[Mapping[str, Any]]] = {}
    for each in own:
        for column, told in zip(_columns(found, each["tasks"]), each["lost"], strict=True):
            lost.setdefault(column, []).append(told)
    for column, told in lost.items():
        values = [one["lost"] for one in told if one["lost"] is not None]
        if column == _columns(found, [])[0] and found["knowledge"] is None:
            continue
        after = Counter(one["most_after"] for one in told if one["most_after"])
        by = ", ".join(f"{task} ({count} of {len(told)})" for task, count in after.most_common())
        mean = sum(values) / len(values) if values else None
        yield column, NOT_MEASURED if mean is None else three_decimals(mean), by or NOT_MEASURED
