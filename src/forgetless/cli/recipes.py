"""The verbs about recipes: demo, run, train, study, sequence, search, report; and workers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from forgetless.cli import tables
from forgetless.cli.options import (
    Address,
    Check,
    Hours,
    On,
    Out,
    Processes,
    RecipeFile,
    Set,
    Share,
    Storage,
    StudyName,
    Threads,
    Workers,
)
from forgetless.cli.screen import begin, watch
from forgetless.cli.values import rates_of

if TYPE_CHECKING:
    from forgetless.recipes.recipe import Recipe
    from forgetless.recipes.study import StudyRecipe
    from forgetless.studies.run import Run
    from forgetless.studies.stages import Listener


def demo(
    out: Out = "runs",
    workers: Workers = 2,
    threads: Threads = None,
    images: Annotated[
        bool, typer.Option("--images", help="Letters, on the image classifier that knows digits.")
    ] = False,
) -> None:
    """Fine-tune the pocket model seven ways and show what each learned and forgot."""
    from forgetless.cli.demo import definition, images_definition

    how = _how(None, workers, threads, 1, None, None, None)
    _do_study(images_definition() if images else definition(), out, how)


def run(
    recipe: RecipeFile,
    changes: Set = None,
    out: Out = "runs",
    study: StudyName = None,
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
    to_try = None if rates is None else rates_of(rates)
    asked = _recipe(recipe, changes)
    if check:
        _say_check(recipe, asked)
        return
    from forgetless.studies.run import run as do

    with watch() as listen:
        if find_lr:
            from forgetless.studies.rate_search import find_rate

            found = find_rate(
                asked, out, study, rates=to_try, steps=find_steps, threads=threads, listen=listen
            )
            tables.print_rates(found)
            asked = found.recipe
        done = do(asked, out, study, threads=threads, listen=listen)
    tables.print_run(done)
    tables.print_usage(done)
    tables.print_end(done)


def train(
    recipe: RecipeFile,
    changes: Set = None,
    out: Out = "runs",
    study: StudyName = None,
    threads: Threads = None,
    check: Check = False,
) -> None:
    """Train and export by a recipe, without measuring; 'run' adds the measuring later."""
    asked = _recipe(recipe, changes)
    if check:
        _say_check(recipe, asked)
        return
    from forgetless.studies.run import run as do

    with watch() as listen:
        done = do(asked, out, study, evaluate=False, threads=threads, listen=listen)
    tables.print_end(done)


def _recipe(path: str, changes: list[str] | None) -> Recipe:
    """The recipe of a file, changed; one without a name is called as its file."""
    from forgetless.core.settings import parse_assignments
    from forgetless.recipes.checking import load_recipe

    recipe = load_recipe(path, parse_assignments(changes or []))
    return recipe if recipe.name else recipe.model_copy(update={"name": Path(path).stem})


def _say_check(path: str, recipe: Recipe) -> None:
    """Say that nothing is wrong, or raise all that is."""
    from forgetless.core.errors import RecipeError
    from forgetless.data.examples import load_examples
    from forgetless.data.modality import modality_of
    from forgetless.data.shown import template_of
    from forgetless.recipes.checking import check
    from forgetless.recipes.identity import run_id

    if problems := check(recipe):
        raise RecipeError(path, problems)
    print(f"{path}: no problems; the run would be {run_id(recipe)}")
    modality = modality_of(recipe.base)
    if modality.own_texts is not None:  # of what is no text there is nothing to say
        first = load_examples(recipe.data.sources[0][0], **{**recipe.data.reading, "limit": 1})
        told = template_of(first, modality.load_processor(recipe.base, weights=False))
        print(f"{first.source}: {told}")


def study(
    path: Annotated[str, typer.Argument(metavar="STUDY", help="A YAML file.")],
    changes: Set = None,
    out: Out = "runs",
    storage: Storage = None,
    workers: Workers = None,
    threads: Threads = None,
    processes: Processes = 1,
    on: On = None,
    address: Address = None,
    share: Share = None,
    check: Check = False,
    page: Annotated[bool, typer.Option("--report/--no-report", help="Write the page.")] = True,
) -> None:
    """Do all runs of a study; a study that was stopped goes on."""
    from forgetless.core.settings import parse_assignments
    from forgetless.recipes.study import StudyRecipe

    definition = StudyRecipe.load(path, parse_assignments(changes or []))
    if check:
        print(f"{path}: no problems; {len(definition.recipes())} runs")
        return
    _do_study(
        definition, out, _how(storage, workers, threads, processes, on, address, share), page=page
    )


def _how(
    storage: str | None,
    workers: int | None,
    threads: int | None,
    processes: int,
    on: Literal["ray"] | None,
    address: str | None,
    share: str | None,
) -> dict[str, Any]:
    """The arguments of a study, a sequence or a search that say who does the runs."""
    who = {"workers": workers, "threads": threads, "processes": processes}
    return {"storage": storage, **who, "on": on, "address": address, "share": share}


def _watch_runs(how: Mapping[str, Any]) -> AbstractContextManager[Listener]:
    """A listener for runs, of which there may be several at a time."""
    return watch(several=how["on"] is not None or (how["workers"] or 1) > 1)


def _do_study(
    definition: StudyRecipe | dict[str, Any], out: str, how: dict[str, Any], *, page: bool = True
) -> None:
    """Do the runs, show what came of them, and end with 1 if one failed."""
    from forgetless.studies.study import study as do

    with _watch_runs(how) as listen:
        done = do(definition, out, **how, listen=listen)
    failed = done.failed
    if len(failed) < len(done.runs):
        tables.print_study(done.folder, page=page)
    _say_failed(failed)


def _say_failed(failed: list[Run]) -> None:
    """Name the runs that failed, and end with 1 if there are any."""
    for run in failed:
        print(f"failed: {run.folder}: {run.record.get('reason')}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def sequence(
    path: Annotated[str, typer.Argument(metavar="SEQUENCE", help="A YAML file.")],
    changes: Set = None,
    out: Out = "runs",
    storage: Storage = None,
    workers: Workers = None,
    threads: Threads = None,
    processes: Processes = 1,
    on: On = None,
    address: Address = None,
    share: Share = None,
    check: Check = False,
    page: Annotated[bool, typer.Option("--report/--no-report", help="Write the page.")] = True,
) -> None:
    """Learn tasks one after the other and measure all of them after each."""
    from forgetless.core.settings import parse_assignments
    from forgetless.recipes.sequence import SequenceRecipe

    definition = SequenceRecipe.load(path, parse_assignments(changes or []))
    if check:
        chains, recipes = definition.chains()
        print(f"{path}: no problems; {len(chains)} sequences in {len(recipes)} runs")
        return
    from forgetless.studies.sequence import sequence as do

    how = _how(storage, workers, threads, processes, on, address, share)
    with _watch_runs(how) as listen:
        done = do(definition, out, **how, listen=listen)
    tables.print_sequences(done.folder, page=page)
    _say_failed(done.failed)


def search(
    path: Annotated[str, typer.Argument(metavar="SEARCH", help="A YAML file.")],
    changes: Set = None,
    out: Out = "runs",
    storage: Storage = None,
    workers: Workers = None,
    threads: Threads = None,
    processes: Processes = 1,
    on: On = None,
    address: Address = None,
    share: Share = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Instead of the file's.")] = None,
    hours: Hours = None,
    check: Check = False,
    page: Annotated[bool, typer.Option("--report/--no-report", help="Write the page.")] = True,
) -> None:
    """Look for settings that learn much and forget little, on one machine or several."""
    from forgetless.core.settings import parse_assignments
    from forgetless.recipes.search import SearchRecipe

    definition = SearchRecipe.load(path, parse_assignments(changes or []))
    if check:
        tasks = definition.check()
        print(f"{path}: no problems; {tasks['learning']} is learned, {tasks['forgetting']} kept")
        return
    from forgetless.studies.search import search as do

    how = _how(storage, workers, threads, processes, on, address, share)
    with _watch_runs(how) as listen:
        done = do(definition, out, **how, trials=trials, hours=hours, listen=listen)
    tables.print_search(done, page=page)
    if not done.front:
        raise typer.Exit(1)


def report(
    folder: Annotated[str, typer.Argument(metavar="STUDY", help="Folder of a study.")],
) -> None:
    """Write the page, the tables and the figures of a study or of sequences."""
    from forgetless.studies.folder import has_sequences, is_search

    if has_sequences(folder):
        tables.print_sequences(folder)
    elif is_search(folder):
        from forgetless.studies.search import Search

        tables.print_search(Search(Path(folder)))
    else:
        tables.print_study(folder, page=True)


def worker(
    folder: Annotated[Path, typer.Argument()],
    storage: Storage = None,
    threads: Threads = None,
    processes: Processes = 1,
    share: Share = None,
    until: Annotated[float | None, typer.Option()] = None,
) -> None:
    """Do runs of a study, or trials of a search, that another process started; or one run."""
    from forgetless.studies import search, study
    from forgetless.studies.folder import RunFolder, is_search
    from forgetless.studies.run import execute
    from forgetless.studies.workers import serve
    from forgetless.training.devices import join

    begin()
    how: dict[str, Any] = {
        "storage": storage,
        "threads": threads,
        "processes": processes,
        "share": share,
    }
    run = RunFolder(folder)
    if run.recipe.exists():
        own: dict[str, Any] = {"threads": threads, "processes": join()}
        serve(lambda listen: execute(run, **own, listen=listen))
    elif is_search(folder):
        serve(lambda listen: search.take_part(folder, **how, until=until, listen=listen))
    else:
        serve(lambda listen: study.take_part(folder, **how, listen=listen))
