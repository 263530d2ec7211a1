"""The verbs that help to choose: plan, data, methods, tasks."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from forgetless.cli.options import AsJson, Base, Set
from forgetless.cli.screen import begin
from forgetless.cli.tables import (
    console,
    print_forecast,
    print_json,
    print_shown,
    print_table,
    print_text,
)
from forgetless.core.errors import UserError

Keep = Annotated[
    str | None, typer.Option(help="Text of what is to be kept: replayed and measured.")
]
Test = Annotated[
    str | None, typer.Option(help="Held-out examples, or the share of the data to hold out: 0.1.")
]


def plan(
    context: typer.Context,
    base: Annotated[
        str,
        typer.Argument(help="A model folder, a hub id or 'pocket'; or a recipe, for its costs."),
    ],
    data: Annotated[
        str | None, typer.Option(help="Training data of the new task, or raw text.")
    ] = None,
    keep: Keep = None,
    test: Test = None,
    goal: Annotated[str, typer.Option(help="learn, balance or keep.")] = "balance",
    method: Annotated[str | None, typer.Option(help="Instead of the advised one.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Likewise.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="What the run may take, such as 24GB; the batch is fitted.")
    ] = None,
    quantise: Annotated[
        str | None, typer.Option(help="Load the base in fewer bits: nf4 or int8.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="YAML file for the recipe.")] = None,
    changes: Set = None,
    forecast: Annotated[
        bool, typer.Option("--forecast", help="Run the base on --data and --keep: what they share.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Advise how to train a base on some data, with reasons, costs and a recipe.

    Of a recipe that there is, say what it will cost.
    """
    from forgetless.core.errors import unknown
    from forgetless.core.files import write_text
    from forgetless.core.settings import parse_assignments
    from forgetless.models.quantised import FORMATS
    from forgetless.recipes.plan.advice import Wishes
    from forgetless.recipes.plan.plan import plan as do
    from forgetless.recipes.plan.plan import plan_recipe
    from forgetless.recipes.plan.showing import recipe_text, render
    from forgetless.recipes.recipe import Recipe
    from forgetless.statistics.passes import parse_bytes
    from forgetless.studies.forecast import forecast as foretold

    if out is not None and Path(out).exists():
        raise UserError(f"{out} is there already; give another name, or remove it")
    if forecast and keep is None:
        raise UserError("--forecast is about what is to be kept: give a text by --keep FILE")
    begin()
    most = None if memory is None else parse_bytes(memory, "--memory")
    if is_recipe := Path(base).suffix in (".yaml", ".yml") and Path(base).is_file():
        if any((data, keep, test, method, rank, quantise, out)) or goal != "balance":
            raise UserError("a recipe says its settings itself; give --memory and --set alone")
        made = plan_recipe(Recipe.load(base, parse_assignments(changes or [])), most)
    elif changes:
        raise UserError("--set changes a recipe, and none is given; --out writes one")
    elif data is None:
        raise UserError("give the training data by --data FILE, or a recipe instead of a base")
    elif quantise is not None and quantise not in FORMATS:
        raise unknown("quantise", quantise, FORMATS)
    else:
        wishes = Wishes(goal, method, rank, keep, test, most, quantise)
        made = do(base, data, wishes)
    if out is not None:
        write_text(Path(out), recipe_text(made, context.obj))
    shared = foretold(made.recipe) if forecast else {}
    if as_json:
        by_layer = {name: share for layers, share in shared.items() for name in layers}
        print_json(made.to_json() | ({"shared_energy": by_layer} if forecast else {}))
        return
    console().print(render(made))
    if forecast:
        print()
        print_forecast(shared)
    if out is not None:
        print(f"recipe: {out}")
    elif not is_recipe:
        print("--out recipe.yaml writes this as a recipe; --json is for programs")


def new(
    context: typer.Context,
    base: Base,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Training data of the new task.")],
    keep: Keep = None,
    test: Test = None,
    out: Annotated[str | None, typer.Option(help="The recipe; FILE's name with .yaml.")] = None,
) -> None:
    """Write a commented recipe for a base and a file, with the settings that 'plan' advises."""
    from forgetless.core.files import write_text
    from forgetless.core.progress import duration
    from forgetless.data.sources import Source
    from forgetless.recipes.plan.advice import Wishes
    from forgetless.recipes.plan.plan import plan as do
    from forgetless.recipes.plan.showing import recipe_text

    name = Path(Source.of(file).name).stem.replace(":", "-")  # of hub:ID:CONFIG:SPLIT the last
    recipe = Path(f"{name}.yaml" if out is None else out)
    if recipe.exists():
        raise UserError(f"{recipe} is there already; give another name by --out, or remove it")
    begin()
    made = do(base, file, Wishes(keep=keep, test=test))
    write_text(recipe, recipe_text(made, context.obj))
    method, least = made.recipe.adapter.method, duration(made.seconds)
    print_text(f"{recipe}: {method}, {made.steps} steps ({least} or more); the reasons are in it")
    print("then:")
    for words in (["data", base, file], ["run", str(recipe), "--check"], ["run", str(recipe)]):
        print(f"  forgetless {shlex.join(words)}")


def data(
    base: Base,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Training data, as in data.train.")],
    count: Annotated[int, typer.Option("--examples", min=1, help="How many to show.")] = 3,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of the longest example.")] = 512,
    chat_template: Annotated[
        str, typer.Option(help="auto, or off for prompts and answers as they stand.")
    ] = "auto",
    system: Annotated[str | None, typer.Option(help="A system prompt before each of them.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show examples as a base meets them: its tokens, and which of them are learned."""
    from forgetless.core.settings import validated
    from forgetless.data.examples import load_examples
    from forgetless.data.modality import modality_of
    from forgetless.data.settings import DataSettings
    from forgetless.data.shown import shown, template_of

    begin()
    modality = modality_of(base)
    if modality.loss_task != "perplexity":
        raise UserError(f"base {base!r} is no language model; its data has no tokens to learn")
    given = {"train": file, "chat_template": chat_template, "system": system}
    examples = load_examples(file, **validated(DataSettings, given, "data").reading)
    tokenizer = modality.load_processor(base, weights=False)
    found = shown(examples, tokenizer, count, max_length)
    if as_json:
        print_json([asdict(example) for example in found])
        return
    print_text(f"{len(examples):,} examples, {template_of(examples, tokenizer)}")
    print_shown(found)


def methods(as_json: AsJson = False) -> None:
    """Show the ways to start an adapter: what each is, needs and trains, and its paper."""
    from forgetless.methods.table import as_text, entries

    if as_json:
        print_json([asdict(entry) for entry in entries()])
        return
    print(as_text(min(console().width, 100)))


def tasks() -> None:
    """List what a model can be scored on."""
    from forgetless.tasks import SUITES, TASKS
    from forgetless.tasks.harness.layouts import STANDARD

    rows = [[name, task.summary, ", ".join(task.required()) or "–"] for name, task in TASKS.items()]
    print_table(["task", "what it measures", "needs"], rows)
    print()
    rows = [[name, task.summary] for name, task in STANDARD.items()]
    print_table(["task of the lm-evaluation-harness", "what it measures"], rows)
    print()
    print_table(["suite", "its tasks"], [[name, ", ".join(SUITES[name])] for name in SUITES])
    print()
    print_text(
        "What a task needs is a setting of it in a recipe; a path can stand behind its name, as in "
        "perplexity:notes.txt. Any other name of the lm-evaluation-harness is a task too, and so "
        "is a YAML file. --data-dir reads the harness's data from local files."
    )
