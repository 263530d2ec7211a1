"""Sequences: tasks that one base learns one after the other, and the matrix of what stays.

<out>/<name>/sequence.yaml  runs.json     the definition; its runs, and which make up a sequence
<out>/<name>/report/sequence.json         every matrix with its metrics, see `matrices`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Listed
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from forgetless.core.continual import continual_metrics
from forgetless.core.files import read_json, write_json
from forgetless.core.metrics import mean_stderr, t_interval, t_probability
from forgetless.recipes.sequence import SequenceRecipe, measures
from forgetless.scores.files import Phase
from forgetless.scores.seeds import holm
from forgetless.studies.course import course
from forgetless.studies.folder import RunFolder
from forgetless.studies.stages import Listener
from forgetless.studies.study import Study, do_runs
from forgetless.studies.workers import Workers
from forgetless.tasks import make_tasks

FORMULAS = {
    "ACC": "mean over j = 1 .. K of R[K, j]",
    "BWT": "mean over j = 1 .. K - 1 of R[K, j] - R[j, j] (Lopez-Paz and Ranzato 2017)",
    "forgetting": "mean over j = 1 .. K - 1 of max over i = 1 .. K - 1 of R[i, j], minus R[K, j]; "
    "negative where every task ended better than it ever was (Chaudhry et al. 2018)",
    "FWT": "mean over j = 2 .. K of R[j - 1, j] - R[0, j] (Lopez-Paz and Ranzato 2017, with the "
    "base for their random initialisation)",
    "learning": "mean over j = 1 .. K of R[j, j], what each task reached when it was learned",
    "knowledge lost": "R[0, 0] - R[K, 0], of the base's knowledge",
    "forgetting (Avalanche)": "mean over j = 1 .. K - 1 of R[j, j] - R[K, j], which is -BWT",
    "forgetting (Mammoth)": "as forgetting, with the maximum over i = 1 .. K: never negative",
}
"""What the metrics are, by name. R[i, j] is the score on task j after task i; row 0 is the base,
and column 0 the base's knowledge. Scores of which less is better count negative.

Of tasks that are learned jointly R has the rows of the base and of the one run, its last. Of tasks
that are learned separately row i is the run that learned task i alone; ACC and learning are then
the mean of its R[j, j], knowledge lost R[0, 0] less the mean of R[i, 0], and nothing else is known.
"""


MAIN_METRICS = ("ACC", "BWT", "forgetting", "FWT", "learning", "knowledge lost")
"""Those that are shown; the others are the two libraries' variants."""

COMPARED = ("ACC", "knowledge lost", "forgetting")
"""Those by which every two arms are compared."""

LESS_IS_BETTER = frozenset({"knowledge lost", "forgetting"})


METRIC_COLUMNS = ("answers", "arm", "order", "seed", "bound", *FORMULAS)
"""Of the table with a row for each sequence."""


class Sequence(Study):
    """Sequences as they lie in their folder."""

    @property
    def matrices(self) -> dict[str, Any]:
        """The matrix of every sequence with its metrics, and their means; see `matrices`."""
        return matrices(self.folder)


def sequence(
    definition: SequenceRecipe | Mapping[str, Any] | str | Path,
    out: str | Path = "runs",
    *,
    storage: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    processes: int = 1,
    on: Literal["ray"] | None = None,
    address: str | None = None,
    share: str | None = None,
    listen: Listener | None = None,
) -> Sequence:
    """Do every run of some sequences that is not done yet, and write their matrices.

    After each task all tasks are measured, those that come later too, and the base's knowledge. A
    run waits for the one before it; all else is as in `forgetless.study`: what was stopped is
    resumed by the same call, several workers or calls share the runs, and so do sequences that
    begin alike.

    Args:
        definition: a `SequenceRecipe`, the mapping that one is written as, or a YAML file.
        out: the folder that holds studies.
        storage: as of `forgetless.study`.
        workers: likewise.
        threads: likewise.
        processes: likewise.
        on: likewise.
        address: likewise.
        share: likewise.
        listen: likewise.

    Returns:
        The sequences; look at ``.matrices`` and ``.failed``.

    Raises:
        RecipeError: what is wrong with the definition, before anything is run.
    """
    team = Workers(storage, workers, threads, processes, on, address, share)
    if not isinstance(definition, SequenceRecipe):
        read = SequenceRecipe.parse if isinstance(definition, Mapping) else SequenceRecipe.load
        definition = read(definition)  # type: ignore[arg-type]
    folder = Path(out) / definition.name
    chains, recipes = definition.chains(team.checker())
    index = {
        "sequences": [asdict(chain) for chain in chains],
        "measured_by": {t["name"]: _first_name(measures(t)) for t in definition.all_tasks},
        "knowledge": _first_name(definition.knowledge),
        "classes": definition.classes if definition.split else {},
    }
    content = {"sequence.yaml": definition.model_dump()}
    do_runs(folder, recipes, content, team, index=index, listen=listen)
    write_json(folder / "report" / "sequence.json", matrices(folder))
    return Sequence(folder)


