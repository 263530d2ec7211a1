"""O-LoRA: the adapter's inputs are kept apart from those of earlier adapters.

Source: Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning",
arXiv:2310.14152. The paper's adapters start at B = 0. One with a start of its own (A0, B0) has the
inputs A0 + dA and dA: half of the overlap of A0 stays, and the pull moves the model off its base by
itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import normalize

from forgetless.adapters.anchored import plain_factors
from forgetless.adapters.folders import down_projections
from forgetless.adapters.layer import adapted_layers
from forgetless.core.errors import UserError
from forgetless.data.modality import Processor
from forgetless.training.penalties.penalty import Penalty


@dataclass
class Orthogonality(Penalty):
    """sum ||A_old A^T||_F^2 over layers and earlier adapters.

    Attributes:
        weight: of the penalty.
        adapters: folders of LoRAs, exported or native, ours or PEFT's.
        normalised: of the rows of A_old and A their directions alone, so that an A that shrinks
            is no further from the earlier ones; the paper's penalty is not.
    """

    adapters: Sequence[str] = ()
    normalised: bool = False
    files: ClassVar[Sequence[str]] = ("adapters",)

    def check(self, method: str) -> None:
        """Read the earlier adapters, from which full fine-tuning cannot be kept apart."""
        self._read(adapted=method != "full")

    def _read(self, *, adapted: bool) -> list[dict[str, Tensor]]:
        """A of every layer, for each of the earlier adapters."""
        if not adapted:
            raise UserError("the penalty 'orthogonality' needs an adapter; full has none")
        if not self.adapters:
            raise UserError("the penalty 'orthogonality' needs 'adapters', folders of earlier ones")
        return [down_projections(folder) for folder in self.adapters]

    def prepare(self, model: nn.Module, processor: Processor, seed: int) -> None:
        """Read every earlier A."""
        found = self._read(adapted=isinstance(model, PeftModel))
        assert isinstance(model, PeftModel)
        device = next(model.parameters()).device
        self._earlier = [{n: A.to(device).float() for n, A in each.items()} for each in found]
        layers = adapted_layers(model, model.active_adapter)
        names = {
            n for n, m in layers.items() if m.lora_A[model.active_adapter].weight.requires_grad
        }
        if not names:
            raise UserError("the penalty 'orthogonality' moves A, which this method freezes")
        for folder, earlier in zip(self.adapters, self._earlier, strict=True):
            if not names & earlier.keys():
                raise UserError(f"{folder} adapts none of the layers that are trained now")

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        """Sum of ||A_old A^T||_F^2."""
        assert isinstance(model, PeftModel)
        total = torch.zeros((), device=next(model.parameters()).device)
        adapter = model.active_adapter
        for name, module in adapted_layers(model, adapter).items():
            A = plain_factors(module, adapter)[0].float()
            for earlier in self._earlier:
                if name in earlier:
                    old = earlier[name]
                    if self.normalised:
                        old, A = normalize(old), normalize(A)
                    total = total + (old @ A.mT).square().sum()
        return total
