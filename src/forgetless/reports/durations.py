"""Learning and forgetting along one training: scores at several steps, and at matched learning."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from forgetless.core.metrics import forgetting_at_matched_learning
from forgetless.reports.arms import Arm, arm_of_row
from forgetless.reports.evidence import Evidence, Row, TaskInfo, number, result_of_row, tasks_of
from forgetless.scores.seeds import Estimate, Ranking, Sample, estimate, rank
from forgetless.tasks.base import TaskResult

MAX_LEVELS = 6

Path = Mapping[float, Mapping[str, TaskResult]]
"""Of one seed: the scores by step (or by learning rate), then by task."""


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
    """One arm at one learning rate, through its steps; `paths` by seed."""

    label: str
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
    learning: tuple[TaskInfo, ...]
    forgetting: tuple[TaskInfo, ...]

    @property
    def steps(self) -> list[int]:
        """Every step at which something was measured, the base left out."""
        return sorted({m.step for track in self.tracks for m in track.moments} - {0})


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
    learning: TaskInfo
    kept: TaskInfo
    levels: tuple[float, ...]
    kept_at: Mapping[str, tuple[Estimate | None, ...]]
    rankings: tuple[Ranking, ...]

    @property
    def has_seeds(self) -> bool:
        """Whether an arm has several."""
        return any(e and e.seeds > 1 for at in self.kept_at.values() for e in at)


# ---------------------------------------------------------------------------------- over the steps


def course(evidence: Evidence, arms: Sequence[Arm]) -> Course | None:
    """Each arm's best setting through its steps; None unless some run was scored at several."""
    runs = {run.run_id: run for arm in arms for run in arm.best.runs}
    labels = {run.run_id: arm.label for arm in arms for run in arm.best.runs}

    def result(row: Row) -> TaskResult | None:
        step = None if row["step"] in (0, row["steps"]) else row["step"]
        return runs[row["run_id"]].result("final" if row["step"] else "base", row["task"], step)

    rows = [row for row in evidence.curve if row["run_id"] in runs]
    by_arm = {arm.label: [r for r in rows if labels[r["run_id"]] == arm.label] for arm in arms}
    return _course(by_arm, evidence.tasks, result)


def course_of_rows(rows: Sequence[Row]) -> Course | None:
    """As `course`, of the rows of a curve.csv alone; each rate of an arm is a track of its own."""
    done = [row for row in rows if row["status"] == "done"]
    rates: dict[str, dict[float, list[Row]]] = {}
    for row in done:
        rates.setdefault(arm_of_row(row), {}).setdefault(row["learning_rate"], []).append(row)
    by_arm = {f"{arm} at {rate:g}" if len(at) > 1 else arm: own
              for arm, at in rates.items() for rate, own in at.items()}  # fmt: skip
    return _course(by_arm, tasks_of(done), result_of_row)


def _course(
    by_arm: Mapping[str, Sequence[Row]],
    tasks: Sequence[TaskInfo],
    result: Callable[[Row], TaskResult | None],
) -> Course | None:
    learning = tuple(task for task in tasks if task.kind == "learning")
    forgetting = with_average([task for task in tasks if task.kind == "forgetting"])
    tracks = []
    for label, rows in by_arm.items():
        paths = _paths(rows, "step", forgetting, result)
        tokens: dict[float, list[float]] = {}
        for row in rows:
            if (count := number(row.get("tokens"))) is not None:
                tokens.setdefault(row["step"], []).append(count)
        moments = []
        for step in sorted({step for path in paths.values() for step in path}):
            scores = {}
            for task in (*learning, *forgetting):
                known = {seed: path[step][task.name] for seed, path in paths.items()
                         if task.name in path.get(step, {})}  # fmt: skip
                if step == 0:  # the base, which all seeds repeat, counts once
                    known = dict(list(known.items())[:1])
                if known:
                    scores[task.name] = estimate(Sample.of(known, is_share=task.is_share))
            mean = fmean(tokens[step]) if step in tokens else None
            moments.append(Moment(int(step), mean, scores))
        if moments:
            tracks.append(Track(label, paths, tuple(moments)))
    trained = [path.keys() - {0} for track in tracks for path in track.paths.values()]
    if not (learning and forgetting and any(len(steps) > 1 for steps in trained)):
        return None
    return Course(tuple(by_arm), tuple(tracks), learning, forgetting)


def with_average(tasks: Sequence[TaskInfo]) -> tuple[TaskInfo, ...]:
    """The tasks; before them the mean score of those that are shares, where there are several."""
    shares = tuple(task.name for task in tasks if task.is_share)
    if len(shares) < 2:
        return tuple(tasks)
    name, kind = f"{len(shares)} tasks", tasks[0].kind
    return (TaskInfo(name, kind, "mean score", True, True, mean_of=shares), *tasks)


