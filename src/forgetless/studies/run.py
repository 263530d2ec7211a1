"""One run: a recipe taken through its stages, and what is written down about it."""

import os
import platform
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from forgetless.core.errors import RecipeError
from forgetless.core.files import folder_name, lock, read_json, remove_temporaries, write_text
from forgetless.core.hashing import checksum
from forgetless.core.processes import Processes
from forgetless.models.load import meta_model
from forgetless.recipes.checking import check, load_recipe
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.studies.folder import RunFolder, run_rows
from forgetless.studies.stages import Listener, Stages
from forgetless.training.devices import join, naming_lost_processes
from forgetless.training.forgetting_budget import Exceeded
from forgetless.training.launch import this_launch

SMALL_MODEL = 50_000_000
"""Weights below which one thread is faster than several."""

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")


@dataclass(frozen=True)
class Run:
    """A run as it lies in its folder."""

    folder: Path

    @property
    def run_id(self) -> str:
        """The method's name and the hash of what decided the weights."""
        return self.folder.name

    @property
    def record(self) -> dict[str, Any]:
        """What run.json says: status, versions, seconds a stage, training, export."""
        return RunFolder(self.folder).read()

    @property
    def status(self) -> str:
        """``pending``, ``running``, ``done`` or ``failed``."""
        return str(self.record.get("status", "pending"))

    @property
    def exceeded(self) -> Exceeded | None:
        """The budget of forgetting that ended the training; None when none did."""
        found = self.record.get("training", {}).get("exceeded")
        return Exceeded(**found) if found else None

    @property
    def scores(self) -> list[dict[str, Any]]:
        """One row a task, with the columns of results.csv."""
        return list(run_rows(RunFolder(self.folder)))


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path = "runs",
    study: str | None = None,
    *,
    evaluate: bool = True,
    threads: int | None = None,
    listen: Listener | None = None,
) -> Run:
    """Do whatever of a recipe's seven stages is not done yet.

    Under `accelerate launch` or torchrun all processes call this alike; see docs/devices.md.

    Args:
        recipe: a `Recipe`, the mapping that one is written as, or the path of a YAML file.
        out: the folder that holds studies.
        study: the study's folder in it; the recipe's name when not given.
        evaluate: whether to measure; without, the run trains and exports only.
        threads: torch threads; None for one on a small model, else torch's own choice.
        listen: called with an `Event` after each stage and each step of training.

    Returns:
        The finished run.

    Raises:
        RecipeError: everything that is wrong with the recipe, before any weight is loaded.
        Exception: what went wrong in a stage; it is kept in run.json, and a new call resumes at
            the first unfinished stage.
    """
    checked, processes = load_recipe(recipe), join()
    problems = processes.first(lambda: check(checked))
    if problems:
        raise RecipeError(checked.name or "recipe", problems)
    folder = RunFolder(Path(out) / folder_name(study or checked.name or "single") / run_id(checked))
    with lock(folder.lock) if processes.is_first else nullcontext():
        processes.first(lambda: prepare(folder, checked))
        execute(folder, evaluate=evaluate, threads=threads, listen=listen, processes=processes)
    return Run(folder.path)


def prepare(folder: RunFolder, recipe: Recipe, **changes: Any) -> None:
    """Write the recipe into its run's folder, and run.json; for the holder of the lock."""
    write_text(folder.recipe, recipe.to_yaml())
    record = read_json(folder.record)
    status = record.get("status", "pending")
    files = {**record.get("files", {}), folder.recipe.name: checksum(folder.recipe)}
    if recipe.after is not None:
        changes = {"after": recipe.after, **changes}
    changes = {"files": files, **changes}
    folder.update(run_id=folder.path.name, name=recipe.name, status=status, **changes)


def execute(
    folder: RunFolder,
    *,
    evaluate: bool = True,
    threads: int | None = None,
    listen: Listener | None = None,
    processes: Processes = Processes(),  # noqa: B008 - it is frozen
) -> None:
    """Take a prepared run through its stages; for the holder of its lock.

    Whatever goes wrong is written into run.json and raised again. Of several processes the first
    holds the lock and writes.
    """
    recipe = Recipe.load(folder.recipe)
    is_first, hardware = processes.is_first, _hardware(processes)
    stages = Stages(
        folder, recipe, listen if listen and is_first else (lambda event: None), processes
    )
    if is_first:
        remove_temporaries(folder.path)
        record = read_json(folder.record)
        folder.update(
            status="running",
            reason=None,
            seed=recipe.seed,
            requested=False,
            started=record.get("started") or _now(),
            versions=_versions(),
            # Once it is trained, that is where; a later evaluation may be done elsewhere.
            hardware=record["hardware"] if "training" in record else hardware,
        )
    began = time.perf_counter()
    try:
        with torch_threads(threads, recipe.base), naming_lost_processes():
            stages.run(evaluate=evaluate)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if is_first:
            folder.update(status="failed", reason=reason, traceback=traceback.format_exc())
        stages.tell("failed", reason)
        raise
    if is_first:
        folder.update(status="done", finished=_now(), traceback=None)
    stages.tell("done", f"{time.perf_counter() - began:.0f} s")


@contextmanager
def torch_threads(threads: int | None, base: str) -> Iterator[None]:
    """Run with so many threads: one on a small model, where more are slower."""
    before = torch.get_num_threads()
    if threads is None and meta_model(base, bare=True).num_parameters() < SMALL_MODEL:
        threads = 1
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------- what is written down


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "forgetless": version("forgetless")}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _hardware(processes: Processes) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = {
        "device": device,
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "processes": processes.count,
    }
    if processes.count == 1:
        return found
    return found | {
        "strategy": this_launch().strategy,
        "backend": distributed.get_backend(),
        "devices": processes.gather(f"{platform.node()}: {device}"),
    }
