"""What the studies write their results with: rows of a study, intervals over seeds, Markdown."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from forgetless.core.metrics import mean_stderr, t_interval


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table that a study wrote."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and Student's 95 % interval over the seeds."""
    mean, stderr, n = mean_stderr(values)
    low, high = t_interval(mean, stderr, n - 1) if n > 1 else (None, None)
    return {"mean": mean, "low": low, "high": high, "seeds": n}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose second row is the rule below its head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
