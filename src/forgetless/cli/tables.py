"""What came of a command, as tables on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from forgetless.cli.commands.measuring import Measurement
    from forgetless.scores.comparison import Comparison
    from forgetless.studies.rate_search import RateSearch
    from forgetless.studies.run import Run


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
        table.add_column(name, justify="right" if name in numbers else "left")
    for row in rows:
        table.add_row(*row)
    console().print(table, markup=False)


def print_text(text: str) -> None:
    """Print prose, broken between words where the terminal ends."""
    console().print(text, markup=False, highlight=False)


def print_json(value: Any) -> None:
    """Print a value for other programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


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
    from forgetless.scores.comparison import compare
    from forgetless.scores.files import read_scores

    base, final = (read_scores(done.folder, phase).scores for phase in ("base", "final"))
    print_comparison(compare(base, final), items=5)
    _print_points(done)


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


def _number(value: float | None, show: Callable[[float], str] = "{:.4g}".format) -> str:
    return "–" if value is None else show(value)
