"""The verbs for what is trained already: repair, dial, spectra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forgetless.cli.options import AsJson, BatchSize, Dtype, Items, MaxLength, Samples, Seed
from forgetless.cli.screen import begin
from forgetless.cli.tables import print_adjusted, print_json, print_spectra
from forgetless.cli.values import calibration_of, numbers_of, task_specs
from forgetless.core.errors import UserError

if TYPE_CHECKING:
    from forgetless.cli.commands.aftercare import Asked

Source = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="An adapter, a run or a tuned model: its folder, or its name on the hub.",
    ),
]
OfBase = Annotated[
    str | None, typer.Option("--base", help="The base, where the folder does not name it.")
]
Keep = Annotated[
    str | None,
    typer.Option(help="Text to keep: a file, 'self', pocket:knowledge, or 'stats' output."),
]
NewTask = Annotated[
    str | None, typer.Option("--task", help="Text of the new task: its training or held-out data.")
]
MaxKL = Annotated[
    float | None,
    typer.Option("--max-kl", help="Most nats per token from the base, on held-out text to keep."),
]
MaxDrop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LIMIT",
        help="Most to give up: 1% of what was learned, or TASK=0.02 for one of --tasks.",
    ),
]
Tasks = Annotated[str, typer.Option(help="To score before and after (see 'forgetless tasks').")]
Limit = Annotated[int | None, typer.Option(min=1, help="Items of each task.")]
OutOrNone = Annotated[
    str | None, typer.Option("--out", help="New folder for the adapter that is taken.")
]


def repair(
    source: Source,
    out: OutOrNone = None,
    base: OfBase = None,
    keep: Keep = None,
    task: NewTask = None,
    strength: Annotated[
        str, typer.Option(help="A number from 0, several with commas between, or auto.")
    ] = "auto",
    scales: Annotated[str, typer.Option(help="Turn the repaired update to these as well.")] = "1",
    max_kl: MaxKL = None,
    max_drop: MaxDrop = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of a tuned model: make a LoRA of this rank.")
    ] = None,
    tasks: Tasks = "",
    limit: Limit = None,
    samples: Samples = "auto",
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    memory_budget: Annotated[
        str | None, typer.Option(help="For the statistics held at a time, such as 2GiB.")
    ] = None,
    items: Items = 10,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Make a trained adapter forget less, in closed form and without training.

    With --strength auto, several strengths are measured on text that was held out, and the one is
    taken that meets --max-kl or --max-drop at the least cost; without a budget, the one where more
    would give up more than it wins.
    """
    from forgetless.adapters.repair import STRENGTHS
    from forgetless.cli.commands.aftercare import Asked

    given = STRENGTHS if strength == "auto" else numbers_of("--strength", strength)
    asked = Asked(
        source,
        base,
        keep,
        task,
        strengths=given,
        scales=numbers_of("--scales", scales),
        max_kl=max_kl,
        max_drop=max_drop or [],
        specs=task_specs(tasks, limit=limit),
        rank=rank,
        calibration=calibration_of("the text to keep", samples, max_length, batch_size,
                                   memory_budget=memory_budget),
        dtype=dtype,
        seed=seed,
    )  # fmt: skip
    _adjust(asked, out, items, as_json)


def dial(
    source: Source,
    out: OutOrNone = None,
    base: OfBase = None,
    scales: Annotated[
        str,
        typer.Option(help="How much of the update to use; 0 is the base, below it the way back."),
    ] = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
    keep: Keep = None,
    task: NewTask = None,
    max_kl: MaxKL = None,
    max_drop: MaxDrop = None,
    tasks: Tasks = "",
    limit: Limit = None,
    samples: Samples = "auto",
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    items: Items = 10,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show what more or less of an adapter keeps and learns, and take what meets a budget."""
    from forgetless.cli.commands.aftercare import Asked

    if not (keep or task or tasks):
        raise UserError("dial measures on something: give --keep, --task or --tasks")
    asked = Asked(
        source,
        base,
        keep,
        task,
        scales=numbers_of("--scales", scales),
        max_kl=max_kl,
        max_drop=max_drop or [],
        specs=task_specs(tasks, limit=limit),
        everywhere=True,
        calibration=calibration_of("the text to keep", samples, max_length, batch_size),
        dtype=dtype,
        seed=seed,
    )
    _adjust(asked, out, items, as_json)


def _adjust(asked: Asked, out: str | None, items: int, as_json: bool) -> None:
    from forgetless.cli.commands.aftercare import adjust, needs_no_weights, repair_from_statistics

    begin()
    if out is not None and asked.strengths and needs_no_weights(asked):
        found = repair_from_statistics(asked, out)
    else:
        found = adjust(asked, out)
    if as_json:
        print_json(found.to_json())
        return
    print_adjusted(found, items)


def spectra(
    source: Source,
    base: OfBase = None,
    keep: Keep = None,
    task: NewTask = None,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights/--no-weights",
            help="Decompose the base's weights too; without, a LoRA takes seconds.",
        ),
    ] = True,
    samples: Samples = "auto",
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Annotated[
        str | None, typer.Option("--out", help="File for every layer: .json or .csv.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what an update is: its rank, where it points, and what of the base it turned."""
    from forgetless.cli.commands.aftercare import look_into, write_spectra
    from forgetless.cli.commands.folders import require_file

    if out is not None and Path(out).suffix not in (".json", ".csv"):
        raise UserError(f"--out takes a .json or .csv file, got {out!r}")
    if out is not None:
        require_file(Path(out))
    begin()
    found = look_into(
        source,
        base,
        keep,
        task,
        calibration=calibration_of("the text to keep", samples, max_length, batch_size),
        of_weights=weights,
        dtype=dtype,
        seed=seed,
    )
    if out is not None:
        write_spectra(found, Path(out))
    if as_json:
        print_json(found.to_json())
        return
    print_spectra(found)
    if out is not None:
        print(f"every layer: {out}")