def _first_name(specs: Listed[Any]) -> str | None:
    """The name of the task that the first of these makes; None of none."""
    return make_tasks(specs[0])[0].name if specs else None


def matrices(folder: str | Path) -> dict[str, Any]:
    """What the sequences in a folder came to, as plain JSON values; None where nothing is known.

    Returns:
        "formulas": what the metrics are; "classes": of every task of a split; "sequences": for each
        its arm, order, seed, tasks and runs, "R" of (K + 1, K + 1) with row and column 0 for the
        base, "metrics", and "lost", for every column how much is lost since its best score, and
        after which task most of it went, and its "course", see `forgetless.studies.course`;
        "arms": for each the mean of every metric over seeds and orders with its 95 % interval, and
        by order the mean matrix "R" over seeds; "pairs": see `pairs`. Of a classifier whose tasks
        share a new head these are of its accuracy over all classes of the head (class-incremental),
        and "task_incremental" has "sequences", "arms" and "pairs" of that over each task's own;
        None of others.

    Raises:
        FileNotFoundError: there are no sequences in the folder.
    """
    folder = Path(folder)
    index = read_json(folder / "runs.json", damaged_as_missing=True)
    if not index.get("sequences"):
        raise FileNotFoundError(f"no sequences in {folder}; 'forgetless sequence' makes some")
    cells = [_cells(folder, index, chain) for chain in index["sequences"]]
    found, by_task = (
        [
            _sequence(folder, chain, own, part)
            for chain, own in zip(index["sequences"], cells, strict=True)
        ]
        for part in ("value", _BY_TASK)
    )
    for each in found:
        each["course"] = course(folder, _columns(index, each), each, each["R"])
    has_classes = any(_BY_TASK in cell for own in cells for row in own for cell in row)
    return {
        "name": folder.resolve().name,
        "measured_by": index["measured_by"],
        "knowledge": index["knowledge"],
        "classes": index.get("classes", {}),
        "formulas": FORMULAS,
        "sequences": found,
        **_summed_up(found),
        "task_incremental": {"sequences": by_task, **_summed_up(by_task)} if has_classes else None,
    }


_BY_TASK = "task_accuracy"
"""What a task measures beside the value where a head has more classes than it."""


def _cells(
    folder: Path, index: Mapping[str, Any], chain: Mapping[str, Any]
) -> list[list[dict[str, Any]]]:
    """For every cell of a matrix the score that was measured, with its extra; empty of none."""
    runs = [RunFolder(folder / run_id) for run_id in chain["runs"]]
    columns = _columns(index, chain)

    def row(run: RunFolder, phase: Phase) -> list[dict[str, Any]]:
        found = []
        for task in columns:
            path = run.scores(phase, task) if task else None
            score = read_json(path, damaged_as_missing=True) if path else {}
            found.append({**score.get("extra", {}), **score})
        return found

    unmeasured: list[list[dict[str, Any]]] = [
        [{} for _ in columns] for _ in range(len(columns) - 1 - len(runs))
    ]
    return [row(runs[0], "base"), *unmeasured, *(row(run, "final") for run in runs)]


def _columns(index: Mapping[str, Any], chain: Mapping[str, Any]) -> list[str | None]:
    """What measures each column of a sequence's matrix."""
    return [index["knowledge"], *(index["measured_by"][task] for task in chain["tasks"])]


def _sequence(
    folder: Path, chain: Mapping[str, Any], cells: Listed[Listed[Mapping[str, Any]]], part: str
) -> dict[str, Any]:
    """The matrix of one sequence and its metrics, of that part of a task's score or its value.

    Knowledge has its value in any case: it is asked under a head that learned all of its classes.
    """
    scores = [
        [row[0].get("value", math.nan)]
        + [cell.get(part, cell.get("value", math.nan)) for cell in row[1:]]
        for row in cells
    ]
    higher = [
        next((cell["higher_is_better"] for cell in column if "higher_is_better" in cell), True)
        for column in zip(*cells, strict=True)
    ]
    R = np.array(scores, np.float64) * np.where(higher, 1.0, -1.0)
    learned = R[1:, 1:].diagonal()
    if chain.get("bound") == "separate":
        metrics = dict.fromkeys(FORMULAS, math.nan)
        metrics["ACC"] = metrics["learning"] = float(learned.mean())
        metrics["knowledge lost"] = float(R[0, 0] - R[1:, 0].mean())
    else:
        metrics = continual_metrics(R[1:, 1:], R[0, 1:], variants=True)
        metrics["learning"] = float(learned.mean())
        metrics["knowledge lost"] = float(R[0, 0] - R[-1, 0])
    after = ["base", *chain["tasks"]]
    is_a_sequence = chain.get("bound") is None
    return {
        **chain,
        "R": [[_known(value) for value in row] for row in R * np.where(higher, 1.0, -1.0)],
        "higher_is_better": higher,
        "metrics": {name: _known(metrics[name]) for name in FORMULAS},
        "lost": [
            _lost(R[j:, j] if is_a_sequence else R[:0, j], after[j:]) for j in range(len(after))
        ],
        "status": [
            RunFolder(folder / run_id).read().get("status", "pending") for run_id in chain["runs"]
        ],
    }


