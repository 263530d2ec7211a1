"""A trained adapter as a plain LoRA that other programs load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from forgetless import adapters, store
from forgetless.adapters import ExportReport
from forgetless.cards import write_run_card
from forgetless.commands.folders import Trained, require_new
from forgetless.errors import UserError
from forgetless.models import load_model
from forgetless.store import RunFolder


def export(
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
    model = adapters.load(load_model(base), trained.folder)
    with store.new_folder(out) as folder:
        report = adapters.export(model, folder, rank)
        if (run := RunFolder(Path(source))).recipe.exists():
            write_run_card(run, folder, report.relative_error)
    return replace(report, folder=out)
