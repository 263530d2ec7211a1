"""How long a training lasts, in optimiser steps, and where on its way it is measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from forgetless.data.batches import TokenRows
from forgetless.data.mixture import Mixture
from forgetless.training.settings import TrainingSettings

if TYPE_CHECKING:
    import datasets

__all__ = ["Rows", "epoch_steps", "measured_steps", "rows_of", "total_steps"]

Rows = TokenRows | Mixture


def rows_of(tokens: datasets.Dataset | Rows) -> Rows:
    """What `forgetless.data.tokenize` gives, as training reads it; rows are that already."""
    return tokens if isinstance(tokens, Rows) else TokenRows(tokens)


def total_steps(rows: Rows, settings: TrainingSettings) -> int:
    """Optimiser steps of a training on `rows`.

    A budget of tokens is met to within a step; tokens are counted without padding, at the mean
    length of a row.
    """
    if settings.steps is not None:
        return settings.steps
    if settings.tokens is not None:
        an_epoch = _steps_an_epoch(len(rows), settings)
        epochs, rest = divmod(settings.tokens, rows.tokens)
        a_step = settings.batch_size * settings.gradient_accumulation * rows.tokens / len(rows)
        # The last step of an epoch may be a short one, so whole epochs are counted by themselves.
        return max(1, epochs * an_epoch + min(an_epoch, round(rest / a_step)))
    return epoch_steps(len(rows), settings)


def epoch_steps(rows: int, settings: TrainingSettings) -> int:
    """Optimiser steps of the epochs of a training on so many rows."""
    assert settings.epochs is not None
    return math.ceil(settings.epochs * _steps_an_epoch(rows, settings))


def _steps_an_epoch(rows: int, settings: TrainingSettings) -> int:
    return math.ceil(math.ceil(rows / settings.batch_size) / settings.gradient_accumulation)


def measured_steps(steps: int, settings: TrainingSettings) -> list[int]:
    """The steps that `measure_at` stands for, in order, those of the last step left out."""
    asked = {max(1, round(share * steps)) for share in settings.measure_at}
    return sorted(asked - {steps})
