"""The command line: one verb a stage, each of which calls one function.

Nothing heavy is imported before a command needs it, so that help and mistakes answer at once.
A user's mistake is one line on standard error and exit code 2; a run that failed is exit code 1.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from forgetless.recipe import CalibrationSettings
    from forgetless.studies import Study

STOPPED = 130
"""The exit code after Ctrl-C."""

app = typer.Typer(
    name="forgetless",
    help="Fine-tune with low-rank adapters, keep what the model knew, and measure both.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, as training.steps=10."),
]
Out = Annotated[str, typer.Option("--out", help="Folder that holds the studies.")]
NewFolder = Annotated[str, typer.Option("--out", help="New folder to write to.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Torch threads of a process; one for a small model.")
]
Check = Annotated[
    bool, typer.Option("--check", help="Only say what is wrong, before any weight is loaded.")
]
Base = Annotated[str, typer.Argument(metavar="BASE", help="'pocket', a model folder or a hub id.")]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text to keep: a file, 'self' (sampled from the base), pocket:knowledge."),
]
Samples = Annotated[int, typer.Option(help="Texts of the calibration source to read.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of the longest calibration text.")]
BatchSize = Annotated[int, typer.Option(help="Calibration texts at a time.")]
Targets = Annotated[
    str,
    typer.Option("--target-modules", help="all-linear, endings such as q_proj,v_proj, or a regex."),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    warnings.showwarning = _show_warning
    try:
        code = app([word for word in given if word != "--debug"], standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except Exception as error:
        if debug:
            raise
        sys.exit(_say(*_explain(error)))
    if code == STOPPED:
        _say("stopped; the same command goes on where it was", code)
    sys.exit(code)


def _explain(error: Exception) -> tuple[str, int]:
    """One line, or a gathered list, and the exit code: 2 where the user can mend it."""
    usage = getattr(error, "format_message", None)
    if usage is not None:
        return f"error: {usage()}; see 'forgetless --help'", 2
    if isinstance(error, KeyError) or not isinstance(error, ValueError | OSError):
        return f"error: {type(error).__name__}: {error} (--debug shows where)", 1
    # A gathered list of one is one line.
    return f"error: {error}".replace(": 1 problem\n  - ", ": "), 2


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


_warned: set[str] = set()


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Each warning to users as one line, once; those to developers are not for them."""
    if issubclass(category, UserWarning) and str(message) not in _warned:
        _warned.add(str(message))
        print(f"warning: {message}", file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        from forgetless import __version__

        print(f"forgetless {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


# ------------------------------------------------------------------------------- the main verbs


@app.command()
def demo(
    out: Out = "runs",
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
    threads: Threads = None,
) -> None:
    """Fine-tune the pocket model seven ways and show what each learned and forgot."""
    from forgetless.demo import definition

    done = _study(definition(), out, workers, threads)
    _finish(done, page=True)
    _exit_if_failed(done)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    changes: Set = None,
    out: Out = "runs",
    study: Annotated[str | None, typer.Option(help="Folder of the run; the recipe's name.")] = None,
    threads: Threads = None,
    check: Check = False,
) -> None:
    """Train by a recipe and measure what was learned and forgotten."""
    _run(recipe, changes, out, study, threads, check, evaluate=True)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    changes: Set = None,
    out: Out = "runs",
    study: Annotated[str | None, typer.Option(help="Folder of the run; the recipe's name.")] = None,
    threads: Threads = None,
    check: Check = False,
) -> None:
    """Train and export by a recipe, without measuring; 'run' adds the measuring later."""
    _run(recipe, changes, out, study, threads, check, evaluate=False)


def _run(
    path: str,
    changes: list[str] | None,
    out: str,
    study: str | None,
    threads: int | None,
    check_only: bool,
    *,
    evaluate: bool,
) -> None:
    from forgetless.errors import RecipeError
    from forgetless.reading import parse_assignments
    from forgetless.recipe import Recipe
    from forgetless.recipe import check as look

    recipe = Recipe.load(path, parse_assignments(changes or []))
    if recipe.name is None:
        recipe = recipe.model_copy(update={"name": Path(path).stem})
    if check_only:
        problems = look(recipe)
        if problems:
            raise RecipeError(path, problems)
        print(f"{path}: no problems; the run would be {recipe.run_id}")
        return
    from forgetless.runs import run as do

    with _watch() as listen:
        done = do(recipe, out, study, evaluate=evaluate, threads=threads, listen=listen)
    if evaluate:
        _print_scores(done.scores)
    print(f"{done.folder}")


