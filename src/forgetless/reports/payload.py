"""What the page's scripts draw and list, as plain JSON values; scores come with their words."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from forgetless.reports.aftercare import RESIDUAL, TRAINED, Used, layers_chart, settings, spectra_of
from forgetless.reports.arms import Arm
from forgetless.reports.changes import FlippedItem, TaskChanges
from forgetless.reports.durations import Course
from forgetless.reports.evidence import RunFiles, TaskInfo, number
from forgetless.reports.findings import Findings
from forgetless.reports.numbers import NOT_MEASURED, amount, interval_words, probe_words, unit
from forgetless.scores.seeds import Estimate

MAX_CURVE_POINTS = 240
MAX_KEPT = 150


def payload(found: Findings) -> dict[str, Any]:
    """Labels, charts and changed items; arms go by their places, and a chart may be missing."""
    arms = found.arms
    places = {arm.label: i for i, arm in enumerate(arms)}
    content = {
        "arms": list(places),
        "plane": _plane(found.evidence.tasks, arms),
        "course": course_chart(found.course) if found.course else None,
        "aftercare": _aftercare(settings(arms, found.evidence.tasks), found, places),
        "layers": layers_chart(spectra_of(arms), places),
        "curves": [
            {"arm": i, "best": setting is arm.best, "points": points}
            for i, arm in enumerate(arms)
            for setting in arm.settings
            for run in setting.runs
            if (points := _thinned(run.log()))
        ],
        "probes": _probes(arms),
        "flips": [
            _flips(of_task, places, found.pictures.places)
            for of_task in found.changes
            if of_task.counted
        ],
    }
    return {name: part for name, part in content.items() if part or name in ("arms", "flips")}


# ------------------------------------------------------------------- learning against forgetting


def _plane(tasks: Sequence[TaskInfo], arms: Sequence[Arm]) -> dict[str, Any] | None:
    """Every arm at every learning rate, and the bases; None without a score of either kind."""
    learning = [task for task in tasks if task.kind == "learning"]
    forgetting = [task for task in tasks if task.kind == "forgetting"]
    points: list[dict[str, Any]] = []
    bases: dict[str, dict[str, Any]] = {}
    for i, arm in enumerate(arms):
        for setting in arm.settings:
            rows = [("seeds", str(len(setting.runs)))]
            if setting.learning_rate is not None:
                rows.append(("learning rate", f"{setting.learning_rate:g}"))
            if (update := setting.mean_of("relative_update")) is not None:
                rows.append(("update ‖ΔW‖/‖W‖", f"{update:.3g}"))
            learned = {task: setting.final(task) for task in learning}
            kept = {task: setting.kept(task) for task in forgetting}
            is_best = setting is arm.best
            point = _point(i, arm.label, rows, 17 if is_best else 11, learned, kept, named=is_best)
            point["seeds"] = [_seed(run, learning, forgetting) for run in setting.runs]
            points += (
                [{**point, "minor": not is_best}] if point["learned"] and point["kept"] else []
            )
        base = {task: arm.best.measured[task.name].base for task in tasks}
        whole = Estimate(1.0, 1.0, 1.0, 1, None)
        kept = {t: whole if t.is_share and base[t] else base[t] for t in forgetting}
        name = arm.best.runs[0].base
        bases.setdefault(name, _point(i, name, [], 0, {t: base[t] for t in learning}, kept))
    if not points:
        return None
    shares = {t.name: f"share of {t.name}" if t.is_share else unit(t) for t in forgetting}
    known = {axis: {name for p in points for name in p[axis]} for axis in ("learned", "kept")}
    return {
        "learned": [_learned_axis(task) for task in learning if task.name in known["learned"]],
        "kept": [
            _axis(t, f"Kept: {shares[t.name]} →") for t in forgetting if t.name in known["kept"]
        ],
        "points": points,
        "bases": [
            {**b, "title": f"base {n}" if len(bases) > 1 else "base"} for n, b in bases.items()
        ],
        "rules": True,
    }


def course_chart(course: Course) -> dict[str, Any]:
    """What the arms learned and kept at every step; the marks grow with the steps."""
    points: list[dict[str, Any]] = []
    bases: list[dict[str, Any]] = []
    for track in course.tracks:
        for moment in track.moments:
            rows = [("step", f"{moment.step:,}")]
            rows += [("tokens", f"{moment.tokens:,.0f}")] if moment.tokens is not None else []
            rows.append(("seeds", str(max((e.seeds for e in moment.scores.values()), default=0))))
            size = moment.step and 9 + 8 * (moment.step / course.steps[-1]) ** 0.5
            learned, kept = ({task: moment.scores.get(task.name) for task in of_kind}
                             for of_kind in (course.learning, course.forgetting))  # fmt: skip
            arm, named = course.labels.index(track.label), moment is track.moments[-1]
            points.append(_point(arm, track.label, rows, size, learned, kept, named=named))
            if moment.step == 0 and not bases:
                bases.append({**points[-1], "title": "base"})
    return {
        "learned": [_learned_axis(task) for task in course.learning],
        "kept": [_axis(task, f"Kept: {unit(task)} →") for task in course.forgetting],
        "points": points,
        "bases": bases,
        "rules": False,
    }


def _aftercare(
    used: Sequence[Used], found: Findings, places: Mapping[str, int]
) -> dict[str, Any] | None:
    """What the arms learned and kept at every setting of their repair and dial."""
    learning, forgetting = (
        [task for task in found.evidence.tasks if task.kind == kind]
        for kind in ("learning", "forgetting")
    )
    if not (used and learning and forgetting):
        return None
    points = []
    for each in used:
        if each.setting == RESIDUAL:  # on no way between more and less of the update
            continue
        size = 17 if each.setting == TRAINED else 12 if each.taken else 9
        learned, kept = (
            {task: each.scores.get(task.name) for task in tasks} for tasks in (learning, forgetting)
        )
        named = each.setting == TRAINED
        rows = [("setting", each.words)]
        point = _point(places[each.arm], each.arm, rows, size, learned, kept, named=named)
        points.append({**point, "apart": bool(each.comparator)})
    bases = (_plane(found.evidence.tasks, found.arms) or {"bases": []})["bases"]
    known = {t.name: found.arms[0].best.measured[t.name].base for t in forgetting}
    return {
        "learned": [_learned_axis(task) for task in learning],
        "kept": [_axis(task, f"Kept: {unit(task)} →") for task in forgetting],
        "points": points,
        "bases": [
            {**base, "kept": {t.name: _estimate(e, t) for t in forgetting if (e := known[t.name])}}
            for base in bases[:1]
        ],
        "rules": False,
    }


def _point(
    arm: int,
    title: str,
    rows: Sequence[tuple[str, str]],
    size: float,
    learned: Mapping[TaskInfo, Estimate | None],
    kept: Mapping[TaskInfo, Estimate | None],
    *,
    named: bool = False,
) -> dict[str, Any]:
    """One place of an arm by every learned and every kept score."""
    scores = {
        axis: {task.name: _estimate(e, task) for task, e in of_axis.items() if e}
        for axis, of_axis in (("learned", learned), ("kept", kept))
    }
    marks = {"size": size, "minor": False, "named": named, "seeds": []}
    return {"arm": arm, "title": title, "rows": rows, **marks, **scores}


def _seed(
    run: RunFiles, learning: Sequence[TaskInfo], forgetting: Sequence[TaskInfo]
) -> dict[str, Any]:
    """The scores of one seed alone."""

    def score(task: TaskInfo, column: str) -> float | None:
        return _round(number(run.rows.get(task.name, {}).get(column)))

    return {
        "learned": {task.name: score(task, "score") for task in learning},
        "kept": {t.name: score(t, "retention" if t.is_share else "score") for t in forgetting},
    }


def _estimate(estimate: Estimate, task: TaskInfo) -> dict[str, Any]:
    text = amount(task, estimate.value)
    items = estimate.num_items
    return {
        "value": _round(estimate.value),
        "low": _round(estimate.low) if estimate.has_error else None,
        "high": _round(estimate.high) if estimate.has_error else None,
        "text": f"{text} ({interval_words(estimate, task)})" if estimate.has_error else text,
        "items": NOT_MEASURED if items is None else f"{items:,}",
    }


def _axis(task: TaskInfo, title: str) -> dict[str, Any]:
    return {
        "name": task.name,
        "title": title,
        "share": task.is_share,
        "higher": task.higher_is_better,
    }


def _learned_axis(task: TaskInfo) -> dict[str, Any]:
    return _axis(task, f"↑ Learned: {unit(task)}")


# ------------------------------------------------------------------------------- on the way


def _probes(arms: Sequence[Arm]) -> dict[str, Any] | None:
    """What was measured on the way, of the runs at the arms' best settings."""
    runs: list[dict[str, Any]] = []
    titles: dict[str, str] = {}
    for i, arm in enumerate(arms):
        for run in arm.best.runs:
            over, kept = run.exceeded.get("step"), run.exceeded.get("kept_step")
            points = []
            for step, values in run.probes():
                titles |= {name: probe_words(name) for name in values}
                point = {"step": step, "values": {name: _round(v) for name, v in values.items()}}
                if step in (over, kept):
                    stopped = "over budget, stopped" if over == kept else "over budget"
                    point |= (
                        {"ring": 9, "event": stopped}
                        if step == over
                        else {"ring": 7, "event": "went back to here"}
                    )
                points.append(point)
            runs.append({"arm": i, "points": points})
    return {"runs": runs, "titles": titles} if titles else None


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float | None]]:
    """At most `MAX_CURVE_POINTS` points, the means of equal stretches of the curve."""
    size = min(len(points), MAX_CURVE_POINTS)
    edges = [i * len(points) // size for i in range(size + 1)] if size else []
    parts = [points[a:b] for a, b in pairwise(edges)]
    return [(part[-1][0], _round(sum(loss for _, loss in part) / len(part))) for part in parts]


def _flips(
    of_task: TaskChanges, places: Mapping[str, int], pictures: Mapping[tuple[str, str], int]
) -> dict[str, Any]:
    """The lists are cut to what a page can hold; the totals are whole."""
    most = of_task.most_listed
    asked: dict[str, int] = {}

    def rows(items: Sequence[FlippedItem]) -> list[tuple[int, str | None, int]]:
        return [(asked.setdefault(i.id, len(asked)), i.answer, i.seeds) for i in items[:most]]

    arms = []
    for change in of_task.counted:
        lost, gained, kept = change.flipped("lost"), change.flipped("gained"), change.kept_items
        spread = kept[:: max(1, -(-len(kept) // MAX_KEPT))]
        arms.append({
            "arm": places[change.label],
            "seeds": len(change.counted),
            "lost": rows(lost),
            "gained": rows(gained),
            "kept": [(asked.setdefault(item, len(asked)), None, 0) for item in spread],
            "totals": {"lost": len(lost), "gained": len(gained), "kept": len(kept)},
        })  # fmt: skip
    return {
        "task": of_task.task.name,
        "kind": of_task.task.kind,
        "questions": [of_task.questions[item] for item in asked],
        "pictures": [pictures.get((of_task.task.name, item)) for item in asked]
        if of_task.pictures
        else None,
        "arms": arms,
    }


def _round(value: float | None) -> float | None:
    """Six significant digits: more than a pixel, a third of the bytes."""
    return None if value is None else float(f"{value:.6g}")
