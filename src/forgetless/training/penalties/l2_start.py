"""L2-SP: the squared distance of the trained weights from their start.

Source: Li et al. 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
arXiv:1802.01483.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forgetless.data.modality import Processor
from forgetless.training.penalties.penalty import Penalty
from forgetless.training.weights import trained_copy, trained_weights


@dataclass
class L2Start(Penalty):
    """1/2 sum (w - w_start)^2 over the trained weights w."""

    def prepare(self, model: nn.Module, processor: Processor, seed: int) -> None:
        """Remember the start."""
        self._start = trained_copy(model)

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        """1/2 sum (w - w_start)^2."""
        squares = [
            (w - self._start[name]).square().sum() for name, w in trained_weights(model).items()
        ]
        return torch.stack(squares).sum() / 2
