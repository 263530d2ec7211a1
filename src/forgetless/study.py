"""A study: one recipe, varied along axes and in arms, as many runs in one folder.

    name: rates
    recipe: {base: pocket, data: {train: "pocket:problems"}, training: {steps: 300}}
    axes: {seed: [0, 1, 2]}                       # every run is done with every value
    arms:                                         # one run each, times the axes
      - {adapter.method: full, training.learning_rate: 3e-4}
      - {name: gentle, adapter.method: lora, training.weight_decay: 0.3}

Runs are done by this process or by several workers. A lock a run keeps two of them from doing the
same one, so that further processes, also on other machines that share the folder, may join by the
same command.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from forgetless import store
from forgetless.errors import RecipeError, UserError
from forgetless.recipe import Checker, Recipe, Section, friendly, load_yaml, with_overrides
from forgetless.run import Event, Listener, Run, execute, prepare
from forgetless.store import RunFolder

# ------------------------------------------------------------------------------------ definition

Axes = dict[str, Annotated[list[Any], Field(min_length=1)]]
_AXES = TypeAdapter(Axes, config=ConfigDict(strict=True))


class StudyRecipe(Section):
    """A recipe and how it is varied.

    ``axes`` maps dotted keys to lists of values, all combined. ``arms`` are mappings of dotted keys
    to values, each with an optional ``name`` and an optional ``axes`` of its own.
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    recipe: dict[str, Any]
    axes: Axes = Field(default={})
    arms: list[dict[str, Any]] = Field(default=[])

    @field_validator("arms")
    @classmethod
    def _arms(cls, arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for position, arm in enumerate(arms, start=1):
            if not isinstance(arm.get("name", "unnamed"), str):
                raise ValueError(f"the name of arm {position} must be text, got {arm['name']!r}")
            try:
                _AXES.validate_python(arm.get("axes", {}))
            except ValidationError:
                raise ValueError(
                    f"the axes of arm {position} must be lists of values, got {arm['axes']!r}"
                ) from None
        return arms

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """The study of a YAML file; its name is the file's when it has none.

        ``recipe`` may name another file, taken from the study's folder. ``overrides`` change that
        recipe.
        """
        path = Path(path)
        content = load_yaml(path)
        if "base" in content and "recipe" not in content:
            raise UserError(f"{path} is a recipe, not a study; run it with 'forgetless run'")
        if isinstance(content.get("recipe"), str):
            content["recipe"] = load_yaml(path.parent / content["recipe"])
        return cls.parse({"name": path.stem, **content}, overrides, source=str(path))

    @classmethod
    def parse(
        cls,
        content: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        *,
        source: str = "study",
    ) -> Self:
        """The study of a mapping; raises ``RecipeError`` with all problems of its form."""
        try:
            definition = cls.model_validate(with_overrides(content, {}))
        except ValidationError as error:
            problems = [friendly(cls, detail) for detail in error.errors()]
            raise RecipeError(source, problems) from None
        if overrides:
            changed = with_overrides(definition.recipe, overrides)
            definition = definition.model_copy(update={"recipe": changed})
        return definition

    def recipes(self) -> dict[str, Recipe]:
        """The runs by run id; combinations that come to the same weights are one run.

        Raises:
            RecipeError: the problems of all combinations, each said once.
        """
        found: dict[str, Recipe] = {}
        problems: dict[str, list[str]] = {}
        checker = Checker()
        combinations = list(self.combinations())
        for arm, overrides in combinations:
            try:
                recipe = Recipe.parse(self.recipe, {**overrides, "name": arm})
                wrong = checker.check(recipe)
            except RecipeError as error:
                wrong = error.problems
            for problem in wrong:
                problems.setdefault(problem, []).append(arm)
            if not problems:
                found.setdefault(recipe.run_id, recipe)
        if problems:
            raise RecipeError(
                self.name,
                [
                    problem if len(arms) == len(combinations) else f"{problem} (in {_listed(arms)})"
                    for problem, arms in problems.items()
                ],
            )
        return found

    def combinations(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The name of the arm and the overrides of every run, in order."""
        for arm in self.arms or [{}]:
            fixed = {key: value for key, value in arm.items() if key not in ("name", "axes")}
            axes = {**self.axes, **arm.get("axes", {})}
            for values in itertools.product(*axes.values()):
                overrides = {**fixed, **dict(zip(axes, values, strict=True))}
                shown = dict(zip(axes, values, strict=True)) if "name" in arm else overrides
                name = " ".join([*([arm["name"]] if "name" in arm else []), *_labels(shown)])
                yield name or self.name, overrides


def _labels(overrides: Mapping[str, Any]) -> Iterator[str]:
    """``pissa learning_rate=0.001``: what sets an arm apart. Seeds belong to one arm."""
    for key, value in overrides.items():
        if key == "adapter.method":
            yield str(value)
        elif key != "seed":
            shown = f"{value:g}" if isinstance(value, float) else value
            yield f"{key.rpartition('.')[2]}={shown}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(dict.fromkeys(names[:3])) + more


# --------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Study:
    """A study as it lies in its folder."""

    folder: Path

    @property
    def runs(self) -> list[Run]:
        """The runs in the study's order."""
        return [Run(folder.path) for folder in store.run_folders(self.folder)]

    @property
    def failed(self) -> list[Run]:
        """The runs that did not come to their end."""
        return [run for run in self.runs if run.status != "done"]

    def results(self) -> list[dict[str, Any]]:
        """One row per run and task, as in results.csv."""
        return store.results(self.folder)


def study(
    definition: StudyRecipe | Mapping[str, Any] | str | Path,
    out: str | Path = "runs",
    *,
    workers: int = 1,
    threads: int | None = None,
    listen: Listener | None = None,
) -> Study:
    """Do every run of a study that is not done yet, and write its results.csv.

    A run that fails keeps its folder with the reason, and the others go on. A study that was
    stopped, by whatever means, is continued by the same call.

    Args:
        definition: a `StudyRecipe`, the mapping that one is written as, or a YAML file.
        out: the folder that holds studies.
        workers: processes that do runs side by side; 1 is this very process.
        threads: torch threads of a worker; None for one on a small model.
        listen: called with the `Event`s of all runs.

    Returns:
        The study; look at ``.failed``.

    Raises:
        RecipeError: what is wrong with the definition, before anything is run.
    """
    definition = _as_definition(definition)
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    folder = Path(out) / definition.name
    _lay_out(folder, definition)
    session, listen = uuid.uuid4().hex, listen or (lambda event: None)
    if workers == 1:
        work(folder, session, threads=threads, listen=listen)
    else:
        _Team(folder, session, threads, listen).work(min(workers, len(store.run_folders(folder))))
    store.write_csv(folder / "report" / "results.csv", store.results(folder))
    return Study(folder)


def _as_definition(given: StudyRecipe | Mapping[str, Any] | str | Path) -> StudyRecipe:
    if isinstance(given, StudyRecipe):
        return given
    return StudyRecipe.parse(given) if isinstance(given, Mapping) else StudyRecipe.load(given)


def _lay_out(folder: Path, definition: StudyRecipe) -> None:
    """Write the definition and a folder for every run; a run that somebody is doing is let be."""
    recipes = definition.recipes()
    text = yaml.safe_dump(definition.model_dump(), sort_keys=False, allow_unicode=True)
    store.write_text(folder / "study.yaml", text)
    entries = [{"run_id": run_id, "name": recipe.name} for run_id, recipe in recipes.items()]
    store.write_json(folder / "runs.json", {"runs": entries})
    for run_id, recipe in recipes.items():
        run = RunFolder(folder / run_id)
        with store.lock(run.lock, wait=False) as free:
            if free:
                prepare(run, recipe)


def work(study_folder: Path, session: str, *, threads: int | None = None, listen: Listener) -> None:
    """Do the runs of a study that nobody has done in this session, one after the other.

    A run that was finished before is gone through again, which costs little: its stages find their
    artefacts. When all that is left is in other hands, wait for them: should such a process die,
    its run is free again.
    """
    while waiting := [run for run in _planned(study_folder) if not _is_over(run, session)]:
        if not any(_try_to_do(run, session, threads, listen) for run in waiting):
            time.sleep(0.5)


def _planned(study_folder: Path) -> list[RunFolder]:
    entries = store.read_json(study_folder / "runs.json")["runs"]
    return [RunFolder(study_folder / entry["run_id"]) for entry in entries]


def _is_over(run: RunFolder, session: str) -> bool:
    record = store.read_json(run.record)
    return record.get("session") == session and record["status"] in ("done", "failed")


def _try_to_do(run: RunFolder, session: str, threads: int | None, listen: Listener) -> bool:
    """Do a run if nobody else does; gives whether there was something to do."""
    with store.lock(run.lock, wait=False) as free:
        if not free or _is_over(run, session):
            return False
        record = store.read_json(run.record)
        if record.get("session") == session:  # it was begun, and nobody is at it
            reason = "the worker process died; perhaps the system ended it for want of memory"
            run.update(status="failed", reason=reason)
            listen(Event(run.path.name, record.get("name") or "", "failed", reason))
            return True
        try:
            execute(run, threads=threads, session=session, listen=listen)
        except Exception as error:  # the study goes on; the reason is in run.json
            if not _is_over(run, session):
                reason = f"{type(error).__name__}: {error}"
                run.update(status="failed", reason=reason, session=session)
        return True


class _Team:
    """Worker processes, and the events that they report on their standard output."""

    def __init__(self, folder: Path, session: str, threads: int | None, listen: Listener) -> None:
        self.command = [sys.executable, "-m", "forgetless", "worker", str(folder), session]
        self.command += [] if threads is None else ["--threads", str(threads)]
        self.folder, self.session, self.threads, self.listen = folder, session, threads, listen

    def work(self, workers: int) -> None:
        """Run the workers to their end; they end with this process, whatever ends it."""
        # A worker ends when its standard input does, so none outlives a parent that is killed.
        team = [
            subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # The bars of several trainings at once are one heap: the listener draws them.
                env=os.environ | {"TTY_COMPATIBLE": "0"},
            )
            for _ in range(workers)
        ]
        readers = [threading.Thread(target=self._pass_on, args=[worker]) for worker in team]
        try:
            for reader in readers:
                reader.start()
            for worker in team:
                worker.wait()
        finally:
            for worker in team:
                worker.terminate()
                worker.wait()
            for reader in readers:
                reader.join()
        if any(worker.returncode for worker in team):
            # What a dead worker leaves is seen to here: its run is marked, the rest is done.
            work(self.folder, self.session, threads=self.threads, listen=self.listen)

    def _pass_on(self, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            with suppress(ValueError):  # anything else that a library prints
                self.listen(Event(**json.loads(line)))


def serve(study_folder: Path, session: str, threads: int | None) -> None:
    """What a worker process does: `work`, with its events as JSON lines on standard output."""

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    output = sys.stdout
    sys.stdout = sys.stderr  # whatever else is printed is no event

    def report(event: Event) -> None:
        print(json.dumps(asdict(event)), file=output, flush=True)

    work(study_folder, session, threads=threads, listen=report)
