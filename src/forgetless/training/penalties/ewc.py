"""EWC: distance from the start, each weight by its Fisher information on texts of the old.

Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks",
arXiv:1612.00796. The Fisher information is the empirical one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forgetless.core.errors import UserError
from forgetless.data.modality import Processor
from forgetless.models.load import evaluating
from forgetless.training.penalties.penalty import HeldTexts
from forgetless.training.weights import trained_copy, trained_weights


@dataclass
class EWC(HeldTexts):
    """1/2 sum F (w - w_start)^2 over the trained weights w, F the diagonal Fisher information.

    F = mean over sequences of (d log p(sequence) / dw)^2, from one backward pass a sequence before
    the first step.
    """

    def prepare(self, model: nn.Module, processor: Processor, seed: int) -> None:
        """Read the texts, measure F and remember the start."""
        super().prepare(model, processor, seed)
        self._start = trained_copy(model)
        # In bfloat16 a sum of a thousand terms would lose a sixth of itself.
        self._fisher = {
            name: torch.zeros_like(start, dtype=torch.promote_types(start.dtype, torch.float32))
            for name, start in self._start.items()
        }
        sequences = self._sequences()
        if not sequences:
            raise UserError(f"penalty 'ewc': no text of {self.source} has two tokens or more")
        with evaluating(model), torch.enable_grad():
            for ids in sequences:
                _log_likelihood(model, ids).backward()  # type: ignore[no-untyped-call]
                for name, weight in trained_weights(model).items():
                    if weight.grad is not None:
                        gradient = weight.grad.to(self._fisher[name])
                        self._fisher[name] += gradient.square() / len(sequences)
                    weight.grad = None
        self.batches = []

    def _sequences(self) -> list[Tensor]:
        """Every text alone, (1, tokens), without padding."""
        return [
            ids[mask.bool()][None]
            for batch in self.batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            if mask.sum() > 1
        ]

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        """1/2 sum F (w - w_start)^2."""
        squares = [
            (self._fisher[name] * (w - self._start[name]).square()).sum()
            for name, w in trained_weights(model).items()
        ]
        return torch.stack(squares).sum() / 2


def _log_likelihood(model: nn.Module, ids: Tensor) -> Tensor:
    """Sum of the log-probabilities of a sequence's tokens, the first one given."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return -loss * (ids.numel() - 1)
