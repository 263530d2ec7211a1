"""A trained adapter as a plain LoRA that other programs load."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from forgetless.adapters.folders import ExportReport, export, learned_classes, load
from forgetless.cli.commands.folders import adapter_and_base, require_new
from forgetless.core.files import new_folder
from forgetless.models.load import load_model
from forgetless.studies.card import write_run_card
from forgetless.studies.folder import RunFolder


def export_adapter(
    source: str | Path, out: str | Path, rank: Any = "exact", base: str | None = None
) -> ExportReport:
    """Write a run's or a folder's adapter as a plain PEFT LoRA for the untouched base."""
    (trained, base), out = adapter_and_base(source, base), Path(out)
    require_new(out)
    model = load(load_model(base, new_classes=learned_classes(trained.folder)), trained.folder)
    with new_folder(out) as folder:
        report = export(model, folder, rank)
        if (run := RunFolder(Path(source))).recipe.exists():
            write_run_card(run, folder, report.relative_error)
    return replace(report, folder=out)
