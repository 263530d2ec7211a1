"""What a study tells of its repairs, dial, comparators and spectra, arm by arm at its best rate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from forgetless.core.errors import UserError
from forgetless.core.files import read_json
from forgetless.reports.arms import Arm
from forgetless.reports.evidence import RunFiles, TaskInfo, number
from forgetless.scores.comparison import Change, compare
from forgetless.scores.seeds import Estimate, Sample, estimate

TRAINED, RESIDUAL = "trained", "residual"
"""Labels: the weights as they were trained, whose scores lie in the run itself; see `beside`."""

SHOWN = 4
"""Questions that are named of those that a repair regained."""


@dataclass(frozen=True)
class Used:
    """One arm at one setting of its repair and dial, over its seeds.

    Attributes:
        taken: in how many of its runs it was taken.
        values: means over the seeds of `kl`, `drift` and `given_up`, where they were measured.
        comparator: what it is, where it is one; it has no strength and no scale.
        lost_at_rank: for reduced intruders, mean over the seeds, see `aftercare.json`.
    """

    arm: str
    setting: str
    strength: float
    scale: float
    taken: int
    values: Mapping[str, float | None]
    scores: Mapping[str, Estimate]
    comparator: str = ""
    lost_at_rank: float | None = None

    @property
    def words(self) -> str:
        """The setting in words."""
        parts = [
            f"repaired with {self.strength:g}" if self.strength else "",
            f"times {self.scale:g}" if self.scale != 1 else "",
        ]
        named = {TRAINED: "as trained", RESIDUAL: "base without the start"}
        return self.comparator or named.get(self.setting) or ", ".join(filter(None, parts))


def settings(arms: Sequence[Arm], tasks: Sequence[TaskInfo]) -> list[Used]:
    """Every arm at every setting that was scored: less of it, stronger repairs, comparators."""
    found = []
    for arm in arms:
        known = [(run, r) for run in arm.best.runs if (r := record(run))]
        labels = dict.fromkeys(label for _, r in known for label in r.get("scored", ()))
        for label in [TRAINED, *labels] if labels else ():
            own = [(run, r) for run, r in known if label in (TRAINED, *r["scored"])]
            runs, points = [run for run, _ in own], [r["points"].get(label, {}) for _, r in own]
            scores = {task.name: _score(runs, task, label) for task in tasks}
            found.append(
                Used(
                    arm.label,
                    label,
                    strength=points[0].get("strength", 0.0),
                    scale=points[0].get("scale", 1.0),
                    taken=sum(r.get("repaired") == label for _, r in own),
                    values={k: _mean(p.get(k) for p in points) for k in _VALUES},
                    scores={name: score for name, score in scores.items() if score},
                    comparator=points[0].get("words", ""),
                    lost_at_rank=_mean(p.get("lost_at_rank") for p in points),
                )
            )
    order = [arm.label for arm in arms]

    def place(used: Used) -> tuple[Any, ...]:
        by_scale = abs(used.scale - (used.strength > 0))
        return order.index(used.arm), bool(used.comparator), used.strength, by_scale

    return sorted(found, key=place)


_VALUES = ("kl", "drift", "given_up")


def record(run: RunFiles) -> dict[str, Any]:
    """What a run wrote down of its settings; empty where it has none."""
    return read_json(run.folder.aftercare, damaged_as_missing=True)


def _score(runs: Iterable[RunFiles], task: TaskInfo, label: str) -> Estimate | None:
    at = None if label == TRAINED else label
    results = {run.column("seed"): run.result("final", task.name, at) for run in runs}
    known = {seed: result for seed, result in results.items() if result}
    return estimate(Sample.of(known, is_share=task.is_share)) if known else None


def _mean(values: Iterable[Any]) -> float | None:
    known = [value for v in values if (value := number(v)) is not None]
    return fmean(known) if known else None


@dataclass(frozen=True)
class Regained:
    """What the repairs that were taken of one arm gave back of a task, as means over the seeds."""

    arm: str
    task: str
    gained: float
    lost: float
    named: Sequence[str]


def regained(arms: Sequence[Arm], tasks: Sequence[TaskInfo]) -> list[Regained]:
    """Of every arm with a repair that was taken, and every task of forgetting with items."""
    found = []
    for arm in arms:
        taken = [(run, record(run).get("repaired")) for run in arm.best.runs]
        for task in (task for task in tasks if task.kind == "forgetting"):
            changes = [
                known
                for run, label in taken
                if label not in (None, TRAINED) and (known := _changes(run, task, str(label)))
            ]
            gained, lost = (
                [change for of_run in changes for change in of_run if change.flip == flip]
                for flip in ("gained", "lost")
            )
            if changes:
                named = list(dict.fromkeys(map(_asked, gained)))[:SHOWN]
                counts = len(gained) / len(changes), len(lost) / len(changes)
                found.append(Regained(arm.label, task.name, *counts, named))
    return found


def _changes(run: RunFiles, task: TaskInfo, label: str) -> Sequence[Change] | None:
    """The items from the weights as trained to the repaired ones; None where that is unknown."""
    before = run.result("final", task.name)
    after = run.result("final", task.name, label)
    if before is None or after is None:
        return None
    try:
        [row] = compare({task.name: before}, {task.name: after}).rows
    except (UserError, ValueError):
        return None
    return row.changes if row.counted else None


def _asked(change: Change) -> str:
    text = " ".join(str(change.prompt).split())
    return text if len(text) <= 60 else f"{text[:59]}…"


# ---- spectra -------------------------------------------------------------------------------------

INSIDE: Mapping[str, tuple[str, str]] = {
    "relative_update": ("size", "‖dW‖ / ‖W‖"),
    "update_rank_at_90": ("rank of dW", "directions with 90 % of the update’s energy"),
    "update_rank_effective": ("eff. rank dW", "effective rank by singular values"),
    "weight_rank_at_90": ("rank of W", "directions with 90 % of the weight’s energy"),
    "weight_rank_effective": ("eff. rank W", "effective rank of the weight, by singular values"),
    "activations_rank_effective": ("eff. rank X", "of the inputs on the text to keep"),
    "rotation": ("turned", "share of dW that turns W’s singular directions"),
    "head_overlap": (
        "in the head",
        "share of dW within W’s largest directions, as many as its rank",
    ),
    "intruders": ("new", "intruder dimensions among the ten largest of W + dW"),
    "output_change": ("output", "‖dW X‖ / ‖W X‖ on the text to keep"),
    "A_on_inputs_last": ("A in the tail", "share of A in the weakest tenth of the inputs"),
    "shared_energy": ("shared", "share of the task’s activation energy in the kept text’s space"),
}
"""Column of a run's spectra -> its head and what it is."""


