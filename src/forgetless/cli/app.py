"""The verbs in the order in which help shows them, and what holds for all of them."""

import os
import sys
import warnings
from io import StringIO
from typing import Annotated

import typer

from forgetless.cli import adapters, aftercare, choosing, doctor, recipes, scores, sharing
from forgetless.core.errors import UserError
from forgetless.training.launch import process_index, this_launch

_TOGETHER = ("run", "train", "stats")
"""The commands that several processes can share."""

app = typer.Typer(
    name="forgetless",
    help="Fine-tune with low-rank adapters, keep what the model knew, and measure both.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
    if process_index() > 0:  # what all processes would say alike, the first one says
        sys.stdout, os.environ["TTY_COMPATIBLE"] = StringIO(), "0"
        warnings.simplefilter("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice to programmers
    if this_launch().processes > 1 and context.invoked_subcommand not in (*_TOGETHER, "worker"):
        raise UserError(
            f"{context.invoked_subcommand!r} is the work of one process; of several, as "
            f"'accelerate launch' starts them, are only {', '.join(_TOGETHER)}"
        )


app.command("demo")(recipes.demo)
app.command("run")(recipes.run)
app.command("train")(recipes.train)
app.command("study")(recipes.study)
app.command("sequence")(recipes.sequence)
app.command("search")(recipes.search)
app.command("report")(recipes.report)
app.command("stats")(adapters.stats)
app.command("init")(adapters.init)
app.command("eval")(scores.eval_)
app.command("compare")(scores.compare)
app.command("export")(adapters.export)
app.command("repair")(aftercare.repair)
app.command("dial")(aftercare.dial)
app.command("spectra")(aftercare.spectra)
app.command("merge")(sharing.merge)
app.command("chat")(sharing.chat)
app.command("push")(sharing.push)
app.command("clean")(sharing.clean)
app.command("plan")(choosing.plan)
app.command("new")(choosing.new)
app.command("data")(choosing.data)
app.command("methods")(choosing.methods)
app.command("tasks")(choosing.tasks)
app.command("doctor")(doctor.doctor)
app.command("worker", hidden=True)(recipes.worker)
