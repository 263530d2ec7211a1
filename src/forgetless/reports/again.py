"""How to do it again: the commands that make every run of a page, and the files that they read."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from forgetless.core.errors import UserError
from forgetless.core.files import folder_name, parse_yaml
from forgetless.reports.evidence import Evidence, Run
from forgetless.reports.markup import details, text
from forgetless.studies.folder import planned

NUM_COMMANDS = 4
"""So many are shown; those behind them are folded."""


def again(evidence: Evidence) -> str:
    """The commands, with what has to be known of them; empty where none is known."""
    found = commands(evidence)
    if not found:
        return ""
    shown = len(found) if len(found) == NUM_COMMANDS + 1 else NUM_COMMANDS
    rest = found[shown:]
    more = details(f"{len(rest)} more", _block(rest)) if rest else ""
    if evidence.evaluations:
        note = "what was measured before is not measured twice."
    else:
        what = " and ".join(name for name, _ in definitions(evidence))
        note = f"with {what} from the end of this page; what is finished is not done twice."
    return (
        f'<div><h3>Do it again</h3>{_block(found[:shown])}{more}<p class="note">{text(note)}</p>'
        "</div>"
    )


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


def _single(evidence: Evidence) -> list[Run]:
    """The runs that no study made, in the order of the folder."""
    of_study = planned(evidence.folder) if evidence.study_text else []
    return [run for run in evidence.runs if run.folder not in of_study]


def _command(run: Run, first: Run, folder: str) -> str:
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
        old, new = first.get(key), other.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping) and _can_be_set(old, new):
            yield from _changes(old, new, f"{prefix}{key}.")
        else:
            yield prefix + key, new


def _can_be_set(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether changing values key by key leads from one mapping to the other."""
    return old.keys() == new.keys() and not any("." in key for key in new)


def _written(value: Any) -> str:
    """A value as YAML on one line: text without quotes where it reads the same."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        plain = str(value)
        with suppress(UserError):
            if parse_yaml(plain) == value:
                return plain
    return json.dumps(value, ensure_ascii=False)


def _block(lines: Sequence[str]) -> str:
    """Commands, each of which may take several lines of the page; none ends within an option."""
    option = re.compile(r"(?<= )--[\w-]+")
    shown = (option.sub(r'<span class="whole">\g<0></span>', text(line)) for line in lines)
    return f"<pre>{''.join(f'<code>{line}{chr(10)}</code>' for line in shown)}</pre>"
