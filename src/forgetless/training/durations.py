"""How long a training lasts, in optimiser steps, and where on its way it is measured."""

from __future__ import annotations

import math

from forgetless.recipe import TrainingSettings
from forgetless.training.batches import TokenRows
from forgetless.training.mixture import Mixture

__all__ = ["Rows", "measured_steps", "total_steps"]

Rows = TokenRows | Mixture


def total_steps(rows: Rows, settings: TrainingSettings) -> int:
    """Optimiser steps of a training on `rows`.

    A budget of tokens is met to within a step; tokens are counted without padding, at the mean
    length of a row.
    """
    if settings.steps is not None:
        return settings.steps
    if settings.tokens is not None:
        a_step = settings.batch_size * settings.gradient_accumulation * rows.tokens / len(rows)
        return max(1, round(settings.tokens / a_step))
    assert settings.epochs is not None
    batches = math.ceil(len(rows) / settings.batch_size)
    return math.ceil(settings.epochs * math.ceil(batches / settings.gradient_accumulation))


def measured_steps(steps: int, settings: TrainingSettings) -> list[int]:
    """The steps that `measure_at` stands for, in order, those of the last step left out."""
    asked = {max(1, round(share * steps)) for share in settings.measure_at}
    return sorted(asked - {steps})
