"""The numbers that the page's scripts draw, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from forgetless.reports.arms import Arm
from forgetless.reports.changes import FlippedItem, TaskChanges
from forgetless.reports.durations import Course
from forgetless.reports.evidence import Evidence, Run, Task, number
from forgetless.scores.seeds import Estimate

MAX_CURVE_POINTS = 240
# What the page lists; the rest stays in the items folder of the runs.
MAX_LISTED = {"forgetting": 1500, "learning": 60}
MAX_KEPT = 150


def payload(
    evidence: Evidence, arms: Sequence[Arm], course: Course | None, counted: Sequence[TaskChanges]
) -> dict[str, Any]:
    """Tasks, arms with their settings, curves and flips; None where nothing was measured."""
    return {
        "tasks": [_task(task) for task in evidence.tasks],
        "arms": [_arm(arm, evidence.tasks) for arm in arms],
        "bases": _bases(arms, evidence.tasks),
        "course": _course(course) if course else None,
        "curves": [curve for i, arm in enumerate(arms) for curve in _curves(i, arm)],
        "probes": [probed for i, arm in enumerate(arms) for probed in _probes(i, arm)],
        "flips": [_flips(of_task) for of_task in counted],
    }


def _task(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "kind": task.kind,
        "metric": task.metric,
        "higher": task.higher_is_better,
        "share": task.is_share,
    }


def _arm(arm: Arm, tasks: Sequence[Task]) -> dict[str, Any]:
    settings = [
        {
            "rate": setting.learning_rate,
            "best": setting is arm.best,
            "update": _round(setting.mean_of("relative_update")),
            "kept": {task.name: _estimate(setting.kept(task)) for task in tasks},
            "final": {task.name: _estimate(setting.final(task)) for task in tasks},
            "seeds": [_seed(run, tasks) for run in setting.runs],
        }
        for setting in arm.settings
    ]
    return {"label": arm.label, "settings": settings}


def _seed(run: Run, tasks: Sequence[Task]) -> dict[str, Any]:
    kept, final = {}, {}
    for task in tasks:
        row: Mapping[str, Any] = run.rows.get(task.name, {})
        final[task.name] = _round(number(row.get("score")))
        kept[task.name] = _round(number(row.get("retention" if task.is_share else "score")))
    return {"seed": run.settings.get("seed"), "kept": kept, "final": final}


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {
        "value": _round(estimate.value),
        "low": _round(estimate.low) if estimate.has_error else None,
        "high": _round(estimate.high) if estimate.has_error else None,
        "n": estimate.num_items,
        "seeds": estimate.seeds,
    }


def _bases(arms: Sequence[Arm], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """The score of each base model on each task, once."""
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        scores = found.setdefault(arm.best.runs[0].base, {})
        for task in tasks:
            base = arm.best.measured[task.name].base
            if base is not None:
                scores.setdefault(task.name, _estimate(base))
    return [{"name": name, "scores": scores} for name, scores in found.items()]


def _course(course: Course) -> dict[str, Any]:
    """What the arms learned and kept at every step."""
    return {
        "learning": [_task(task) for task in course.learning],
        "forgetting": [_task(task) for task in course.forgetting],
        "tracks": [
            {
                "arm": course.labels.index(track.label),
                "moments": [
                    {
                        "step": moment.step,
                        "tokens": _round(moment.tokens),
                        "scores": {name: _estimate(e) for name, e in moment.scores.items()},
                    }
                    for moment in track.moments
                ],
            }
            for track in course.tracks
        ],
    }


def _curves(index: int, arm: Arm) -> list[dict[str, Any]]:
    return [
        {
            "arm": index,
            "rate": setting.learning_rate,
            "best": setting is arm.best,
            "seed": run.settings.get("seed"),
            "points": [[step, _round(loss)] for step, loss in _thinned(run.log())],
        }
        for setting in arm.settings
        for run in setting.runs
    ]


def _probes(index: int, arm: Arm) -> list[dict[str, Any]]:
    """What was measured on the way, of the runs at the arm's best setting."""
    found = []
    for run in arm.best.runs:
        probes = run.probes()
        names = dict.fromkeys(name for _, values in probes for name in values)
        if names:
            found.append(
                {
                    "arm": index,
                    "seed": run.settings.get("seed"),
                    "values": {
                        name: [[step, _round(v[name])] for step, v in probes if name in v]
                        for name in names
                    },
                    "over": run.exceeded.get("step"),
                    "kept": run.exceeded.get("kept_step"),
                }
            )
    return found


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `MAX_CURVE_POINTS` points, the means of equal stretches of the curve."""
    if len(points) <= MAX_CURVE_POINTS:
        return list(points)
    edges = [i * len(points) // MAX_CURVE_POINTS for i in range(MAX_CURVE_POINTS + 1)]
    parts = [points[a:b] for a, b in pairwise(edges)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def _flips(of_task: TaskChanges) -> dict[str, Any]:
    """The lists are cut to what a page can hold; the counts are whole."""
    most = MAX_LISTED[of_task.task.kind]
    arms: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    for change in of_task.counted:
        lost, gained = change.flipped("lost"), change.flipped("gained")
        kept = change.kept_items[:: max(1, -(-len(change.kept_items) // MAX_KEPT))]

        def listed(items: Sequence[FlippedItem]) -> list[list[Any]]:
            return [
                [places.setdefault(item.id, len(places)), item.answer, item.seeds]
                for item in items[:most]
            ]

        arms.append(
            {
                "label": change.label,
                "seeds": len(change.counted),
                "lost": listed(lost),
                "gained": listed(gained),
                "kept": [[places.setdefault(item, len(places)), None, 0] for item in kept],
                "totals": {
                    "lost": len(lost),
                    "gained": len(gained),
                    "kept": len(change.kept_items),
                },
            }
        )
    return {
        "task": of_task.task.name,
        "kind": of_task.task.kind,
        "questions": [list(of_task.questions[item]) for item in places],
        "arms": arms,
    }


def _round(value: float | None) -> float | None:
    """Six significant digits: more than a pixel, a third of the bytes."""
    return None if value is None else float(f"{value:.6g}")
