"""Learning rates of long trainings: flat or slowly falling, with a cool-down at the end.

Other than a cosine, such a rate does not depend on where the training ends until the cool-down
begins, so that weights taken on the way are those of a shorter training before its cool-down.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["rate_factor"]


def rate_factor(
    schedule: str, steps: int, *, warmup_ratio: float, cooldown_ratio: float
) -> Callable[[int], float]:
    """What the learning rate is multiplied by at step t = 0 .. steps - 1.

    With w and c steps of warm-up and cool-down it is

        t / w                                     for t < w
        f(t) * (steps - t) / c                    in the last c steps
        f(t) = 1 (constant), sqrt(max(w, 1) / t) (inverse_sqrt)    otherwise

    which reaches 0 one step after the last.

    Args:
        schedule: "constant" or "inverse_sqrt".
        steps: of the training.
        warmup_ratio: w / steps, rounded up.
        cooldown_ratio: c / steps, rounded up.
    """
    warmup = math.ceil(warmup_ratio * steps)
    cooldown = math.ceil(cooldown_ratio * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        falling = schedule == "inverse_sqrt" and step > 0
        flat = math.sqrt(min(1.0, max(warmup, 1) / step)) if falling else 1.0
        return flat * (min(1.0, (steps - step) / cooldown) if cooldown else 1.0)

    return factor
