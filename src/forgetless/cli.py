"""The command line: one verb a stage, each of which calls one function.

Nothing heavy is imported before a command needs it, so that help and mistakes answer at once.
A user's mistake is one line on standard error and exit code 2; a run that failed is exit code 1.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from forgetless.errors import OtherProcessError, UserError
from forgetless.launch import process_index, this_launch

if TYPE_CHECKING:
    from rich.console import Console

    from forgetless.rate_search import RateSearch
    from forgetless.recipe import CalibrationSettings
    from forgetless.runs import Run
    from forgetless.scores.comparison import Comparison
    from forgetless.studies import Study

STOPPED = 130
"""The exit code after Ctrl-C."""

_TOGETHER = ("run", "train", "stats")
"""The commands that several processes can share."""

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
    typer.Option(
        "--target-modules",
        help="all-linear, attention, mlp, endings such as q_proj,v_proj, or a regex.",
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Items = Annotated[int, typer.Option(min=0, help="Lost and gained items of a task to show.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    warnings.showwarning = _show_warning
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clusters send it
    try:
        words = [word for word in given if word != "--debug"]
        code = app(words, standalone_mode=False, obj=words) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except Exception as error:
        if debug:
            raise
        sys.exit(_say(*_explain(error)))
    finally:
        _clear_screen()
    if code == STOPPED and process_index() == 0:
        _say(f"stopped; to go on: {_as_typed(given)}", code)
    sys.exit(code)


def _clear_screen() -> None:
    """Take away the bar of work that was stopped or failed."""
    if "forgetless.progress" in sys.modules:
        from forgetless.progress import clear

        clear()


def _as_typed(given: Sequence[str]) -> str:
    """The command line, to be copied."""
    if "WORLD_SIZE" in os.environ:
        return "start the same launch again"
    program = "python -m forgetless" if sys.argv[0].endswith("__main__.py") else "forgetless"
    return f"{program} {shlex.join(given)}"


def _this_command(context: typer.Context) -> str:
    """The command that is being done, to be copied."""
    words = context.find_object(list)
    return _as_typed(sys.argv[1:] if words is None else words)


def _explain(error: Exception) -> tuple[str, int]:
    """One line, or a gathered list, and the exit code: 2 where the user can mend it."""
    usage = getattr(error, "format_message", None)
    if usage is not None:
        return f"error: {usage()}; see 'forgetless --help'", 2
    if isinstance(error, KeyError) or not isinstance(error, ValueError | OSError):
        return f"error: {type(error).__name__}: {error} (--debug shows where)", 1
    if isinstance(error, OtherProcessError) and process_index() > 0:
        return "", 1  # that process says it
    # A gathered list of one is one line.
    return f"error: {error}".replace(": 1 problem\n  - ", ": "), 2


def _say(message: str, code: int) -> int:
    who = f"process {process_index()}: " if process_index() > 0 else ""
    if message:
        print(f"{who}{message}", file=sys.stderr)
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
    if process_index() > 0:  # what all processes would say alike, the first one says
        sys.stdout, os.environ["TTY_COMPATIBLE"] = StringIO(), "0"
        warnings.simplefilter("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice to programmers
    if this_launch().processes > 1 and context.invoked_subcommand not in _TOGETHER:
        raise UserError(
            f"{context.invoked_subcommand!r} is the work of one process; of several, as "
            f"'accelerate launch' starts them, are only {', '.join(_TOGETHER)}"
        )


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
    find_lr: Annotated[
        bool,
        typer.Option("--find-lr", help="Try rates briefly first; go on with the highest stable."),
    ] = False,
    rates: Annotated[
        str | None,
        typer.Option(metavar="RATE,RATE,...", help="To be tried; six around the recipe's own."),
    ] = None,
    find_steps: Annotated[
        int | None, typer.Option(min=2, help="At each rate; a twentieth of the training's.")
    ] = None,
) -> None:
    """Train by a recipe and measure what was learned and forgotten."""
    if not find_lr and (rates or find_steps):
        raise typer.BadParameter("--rates and --find-steps are for --find-lr; add that")
    trials = {"rates": _rates(rates), "steps": find_steps} if find_lr else None
    _run(recipe, changes, out, study, threads, check, evaluate=True, trials=trials)


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
    trials: dict[str, Any] | None = None,
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
        if trials is not None:
            from forgetless.rate_search import find_rate

            found = find_rate(recipe, out, study, **trials, threads=threads, listen=listen)
            _print_rates(found)
            recipe = found.recipe
        done = do(recipe, out, study, evaluate=evaluate, threads=threads, listen=listen)
    if evaluate:
        _print_run(done)
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
    skip_first: Annotated[
        int, typer.Option(help="Leave out so many first tokens of each text (attention sinks).")
    ] = 0,
) -> None:
    """Collect the activations of the knowledge to keep; goes on where it was interrupted."""
    settings = _calibration(
        calibration or "self",
        samples,
        max_length,
        batch_size,
        skip_first=skip_first,
        memory_budget=memory_budget,
    )
    from forgetless.commands import collect_statistics
    from forgetless.store import remove
    from forgetless.training.devices import join

    _hush()
    ranks = join()
    unfinished = Path(out).with_name(f".{Path(out).name}.unfinished")
    collected = collect_statistics(
        base,
        settings,
        target_modules=_targets(target_modules),
        dtype=dtype,
        seed=seed,
        unfinished=unfinished,
    )
    ranks.wait()  # until none needs what is unfinished
    file = ranks.first(lambda: collected.save(out))
    ranks.first(lambda: remove(unfinished))
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
    data: Annotated[
        str | None, typer.Option(help="The new task's training data, for methods that look at it.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    alpha: Annotated[float, typer.Option(help="scaling = alpha / rank.")] = 16.0,
    target_modules: Targets = "all-linear",
    dropout: Annotated[float, typer.Option(help="On the adapter's input.")] = 0.0,
    rslora: Annotated[bool, typer.Option("--rslora", help="scaling = alpha / sqrt(rank).")] = False,
    dora: Annotated[
        bool, typer.Option("--dora", help="Train the length of every row of a weight too.")
    ] = False,
    rank_pattern: Annotated[
        list[str] | None, typer.Option(metavar="LAYER=RANK", help="Rank of layers named so.")
    ] = None,
    alpha_pattern: Annotated[
        list[str] | None, typer.Option(metavar="LAYER=ALPHA", help="Alpha of layers named so.")
    ] = None,
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
    from forgetless.recipe import AdapterSettings, DataSettings

    values = {
        "method": method,
        "rank": rank,
        "alpha": alpha,
        "target_modules": _targets(target_modules),
        "dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "rank_pattern": _by_layer(rank_pattern),
        "alpha_pattern": _by_layer(alpha_pattern),
        "options": parse_assignments(option or []),
    }
    settings = validated(AdapterSettings, values, "init")
    text = _calibration(calibration, samples, max_length, batch_size) if calibration else None
    new_task = validated(DataSettings, {"train": data}, "data") if data is not None else None
    from forgetless.commands import init as write
    from forgetless.statistics import Statistics

    _hush()
    source = Statistics.load(statistics) if statistics is not None else text
    start = write(base, settings, out, source=source, data=new_task, dtype=dtype, seed=seed)
    if start.obstacle is None:
        print(f"{start.folder}: a plain LoRA that any PEFT-based trainer can continue")
    else:
        print(f"{start.folder}: not for trainers that know only PEFT, since {start.obstacle}.")
        print(f"continue it with: forgetless.load(base, {str(start.folder)!r}, trainable=True)")


@app.command("eval")
def eval_(
    context: typer.Context,
    base: Base,
    tasks: Annotated[
        str,
        typer.Option(
            help="Names with commas between (see 'forgetless tasks'), kind:file, or YAML."
        ),
    ],
    adapter: Annotated[
        str | None, typer.Option(help="An adapter, a run or a trained model to compare.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Worked examples in a prompt; the task's own number.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of an answer; the task's own number.")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Folder with the standard tasks' data in local files.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Texts at once; it does not change the scores.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Folder of the scores measured before; the user's cache.")
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option("--allow-code-execution", help="Run what the model programs, in a sandbox."),
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(help="JSON file: {task: {metric: {value, stderr, n}}}; the base's beside it."),
    ] = None,
    page: Annotated[
        str | None,
        typer.Option("--report", help="Folder for a page of what the adapter lost and learned."),
    ] = None,
    learning: Annotated[
        str,
        typer.Option(
            metavar="TASKS", help="Those of the tasks that were to be learned, for --report."
        ),
    ] = "",
    items: Items = 10,
    dtype: Dtype = "auto",
) -> None:
    """Score a base, and an adapter on it, on tasks."""
    from forgetless.commands import learned_among, measure, task_specs, write_scores
    from forgetless.errors import UserError

    if page is not None and adapter is None:
        raise UserError("--report shows an adapter against its base; give --adapter too")
    if learning and page is None:
        raise UserError("--learning is about the page of --report; give --report too")
    _hush()
    specs = task_specs(
        tasks,
        limit=limit,
        num_fewshot=num_fewshot,
        max_new_tokens=max_new_tokens,
        data_dir=data_dir,
        allow_code_execution=allow_code_execution or None,
    )
    learned = learned_among(specs, learning)
    found = measure(
        base,
        specs,
        adapter=adapter,
        dtype=dtype,
        batch_size=batch_size,
        cache=cache,
        listen=_tell_terminal,
    )
    _print_measurement(found, items)
    if out is not None:
        write_scores(found, Path(out))
    if page is not None and adapter is not None and found.adapted is not None:
        from forgetless.reports import report, write_evaluation

        write_evaluation(
            page,
            base,
            adapter,
            found.base,
            found.adapted,
            learning=learned,
            command=_this_command(context),
        )
        print(f"report: {report(page)}")


@app.command()
def compare(
    base_scores: Annotated[
        str,
        typer.Argument(metavar="BASE_SCORES", help="A file of 'eval --out', or a run (its base)."),
    ],
    scores: Annotated[
        str | None,
        typer.Argument(metavar="SCORES", help="Likewise, or a run; the same run if left out."),
    ] = None,
    max_drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIMIT",
            help="Exit with 1 if a task lost more: 0.02 (points), 5% (of the base), TASK=0.05.",
        ),
    ] = None,
    certain: Annotated[
        bool, typer.Option("--certain", help="Only if the whole interval is beyond the limit.")
    ] = False,
    items: Items = 10,
    json: Annotated[str | None, typer.Option(help="JSON file for all of it.")] = None,
    junit: Annotated[str | None, typer.Option(help="JUnit XML file: a test case a task.")] = None,
) -> None:
    """Show what was lost and gained between two scorings, and fail if it is too much."""
    from forgetless.errors import UserError
    from forgetless.scores import gates
    from forgetless.scores.comparison import compare as do
    from forgetless.scores.files import read_scores
    from forgetless.store import write_json, write_text

    limits = gates.parse_limits(max_drop or [])
    if scores is None and Path(base_scores).is_file():
        raise UserError(f"give the scores to compare with {base_scores}; only a run has both")
    before = read_scores(base_scores, "base")
    after = read_scores(base_scores if scores is None else scores, "final")
    comparison = do(before.scores, after.scores)
    learning = before.learning | after.learning
    judged = gates.judge(comparison, limits, learning=learning, certain=certain)
    _print_comparison(comparison, items)
    if limits:
        print("\n" + gates.verdict(judged))
    if json is not None:
        write_json(Path(json), {**comparison.to_json(), "gate": gates.to_json(judged)})
    if junit is not None:
        write_text(Path(junit), gates.junit(judged))
    if any(judgement.failed for judgement in judged):
        raise typer.Exit(1)


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
    print(report)


@app.command()
def plan(
    context: typer.Context,
    base: Base,
    data: Annotated[str, typer.Option(help="Training data of the new task, or raw text.")],
    keep: Annotated[
        str | None, typer.Option(help="Text of what is to be kept: replayed and measured.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Held-out examples of the new task: measured.")
    ] = None,
    goal: Annotated[str, typer.Option(help="learn, balance or keep.")] = "balance",
    method: Annotated[str | None, typer.Option(help="Instead of the advised one.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Likewise.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="What the run may take, such as 24GB; the batch is fitted.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="YAML file for the recipe.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For other programs.")] = False,
) -> None:
    """Advise how to train a base on some data, with reasons, costs and a recipe."""
    from forgetless.errors import UserError
    from forgetless.planning import Wishes, recipe_text, render
    from forgetless.planning import plan as do
    from forgetless.statistics.budget import parse_bytes
    from forgetless.store import write_text

    if out is not None and Path(out).exists():
        raise UserError(f"{out} is there already; give another name, or remove it")
    _hush()
    most = None if memory is None else parse_bytes(memory, "--memory")
    made = do(base, data, Wishes(goal, method, rank, keep, test, most))
    if out is not None:
        write_text(Path(out), recipe_text(made, _this_command(context)))
    if as_json:
        import json

        print(json.dumps(made.to_json(), indent=2, ensure_ascii=False))
        return
    _console().print(render(made))
    if out is not None:
        print(f"recipe: {out}")
    else:
        print("--out recipe.yaml writes this as a recipe; --json is for programs")


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="For other programs.")] = False,
) -> None:
    """Show the ways to start an adapter: what each is, needs and trains, and its paper."""
    from forgetless.method_table import as_text, entries

    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps([asdict(entry) for entry in entries()], indent=2, ensure_ascii=False))
        return
    print(as_text(min(_console().width, 100)))


@app.command()
def tasks() -> None:
    """List what a model can be scored on."""
    from forgetless.tasks import SUITES, TASKS
    from forgetless.tasks.harness import STANDARD

    rows = [[name, task.summary, ", ".join(task.required) or "–"] for name, task in TASKS.items()]
    _print_table(["kind", "what it measures", "needs"], rows)
    rows = [[name, task.summary] for name, task in STANDARD.items()]
    _print_table(
        ["standard task", "of the lm-evaluation-harness; --data-dir for local files"], rows
    )
    _print_table(["suite", "its tasks"], [[name, ", ".join(SUITES[name])] for name in SUITES])
    print("Any other name of the lm-evaluation-harness is a task too, and so is a YAML file.")


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


def _rates(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(rate) for rate in text.split(",")]
    except ValueError:
        message = f"--rates takes numbers with commas between, as 1e-4,3e-4; got {text!r}"
        raise typer.BadParameter(message) from None


def _targets(text: str) -> str | list[str]:
    """A list where commas stand between names, else the word or regular expression itself."""
    from forgetless.blocks import PARTS

    names = [name.strip() for name in text.split(",")]
    return names if len(names) > 1 or (text.isidentifier() and text not in PARTS) else text


def _by_layer(assignments: list[str] | None) -> dict[str, Any]:
    """Settings LAYER=NUMBER, where a layer may be a regular expression with an = in it."""
    from forgetless.reading import parse_yaml

    parts = [text.rpartition("=") for text in assignments or ()]
    return {layer: parse_yaml(number) for layer, _, number in parts}


def _calibration(
    source: str, samples: int, max_length: int, batch_size: int, **more: Any
) -> CalibrationSettings:
    from forgetless.reading import validated
    from forgetless.recipe import CalibrationSettings

    values = {
        "source": source,
        "samples": samples,
        "max_length": max_length,
        "batch_size": batch_size,
        **more,
    }
    return validated(CalibrationSettings, values, "calibration")


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


def _print_rates(found: RateSearch) -> None:
    """The rates that were tried, and what is to be said of the one that is taken."""
    names = list(dict.fromkeys(name for trial in found.trials for name in trial.forgetting))
    rows = [
        [
            f"{verdict.learning_rate:g}",
            _number(verdict.final_loss),
            _number(verdict.rise),
            *(_number(trial.forgetting.get(name)) for name in names),
            verdict.why + (" <- taken" if verdict.learning_rate == found.rate else ""),
        ]
        for trial, verdict in zip(found.trials, found.verdicts, strict=True)
    ]
    _print_table(["learning rate", "last loss", "highest rise", *names, "verdict"], rows)
    print(f"{found.steps} steps at each rate; {found.file}")
    if found.rate == found.trials[-1].learning_rate:
        print("The highest rate that was tried is stable; there may be higher ones (--rates).")
    print("A higher rate learns faster and forgets more; a study of several shows at what price.")


def _print_run(done: Run) -> None:
    """What a run learned and forgot."""
    if not done.scores:
        print("nothing was measured: the recipe names no tasks")
        return
    from forgetless.scores.comparison import compare
    from forgetless.scores.files import read_scores

    base, final = (read_scores(done.folder, phase).scores for phase in ("base", "final"))
    _print_comparison(compare(base, final), items=5)


def _print_comparison(comparison: Comparison, items: int) -> None:
    from forgetless.scores.showing import render

    console = _console()
    console.print(render(comparison, items, console.width))


def _print_measurement(found: Any, items: int) -> None:
    if found.comparison is not None:
        _print_comparison(found.comparison, items)
        return
    cells = [
        [task, score.metric, _number(score.value), _number(score.stderr), str(score.n)]
        for task, score in found.base.items()
    ]
    _print_table(["task", "metric", "score", "stderr", "n"], cells)


def _tell_terminal(message: str) -> None:
    """What a command is doing, for those who wait in front of it."""
    if sys.stderr.isatty():
        print(message, file=sys.stderr)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _watch(several: bool = False) -> Any:
    from forgetless.watch import watch

    _hush()
    return watch(several=several)


def _hush() -> None:
    """Our own bars, and none of transformers, nor what it says alike for every model it loads."""
    from transformers.utils import logging

    from forgetless.progress import draw

    draw()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