@app.command()
def study(
    path: Annotated[str, typer.Argument(metavar="STUDY", help="A YAML file.")],
    changes: Set = None,
    out: Out = "runs",
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    threads: Threads = None,
    check: Check = False,
    page: Annotated[bool, typer.Option("--report/--no-report", help="Write the page.")] = True,
) -> None:
    """Do all runs of a study; a study that was stopped goes on."""
    from forgetless.reading import parse_assignments
    from forgetless.study_recipe import StudyRecipe

    definition = StudyRecipe.load(path, parse_assignments(changes or []))
    if check:
        print(f"{path}: no problems; {len(definition.recipes())} runs")
        return
    done = _study(definition, out, workers, threads)
    _finish(done, page)
    _exit_if_failed(done)


def _study(definition: Any, out: str, workers: int, threads: int | None) -> Study:
    from forgetless.studies import study as do

    with _watch(several=workers > 1) as listen:
        return do(definition, out, workers=workers, threads=threads, listen=listen)


def _finish(done: Study, page: bool) -> None:
    """Print the summary of a study and, if wanted, write its page."""
    from forgetless.reports import report, summary

    if len(done.failed) < len(done.runs):
        _console().print(summary(done.folder))
        if page:
            print(f"report: {report(done.folder)}")


def _exit_if_failed(done: Study) -> None:
    for run in done.failed:
        print(f"failed: {run.folder}: {run.record.get('reason')}", file=sys.stderr)
    if done.failed:
        raise typer.Exit(1)


@app.command("report")
def report_(
    folder: Annotated[str, typer.Argument(metavar="STUDY", help="Folder of a study.")],
) -> None:
    """Write the page, the tables and the figures of a study."""
    from forgetless.reports import report, summary

    page = report(folder)
    _console().print(summary(folder))
    print(f"report: {page}")


# ------------------------------------------------------------------------------- single stages


@app.command()
def stats(
    base: Base,
    out: NewFolder,
    calibration: Calibration = "self",
    samples: Samples = 256,
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    target_modules: Targets = "all-linear",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    memory_budget: Annotated[
        str | None, typer.Option(help="For the matrices held at a time, such as 2GiB.")
    ] = None,
) -> None:
    """Collect the activations of the knowledge to keep."""
    settings = _calibration(calibration or "self", samples, max_length, batch_size)
    from forgetless.commands import collect_statistics

    _hush()
    collected = collect_statistics(
        base,
        settings,
        target_modules=_targets(target_modules),
        dtype=dtype,
        seed=seed,
        memory_budget=memory_budget,
    )
    file = collected.save(out)
    print(f"{file}: {len(collected)} layers, {collected.metadata['tokens']} tokens")


