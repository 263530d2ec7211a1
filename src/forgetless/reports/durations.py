"""Learning and forgetting along one training: scores at several steps, and at matched learning."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from forgetless.core.metrics import forgetting_at_matched_learning
from forgetless.reports.arms import Arm, without_rate
from forgetless.reports.compared import result_of
from forgetless.reports.evidence import Evidence, Row, Task, number, tasks_of
from forgetless.scores.files import Phase
from forgetless.scores.seeds import Estimate, Ranking, Sample, estimate, rank
from forgetless.tasks.base import TaskResult

MAX_LEVELS = 6

# Of one run: the score rows by step (or by learning rate), then by task.
Path = Mapping[float, Mapping[str, Row]]
# A row's score with its items, where these were kept.
Results = Callable[[Row], TaskResult | None]


@dataclass(frozen=True)
class Moment:
    """An arm after some steps, over its seeds.

    Attributes:
        step: of the training; 0 is the base.
        tokens: that were trained on until then, mean over the seeds; None where not known.
        scores: by the name of the task, or of the average of several.
    """

    step: int
    tokens: float | None
    scores: Mapping[str, Estimate]


@dataclass(frozen=True)
class Track:
    """One arm at one learning rate, through its steps.

    Attributes:
        paths: by seed.
    """

    label: str
    learning_rate: float | None
    paths: Mapping[float, Path]
    moments: tuple[Moment, ...]


@dataclass(frozen=True)
class Course:
    """The tracks of a study, and what they are measured by.

    Attributes:
        labels: of all arms, in the order of their colours.
        tracks: one an arm, at its best learning rate.
        learning: the learning tasks.
        forgetting: the forgetting tasks; before them their average, where two or more are shares.
    """

    labels: tuple[str, ...]
    tracks: tuple[Track, ...]
    learning: tuple[Task, ...]
    forgetting: tuple[Task, ...]

    @property
    def steps(self) -> list[int]:
        """Every step at which something was measured, the base left out."""
        found = {moment.step for track in self.tracks for moment in track.moments}
        return sorted(found - {0})


@dataclass(frozen=True)
class Matched:
    """What every arm keeps where all have learned equally much.

    Attributes:
        along: what was interpolated, "steps" or "learning rates".
        learning: the task that says how much was learned.
        kept: the task or average that is compared.
        levels: of the learning task, the most learned last.
        kept_at: by arm, one estimate a level; None where a seed of the arm did not get there.
        rankings: one a level, of the arms in the order of `kept_at` that have several seeds.
    """

    along: str
    learning: Task
    kept: Task
    levels: tuple[float, ...]
    kept_at: Mapping[str, tuple[Estimate | None, ...]]
    rankings: tuple[Ranking, ...]


# ---------------------------------------------------------------------------------- over the steps


def course(evidence: Evidence, arms: Sequence[Arm]) -> Course | None:
    """Each arm's best setting through its steps; None unless some run was scored at several."""
    owner = {run.run_id: arm.label for arm in arms for run in arm.best.runs}
    runs = {run.run_id: run for arm in arms for run in arm.best.runs}
    rows = [row for row in evidence.curve if row["run_id"] in owner]

    def result(row: Row) -> TaskResult | None:
        step = None if row["step"] in (0, row["steps"]) else row["step"]
        phase: Phase = "base" if row["step"] == 0 else "final"
        return result_of(runs[row["run_id"]], phase, row["task"], step)

    labels = [arm.label for arm in arms]
    return _course(rows, evidence.tasks, labels, lambda row: owner[row["run_id"]], result)


def course_of_rows(rows: Sequence[Row]) -> Course | None:
    """As `course`, of the rows of a curve.csv alone; each rate of an arm is a track of its own."""
    done = [row for row in rows if row["status"] == "done"]
    tried = {(arm_of_row(row), row["learning_rate"]) for row in done}
    several = [arm for arm, count in Counter(arm for arm, _ in tried).items() if count > 1]

    def label_of(row: Row) -> str:
        arm = arm_of_row(row)
        return f"{arm} at {row['learning_rate']:g}" if arm in several else arm

    labels = list(dict.fromkeys(map(label_of, done)))
    return _course(done, tasks_of(done), labels, label_of, result_of_row)


def arm_of_row(row: Row) -> str:
    """The arm of a row of results.csv or curve.csv, without its learning rate."""
    return without_rate(str(row.get("arm") or "")) or str(row.get("method"))


