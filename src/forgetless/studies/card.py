"""The model card of a run's adapter: how it was trained, what it learned and what it forgot."""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from forgetless.adapters.card import Card, file_name, table, write
from forgetless.adapters.folders import CONFIG_FILE, HEADS_FILE, learned_classes
from forgetless.core.errors import UserError
from forgetless.core.files import read_json
from forgetless.data.texts import SELF
from forgetless.methods import known
from forgetless.models.load import head_of
from forgetless.models.quantised import FORMATS
from forgetless.recipes.recipe import Recipe
from forgetless.scores.comparison import Comparison, compare
from forgetless.scores.files import read_scores
from forgetless.scores.showing import sentence
from forgetless.studies.folder import RunFolder
from forgetless.training.penalties import words_of
from forgetless.training.settings import titled_settings


def write_run_card(
    run: RunFolder,
    folder: str | Path | None = None,
    error: float | None = None,
    *,
    repaired: str | None = None,
) -> None:
    """Write the card of a run's adapter, with whatever of it is measured by now.

    The folder is an exported adapter's with its own error and repair; None for the run's own, and
    nothing where there is none.
    """
    folder = run.adapter if folder is None else Path(folder)
    config = read_json(folder / CONFIG_FILE)
    if not config:
        return
    recipe, record = Recipe.load(run.recipe), read_json(run.record)
    try:
        point = None if repaired is None else run.point(repaired).path
        base, final = read_scores(run.path, "base"), read_scores(run.path, "final", point)
        scores = score_paragraphs(compare(base.scores, final.scores), base.learning)
    except UserError:  # not measured yet
        scores = []
    head = None
    if config.get("task_type") is None:
        with suppress(UserError):  # the base may be gone
            head = head_of(recipe.base)
    if error is None and repaired is None:
        error = record.get("export", {}).get("relative_error")
    settings = _settings(run, recipe, record.get("training", {}))
    if repaired is not None:
        settings["repair"] = _repair(run, recipe, repaired)
    card = Card(
        base=recipe.base,
        config=config,
        method=recipe.adapter.method,
        options=recipe.adapter.options,
        error=error,
        settings=settings,
        scores=scores,
        versions=record.get("versions", {}),
        head=head,
        new_classes=learned_classes(folder),
        own_classes=read_json(folder / HEADS_FILE).get("own_classes", 0),
        packing=None if recipe.quantise is None else FORMATS[recipe.quantise],
    )
    write(folder, card)


def score_paragraphs(comparison: Comparison, learning: frozenset[str]) -> list[str]:
    level = f"{comparison.level:.0%}".replace("%", " %")
    rows = sorted(comparison, key=lambda row: row.task not in learning)
    cells = [
        [
            f"`{row.task}`",
            "learning" if row.task in learning else "forgetting",
            row.metric.partition(",")[0],
            f"{row.base:.4g}",
            f"{row.score:.4g}",
            f"{row.difference:+.3g}",
            "unknown"
            if math.isnan(row.interval[0])
            else "{:+.3g} to {:+.3g}".format(*row.interval),
            str(row.n),
            "–" if math.isnan(row.retention) else f"{100 * row.retention:.3g} %",
        ]
        for row in rows
    ]
    head = ["task", "", "metric", "base", "adapter", "change", f"{level} interval", "items", "kept"]
    parts = [table(head, cells), "\n".join(f"- `{row.task}`: {sentence(row)}." for row in rows)]
    averages = [average for average in comparison.averages if not average.missing]
    if averages:
        means = [[a.name, f"{a.base:.4f}", f"{a.score:.4f}"] for a in averages]
        parts.append(table(["average", "base", "adapter"], means))
    if comparison.unmatched:
        parts.append(f"Not measured for both: {', '.join(comparison.unmatched)}.")
    parts.append(
        f"Base and adapter answered the same items; the {level} interval is that of the "
        "difference over items. *Kept* is the share of the base's score that is left. Loss and KL "
        "are in nats per token, and lower is better."
    )
    return parts


def _repair(run: RunFolder, recipe: Recipe, setting: str) -> str:
    """How an adapter was repaired, and what that did on held-out text."""
    point = read_json(run.aftercare)["points"][setting]
    kept = {SELF: "texts that the base wrote"}.get(recipe.text_to_keep, recipe.text_to_keep)
    words = [f"strength {point['strength']:g}, by {file_name(kept)}"]
    if point["scale"] != 1:
        words.append(f"the update times {point['scale']:g}")
    if (left := point.get("drift")) is not None:
        words.append(f"{left:.0%} of the drift is left")
    if (lost := point.get("given_up")) is not None:
        words.append(f"{lost:.1%} of what was learned is given up")
    return ", ".join(words).replace("%", " %")


def _settings(run: RunFolder, recipe: Recipe, trained: Mapping[str, Any]) -> dict[str, str]:
    """The rows of a run: what it was trained on, for how long, and what it was told to keep."""
    adapter, training, text = recipe.adapter, recipe.training, recipe.calibration
    data = recipe.data.sources
    sources = [file_name(path) + (f" (weight {w:g})" if len(data) > 1 else "") for path, w in data]
    kept, method = "none: this start reads no text", known(adapter.method)
    if method is not None and "second_moment" in method.needs:
        called = {"self": "sampled from the base itself", "data": "the training data"}
        read = [called.get(name) or file_name(name) for name, _ in text.sources]
        count = "as many as it took" if text.samples == "auto" else text.samples
        kept = f"{' and '.join(read)}; {count} texts of at most {text.max_length} tokens"
    elif method is not None and method.needs:
        kept = "none: this start reads the training data alone"
    steps = trained.get("steps", training.steps or "")
    if over := trained.get("exceeded"):
        seen = f"at step {over['step']} {over['probe']} reached {over['value']:.3g}"
        steps = f"{over['kept_step']}; ended by the budget: {seen}"
    optimiser = [
        f"{training.optimizer}, learning rate {training.learning_rate:g}",
        f"{training.schedule}, warm-up {training.warmup_ratio:g}",
        *[f"{title} {value:g}" for title, value in titled_settings(training).items()],
        f"weight decay {training.weight_decay:g}, {training.precision}",
    ]
    limits = {"KL to the base": recipe.probes.max_kl, "drop of a score": recipe.probes.max_drop}
    loss = trained.get("final_loss")
    update = read_json(run.analysis, damaged_as_missing=True).get("relative_update")
    return {
        "rank and alpha in training": f"{adapter.rank}, {adapter.alpha:g}",
        "dropout": f"{adapter.dropout:g}",
        "training data": ", ".join(sources),
        "prompts and answers": read_json(run.record).get("prompts", ""),
        "knowledge to keep": kept,
        "steps": str(steps),
        "batch": str(training.batch_size * training.gradient_accumulation),
        "optimiser": ", ".join(optimiser),
        "penalties": "; ".join(map(words_of, recipe.penalties)),
        "budget of forgetting": ", ".join(
            f"{name} at most {most:g}" for name, most in limits.items() if most is not None
        ),
        "final loss": "" if loss is None else f"{loss:.4g}",
        "size of the update": f"{update:.3g} of the weights' norm" if update else "",
        "seed": str(recipe.seed),
    }
