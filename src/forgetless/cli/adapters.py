"""The verbs about one adapter: the statistics it may need, its start, and its export."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from forgetless.cli.options import (
    Base,
    BatchSize,
    Calibration,
    Dtype,
    MaxLength,
    NewFolder,
    Samples,
    Seed,
    Targets,
)
from forgetless.cli.screen import begin
from forgetless.cli.values import by_layer, calibration_of, options_of, rank_of, targets_of


def stats(
    base: Base,
    out: NewFolder,
    calibration: Calibration = "self",
    samples: Samples = "auto",
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
    adapter: Annotated[
        str | None,
        typer.Option(help="Of the model with this adapter on it, for the --task of a repair."),
    ] = None,
) -> None:
    """Collect the activations of the knowledge to keep; goes on where it was interrupted."""
    settings = calibration_of(
        calibration or "self",
        samples,
        max_length,
        batch_size,
        skip_first=skip_first,
        memory_budget=memory_budget,
    )
    from forgetless.cli.commands.starts import collect_statistics
    from forgetless.core.files import lock, remove
    from forgetless.training.devices import join

    begin()
    processes = join()
    place = Path(out)
    unfinished, turn = (place.with_name(f".{place.name}.{end}") for end in ("unfinished", "lock"))
    with lock(turn) if processes.is_first else nullcontext():
        collected = collect_statistics(
            base,
            settings,
            target_modules=targets_of(target_modules),
            dtype=dtype,
            seed=seed,
            unfinished=unfinished,
            adapter=adapter,
        )
        processes.wait_for_everyone()  # until none needs what is unfinished
        file = processes.first(lambda: collected.save(out))
        processes.first(lambda: remove(unfinished))
    print(f"{file}: {len(collected)} layers, {collected.metadata['tokens']} tokens")


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
    samples: Samples = "auto",
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Write the start of an adapter for any trainer."""
    from forgetless.adapters.settings import AdapterSettings
    from forgetless.core.settings import validated
    from forgetless.data.settings import DataSettings

    values = {
        "method": method,
        "rank": rank,
        "alpha": alpha,
        "target_modules": targets_of(target_modules),
        "dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "rank_pattern": by_layer("--rank-pattern", rank_pattern),
        "alpha_pattern": by_layer("--alpha-pattern", alpha_pattern),
        "options": options_of(option),
    }
    settings = validated(AdapterSettings, values, "init")
    text = calibration_of(calibration, samples, max_length, batch_size) if calibration else None
    new_task = validated(DataSettings, {"train": data}, "data") if data is not None else None
    from forgetless.cli.commands.starts import init as write
    from forgetless.statistics.moments import Statistics

    begin()
    source = Statistics.load(statistics) if statistics is not None else text
    start = write(base, settings, out, source=source, data=new_task, dtype=dtype, seed=seed)
    if start.obstacle is None:
        print(f"{start.folder}: a plain LoRA that any PEFT-based trainer can continue")
    else:
        load = f"forgetless.load(base, {str(start.folder)!r}, trainable=True)"
        print(f"{start.folder}: not for trainers that know only PEFT, since {start.obstacle}.")
        print(f"continue it in Python with {load}")


def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Its folder, or its name on the hub.")
    ],
    out: NewFolder,
    rank: Annotated[str, typer.Option(help="exact, requested or a number.")] = "exact",
    base: Annotated[str | None, typer.Option(help="The base, where it is not recorded.")] = None,
) -> None:
    """Write a trained adapter as a plain PEFT LoRA for the untouched base."""
    from forgetless.cli.commands.sharing import export_adapter as write

    begin()
    written = write(source, out, rank_of(rank), base)
    print(written)
    if written.exact:
        print("a plain LoRA for the untouched base, with all that was trained")
    else:
        print(
            "a plain LoRA for the untouched base; cut to this rank, its change of the weights is "
            f"off by {100 * written.relative_error:.3g} % (--rank exact cuts nothing off)"
        )