def _course(
    rows: Sequence[Row],
    tasks: Sequence[Task],
    labels: Sequence[str],
    label_of: Callable[[Row], str],
    results: Results,
) -> Course | None:
    learning = tuple(task for task in tasks if task.kind == "learning")
    single = [task for task in tasks if task.kind == "forgetting"]
    mean = average(single)
    forgetting = (*([mean] if mean else []), *single)
    tracks = [
        _track(
            label,
            [row for row in rows if label_of(row) == label],
            (*learning, *forgetting),
            results,
        )
        for label in labels
    ]
    found = tuple(track for track in tracks if track.moments)
    paths = [path for track in found for path in track.paths.values()]
    has_several = any(len([step for step in path if step > 0]) > 1 for path in paths)
    if not (learning and forgetting and has_several):
        return None
    return Course(tuple(labels), found, learning, forgetting)


def average(tasks: Sequence[Task]) -> Task | None:
    """The mean score of the tasks that are shares, as a task; None for fewer than two."""
    shares = tuple(task.name for task in tasks if task.is_share)
    if len(shares) < 2:
        return None
    kind = tasks[0].kind
    return Task(f"{len(shares)} tasks", kind, "mean score", True, True, mean_of=shares)


def _track(label: str, rows: Sequence[Row], tasks: Sequence[Task], results: Results) -> Track:
    paths = _paths(rows, "step")
    moments = []
    for step in sorted({step for path in paths.values() for step in path}):
        seeds = {seed: path[step] for seed, path in paths.items() if step in path}
        estimates = {task.name: _estimate(step, seeds, task, results) for task in tasks}
        scores = {name: score for name, score in estimates.items() if score}
        tokens = [
            number(row.get("tokens")) for of_seed in seeds.values() for row in of_seed.values()
        ]
        known = [count for count in tokens if count is not None]
        moments.append(Moment(int(step), fmean(known) if known else None, scores))
    rate = next((number(row.get("learning_rate")) for row in rows), None)
    return Track(label, rate, paths, tuple(moments))


def _paths(rows: Iterable[Row], along: str) -> dict[float, Path]:
    """The score rows of every seed, by rising value of the column `along`."""
    found: dict[float, dict[float, dict[str, Row]]] = {}
    for row in rows:
        place = number(row.get(along))
        if place is not None and number(row.get("score")) is not None:
            of_seed = found.setdefault(number(row.get("seed")) or 0.0, {})
            of_seed.setdefault(place, {})[row["task"]] = row
    return {seed: dict(sorted(found[seed].items())) for seed in sorted(found)}


def _estimate(
    step: float, seeds: Mapping[float, Mapping[str, Row]], task: Task, results: Results
) -> Estimate | None:
    """Over the seeds that were measured here; the base, which all seeds repeat, counts once."""
    found = {seed: score for seed, row in seeds.items() if (score := _score(row, task, results))}
    if step == 0:
        found = dict(list(found.items())[:1])
    return estimate(Sample.of(found, is_share=task.is_share)) if found else None


def _score(of_seed: Mapping[str, Row], task: Task, results: Results) -> TaskResult | None:
    """One seed's score; of an average nothing if a part is missing."""
    rows = [of_seed.get(name) for name in task.mean_of or (task.name,)]
    found = [result for row in rows if row and (result := results(row))]
    if len(found) < len(rows):
        return None
    if not task.mean_of:
        return found[0]
    # The tasks have different questions, so their errors are independent.
    error = math.hypot(*(result.stderr for result in found)) / len(found)
    value = fmean(result.value for result in found)
    return replace(found[0], task=task.name, value=value, stderr=error, n=0, items=())


def result_of_row(row: Row) -> TaskResult | None:
    """The score of a row of curve.csv or results.csv, which has no items."""
    value, stderr, n = (number(row.get(column)) for column in ("score", "stderr", "n"))
    return None if value is None else TaskResult(
        task=str(row["task"]), metric=str(row["metric"]), value=value,
        stderr=math.nan if stderr is None else stderr, n=int(n or 0),
        higher_is_better=row["higher_is_better"] is not False, fingerprint="", seconds=0.0,
    )  # fmt: skip


# ------------------------------------------------------------------------------ matched learning


def matched(evidence: Evidence, arms: Sequence[Arm], found: Course | None) -> Matched | None:
    """What the arms keep at equal learning, each seed interpolated along its own training.

    Where no run was scored at several steps, along the learning rates of each arm; None where there
    is nothing to match.
    """
    return matched_over_steps(found) if found else _matched_over_rates(evidence, arms)


def matched_over_steps(found: Course) -> Matched | None:
    """What the arms of a course keep at equal learning; None where there is nothing to match."""
    paths = {track.label: track.paths for track in found.tracks}
    return _matched(paths, found.learning[0], found.forgetting[0], "steps")


