"""Drawing tokens at a temperature: the same draw whatever the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from forgetless.tasks.base import whole_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's probabilities.

        p_i ∝ exp(logit_i / temperature)   over the fewest tokens whose shares sum to top_p

    Each text has random numbers of its own, made from the seed and the text's place among all, so
    that neither the size of a batch nor the other texts in it change what is drawn.

    Attributes:
        temperature: above 0; 1 is the model's own distribution.
        top_p: in (0, 1]; 1 leaves no token out.
        seed: 0 or more.

    Reference:
        Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration", arXiv:1904.09751
        (top_p: nucleus sampling).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def chooser(self, places: Sequence[int], steps: int) -> Callable[[Tensor, Tensor, int], Tensor]:
        """A function of logits (rows, tokens), row numbers and step that draws a token a row.

        The rows have these places among all texts, and `steps` is the most that will be drawn for
        one.
        """
        import torch

        drawn = [np.random.default_rng((self.seed, place)).random(steps) for place in places]
        uniform = torch.tensor(np.array(drawn))

        def choose(logits: Tensor, rows: Tensor, step: int) -> Tensor:
            shares = (logits.double() / self.temperature).softmax(-1)
            shares, tokens = shares.sort(dim=-1, descending=True, stable=True)
            before = shares.cumsum(-1) - shares
            shares = shares.masked_fill(before >= self.top_p, 0.0)
            reached = shares.cumsum(-1)
            level = uniform.to(rows.device)[rows, step, None] * reached[:, -1:]
            chosen = (reached <= level).sum(-1, keepdim=True).clamp(max=tokens.shape[1] - 1)
            return tokens.gather(1, chosen).squeeze(1)

        return choose


def sampling_problems(temperature: object, top_p: object, seed: object) -> list[str | None]:
    """What is wrong with the settings of a sampling task, where 0 stands for the best token."""

    def is_number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    cold = is_number(temperature) and 0 <= temperature < float("inf")  # type: ignore[operator]
    share = is_number(top_p) and 0 < top_p <= 1  # type: ignore[operator]
    return [
        None if cold else f"temperature must be 0 or more, got {temperature!r}",
        None if share else f"top_p must be above 0 and at most 1, got {top_p!r}",
        whole_number("seed", seed, 0),
    ]
