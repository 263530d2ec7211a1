"""What came of a command, as tables on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from forgetless.adapters.spectra import Spectra
    from forgetless.cli.commands.aftercare import Adjusted
    from forgetless.cli.commands.measuring import Measurement
    from forgetless.data.shown import Shown
    from forgetless.scores.comparison import Comparison
    from forgetless.studies.rate_search import RateSearch
    from forgetless.studies.run import Run
    from forgetless.studies.search import Search


def console() -> Console:
    """The terminal, or whatever takes its place, with its width."""
    from rich.console import Console

    return Console()


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()
) -> None:
    """Print rows of words, the columns of ``numbers`` aligned at their right."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in head:
        number, longest = name in numbers, max(map(len, name.split() or [""]))
        justify: Any = "right" if number else "left"
        # No name is cut off, and no short word above numbers broken.
        least = longest if number and longest <= 12 else None
        table.add_column(name, justify=justify, overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*row)
    console().print(table, markup=False)


def print_text(text: str) -> None:
    """Print prose, broken between words where the terminal ends."""
    console().print(text, markup=False, highlight=False)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value for other programs; without an indent on one line, of which several follow."""
    print(json.dumps(value, indent=indent, ensure_ascii=False), flush=True)


def print_shown(found: Sequence[Shown]) -> None:
    """Examples, with what is learned in colour, or in brackets where there are no colours."""
    from rich.text import Text

    terminal = console()
    coloured = terminal.color_system is not None
    legend = "in green" if coloured else "between [[ and ]]"
    print_text(f"What is learned stands {legend}; the rest is shown only.")
    for example in found:
        line = example.problem or f"{example.tokens} tokens, {example.learned} of them learned"
        print_text(f"\n{example.where}: {line}")
        for row in example.rows:
            text = Text()
            for piece in row:
                marked = piece.text if coloured or not piece.learned else f"[[{piece.text}]]"
                text.append(marked, "green" if piece.learned else "dim")
            terminal.print(text, soft_wrap=True)


def print_rates(found: RateSearch) -> None:
    """The rates that were tried, which one is taken, and why."""
    from forgetless.training.rates import TOLERANCE

    probes = list(dict.fromkeys(name for trial in found.trials for name in trial.forgetting))
    rows = [
        [
            f"{verdict.learning_rate:g}",
            _number(verdict.final_loss),
            _number(verdict.rise),
            *(_number(trial.forgetting.get(name)) for name in probes),
            verdict.why + (" <- taken" if verdict.learning_rate == found.rate else ""),
        ]
        for trial, verdict in zip(found.trials, found.verdicts, strict=True)
    ]
    numbers = ["learning rate", "final loss", "largest rise", *probes]
    print_text(
        f"Each rate was tried for {found.steps} steps, from the same start on the same data:"
    )
    print_table([*numbers, "verdict"], rows, numbers)
    print()
    print_text(
        "final loss: training loss in nats per token, mean of the last tenth of the steps; "
        "largest rise: the most by which it climbed again on its way."
    )
    if probes:
        print_text(
            f"{', '.join(probes)}: measured after the trial on what is to be kept; a KL is how far "
            "the model moved from the base, in nats per token."
        )
    print_text(
        "stable: the loss does not spike, and falls at least "
        f"{100 * (1 - TOLERANCE):.0f} % as far as at the best rate."
    )
    print()
    if found.rate == found.trials[-1].learning_rate:
        print_text(
            "The highest rate that was tried is stable; higher ones may be too: --rates takes some."
        )
    print_text("A higher rate learns faster and forgets more; a study of several shows its price.")
    print(f"The trials are kept in {found.file}")
    print(f"Taken: {found.rate:g}, the highest stable rate. Now the whole training, at this rate.")
    print()


def print_run(done: Run) -> None:
    """What a run learned and forgot."""
    if not done.scores:
        print("nothing was measured: the recipe names no tasks")
        return
    from forgetless.core.files import read_json
    from forgetless.scores.comparison import compare
    from forgetless.scores.files import read_scores
    from forgetless.studies.folder import RunFolder

    run = RunFolder(done.folder)
    taken = run.taken
    base, final = (read_scores(run.path, phase).scores for phase in ("base", "final"))
    if taken:
        print("as it was trained")
    print_comparison(compare(base, final), items=0 if taken else 5)
    if taken:
        strength = read_json(run.aftercare)["points"][taken]["strength"]
        print(f"\nrepaired with strength {strength:g}: this one to ship")
        repaired = read_scores(run.path, "final", run.point(taken).path).scores
        print_comparison(compare(base, repaired), items=5)
    _print_points(done)


def print_usage(done: Run) -> None:
    """How to load the adapter of a run, repaired where it is, as its card says it."""
    from forgetless.adapters.card import CARD_FILE, usage
    from forgetless.core.files import read_json
    from forgetless.recipes.recipe import Recipe
    from forgetless.studies.aftercare import TRAINED
    from forgetless.studies.folder import RunFolder

    run = RunFolder(done.folder)
    if lines := usage(run.shipped, Recipe.load(run.recipe).base):
        print(f"\na plain PEFT LoRA for the untouched base (for vLLM see its {CARD_FILE}):")
        print(*(f"    {line}" for line in lines), sep="\n")
    if read_json(run.aftercare, damaged_as_missing=True).get("repaired") == TRAINED.label:
        print("not repaired: every strength gives up more of what was learned than it may")
    elif run.repaired.is_dir():
        print(f"repaired: {run.repaired}")
        print(f"as it was trained: {run.adapter if run.adapter.is_dir() else run.model}")


def print_end(done: Run) -> None:
    """What ended the training before its last step, if anything did, and where the run lies."""
    if done.exceeded is not None:
        print(f"ended by its budget of forgetting: {done.exceeded}")
    print(f"{done.folder}")


def _print_points(done: Run) -> None:
    """The scores at the steps of `measure_at`, between those of the base and of the end."""
    from forgetless.reports.numbers import three_decimals
    from forgetless.studies.folder import RunFolder, curve_rows

    rows = list(curve_rows(RunFolder(done.folder)))
    if not rows:
        return
    steps = sorted({row["step"] for row in rows})
    scores = {(row["task"], row["step"]): row["score"] for row in rows}
    metrics = {row["task"]: row["metric"] for row in rows}
    heads = ["base", *(f"step {step}" for step in steps[1:-1]), f"end ({steps[-1]})"]
    cells = [
        [task, metric or "", *(_number(scores[task, step], three_decimals) for step in steps)]
        for task, metric in metrics.items()
    ]
    print()
    print_table(["measured on the way", "metric", *heads], cells, heads)


def print_study(folder: str | Path, *, page: bool) -> None:
    """The summary of a study and, if wanted, its page, which is written."""
    from forgetless.reports import report, summary

    console().print(summary(folder))
    if page:
        print(f"report: {report(folder)}")


def print_sequences(folder: str | Path, *, page: bool = True) -> None:
    """The mean matrix of every arm and order, the metrics, and the page, which is written."""
    from forgetless.reports import report
    from forgetless.reports.numbers import three_decimals
    from forgetless.studies.sequence import MAIN_METRICS, matrices, row_names

    found = matrices(folder)
    for arm in found["arms"]:
        for order, of_order in arm["orders"].items():
            seeds = len(of_order["seeds"])
            print(f"{arm['arm']}, {order}{f', mean of {seeds} seeds' if seeds > 1 else ''}")
            known = found["knowledge"] is not None
            heads = [*([found["knowledge"]] if known else []), *of_order["tasks"]]
            rows = [
                [name, *(_number(value, three_decimals) for value in row[not known :])]
                for name, row in zip(row_names(of_order), of_order["R"], strict=True)
                if name is not None
            ]
            print_table(["", *heads], rows, heads)
            print()
    names, by_task = list(MAIN_METRICS), found["task_incremental"]
    parts = {"": found["arms"]}
    if by_task:
        parts = {"class-incremental": found["arms"], "task-incremental": by_task["arms"]}
    for heading, arms in parts.items():
        if heading:
            print(f"{heading}:")
        rows = [
            [
                arm["arm"],
                str(arm["metrics"]["ACC"]["n"]),
                *(_mean(arm["metrics"][n]) for n in names),
            ]
            for arm in arms
        ]
        print_table(["arm", "n", *names], rows, ["n", *names])
        print()
    for name in names:
        print_text(f"{name}: {found['formulas'][name]}.")
    print_text("n: sequences, over seeds and orders; ±: half of the 95 % interval of their mean.")
    if page:
        print(f"report: {report(folder)}")


def _mean(found: Mapping[str, Any]) -> str:
    """A mean with its interval, if it has one."""
    if found["mean"] is None:
        return "–"
    shown = f"{found['mean']:.3f}"
    return shown if found["low"] is None else f"{shown}\n±{found['high'] - found['mean']:.3f}"


def print_search(done: Search, *, page: bool = True) -> None:
    """The front with both objectives and its settings, what mattered, and the page."""
    from forgetless.recipes.study import labels

    found = done.outcome
    for reason in found["failed"]:
        print_text(f"failed: {reason}")
    if not found["front"]:
        print_text("No trial came to its end, so there is no front.")
        return
    tasks = {kind: of["task"] for kind, of in found["objectives"].items()}
    rows = [
        [
            str(point["trial"]),
            point["arm"],
            *(_interval(point[kind]) for kind in tasks),
            str(point["learning"]["n"]),
            " ".join(labels(point["chosen"])),
        ]
        for point in found["front"]
    ]
    print_text(f"The front of {found['finished']} trials, by what was learned:")
    print_table(["trial", "arm", *tasks.values(), "seeds", "settings"], rows, ["trial", "seeds"])
    print()
    print_text(
        "A score is the mean over seeds, with Student's 95 % interval where there are several. "
        "Nothing else that was tried learns more of "
        f"{tasks['learning']} and is better at {tasks['forgetting']}."
    )
    for kind, shares in found["importance"].items():
        shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        if shown:
            print_text(f"What decides {tasks[kind]}: {shown}.")
    print(f"front: {done.folder / 'report' / 'front.csv'}")
    if page:
        from forgetless.reports import report

        print(f"report: {report(done.folder)}")


def _interval(found: Mapping[str, Any]) -> str:
    ends = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    return f"{found['value']:.3f}{ends}"


def print_comparison(comparison: Comparison, items: int) -> None:
    """Scores before and after, and some of the items that were lost and gained."""
    from forgetless.scores.showing import render

    terminal = console()
    terminal.print(render(comparison, items, terminal.width))


def print_measurement(found: Measurement, items: int) -> None:
    """The comparison of what was trained with its base, or a base's scores alone."""
    if found.comparison is not None:
        print_comparison(found.comparison, items)
        return
    rows = [
        [task, score.metric, _number(score.value), _number(score.stderr), str(score.n)]
        for task, score in found.base.items()
    ]
    numbers = ["score", "stderr", "n"]
    print_table(["task", "metric", *numbers], rows, numbers)