def _matched_over_rates(evidence: Evidence, arms: Sequence[Arm]) -> Matched | None:
    learning = evidence.first("learning")
    single = [task for task in evidence.tasks if task.kind == "forgetting"]
    if learning is None or not single or all(len(arm.settings) < 2 for arm in arms):
        return None
    paths = {}
    for arm in arms:
        ids = {run.run_id for setting in arm.settings for run in setting.runs}
        rows = (row for row in evidence.rows if row["run_id"] in ids)
        paths[arm.label] = _paths(rows, "learning_rate")
    return _matched(paths, learning, average(single) or single[0], "learning rates")


def _matched(
    paths: Mapping[str, Mapping[float, Path]], learning: Task, kept: Task, along: str
) -> Matched | None:
    """None where there is nothing to match: fewer than two arms, or none that others reach."""
    curves = {
        label: {seed: _curve(path, learning, kept) for seed, path in own.items()}
        for label, own in paths.items()
    }
    spans = [span for own in curves.values() if (span := _span([*own.values()], learning))]
    levels = _levels(spans, learning) if spans else ()
    if not levels:
        return None
    sizes = {label: _num_items(own, kept) for label, own in paths.items()}
    samples = {
        label: [_at(own, level, kept, sizes[label]) for level in levels]
        for label, own in curves.items()
    }
    kept_at = {
        label: tuple(estimate(sample) if sample else None for sample in own)
        for label, own in samples.items()
    }
    rankings = [_ranked([own[i] for own in samples.values()]) for i in range(len(levels))]
    return Matched(along, learning, kept, levels, kept_at, tuple(rankings))


def _ranked(at: Sequence[Sample | None]) -> Ranking:
    """Of the arms with several seeds; one seed tells nothing of others."""
    samples = [sample if sample and len(sample.scores) > 1 else None for sample in at]
    values = [
        None if sample is None else sample.value if sample.higher_is_better else -sample.value
        for sample in samples
    ]
    return rank((values, samples))[0]


def _curve(path: Path, learning: Task, kept: Task) -> list[tuple[float, float]]:
    """(learned, kept) of one seed, in the order of what was varied; only what has both."""
    pairs = [
        (_score(row, learning, result_of_row), _score(row, kept, result_of_row))
        for row in path.values()
    ]
    return [(x.value, y.value) for x, y in pairs if x is not None and y is not None]


def _span(
    curves: Sequence[Sequence[tuple[float, float]]], task: Task
) -> tuple[float, float] | None:
    """From the least to the most learning that every seed passes, larger being more."""
    if not curves or not all(curves):
        return None
    signed = [[x if task.higher_is_better else -x for x, _ in curve] for curve in curves]
    low, high = max(min(own) for own in signed), min(max(own) for own in signed)
    return (low, high) if low < high else None


def _levels(spans: Sequence[tuple[float, float]], task: Task) -> tuple[float, ...]:
    """At most `MAX_LEVELS` round numbers that two arms or more pass, the most learned last."""
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    ticks = [tick for tick in round_numbers(low, high) if _num_passing(spans, tick) > 1]
    return tuple(tick if task.higher_is_better else -tick or 0.0 for tick in ticks[-MAX_LEVELS:])


def _num_passing(spans: Sequence[tuple[float, float]], level: float) -> int:
    return sum(low <= level <= high for low, high in spans)


def round_numbers(low: float, high: float, at_most: int = 12) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten strictly above `low` and up to `high`."""
    if not low < high:
        return []
    power = 10.0 ** math.floor(math.log10((high - low) / at_most))
    step = next(m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= at_most)
    first = math.floor(low / step + 1e-9) + 1
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _num_items(paths: Mapping[float, Path], task: Task) -> int | None:
    """The fewest that a score of the task stands on; None where it is not known."""
    scores = [_score(row, task, result_of_row) for path in paths.values() for row in path.values()]
    return min((score.n for score in scores if score is not None and score.n), default=None)


def _at(
    curves: Mapping[float, Sequence[tuple[float, float]]],
    level: float,
    kept: Task,
    num_items: int | None,
) -> Sample | None:
    """What each seed kept; None if one did not get there: the others alone would flatter."""
    values = {
        seed: forgetting_at_matched_learning(curve, level, kept.higher_is_better)
        for seed, curve in curves.items()
    }
    if not values or any(math.isnan(value) for value in values.values()):
        return None
    return Sample(
        values,
        num_items=num_items,
        is_share=kept.is_share,
        higher_is_better=kept.higher_is_better,
    )
