"""The numbers that the page's scripts draw, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from forgetless.reports.arms import Arm
from forgetless.reports.durations import Course
from forgetless.reports.evidence import Evidence, Run, Task, number
from forgetless.reports.flips import MAX_KEPT, MAX_LISTED, ArmFlips, Flip, TaskFlips
from forgetless.scores.seeds import Estimate

MAX_CURVE_POINTS = 240


def payload(
    evidence: Evidence, arms: Sequence[Arm], course: Course | None, flips: Sequence[TaskFlips]
) -> dict[str, Any]:
    """Tasks, arms with their settings, curves and flips; None where nothing was measured."""
    return {
        "tasks": [_task(task) for task in evidence.tasks],
        "arms": [_arm(arm, evidence.tasks) for arm in arms],
        "bases": _bases(arms, evidence.tasks),
        "course": _course(course) if course else None,
        "curves": [curve for i, arm in enumerate(arms) for curve in _curves(i, arm)],
        "probes": [probed for i, arm in enumerate(arms) for probed in _probes(i, arm)],
        "flips": [_flips(of_task) for of_task in flips],
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


def _flips(of_task: TaskFlips) -> dict[str, Any]:
    """The lists are cut to what a page can hold; the counts are whole."""
    listed = MAX_LISTED[of_task.task.kind]
    wanted = [
        item
        for arm in of_task.arms
        for item in (
            *(flip.item for flip in arm.lost_items[:listed]),
            *(flip.item for flip in arm.gained_items[:listed]),
            *_spread(arm.kept_items),
        )
    ]
    place = {item: i for i, item in enumerate(dict.fromkeys(wanted))}
    return {
        "task": of_task.task.name,
        "kind": of_task.task.kind,
        "questions": [list(of_task.questions[item]) for item in place],
        "arms": [_arm_flips(arm, place, listed) for arm in of_task.arms],
    }


def _arm_flips(arm: ArmFlips, place: Mapping[str, int], listed: int) -> dict[str, Any]:
    def rows(flips: Sequence[Flip]) -> list[list[Any]]:
        return [[place[flip.item], flip.answer, flip.seeds] for flip in flips[:listed]]

    return {
        "label": arm.label,
        "seeds": arm.seeds,
        "lost": rows(arm.lost_items),
        "gained": rows(arm.gained_items),
        "kept": [[place[item], None, 0] for item in _spread(arm.kept_items)],
        "totals": {
            "lost": len(arm.lost_items),
            "gained": len(arm.gained_items),
            "kept": len(arm.kept_items),
        },
    }


def _spread(items: Sequence[str]) -> list[str]:
    """At most `MAX_KEPT` items from all over the list."""
    step = max(1, -(-len(items) // MAX_KEPT))
    return list(items[::step])


def _round(value: float | None) -> float | None:
    """Six significant digits: more than a pixel, a third of the bytes."""
    return None if value is None else float(f"{value:.6g}")
