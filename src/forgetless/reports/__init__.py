"""The report of a study: one page, two tables and a few figures, made from its files alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from forgetless.core.files import write_text
from forgetless.reports import evidence as _evidence
from forgetless.reports import figures, terminal
from forgetless.reports.arms import gather
from forgetless.reports.changes import find_changes
from forgetless.reports.durations import course, matched
from forgetless.reports.evaluated import write_evaluation
from forgetless.reports.page import page
from forgetless.reports.standing import standing
from forgetless.reports.words import answer
from forgetless.studies.folder import COLUMNS, write_tables

__all__ = ["report", "summary", "write_evaluation"]

_log = logging.getLogger(__name__)


def report(study_folder: str | Path) -> Path:
    """Write `report/` into a study's folder: the page, results.csv and .parquet, figures.

    Where runs were scored on the way, curve.csv lies beside them.

    Nothing but the files of the study is read, so a report can be made anywhere and again. What
    needs a package that is not installed is left out, with a note at the foot of the page.

    Args:
        study_folder: the folder of a study, finished or not.

    Returns:
        The path of index.html.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no run.
    """
    evidence = _evidence.read(study_folder)
    arms = gather(evidence)
    place = standing(evidence, arms)
    over_steps = course(evidence, arms)
    equal = matched(evidence, arms, over_steps)
    words = answer(evidence, arms, place, equal)
    folder = evidence.folder / "report"
    write_tables(evidence.folder, evidence.rows, evidence.curve)
    notes = [note for note in (_write_parquet(folder / "results.parquet", evidence.rows),) if note]
    drawings: dict[str, str] = {}
    try:
        drawings = figures.draw(arms, place, over_steps, folder / "figures")
    except ImportError:
        notes.append("No figures: matplotlib is not installed (pip install 'forgetless[report]').")
    index = folder / "index.html"
    changes = find_changes(evidence, arms)
    write_text(
        index, page(evidence, arms, place, words, over_steps, equal, changes, drawings, notes)
    )
    for note in notes:
        _log.info(note)
    return index


def summary(study_folder: str | Path) -> RenderableType:
    """The report for a terminal, to be printed by rich; raises as `report` does."""
    evidence = _evidence.read(study_folder)
    arms = gather(evidence)
    place = standing(evidence, arms)
    words = answer(evidence, arms, place, matched(evidence, arms, course(evidence, arms)))
    return terminal.render(evidence, arms, place, words, find_changes(evidence, arms))


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows as Parquet; gives a note, and writes nothing, when a package is missing."""
    try:
        import pandas as pd

        content = pd.DataFrame(list(rows), columns=list(COLUMNS)).to_parquet(index=False)
    except ImportError:
        path.unlink(missing_ok=True)
        return "No results.parquet: it needs pandas and pyarrow (pip install 'forgetless[report]')."
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(content)
    temporary.replace(path)
    return ""
