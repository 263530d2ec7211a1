"""The options that several verbs have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, as training.steps=10."),
]


def _writable(out: str) -> str:
    from forgetless.core.files import require_place

    if not Path(out).is_dir():
        require_place(Path(out) / "study")
    return out


Out = Annotated[
    str, typer.Option("--out", help="Folder that holds the studies.", callback=_writable)
]
StudyName = Annotated[str | None, typer.Option(help="Folder of the run; the recipe's name.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Runs at a time; one, or all that a cluster has room for.")
]
On = Annotated[Literal["ray"] | None, typer.Option("--on", help="Do the runs on a Ray cluster.")]
Share = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Folder in an object store, for machines without a shared one."
    ),
]
Address = Annotated[
    str | None, typer.Option(envvar="RAY_ADDRESS", help="Of the cluster; that of this machine.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Torch threads of a process; one for a small model.")
]
Processes = Annotated[
    int, typer.Option(min=1, help="Processes that do a run together, each on a GPU of its own.")
]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="FORGETLESS_STORAGE",
        help="Database that several machines share; without, a file.",
    ),
]
Hours = Annotated[
    float | None, typer.Option(min=0, help="Begin no trial later than this; instead of the file's.")
]
Check = Annotated[
    bool, typer.Option("--check", help="Only say what is wrong, before any weight is loaded.")
]

Base = Annotated[
    str,
    typer.Argument(metavar="BASE", help="'pocket', a model folder or a hub id (ID@REVISION too)."),
]
NewFolder = Annotated[str, typer.Option("--out", help="New folder to write to.")]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text to keep: a file, 'self' (sampled from the base), pocket:knowledge."),
]
Samples = Annotated[
    str,
    typer.Option(help="Calibration texts to read; auto: of self as many as it takes, else 256."),
]
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
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]

Items = Annotated[int, typer.Option(min=0, help="Lost and gained items of a task to show.")]
AsJson = Annotated[bool, typer.Option("--json", help="For other programs.")]
