"""The plane and the training curves as PNG and SVG, for papers and for browsers without scripts."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgetless.core.files import new_folder
from forgetless.reports.arms import Arm, Setting
from forgetless.reports.durations import Course
from forgetless.reports.evidence import Task
from forgetless.reports.numbers import probe_words, unit
from forgetless.reports.standing import Standing
from forgetless.scores.seeds import Estimate

COLOURS = ("#0069a8", "#c45100", "#00805c", "#a3418a", "#8a6d00", "#3a8fd6", "#4d5566", "#d14a6b")
MARKERS = "os^DvP*H"
MAX_NAMED = 12
SOFT, LINE, INK = "#565c69", "#e3e3df", "#17191e"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ecece8",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "svg.hashsalt": "forgetless",
}


def draw(
    arms: Sequence[Arm], place: Standing, course: Course | None, folder: Path
) -> dict[str, str]:
    """Write the figures that the study has numbers for.

    Returns:
        The SVG of each figure by name, ready to stand inside a page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    drawings = {}
    with matplotlib.rc_context(STYLE), new_folder(folder) as new:
        figures = {
            "plane": _plane(arms, place),
            "course": _course(course) if course else None,
            "curves": _curves(arms),
            "probes": _probes(arms),
        }
        for name, figure in figures.items():
            if figure is None:
                continue
            _save_png(figure, new / f"{name}.png")
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            (new / f"{name}.svg").write_text(text.getvalue(), "utf-8")
            drawings[name] = _inline(text.getvalue())
    return drawings


def draw_course(course: Course, path: Path) -> None:
    """Write the figure of scores over the steps as one PNG; raises as `draw`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        _save_png(_course(course), path)


def _save_png(figure: Any, path: Path) -> None:
    figure.set_layout_engine("none")
    figure.savefig(path, dpi=200, metadata={"Software": None})


def _inline(svg: str) -> str:
    """The drawing without what names an address: it needs neither inside a page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _plane(arms: Sequence[Arm], place: Standing) -> Any:
    learning, forgetting = place.learning, place.forgetting
    if not place.placed or learning is None or forgetting is None:
        return None
    figure, axes = _figure(7.6, 4.8)
    names, bars = [], []
    for i, arm in enumerate(arms):
        spots = [s for setting in arm.settings if (s := _spot(setting, forgetting, learning))]
        if len(spots) > 1:
            axes.plot([x.value for x, _ in spots], [y.value for _, y in spots],
                      color=_colour(i), lw=0.9, alpha=0.4, marker=_marker(i), ms=3.5)  # fmt: skip
        best = _spot(arm.best, forgetting, learning)
        if best is not None:
            _point(axes, best, i)
            names.append((best[0].value, best[1].value, arm.label))
            bars += _bars(*best)
    base = place.placed[0].best.measured
    base_kept, base_learned = base[forgetting.name].base, base[learning.name].base
    if base_kept and base_learned:
        x, y = 1.0 if forgetting.is_share else base_kept.value, base_learned.value
        axes.axvline(x, color="#8a909c", lw=0.8, ls=":")
        axes.axhline(y, color="#8a909c", lw=0.8, ls=":")
        axes.plot(x, y, "o", mfc="white", mec=INK, mew=1.4, ms=7, clip_on=False, zorder=4)
        names.append((x, y, "base"))
    _front(axes, place, forgetting, learning)
    share = f"share of {forgetting.name}" if forgetting.is_share else unit(forgetting)
    _label_axes(axes, forgetting, learning, share)
    figure.draw_without_rendering()
    _names(figure, axes, names, bars)
    return figure


