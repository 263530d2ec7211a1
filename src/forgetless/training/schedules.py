"""How long a training lasts, in optimiser steps, and its learning rate on the way.

Other than a cosine or a line, a rate that is flat (``constant``) or falls slowly (``inverse_sqrt``)
does not depend on where the training ends until the cool-down begins, so that weights taken on the
way are those of a shorter training before its cool-down.
"""

import math
from collections.abc import Callable

from forgetless.data.modality import Rows
from forgetless.training.settings import TrainingSettings


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


def rate_factor(settings: TrainingSettings, steps: int) -> Callable[[int], float]:
    """What the learning rate is multiplied by at step t = 0 .. steps - 1.

    With w and c steps of warm-up and cool-down (their ratios times the steps, rounded up) it is

        t / w                                                 for t < w
        f(t) * (steps - t) / c                                in the last c steps
        f(t)                                                  otherwise

        f(t) = (1 + cos(pi (t - w) / (steps - w))) / 2        cosine
               (steps - t) / (steps - w)                      linear
               1                                              constant
               sqrt(max(w, 1) / t), at most 1                 inverse_sqrt

    which reaches 0 one step after the last, but for a schedule that is flat or falls slowly and has
    no cool-down. A training of a single step has no warm-up, which would be a rate of 0.
    """
    warmup = math.ceil(settings.warmup_ratio * steps) if steps > 1 else 0
    cooldown = math.ceil(settings.cooldown_ratio * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        left = max(1, steps - warmup)
        if settings.schedule == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / left))))
        if settings.schedule == "linear":
            return max(0.0, (steps - step) / left)
        falling = settings.schedule == "inverse_sqrt" and step > 0
        flat = math.sqrt(min(1.0, max(warmup, 1) / step)) if falling else 1.0
        return flat * (min(1.0, (steps - step) / cooldown) if cooldown else 1.0)

    return factor