def _lost(scores: NDArray[np.float64], after: Listed[str]) -> dict[str, Any]:
    """What became of one column, from the row in which its task was learned."""
    if not scores.size or np.isnan(scores).any():
        return {"lost": None, "most_after": None}
    falls = scores[:-1] - scores[1:]
    worst = int(falls.argmax()) if falls.size and falls.max() > 0 else None
    return {
        "lost": float(scores.max() - scores[-1]),
        "most_after": None if worst is None else after[worst + 1],
    }


def _summed_up(found: Listed[Mapping[str, Any]]) -> dict[str, Any]:
    return {"arms": _arms(found), "pairs": pairs(found)}


def pairs(found: Listed[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every two arms by each metric of `COMPARED`, over the sequences that both have.

    Returns:
        For each "metric", "arm" and "other" the mean "difference" of the first less the second over
        the same orders and seeds (over seeds alone with a bound, which has no order), its 95 %
        interval "low" and "high", their number "n", "p" by Student's test on the differences,
        corrected by Holm's method for all pairs of the metric, and "verdict": "better" or "worse"
        where p is below 0.05, else "level". Where fewer than two pairs are known, p is 1.
    """
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for each in found:
        by_arm.setdefault(each["arm"], []).append(each)
    compared = []
    for metric in COMPARED:
        rows = []
        for arm, other in combinations(by_arm, 2):
            differences = _differences(by_arm[arm], by_arm[other], metric)
            row = {"metric": metric, "arm": arm, "other": other, **mean_over(differences), "p": 1.0}
            if row["low"] is not None:
                error = mean_stderr(np.array(differences, np.float64)).stderr
                row["p"] = t_probability(row["mean"], error, row["n"] - 1)
            rows.append(row)
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
            mean = row.pop("mean")
            better = p < 0.05 and (mean > 0) != (metric in LESS_IS_BETTER)
            verdict = "level" if p >= 0.05 else "better" if better else "worse"
            compared.append({**row, "difference": mean, "p": p, "verdict": verdict})
    return compared


def _differences(
    one: Listed[Mapping[str, Any]], other: Listed[Mapping[str, Any]], metric: str
) -> list[float | None]:
    """Of a metric between the sequences of two arms that have the same seed and order."""
    bounded = any(each.get("bound") for each in (*one, *other))

    def by_case(arm: Listed[Mapping[str, Any]]) -> dict[object, float]:
        cases: dict[object, list[float]] = {}
        for each in arm:
            case = each["seed"] if bounded else (each["seed"], each["order"])
            value = each["metrics"][metric]
            cases.setdefault(case, []).append(math.nan if value is None else value)
        return {case: float(np.mean(values)) for case, values in cases.items()}

    first, second = by_case(one), by_case(other)
    # Rounded, so that sums in another order are no difference.
    return [_known(round(first[case] - second[case], 12)) for case in first if case in second]


def _arms(found: Listed[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds and orders, in the order of the definition."""
    arms = []
    for arm in dict.fromkeys(each["arm"] for each in found):
        own = [each for each in found if each["arm"] == arm]
        orders = {}
        for order in dict.fromkeys(each["order"] for each in own):
            alike = [each for each in own if each["order"] == order]
            mean = np.array([each["R"] for each in alike], np.float64).mean(axis=0)
            orders[order] = {
                "tasks": alike[0]["tasks"],
                "bound": alike[0].get("bound"),
                "seeds": [each["seed"] for each in alike],
                "R": [[_known(value) for value in row] for row in mean],
            }
        metrics = {name: mean_over([each["metrics"][name] for each in own]) for name in FORMULAS}
        arms.append({"arm": arm, "metrics": metrics, "orders": orders})
    return arms


def row_names(order: Mapping[str, Any]) -> list[str | None]:
    """What each row of the matrix of an order is called; None for one that was never measured."""
    tasks = order["tasks"]
    if order.get("bound") == "joint":  # one run learns all of them
        return ["base", *[None] * (len(tasks) - 1), "all together"]
    says = "{} alone" if order.get("bound") == "separate" else "after {}"
    return ["base", *(says.format(task) for task in tasks)]


def metric_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each sequence of `matrices`, for a table of one row each.

    "answers" are those "of all" classes of a shared head or, in further rows, "of the task"; of
    models that have no classes "of all" alone.
    """
    parts = {"of all": found["sequences"]}
    if found["task_incremental"]:
        parts["of the task"] = found["task_incremental"]["sequences"]
    return [
        {
            "answers": answers,
            **{key: each.get(key) for key in METRIC_COLUMNS[1:5]},
            **each["metrics"],
        }
        for answers, sequences in parts.items()
        for each in sequences
    ]


def mean_over(values: Listed[float | None]) -> dict[str, Any]:
    """Mean over sequences with Student's 95 % interval; no mean where one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return {"mean": None, "low": None, "high": None, "n": len(known)}
    mean = mean_stderr(known)
    low, high = t_interval(mean.value, mean.stderr, mean.n - 1) if mean.n > 1 else (None, None)
    return {"mean": mean.value, "low": low, "high": high, "n": mean.n}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
