"""EWC: distance from the start, each weight by its Fisher information on texts of the old.

Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks",
arXiv:1612.00796. The Fisher information is the empirical one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.core.errors import UserError
from forgetless.data.losses import loss_of
from forgetless.data.modality import Batch, Processor
from forgetless.data.packing import IGNORED
from forgetless.models.state import evaluating
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
        examples = self._examples()
        if not examples:
            raise UserError(f"penalty 'ewc': {self.source} has nothing that the model can predict")
        mean = loss_of(model)
        with evaluating(model), torch.enable_grad():
            for example, answers in examples:
                # The loss is the mean of - log p over the answers.
                loss: Any = mean(model(**example, **self.options), labels=example["labels"])
                (-loss * answers).backward()
                for name, weight in trained_weights(model).items():
                    if weight.grad is not None:
                        gradient = weight.grad.to(self._fisher[name])
                        self._fisher[name] += gradient.square() / len(examples)
                    weight.grad = None
        self.batches = []

    def _examples(self) -> list[tuple[Batch, int]]:
        """Every example alone with the number of its answers: a text's tokens but the first one."""
        found: list[tuple[Batch, int]] = []
        for batch in self.batches:
            for row in range(len(next(iter(batch.values())))):
                if "labels" in batch:
                    example = {name: value[row : row + 1] for name, value in batch.items()}
                    answers = int((example["labels"] != IGNORED).sum())
                else:  # without padding
                    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
                    example, answers = {"input_ids": ids, "labels": ids}, ids.numel() - 1
                found += [(example, answers)] if answers > 0 else []
        return found

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        """1/2 sum F (w - w_start)^2."""
        squares = [
            (self._fisher[name] * (w - self._start[name]).square()).sum()
            for name, w in trained_weights(model).items()
        ]
        return torch.stack(squares).sum() / 2
