"""The charts of the page as PNG and SVG, for papers and for browsers without scripts."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forgetless.core.files import new_folder
from forgetless.core.metrics import pareto_front

COLOURS = ("#0069a8", "#c45100", "#00805c", "#a3418a", "#8a6d00", "#3a8fd6", "#4d5566", "#d14a6b")
MARKERS = "os^DvP*H"
MAX_NAMED = 12
SOFT, LINE, INK, FAINT = "#565c69", "#e3e3df", "#17191e", "#8a909c"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.titlesize": 10,
    "grid.color": "#ecece8",
    "xaxis.labellocation": "right",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "svg.hashsalt": "forgetless",
}


def draw(content: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write a figure of each chart, of its first tasks and the arms' best rates.

    The content is that of `payload`; a folder that is there is replaced.

    Returns:
        The SVG of each figure by name, ready to stand inside a page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    drawings = {}
    charts: dict[str, Callable[..., Any]] = {
        "plane": _pairs,
        "course": _pairs,
        "aftercare": _pairs,
        "curves": _curves,
        "probes": _probes,
    }
    with matplotlib.rc_context(STYLE), new_folder(folder) as new:
        for name, chart in charts.items():
            if name in content:
                figure, text = chart(content[name], content["arms"]), io.StringIO()
                _save_png(figure, new / f"{name}.png")
                figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
                (new / f"{name}.svg").write_text(text.getvalue(), "utf-8")
                # Inside a page a drawing needs neither what names an address nor its head.
                body = text.getvalue()[text.getvalue().index("<svg") :]
                body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
                drawings[name] = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body)
    return drawings


def draw_pairs(chart: Mapping[str, Any], labels: Sequence[str], path: Path) -> None:
    """Write one chart of learning against forgetting as a PNG; raises as `draw`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        _save_png(_pairs(chart, labels), path)


def _save_png(figure: Any, path: Path) -> None:
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    figure.savefig(path, dpi=200, metadata={"Software": None})


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]


def _colour(arm: int) -> str:
    return COLOURS[arm % len(COLOURS)]