BY_BLOCK: Mapping[str, str] = {
    "relative_update": "‖dW‖ / ‖W‖",
    "update_rank_at_90": "rank of dW at 90 %",
    "rotation": "share of dW that turns",
    "intruders": "intruder dimensions",
    "output_change": "‖dW X‖ / ‖W X‖",
    "narrowness": "eff. rank X / eff. rank W",
    "shared_energy": "share of the task’s input energy in the kept space",
}
"""What is drawn by block, and its title."""


def spectra_of(arms: Sequence[Arm]) -> dict[str, list[dict[str, Any]]]:
    """Arm -> the spectra of its runs at its best rate, of those that have them."""
    found = {
        arm.label: [
            content
            for run in arm.best.runs
            if (content := read_json(run.folder.spectra, damaged_as_missing=True))
        ]
        for arm in arms
    }
    return {label: of_arm for label, of_arm in found.items() if of_arm}


def spectra_rows(
    found: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[list[tuple[str, str]], list[list[Any]]] | None:
    """Heads, each with what it is, and one row an arm and kind of module; None without spectra."""
    names = [n for n in INSIDE if any(_mean_of(of, None, n) is not None for of in found.values())]
    rows = [
        [label, module or "all", *(_mean_of(of_arm, module, name) for name in names)]
        for label, of_arm in found.items()
        for module in (*of_arm[0]["modules"], None)
    ]
    heads = [("arm", ""), ("module", "text"), *(INSIDE[name] for name in names)]
    return (heads, rows) if rows else None


def _mean_of(of_arm: Sequence[Mapping[str, Any]], module: str | None, column: str) -> float | None:
    parts = [each["overall"] if module is None else each["modules"][module] for each in of_arm]
    return _mean(part.get(column) for part in parts)


def layers_chart(
    found: Mapping[str, Sequence[Mapping[str, Any]]], places: Mapping[str, int]
) -> dict[str, Any] | None:
    """Numbers of every layer by its block: the kinds of module, and a line an arm for each."""
    rows = [
        {
            "arm": places[label],
            "module": layer["module"],
            "block": layer["block"],
            "values": {name: _of_layer(layers, name) for name in BY_BLOCK},
        }
        for label, of_arm in found.items()
        for i, layer in enumerate(of_arm[0]["layers"])
        if layer["block"] is not None
        for layers in [[each["layers"][i] for each in of_arm]]
    ]
    titles = {
        name: title
        for name, title in BY_BLOCK.items()
        if any(row["values"][name] is not None for row in rows)
    }
    return {"rows": rows, "titles": titles} if titles else None


def _of_layer(layers: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean over the seeds of one layer's number."""
    if name == "update_rank_at_90":
        return _mean(layer["update"]["at_90"] for layer in layers)
    if name == "intruders":
        return _mean(len(v) for layer in layers if (v := layer["intruders"]) is not None)
    if name == "narrowness":
        ranks = [(layer["activations"], layer["weight"]) for layer in layers]
        return _mean(x["effective"] / w["effective"] for x, w in ranks if x and w)
    return _mean(layer[name] for layer in layers)


MAPPED: Mapping[str, str] = {
    "rotation": "Share of dW that turns W’s directions",
    "update_rank_at_90": "Rank of dW at 90 % of its energy",
    "narrowness": "Effective rank of the inputs over W’s",
    "shared_energy": "Share of the task’s inputs in the kept space",
}
"""What has a map of blocks by kinds of module, and its title."""


class HeatMap(NamedTuple):
    """One number of an arm's updates: a row a block, a column a kind of module, None for nothing.

    `most` is the largest over all arms, by which cells are shaded.
    """

    title: str
    modules: Sequence[str]
    rows: Sequence[tuple[int, Sequence[float | None]]]
    most: float


def heat_maps(chart: Mapping[str, Any], labels: Sequence[str]) -> dict[str, list[HeatMap]]:
    """Arm -> its maps, from what `layers_chart` gave; layers of a kind in a block are averaged."""
    layers, found = chart["rows"], {}
    for arm in dict.fromkeys(layer["arm"] for layer in layers):
        own = [layer for layer in layers if layer["arm"] == arm]
        modules = list(dict.fromkeys(layer["module"] for layer in own))
        blocks = sorted({layer["block"] for layer in own})
        cells: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
        for layer in own:
            cells.setdefault((layer["block"], layer["module"]), []).append(layer["values"])
        found[labels[arm]] = [
            HeatMap(
                title,
                modules,
                [(b, [_mean(v[name] for v in cells.get((b, m), ())) for m in modules])
                 for b in blocks],
                max(layer["values"][name] or 0.0 for layer in layers),
            )
            for name, title in MAPPED.items()
            if name in chart["titles"]
        ]  # fmt: skip
    return found
