"""The report of a study: one page, two tables and a few figures, made from its files alone."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from forgetless.core.files import new_file, write_text
from forgetless.reports import figures, terminal
from forgetless.reports.evaluated import write_evaluation
from forgetless.reports.findings import find
from forgetless.reports.page import page
from forgetless.reports.payload import payload
from forgetless.studies.folder import COLUMNS, has_sequences, is_search, write_tables

__all__ = ["report", "summary", "write_evaluation"]

_log = logging.getLogger(__name__)


def report(study_folder: str | Path) -> Path:
    """Write `report/` into a study's folder: the page, results.csv and .parquet, figures.

    Where runs were scored on the way, curve.csv lies beside them. Sequences and searches have
    pages of their own, and sequence.json or search.json.

    Nothing but the files of the study is read, so a report can be made anywhere and again, also
    while runs are being trained. What is damaged, or needs a package that is not installed, is left
    out, with a note at the foot of the page.

    Args:
        study_folder: the folder of a study, finished or not.

    Returns:
        The path of index.html.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no run.
    """
    if has_sequences(study_folder):
        from forgetless.reports.sequences import write_sequences  # loads torch

        return write_sequences(study_folder)
    if is_search(study_folder):
        from forgetless.reports.search import write_search

        return write_search(study_folder)
    folder = Path(study_folder) / "report"
    with _warnings() as warnings:
        found = find(study_folder)
        content = payload(found)
        write_tables(Path(study_folder), found.evidence.rows, found.evidence.curve)
        notes, drawings = [], {}
        try:
            _write_parquet(folder / "results.parquet", found.evidence.rows)
        except ImportError:
            notes.append(f"No results.parquet: it needs pandas and pyarrow ({_INSTALL}).")
        try:
            drawings = figures.draw(content, folder / "figures")
        except ImportError:
            notes.append(f"No figures: matplotlib is not installed ({_INSTALL}).")
    for note in notes:
        _log.info(note)
    for warning in warnings:
        _log.warning("%s", warning)
    notes += [f"{warning.replace(f'{study_folder}/', '')}." for warning in warnings]
    write_text(folder / "index.html", page(found, content, drawings, notes))
    return folder / "index.html"


_INSTALL = "pip install 'forgetless[report]'"


def summary(study_folder: str | Path) -> RenderableType:
    """The report for a terminal, to be printed by rich; raises as `report` does."""
    return terminal.render(find(study_folder))


@contextmanager
def _warnings() -> Iterator[Mapping[str, None]]:
    """What the readers of the files warn of in the block, each warning once."""
    found: dict[str, None] = {}
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.setdefault(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("forgetless")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows as Parquet; raises ImportError, and leaves no file, without a package."""
    path.unlink(missing_ok=True)
    import pandas as pd  # optional, and slow

    with new_file(path) as temporary:
        pd.DataFrame(list(rows), columns=list(COLUMNS)).to_parquet(temporary, index=False)