def _course(course: Course) -> Any:
    """A line an arm through its steps, points growing with them, from the base on."""
    learning, kept = course.learning[0], course.forgetting[0]
    is_crowded = len(course.tracks) > MAX_NAMED
    figure, axes = _figure(10.4 if is_crowded else 7.6, 6.0 if is_crowded else 4.8)
    names, bars = {}, []
    for track in course.tracks:
        i = course.labels.index(track.label)
        spots = {
            moment.step: (x, y)
            for moment in track.moments
            if (x := moment.scores.get(kept.name)) and (y := moment.scores.get(learning.name))
        }
        places = {step: (x.value, y.value) for step, (x, y) in spots.items()}
        axes.plot(*zip(*places.values(), strict=True), color=_colour(i), lw=1.4, alpha=0.75)
        if 0 in places:
            names["base"] = places[0]
        last = max(spots, default=0)
        for step, spot in spots.items():
            if step:
                size = 4.5 + 5 * (step / course.steps[-1]) ** 0.5
                _point(axes, spot, i, size, track.label if step == last else None)
                bars += _bars(*spot)
        if last:
            names[track.label] = places[last]
    if "base" in names:
        axes.plot(*names["base"], "o", mfc="white", mec=INK, mew=1.4, ms=7, clip_on=False, zorder=4)
    _label_axes(axes, kept, learning, unit(kept))
    if is_crowded:
        names = {name: place for name, place in names.items() if name == "base"}
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left",
                    bbox_to_anchor=(1, 1))  # fmt: skip
    figure.draw_without_rendering()
    _names(figure, axes, [(x, y, name) for name, (x, y) in names.items()], bars)
    return figure


def _spot(setting: Setting, forgetting: Task, learning: Task) -> tuple[Estimate, Estimate] | None:
    kept, learned = setting.kept(forgetting), setting.final(learning)
    return (kept, learned) if kept is not None and learned is not None else None


def _point(
    axes: Any,
    spot: tuple[Estimate, Estimate],
    index: int,
    size: float = 8,
    label: str | None = None,
) -> None:
    x, y = spot
    axes.errorbar(
        x.value, y.value,
        xerr=[[x.value - x.low], [x.high - x.value]],
        yerr=[[y.value - y.low], [y.high - y.value]],
        fmt="none", ecolor=_colour(index), elinewidth=1.1, alpha=0.55, zorder=2,
    )  # fmt: skip
    wide = 1.375 if _marker(index) == "*" else 1.0
    axes.plot(x.value, y.value, _marker(index), color=_colour(index), ms=size * wide, mec="white",
              mew=0.9, zorder=3, label=label)  # fmt: skip


def _bars(x: Estimate, y: Estimate) -> list[list[tuple[float, float]]]:
    return [[(x.low, y.value), (x.high, y.value)], [(x.value, y.low), (x.value, y.high)]]


def _front(axes: Any, place: Standing, forgetting: Task, learning: Task) -> None:
    spots = [_spot(setting, forgetting, learning) for setting in place.front_settings]
    found = [(spot[0].value, spot[1].value) for spot in spots if spot is not None]
    if len(found) > 1:
        axes.plot(*zip(*found, strict=True), color="#8a909c", lw=1.1, ls=(0, (5, 3)), zorder=1)


def _label_axes(axes: Any, forgetting: Task, learning: Task, kept: str) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_xlabel(f"Kept: {kept} →", loc="right")
    axes.set_title(f"↑ Learned: {unit(learning)}", loc="left", fontsize=10, color=INK, pad=12)
    for task, axis, invert in (
        (forgetting, axes.xaxis, axes.invert_xaxis),
        (learning, axes.yaxis, axes.invert_yaxis),
    ):
        if task.is_share:
            axis.set_major_formatter(PercentFormatter(1.0))
        if not task.higher_is_better:
            invert()