def _paths(
    rows: Iterable[Row],
    along: str,
    forgetting: Sequence[TaskInfo],
    result: Callable[[Row], TaskResult | None] = result_of_row,
) -> dict[float, Path]:
    """The scores of every seed, by rising value of the column `along`, averages among them."""
    found: dict[float, dict[float, dict[str, TaskResult]]] = {}
    for row in rows:
        place, score = number(row.get(along)), result(row)
        if place is not None and score is not None:
            of_seed = found.setdefault(number(row.get("seed")) or 0.0, {})
            of_seed.setdefault(place, {})[row["task"]] = score
    means = [task for task in forgetting if task.mean_of]
    for at in (at for of_seed in found.values() for at in of_seed.values()):
        for task in means:
            parts = [at[name] for name in task.mean_of if name in at]
            if len(parts) == len(task.mean_of):  # a mean without a part would be another one
                # The tasks have different questions, so their errors are independent.
                stderr = math.hypot(*(part.stderr for part in parts)) / len(parts)
                value = fmean(part.value for part in parts)
                at[task.name] = replace(parts[0], value=value, stderr=stderr, n=0, items=())
    return {seed: dict(sorted(found[seed].items())) for seed in sorted(found)}


# ------------------------------------------------------------------------------ matched learning


def matched(evidence: Evidence, arms: Sequence[Arm], found: Course | None) -> Matched | None:
    """What the arms keep at equal learning, each seed interpolated along its own training.

    Where no run was scored at several steps, along the learning rates of each arm; None where there
    is nothing to match.
    """
    if found:
        return matched_over_steps(found)
    learning = evidence.first("learning")
    forgetting = with_average([task for task in evidence.tasks if task.kind == "forgetting"])
    if learning is None or not forgetting or all(len(arm.settings) < 2 for arm in arms):
        return None
    paths = {}
    for arm in arms:
        ids = {run.run_id for setting in arm.settings for run in setting.runs}
        rows = [row for row in evidence.rows if row["run_id"] in ids]
        paths[arm.label] = _paths(rows, "learning_rate", forgetting)
    return _matched(paths, learning, forgetting[0], "learning rates")


def matched_over_steps(found: Course) -> Matched | None:
    """What the arms of a course keep at equal learning; None where there is nothing to match."""
    paths = {track.label: track.paths for track in found.tracks}
    return _matched(paths, found.learning[0], found.forgetting[0], "steps")


def _matched(
    paths: Mapping[str, Mapping[float, Path]], learning: TaskInfo, kept: TaskInfo, along: str
) -> Matched | None:
    """None where there is nothing to match: fewer than two arms, or none that others reach."""
    # (learned, kept) of each seed, in the order of what was varied; only what has both.
    curves = {
        label: {
            seed: [(at[learning.name], at[kept.name]) for at in path.values()
                   if learning.name in at and kept.name in at]
            for seed, path in own.items()
        }
        for label, own in paths.items()
    }  # fmt: skip
    sign = 1 if learning.higher_is_better else -1
    spans = []
    for own in curves.values():
        # From the least to the most learning that every seed passes, larger being more.
        learned = [[sign * x.value for x, _ in curve] for curve in own.values()]
        if learned and all(learned):
            spans.append((max(map(min, learned)), min(map(max, learned))))
    spans = [(low, high) for low, high in spans if low < high]
    if not spans:
        return None
    ticks = round_numbers(min(low for low, _ in spans), max(high for _, high in spans))
    passed = [tick for tick in ticks if sum(low <= tick <= high for low, high in spans) > 1]
    levels = tuple(sign * tick or 0.0 for tick in passed[-MAX_LEVELS:])
    if not levels:
        return None
    samples = {label: [_at(own, at, kept) for at in levels] for label, own in curves.items()}
    kept_at = {label: tuple(estimate(sample) if sample else None for sample in own)
               for label, own in samples.items()}  # fmt: skip
    direction, rankings = 1 if kept.higher_is_better else -1, []
    for of_level in zip(*samples.values(), strict=True):
        # One seed tells nothing of others.
        several = [sample if sample and len(sample.scores) > 1 else None for sample in of_level]
        values = [sample and direction * sample.value for sample in several]
        rankings.append(rank((values, several))[0])
    return Matched(along, learning, kept, levels, kept_at, tuple(rankings))


def round_numbers(low: float, high: float, at_most: int = 12) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten strictly above `low` and up to `high`."""
    if not low < high:
        return []
    power = 10.0 ** math.floor(math.log10((high - low) / at_most))
    step = next(m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= at_most)
    first, last = (math.floor(end / step + 1e-9) for end in (low, high))
    return [float(f"{i * step:.12g}") for i in range(first + 1, last + 1)]


def _at(
    curves: Mapping[float, Sequence[tuple[TaskResult, TaskResult]]], level: float, kept: TaskInfo
) -> Sample | None:
    """What each seed kept; None if one did not get there: the others alone would flatter."""
    values = {}
    for seed, curve in curves.items():
        points = [(x.value, y.value) for x, y in curve]
        values[seed] = forgetting_at_matched_learning(points, level, kept.higher_is_better)
    if not values or any(math.isnan(value) for value in values.values()):
        return None
    sizes = [y.n for curve in curves.values() for _, y in curve if y.n]
    return Sample(
        values,
        num_items=min(sizes, default=None),
        is_share=kept.is_share,
        higher_is_better=kept.higher_is_better,
    )
