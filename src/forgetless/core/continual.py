"""Learning tasks one after the other, as numbers: ACC, BWT, forgetting and FWT. No torch."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def continual_metrics(
    R: ArrayLike, base: ArrayLike | None = None, *, variants: bool = False
) -> dict[str, float]:
    """How well a sequence of K tasks was learned, and what the later ones did to the earlier.

    With R[i, j] the score on task j after task i, counted from 1, larger being better:

        ACC         mean over j = 1 .. K     of  R[K, j]
        BWT         mean over j = 1 .. K - 1 of  R[K, j] - R[j, j]
        forgetting  mean over j = 1 .. K - 1 of  max over i = 1 .. K - 1 of R[i, j]  -  R[K, j]
        FWT         mean over j = 2 .. K     of  R[j - 1, j] - base[j]

    Forgetting is against the best *earlier* score, the last row left out, and is negative where
    every task ended better than it ever was. What was not measured is neither 0 nor left out of a
    mean: a number that needs it is nan. Only scores on tasks that were not trained on yet
    (i < j) may be missing from the maximum, as they are where a sequence scores seen tasks only.

    Args:
        R: (K, K), K of 1 or more; nan where not measured. It is not changed.
        base: (K,), the score on each task before the first one is trained on: of the base model,
            which stands for the paper's random initialisation.
        variants: give the definitions of two libraries beside, under their names.

    Returns:
        "ACC", "BWT", "forgetting" and "FWT", in the unit of the scores; nan for all but ACC where
        K is 1, and for FWT without `base`. With `variants` also

        * "forgetting (Avalanche)": R[j, j] - R[K, j], which is -BWT;
        * "forgetting (Mammoth)": the maximum over *all* rows, so that it is never negative.
          (Mammoth counts an unmeasured score as 0 there; here it is left out.)

    Raises:
        ValueError: R is not square, `base` has another length, or a score is infinite.

    Reference:
        ACC, BWT, FWT: Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for Continual
        Learning", arXiv:1706.08840, section 2. Forgetting: Chaudhry et al. 2018, "Riemannian Walk
        for Incremental Learning", arXiv:1801.10112, section 3.1.
    """
    scores = np.array(R, np.float64)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or not len(scores):
        raise ValueError(
            f"R must be (K, K), a row after each task and a column a task, got {scores.shape}"
        )
    K = len(scores)
    before = np.full(K, math.nan) if base is None else np.array(base, np.float64)
    if before.shape != (K,):
        raise ValueError(f"base must have a score for each of {K} tasks, got shape {before.shape}")
    if np.isinf(scores).any() or np.isinf(before).any():
        raise ValueError("scores must be finite, or nan where not measured")
    last, learned = scores[-1], scores.diagonal()
    lost = np.full(K - 1, math.nan)
    for j in range(K - 1):
        # Without a score since the task's own row the best one is not known.
        if not np.isnan(scores[j:, j]).any():
            lost[j] = np.nanmax(scores[:-1, j]) - last[j]
    found = {
        "ACC": _mean(last),
        "BWT": _mean(last[:-1] - learned[:-1]),
        "forgetting": _mean(lost),
        "FWT": _mean(scores.diagonal(1) - before[1:]),
    }
    if variants:
        found["forgetting (Avalanche)"] = -found["BWT"]
        found["forgetting (Mammoth)"] = _mean(np.maximum(lost, 0.0))
    return found


def _mean(values: NDArray[np.float64]) -> float:
    """Nan for none, and where one is not known."""
    return float(values.mean()) if values.size else math.nan