@app.command()
def init(
    base: Base,
    out: NewFolder,
    method: Annotated[str, typer.Option(help="See 'forgetless methods'.")] = "lora_null_v1",
    calibration: Calibration = None,
    statistics: Annotated[
        str | None, typer.Option("--stats", help="Folder written by 'forgetless stats'.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    alpha: Annotated[float, typer.Option(help="scaling = alpha / rank.")] = 16.0,
    target_modules: Targets = "all-linear",
    dropout: Annotated[float, typer.Option(help="On the adapter's input.")] = 0.0,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the method.")
    ] = None,
    samples: Samples = 256,
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Write the start of an adapter for any trainer."""
    from forgetless.reading import parse_assignments, validated
    from forgetless.recipe import AdapterSettings

    values = {
        "method": method,
        "rank": rank,
        "alpha": alpha,
        "target_modules": _targets(target_modules),
        "dropout": dropout,
        "options": parse_assignments(option or []),
    }
    settings = validated(AdapterSettings, values, "init")
    text = _calibration(calibration, samples, max_length, batch_size) if calibration else None
    from forgetless.commands import init as write
    from forgetless.statistics import Statistics

    _hush()
    source = Statistics.load(statistics) if statistics is not None else text
    start = write(base, settings, out, source=source, dtype=dtype, seed=seed)
    if start.obstacle is None:
        print(f"{start.folder}: a plain LoRA that any PEFT-based trainer can continue")
    else:
        print(f"{start.folder}: not for trainers that know only PEFT, since {start.obstacle}.")
        print(f"continue it with: forgetless.load(base, {str(start.folder)!r}, trainable=True)")


@app.command("eval")
def eval_(
    base: Base,
    tasks: Annotated[str, typer.Option(help="Names with commas between; kind:file for a file.")],
    adapter: Annotated[
        str | None, typer.Option(help="An adapter, a run or a trained model to compare.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.")] = None,
    out: Annotated[str | None, typer.Option(help="JSON file for the scores.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Score a base, and an adapter on it, on tasks."""
    from forgetless.commands import measure, task_specs

    _hush()
    found = measure(base, task_specs(tasks, limit), adapter=adapter, dtype=dtype)
    _print_measurement(found)
    if out is not None:
        from forgetless.store import write_json

        write_json(Path(out), found.to_json())


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Its folder.")],
    out: NewFolder,
    rank: Annotated[str, typer.Option(help="exact, requested or a number.")] = "exact",
    base: Annotated[str | None, typer.Option(help="The base, where it is not recorded.")] = None,
) -> None:
    """Write a trained adapter as a plain PEFT LoRA for the untouched base."""
    from forgetless.commands import export as write
    from forgetless.commands import parse_rank

    _hush()
    report = write(source, out, parse_rank(rank), base)
    print(f"{out}: rank {report.rank}, relative error {report.relative_error:.3g}")


@app.command()
def methods() -> None:
    """List the ways to start an adapter."""
    from forgetless.methods import METHODS

    rows = [
        [name, method.summary, ", ".join(sorted(method.needs)) or "–", _options_of(method.options)]
        for name, method in METHODS.items()
    ]
    _print_table(["method", "what it does", "needs", "options"], rows)


@app.command()
def tasks() -> None:
    """List what a model can be scored on."""
    from forgetless.tasks import TASKS

    rows = [[name, task.summary, ", ".join(task.required) or "–"] for name, task in TASKS.items()]
    _print_table(["task", "what it measures", "needs"], rows)


@app.command(hidden=True)
def worker(
    folder: Annotated[str, typer.Argument()],
    session: Annotated[str, typer.Argument()],
    threads: Threads = None,
) -> None:
    """Do runs of a study that another process started."""
    from forgetless.studies import serve

    _hush()
    serve(Path(folder), session, threads)


# ------------------------------------------------------------------------------------- printing


def _targets(text: str) -> str | list[str]:
    """A list where commas stand between names, else the word or regular expression itself."""
    names = [name.strip() for name in text.split(",")]
    return names if len(names) > 1 or text.isidentifier() else text


def _calibration(
    source: str, samples: int, max_length: int, batch_size: int
) -> CalibrationSettings:
    from forgetless.reading import validated
    from forgetless.recipe import CalibrationSettings

    values = {
        "source": source,
        "samples": samples,
        "max_length": max_length,
        "batch_size": batch_size,
    }
    return validated(CalibrationSettings, values, "calibration")


def _options_of(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "–"


def _console() -> Console:
    from rich.console import Console

    return Console()


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(*head, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _print_scores(rows: Sequence[dict[str, Any]]) -> None:
    """The scores of one run."""
    if not rows:
        print("nothing was measured: the recipe names no tasks")
        return
    cells = [
        [str(row["task"]), str(row["kind"]), str(row["metric"])]
        + [_number(row[key]) for key in ("base_score", "score", "stderr", "n", "retention")]
        for row in rows
    ]
    head = ["task", "kind", "metric", "base", "trained", "stderr", "n", "retention"]
    _print_table(head, cells)


def _print_measurement(found: Any) -> None:
    if found.comparison is not None:
        print(found.comparison)
        return
    cells = [
        [task, score.metric, _number(score.value), _number(score.stderr), str(score.n)]
        for task, score in found.base.items()
    ]
    _print_table(["task", "metric", "score", "stderr", "n"], cells)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _watch(several: bool = False) -> Any:
    from forgetless.watch import watch

    _hush()
    return watch(several=several)


def _hush() -> None:
    """No bars and notes of transformers, which says the same for every load of a model."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