def print_adjusted(found: Adjusted, items: int) -> None:
    """What every setting leaves and gives up, which is taken, and what that changes by name."""
    from forgetless.scores.comparison import compare
    from forgetless.studies.aftercare import BASE, TRAINED

    tasks = list(dict.fromkeys(name for point in found.points for name in point.scores))
    names = {BASE: "base", TRAINED: "as trained"}
    shares = "drift left", "given up"
    numbers = ["strength", "scale", "KL", "loss", *shares, *tasks]
    rows = [
        [
            names.get(point.setting, ""),
            f"{point.setting.strength:g}",
            f"{point.setting.scale:g}",
            _number(point.kl),
            _number(point.loss),
            f"{100 * point.drift:.3g} %",
            f"{100 * point.given_up:.3g} %",
            *(_number(point.scores[t].value if t in point.scores else None) for t in tasks),
            "<- taken"
            if found.chosen is not None and point.setting == found.chosen.setting
            else "",
        ]
        for point in found.points
    ]
    print_table(["", *numbers, " "], rows, numbers)
    print()
    print_text(
        "KL: nats per token between the base and the model, on held-out text to keep; drift left: "
        "the share of it that is left. loss: nats per token on held-out text of the new task; "
        "given up: the share of what was learned of it that is lost again. Where a text was not "
        "given, the two shares are told by the second moments."
    )
    trained = next((p for p in found.points if p.setting == TRAINED), None)
    if found.chosen is not None and found.chosen.scores and trained is not None and trained.scores:
        print("\nFrom the adapter as trained to the one that is taken:")
        print_comparison(compare(trained.scores, found.chosen.scores), items)
    if found.folder is not None:
        print(f"\n{found.folder}: a plain adapter, with aftercare.json on how it was chosen")


