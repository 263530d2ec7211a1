"""The model card of a run's adapter: how it was trained, what it learned and what it forgot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetless.adapters.card import Card, file_name, table, write
from forgetless.adapters.folders import CONFIG_FILE
from forgetless.core.errors import UserError
from forgetless.core.files import read_json
from forgetless.methods import METHODS
from forgetless.recipes.recipe import Recipe
from forgetless.scores.comparison import Comparison, TaskChange, compare
from forgetless.scores.files import read_scores
from forgetless.scores.showing import sentence
from forgetless.studies.folder import RunFolder
from forgetless.training.penalties import words_of
from forgetless.training.settings import titled_settings

__all__ = ["score_paragraphs", "write_run_card"]


def write_run_card(
    run: RunFolder, folder: str | Path | None = None, error: float | None = None
) -> None:
    """Write the card of a run's adapter, with whatever of it is measured by now.

    Args:
        run: the run's folder.
        folder: of the exported adapter; None for the run's own, and nothing where there is none.
        error: relative error of the export; None for that of the run's own.
    """
    folder = run.adapter if folder is None else Path(folder)
    config = read_json(folder / CONFIG_FILE)
    if not config:
        return
    recipe = Recipe.load(run.recipe)
    record = read_json(run.record)
    if error is None:
        error = record.get("export", {}).get("relative_error")
    comparison, learning = _measured(run)
    card = Card(
        base=recipe.base,
        config=config,
        method=recipe.adapter.method,
        options=recipe.adapter.options,
        error=error,
        settings=_run_settings(recipe, record, read_json(run.analysis)),
        scores=[] if comparison is None else score_paragraphs(comparison, learning),
        versions=record.get("versions", {}),
    )
    write(folder, card)


def _measured(run: RunFolder) -> tuple[Comparison | None, frozenset[str]]:
    """The final scores against the base's, where both were measured."""
    try:
        base, final = read_scores(run.path, "base"), read_scores(run.path, "final")
        return compare(base.scores, final.scores), base.learning
    except UserError:
        return None, frozenset()


def score_paragraphs(comparison: Comparison, learning: frozenset[str]) -> list[str]:
    rows = sorted(comparison, key=lambda row: row.task not in learning)
    level = f"{comparison.level:.0%}".replace("%", " %")
    head = ["task", "", "metric", "base", "adapter", "change", f"{level} interval", "items", "kept"]
    scores = table(head, [_score_cells(row, row.task in learning) for row in rows])
    said = "\n".join(f"- `{row.task}`: {sentence(row)}." for row in rows)
    parts = [scores, said]
    averages = [average for average in comparison.averages if not average.missing]
    if averages:
        cells = [[a.name, f"{a.base:.4f}", f"{a.score:.4f}"] for a in averages]
        parts.append(table(["average", "base", "adapter"], cells))
    if comparison.unmatched:
        parts.append(f"Not measured for both: {', '.join(comparison.unmatched)}.")
    note = (
        f"Base and adapter answered the same items; the {level} interval is that of the "
        "difference over items. *Kept* is the share of the base's score that is left. Loss and KL "
        "are in nats per token, and lower is better."
    )
    return [*parts, note]


def _score_cells(row: TaskChange, learned: bool) -> list[str]:
    low, high = row.interval
    return [
        f"`{row.task}`",
        "learning" if learned else "forgetting",
        row.metric.partition(",")[0],
        f"{row.base:.4g}",
        f"{row.score:.4g}",
        f"{row.difference:+.3g}",
        "unknown" if math.isnan(low) else f"{low:+.3g} to {high:+.3g}",
        str(row.n),
        "–" if math.isnan(row.retention) else f"{100 * row.retention:.3g} %",
    ]


def _run_settings(
    recipe: Any, record: Mapping[str, Any], analysis: Mapping[str, Any]
) -> dict[str, str]:
    """The rows of a run: what it was trained on, for how long, and what it was told to keep."""
    adapter, training, data = recipe.adapter, recipe.training, recipe.data
    trained = record.get("training", {})
    update = analysis.get("relative_update")
    sources = ", ".join(
        file_name(path) + (f" (weight {weight:g})" if len(data.sources) > 1 else "")
        for path, weight in data.sources
    )
    return {
        "rank and alpha in training": f"{adapter.rank}, {adapter.alpha:g}",
        "dropout": f"{adapter.dropout:g}",
        "training data": sources,
        "knowledge to keep": _kept_text(recipe),
        "steps": _steps(trained, training),
        "batch": str(training.batch_size * training.gradient_accumulation),
        "optimiser": _optimiser(training),
        "penalties": "; ".join(map(words_of, recipe.penalties)),
        "budget of forgetting": _budget(recipe.probes),
        "final loss": _final_loss(trained),
        "size of the update": f"{update:.3g} of the weights' norm" if update else "",
        "seed": str(recipe.seed),
    }


def _optimiser(training: Any) -> str:
    """Name and settings; those that most trainings leave out only where they are used."""
    return ", ".join(
        [
            f"{training.optimizer}, learning rate {training.learning_rate:g}",
            f"{training.schedule}, warm-up {training.warmup_ratio:g}",
            *[f"{title} {value:g}" for title, value in titled_settings(training).items()],
            f"weight decay {training.weight_decay:g}, {training.precision}",
        ]
    )


def _budget(probes: Any) -> str:
    limits = {"KL to the base": probes.max_kl, "drop of a score": probes.max_drop}
    return ", ".join(f"{name} at most {at:g}" for name, at in limits.items() if at is not None)


def _steps(trained: Mapping[str, Any], training: Any) -> str:
    """Those that the weights have behind them; fewer than were planned where a budget ended it."""
    over = trained.get("exceeded")
    if not over:
        return str(trained.get("steps", training.steps or ""))
    seen = f"at step {over['step']} {over['probe']} reached {over['value']:.3g}"
    return f"{over['kept_step']}; ended by the budget: {seen}"


def _final_loss(trained: Mapping[str, Any]) -> str:
    """Of the weights that the adapter has; not known of those that a training went back to."""
    over = trained.get("exceeded")
    went_back = over and over["kept_step"] != over["step"]
    return f"{trained['final_loss']:.4g}" if "final_loss" in trained and not went_back else ""


def _kept_text(recipe: Any) -> str:
    """The calibration text, where the method reads one."""
    known = METHODS.get(recipe.adapter.method)
    if known is None or not known.needs:
        return "none: this start reads no text"
    text = recipe.calibration
    called = {"self": "sampled from the base itself", "data": "the training data"}
    sources = [called.get(name) or file_name(name) for name, _ in text.sources(known.name)]
    read = " and ".join(sources)
    return f"{read}; {text.samples} texts of at most {text.max_length} tokens"
