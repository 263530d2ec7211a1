"""A sequence step by step: what its runs logged, joined along the sequence."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetless.core.files import read_json
from forgetless.studies.folder import RunFolder

MOST_LINES = 50
"""Of the loss of one run, evenly spread; the last one is always there."""


def course(
    folder: Path,
    columns: Sequence[str | None],
    chain: Mapping[str, Any],
    R: Sequence[Sequence[Any]],
) -> dict[str, Any] | None:
    """What became of the losses and scores of a sequence, by steps counted over all of its tasks.

    A column of R is measured by what `columns` names; `chain` are the sequence's tasks and runs.

    Returns:
        "ends": the step at which each task was learned; "loss": [step, the task's own training
        loss, without penalties, since the line before]; "scores": [step, those of all columns] at
        0, at every end, and where a run was scored on its way; "probes": name -> [step, value]. Up
        to the first run that is not trained. None for separate runs, which are no sequence.
    """
    if chain.get("bound") == "separate":
        return None
    found: dict[str, Any] = {"ends": [], "loss": [], "scores": [[0, R[0]]], "probes": {}}
    before = 0
    for run_id, row in zip(chain["runs"], R[len(R) - len(chain["runs"]) :], strict=True):
        run = RunFolder(folder / run_id)
        record = run.read()
        steps = record.get("training", {}).get("steps")
        if steps is None:
            break
        lines = run.lines(record)
        losses = [line for line in lines if "loss" in line]
        every = -(-len(losses) // MOST_LINES) or 1
        found["loss"] += [
            [before + line["step"], line["loss"] - line.get("penalty", 0.0)]
            for line in losses[::-every][::-1]
        ]
        for line in lines:
            for name, value in line.get("probe", {}).items():
                found["probes"].setdefault(name, []).append([before + line["step"], value])
        for step in (step for step in run.points if step < steps):
            point = run.point(step)
            scores = [
                read_json(point.scores("final", task), damaged_as_missing=True).get("value")
                if task
                else None
                for task in columns
            ]
            found["scores"].append([before + step, scores])
        before += steps
        found["ends"].append(before)
        found["scores"].append([before, row])
    return found