def print_spectra(found: Spectra) -> None:
    """The means over the layers of every kind of module."""
    columns = {
        "layers": "layers",
        "relative_update": "size",
        "update_rank_at_90": "r90 dW",
        "weight_rank_effective": "erank W",
        "activations_rank_effective": "erank X",
        "rotation": "turned",
        "intruders": "new",
        "output_change": "output",
        "update_on_inputs_last": "tail",
        "shared_energy": "shared",
    }
    rows = {**found.by_module, "all": found.overall}
    shown = {
        column: head
        for column, head in columns.items()
        if any(row.get(column) is not None for row in rows.values())
    }
    cells = [
        [name, *(_number(row[c], "{:.3g}".format) for c in shown)] for name, row in rows.items()
    ]
    print_table(["module", *shown.values()], cells, list(shown.values()))
    print()
    print_text(
        "Means over layers; --out and --json have every layer, and more. size: ||dW|| / ||W||; "
        "r90: directions of the update dW with 90 % of its energy; erank: effective rank (Roy and "
        "Vetterli) by singular values, of the weight W and of the inputs X on the text to keep; "
        "turned: share of dW that turns W's singular directions instead of rescaling them; new: "
        "intruder dimensions among the ten largest of W + dW; output: ||dW X|| / ||W X||; tail: "
        "share of dW that reads the weakest tenth of the directions of X; shared: share of the new "
        "task's activation energy within the space that holds 90 % of the kept text's."
    )


def print_forecast(found: Mapping[tuple[str, ...], float]) -> None:
    """What the texts share, one row a block and one column an input of it."""
    from forgetless.models.parts import block_of

    cells: dict[str, dict[int | None, list[float]]] = {}
    for layers, share in found.items():
        kind = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        cells.setdefault(kind, {}).setdefault(block_of(layers[0]), []).append(share)

    def shown(values: Sequence[float]) -> str:
        return f"{sum(values) / len(values):.0%}" if values else "–"

    blocks = dict.fromkeys(block for of_kind in cells.values() for block in of_kind)
    rows = [
        ["–" if block is None else str(block), *(shown(c.get(block, ())) for c in cells.values())]
        for block in blocks
    ]
    rows.append(["mean", *(shown([v for of in c.values() for v in of]) for c in cells.values())])
    print_table(["block", *cells], rows, list(cells))
    print_text(
        "Forecast: share of the new task's activation energy in the space that holds 90 % of that "
        "of the text to keep, by what the layers read. Where it is near 100 % whatever the task "
        "changes moves what is to be kept too; near 0 % the two can be had together."
    )


def _number(value: float | None, show: Callable[[float], str] = "{:.4g}".format) -> str:
    return "–" if value is None else show(value)
