"""A trained adapter as a plain LoRA that other programs load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from forgetless.adapters.folders import ExportReport, export, load
from forgetless.cli.commands.folders import Trained, require_new
from forgetless.core.errors import UserError
from forgetless.core.files import new_folder
from forgetless.models.load import load_model
from forgetless.studies.card import write_run_card
from forgetless.studies.folder import RunFolder


def export_adapter(
    source: str | Path, out: str | Path, rank: Any = "exact", base: str | None = None
) -> ExportReport:
    """Write a run's or a folder's adapter as a plain PEFT LoRA for the untouched base."""
    trained, out = Trained.find(source), Path(out)
    if not trained.is_adapter:
        raise UserError(f"{source} is a whole model, not an adapter; use it as it is")
    base = base or trained.base
    if base is None:
        raise UserError(f"{source} does not say which base it is for; give --base")
    require_new(out)
    model = load(load_model(base), trained.folder)
    with new_folder(out) as folder:
        report = export(model, folder, rank)
        if (run := RunFolder(Path(source))).recipe.exists():
            write_run_card(run, folder, report.relative_error)
    return replace(report, folder=out)
