"""How a study was made and how to make it again: settings, versions, machines, commands, files."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from forgetless.core.errors import UserError
from forgetless.core.files import folder_name, parse_yaml
from forgetless.core.progress import duration
from forgetless.reports.arms import Arm
from forgetless.reports.evidence import Evidence, RunFiles, flatten, number
from forgetless.reports.numbers import NOT_MEASURED
from forgetless.studies.folder import planned

# What a run's record holds about its stages, in the order of the table.
RECORDED = ("start", "seconds", "statistics", "training", "export")


def day(runs: Iterable[RunFiles]) -> str:
    """The day on which the first run was started; empty where none has been."""
    started = (run.record.get("started") for run in runs)
    return min((str(moment)[:10] for moment in started if moment), default="")


def seeds_of(runs: Iterable[RunFiles]) -> list[str]:
    """The seeds used, in order."""
    seeds = {run.settings.get("seed") for run in runs} - {None}
    return [str(seed) for seed in sorted(seeds, key=lambda seed: (number(seed) or 0.0, str(seed)))]


def version(runs: Iterable[RunFiles]) -> str:
    """Of Forgetless, that made the first run; empty where it is not known."""
    found = (run.part("versions").get("forgetless") for run in runs)
    return next((str(one) for one in found if one), "")


# ---------------------------------------------------------------------------------------- commands


def commands(evidence: Evidence) -> list[str]:
    """One for the study, and one for each run that its definition does not make."""
    if evidence.evaluations:
        return [command for command in evidence.evaluations if command]
    single = _single(evidence)
    of_study = ["forgetless study study.yaml"] if evidence.study_text else []
    return of_study + [_command(run, single[0], evidence.name) for run in single]


def definitions(evidence: Evidence) -> list[tuple[str, str]]:
    """The files that the commands read: (name, content)."""
    if evidence.evaluations:
        return []
    of_study = [("study.yaml", evidence.study_text)] if evidence.study_text else []
    firsts = _single(evidence)[:1]
    return of_study + [("recipe.yaml", run.folder.recipe.read_text("utf-8")) for run in firsts]


def _single(evidence: Evidence) -> list[RunFiles]:
    """The runs that no study made, in the order of the folder."""
    of_study = set(planned(evidence.folder)) if evidence.study_text else set()
    return [run for run in evidence.runs if run.folder not in of_study]


def _command(run: RunFiles, first: RunFiles, folder: str) -> str:
    """What makes a run of the recipe of the first one."""
    words = ["forgetless", "run", "recipe.yaml"]
    name = run.recipe.get("name")
    if not name or folder_name(str(name)) != folder:
        words += ["--study", folder]
    for key, value in _changes(first.recipe, run.recipe):
        words += ["--set", f"{key}={_written(value)}"]
    return shlex.join(words)


def _changes(
    first: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The settings of `other` that differ: (dotted key, value); a mapping of other keys whole."""
    for key in dict.fromkeys((*first, *other)):
        old: Any = first.get(key)
        new: Any = other.get(key)
        if old == new:
            continue
        is_nested = isinstance(old, Mapping) and isinstance(new, Mapping)
        if is_nested and old.keys() == new.keys() and not any("." in part for part in new):
            yield from _changes(old, new, f"{prefix}{key}.")
        else:
            yield prefix + key, new


def _written(value: Any) -> str:
    """A value as YAML on one line: text without quotes where it reads the same."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        plain = str(value)
        with suppress(UserError):
            if parse_yaml(plain) == value:
                return plain
    return json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------------------------- settings


def shared_settings(runs: Sequence[RunFiles]) -> dict[str, str]:
    """The settings that are the same in all runs, as text."""
    values = _settings(runs)
    return {
        key: shown.pop()
        for key, shown in values.items()
        if len(shown) == 1 and shown != {NOT_MEASURED}
    }


def _settings(runs: Sequence[RunFiles]) -> dict[str, set[str]]:
    """Every setting with its values, as text."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return {key: {_shown(run.settings.get(key)) for run in runs} for key in keys}


Rows = tuple[list[tuple[str, str]], list[list[Any]]]
"""Heads, each with a mark where its column holds text, and the values below them."""


def columns_and_rows(
    columns: Iterable[str], rows: Sequence[Mapping[str, Any]], *, plain: bool = False
) -> Rows:
    """Rows as they are; `plain` leaves the columns' names as they are too."""
    heads = []
    for key in (columns := list(columns)):
        is_number = any(number(row.get(key)) is not None for row in rows)
        heads.append((key if plain else key.replace("_", " "), "" if is_number else "text"))
    return heads, [[row.get(key) for key in columns] for row in rows]


def differing(evidence: Evidence, arms: Sequence[Arm]) -> Rows | None:
    """The settings that differ, by arm; None where it is the method alone."""
    settings = _settings(evidence.runs)
    varied = [k for k, shown in settings.items() if len(shown) > 1 and k not in ("name", "seed")]
    if not set(varied) - {"adapter.method"} or not arms:
        return None
    rows = []
    for arm in arms:
        runs = [run for setting in arm.settings for run in setting.runs]
        values = {k: dict.fromkeys(_shown(run.settings.get(k)) for run in runs) for k in varied}
        shown = {key: ", ".join(own) for key, own in values.items()}
        rows.append({"arm": arm.label, **shown, "seeds": ", ".join(seeds_of(runs))})
    return columns_and_rows(("arm", *varied, "seeds"), rows, plain=True)


def unfinished(runs: Sequence[RunFiles]) -> Rows | None:
    """The runs without a result, with the reason; None where there is none."""
    keys = {"method": "adapter.method", "rate": "training.learning_rate", "seed": "seed"}
    rows = []
    for run in (run for run in runs if run.status != "done"):
        known = {head: _shown(run.settings.get(key)) for head, key in keys.items()}
        reason = str(run.record.get("reason") or "not finished yet")
        rows.append({"run": run.run_id, **known, "status": run.status, "reason": reason})
    return columns_and_rows(rows[0], rows) if rows else None


def machine(runs: Sequence[RunFiles]) -> dict[str, str]:
    """Versions, hardware and the time of all runs together, as text."""
    found: dict[str, set[str]] = {}
    seconds = []
    for run in runs:
        for part in ("versions", "hardware"):
            for key, value in flatten(run.part(part)):
                if value is not None:
                    found.setdefault(key, set()).add(_shown(value))
        seconds += [s for _, v in flatten(run.part("seconds")) if (s := number(v)) is not None]
    shown = {key: ", ".join(sorted(values)) for key, values in found.items()}
    return shown | ({"time of all runs together": duration(sum(seconds))} if seconds else {})


def recorded(runs: Sequence[RunFiles]) -> Rows:
    """What the stages of every run wrote down, and what a task measured beside its score."""
    rows = []
    for run in runs:
        parts = {part: run.part(part) for part in RECORDED}
        parts |= {task: run.score("final", task).get("extra") or {} for task in run.rows}
        values = {f"{part} {key}": value for part, content in parts.items()
                  for key, value in flatten(content) if not isinstance(value, list)}  # fmt: skip
        rows.append({"run": run.run_id, **values})
    return columns_and_rows(dict.fromkeys(key for row in rows for key in row), rows)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(part) for part in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(part)}" for key, part in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return NOT_MEASURED if value is None else str(value)