def _marker(arm: int) -> str:
    return MARKERS[(arm + arm // len(MARKERS)) % len(MARKERS)]


def _legend(axes: Any) -> None:
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, **place)


# ------------------------------------------------------------------- learning against forgetting


def _pairs(chart: Mapping[str, Any], labels: Sequence[str]) -> Any:
    """A line an arm through its rates or its steps, with intervals at the marks, and the base."""
    axis = {"kept": chart["kept"][0], "learned": chart["learned"][0]}

    def placed(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        found = [{**p, **{a: p[a].get(task["name"]) for a, task in axis.items()}} for p in points]
        return [point for point in found if point["kept"] and point["learned"]]

    points, bases = placed(chart["points"]), placed(chart["bases"])
    arms = dict.fromkeys(point["arm"] for point in points)
    is_crowded = len(arms) > MAX_NAMED and not chart["rules"]
    figure, [axes] = _figure(10.4 if is_crowded else 7.6, 6.0 if is_crowded else 4.8)
    bars: list[Sequence[tuple[float, float]]] = []
    for arm in arms:
        own = [point for point in points if point["arm"] == arm]
        line = [_place(point) for point in own if not point.get("apart")]
        axes.plot(*zip(*line, strict=True), color=_colour(arm), lw=1.2, alpha=0.6)
        for point in own:
            if point["size"]:
                bars += _mark(axes, point, labels[arm] if point["named"] else None)
    for base in bases:
        x, y = _place(base)
        if chart["rules"]:
            axes.axvline(x, color=FAINT, lw=0.8, ls=":")
            axes.axhline(y, color=FAINT, lw=0.8, ls=":")
        axes.plot(x, y, "o", mfc="white", mec=INK, mew=1.4, ms=7, clip_on=False, zorder=4)
    if chart["rules"]:
        sign = [1 if axis[a]["higher"] else -1 for a in ("kept", "learned")]
        places = [_place(point) for point in points]
        front = pareto_front((x * sign[0], y * sign[1]) for x, y in places)
        front_line = {"color": FAINT, "lw": 1.1, "ls": (0, (5, 3)), "zorder": 1}
        axes.plot(*zip(*(places[i] for i in front), strict=True), **front_line)
    axes.set_xlabel(axis["kept"]["title"])
    axes.set_title(axis["learned"]["title"])
    _orient(axes.xaxis, axis["kept"])
    _orient(axes.yaxis, axis["learned"])
    if is_crowded:
        _legend(axes)
    named = [] if is_crowded else [point for point in points if point["named"]]
    figure.draw_without_rendering()
    _place_names(figure, axes, [(*_place(p), p["title"]) for p in (*named, *bases)], bars)
    return figure


def _place(point: Mapping[str, Any]) -> tuple[float, float]:
    return point["kept"]["value"], point["learned"]["value"]


def _mark(
    axes: Any, point: Mapping[str, Any], label: str | None
) -> list[list[tuple[float, float]]]:
    """The mark of a point with its intervals; gives the lines of these."""
    (x, y), arm = _place(point), point["arm"]
    size = point["size"] / 2 * (1.375 if _marker(arm) == "*" else 1.0)
    axes.plot(x, y, _marker(arm), color=_colour(arm), ms=size, mec="white", mew=0.9, zorder=3,
              alpha=0.5 if point["minor"] else 1.0, label=label)  # fmt: skip
    if point["minor"]:
        return []
    kept, learned = ((point[a]["low"], point[a]["high"]) for a in ("kept", "learned"))
    bars = [[(low, y), (high, y)] for low, high in [kept] if low is not None]
    bars += [[(x, low), (x, high)] for low, high in [learned] if low is not None]
    for bar in bars:
        axes.plot(*zip(*bar, strict=True), color=_colour(arm), lw=1.1, alpha=0.55, zorder=2)
    return bars


def _orient(axis: Any, task: Mapping[str, Any]) -> None:
    """The better scores right and up; shares as per cent."""
    from matplotlib.ticker import PercentFormatter

    if task["share"]:
        axis.set_major_formatter(PercentFormatter(1.0))
    axis.set_inverted(not task["higher"])


_PLACES = [
    *((7, 9, "left"), (7, -9, "left"), (-7, 9, "right"), (-7, -9, "right")),
    *((9, 0, "left"), (-9, 0, "right"), (0, 12, "center"), (0, -13, "center")),
    *((0, 22, "center"), (0, -24, "center"), (14, 20, "left"), (14, -20, "left")),
]


def _place_names(
    figure: Any,
    axes: Any,
    names: Sequence[tuple[float, float, str]],
    bars: Sequence[Sequence[tuple[float, float]]],
) -> None:
    """A name beside each point, where it covers the least of names, points and error bars."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    def overlap(one: Any, others: Sequence[Any]) -> float:
        """The area that it shares with each of the others, summed up."""
        corners = np.array([other.extents for other in others])
        sides = np.minimum(corners[:, 2:], one.max) - np.maximum(corners[:, :2], one.min)
        return float(sides.clip(min=0).prod(axis=1).sum())

    renderer, frame = figure.canvas.get_renderer(), axes.get_window_extent()
    points = axes.transData.transform([(x, y) for x, y, _ in names])
    taken = [Bbox([(x - 10, y - 10), (x + 10, y + 10)]) for x, y in points]
    for bar in bars:
        ends = axes.transData.transform(bar)
        taken.append(Bbox([ends.min(axis=0) - 2, ends.max(axis=0) + 2]))
    halo = withStroke(linewidth=2.5, foreground="white")
    for x, y, name in names:
        tries: list[tuple[float, Any, Any]] = []
        for dx, dy, side in _PLACES:
            label = axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=side,
                                  va="center", color=INK, fontsize=9.5, zorder=5,
                                  path_effects=[halo])  # fmt: skip
            box = label.get_window_extent(renderer)
            outside = box.width * box.height - overlap(box, [frame])
            cost = overlap(box, taken) + 100 * outside + 8 * len(tries)
            tries.append((cost, label, box))
        best = min(tries, key=lambda candidate: candidate[0])
        for candidate in tries:
            if candidate is not best:
                candidate[1].remove()
        taken.append(best[2])


# ---------------------------------------------------------------------------------- by step


def _curves(curves: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Any:
    """Training loss by step, each arm at its best rate, its first seed with a name."""
    figure, [axes] = _figure(7.6, 4.2)
    named: set[int] = set()
    for arm, points in ((c["arm"], c["points"]) for c in curves if c["best"]):
        first = {"lw": 1.4, "label": labels[arm]} if arm not in named else {"lw": 0.7, "alpha": 0.5}
        axes.plot(*zip(*points, strict=True), color=_colour(arm), marker=_marker(arm), ms=6,
                  markevery=[-1], **first)  # fmt: skip
        named.add(arm)
    if all(loss > 0 for curve in curves for _, loss in curve["points"]):
        axes.set_yscale("log")
    axes.set_xlabel("step →")
    axes.set_title("↑ Training loss")
    _legend(axes)
    return figure


def _probes(probes: Mapping[str, Any], labels: Sequence[str]) -> Any:
    """What was measured on the way, one panel a measure, each arm's first seed."""
    first = {run["arm"]: run["points"] for run in reversed(probes["runs"])}
    figure, panels = _figure(7.6, 2.9 * len(probes["titles"]), len(probes["titles"]))
    for axes, (name, title) in zip(panels, probes["titles"].items(), strict=True):
        for arm, points in sorted(first.items()):
            known = [(p["step"], p["values"][name]) for p in points if name in p["values"]]
            axes.plot(*zip(*known, strict=True), color=_colour(arm), lw=1.4, marker=_marker(arm),
                      ms=4, label=labels[arm])  # fmt: skip
        axes.set_title(f"↑ {title}")
    panels[-1].set_xlabel("step →")
    _legend(panels[0])
    return figure