def _names(
    figure: Any,
    axes: Any,
    names: Sequence[tuple[float, float, str]],
    bars: Sequence[Sequence[tuple[float, float]]],
) -> None:
    """A name beside each point, where it covers the least of names, points and error bars."""
    from matplotlib.patheffects import withStroke

    renderer = figure.canvas.get_renderer()
    points = axes.transData.transform([(x, y) for x, y, _ in names])
    taken: list[Any] = [(px - 10, py - 10, px + 10, py + 10) for px, py in points]
    for bar in bars:
        ends = axes.transData.transform(bar)
        taken.append((*(ends.min(axis=0) - 2), *(ends.max(axis=0) + 2)))
    halo = [withStroke(linewidth=2.5, foreground="white")]
    frame = axes.get_window_extent(renderer)
    for (x, y, name), _ in zip(names, points, strict=True):
        tries: list[tuple[float, Any, Any]] = []
        for dx, dy, side in _PLACES:
            label = axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=side,
                                  va="center", color=INK, fontsize=9.5, zorder=5,
                                  path_effects=halo)  # fmt: skip
            extent = label.get_window_extent(renderer).extents
            outside = _area(extent) - _overlap(extent, frame.extents)
            cost = sum(_overlap(extent, other) for other in taken) + 100 * outside
            tries.append((cost + 8 * len(tries), label, extent))
        best = min(tries, key=lambda candidate: candidate[0])
        for _, label, _extent in tries:
            if label is not best[1]:
                label.remove()
        taken.append(best[2])


_PLACES = [
    *((7, 9, "left"), (7, -9, "left"), (-7, 9, "right"), (-7, -9, "right")),
    *((9, 0, "left"), (-9, 0, "right"), (0, 12, "center"), (0, -13, "center")),
    *((0, 22, "center"), (0, -24, "center"), (14, 20, "left"), (14, -20, "left")),
]


def _area(box: Sequence[float]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return float(max(width, 0.0) * max(height, 0.0))


def _curves(arms: Sequence[Arm]) -> Any:
    """Training loss by step, each arm at its best setting, its first seed with a name."""
    logs = [(i, arm, [run.log() for run in arm.best.runs]) for i, arm in enumerate(arms)]
    if not any(log for _, _, of_arm in logs for log in of_arm):
        return None
    figure, axes = _figure(7.6, 4.2)
    for i, arm, of_arm in logs:
        for seed, log in enumerate(log for log in of_arm if log):
            axes.plot([step for step, _ in log], [loss for _, loss in log], color=_colour(i),
                      lw=1.4 if seed == 0 else 0.7, alpha=1.0 if seed == 0 else 0.5,
                      marker=_marker(i), markevery=[-1], ms=6,
                      label=arm.label if seed == 0 else None)  # fmt: skip
    if all(loss > 0 for _, _, of_arm in logs for log in of_arm for _, loss in log):
        axes.set_yscale("log")
    axes.set_xlabel("step →", loc="right")
    axes.set_title("↑ Training loss", loc="left", fontsize=10, color=INK, pad=12)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    figure.draw_without_rendering()
    return figure


def _probes(arms: Sequence[Arm]) -> Any:
    """What was measured on the way, one panel a measure, each arm's first seed."""
    found = [
        (i, arm, probes) for i, arm in enumerate(arms) if (probes := arm.best.runs[0].probes())
    ]
    names = list(dict.fromkeys(n for _, _, of_arm in found for _, values in of_arm for n in values))
    if not names:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 2.9 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        for i, arm, probes in found:
            points = [(step, values[name]) for step, values in probes if name in values]
            axes.plot([s for s, _ in points], [v for _, v in points], color=_colour(i), lw=1.4,
                      marker=_marker(i), ms=4, label=arm.label)  # fmt: skip
        axes.set_title(f"↑ {probe_words(name)}", loc="left", fontsize=10, color=INK, pad=10)
    panels[-1].set_xlabel("step →", loc="right")
    panels[0].legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left",
                     bbox_to_anchor=(1, 1))  # fmt: skip
    figure.draw_without_rendering()
    return figure


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _marker(index: int) -> str:
    return MARKERS[(index + index // len(MARKERS)) % len(MARKERS)]
