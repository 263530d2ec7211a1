"""KL(base || model) on texts of the old knowledge.

Source: Li and Hoiem 2016, "Learning without Forgetting", arXiv:1606.09282, which distils the old
model on the new task's inputs; here they are texts to keep.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from forgetless.data.modality import Processor
from forgetless.models.heads import own_logits
from forgetless.models.state import adapter_off, evaluating
from forgetless.training.penalties.penalty import HeldTexts

_CHUNK_LOGITS = 1 << 22
"""Logits whose softmax is taken at once, those of one token at least: 16 MB in float32, and some
six times that while it is taken."""


@dataclass
class KLToBase(HeldTexts):
    """KL(base || model) a token, or an image, on a new batch of what is kept at every step.

    The base is the model with its adapter off; where the weights themselves are trained, a frozen
    copy of them, which takes their memory once more.
    """

    def prepare(self, model: nn.Module, processor: Processor, seed: int) -> None:
        """Read the texts and, without an adapter, copy the base."""
        super().prepare(model, processor, seed)
        self._base = None if isinstance(model, PeftModel) else copy.deepcopy(model).eval()
        if self._base is not None:
            self._base.requires_grad_(False)

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        """Sum over all answers of p_base (log p_base - log p_model), mean over tokens or images."""
        batch = self.batches[step % len(self.batches)]
        base = self._base_logits(model, batch)
        ours = own_logits(model, model(**batch, **self.options).logits)
        mask = batch.get("attention_mask")
        if ours.ndim == 2:  # one answer a row, and not one a token
            ours, base, mask = ours[:, None], base[:, None], None
        if mask is None:
            mask = torch.ones(ours.shape[:2], device=ours.device)
        divergence: Tensor = _MeanKL.apply(ours, base, mask)  # type: ignore[no-untyped-call]
        return divergence

    def _base_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor
        if self._base is not None:
            # Where accelerate has wrapped a model's forward in autocast, this is the plain one.
            mixed = hasattr(model, "_original_forward")
            device = next(iter(batch.values())).device.type
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=mixed):
                logits = self._base(**batch, **self.options).logits
        else:
            assert isinstance(model, PeftModel)
            with evaluating(model), adapter_off(model):
                logits = model(**batch, **self.options).logits
        return own_logits(model, logits)


class _MeanKL(torch.autograd.Function):
    """KL(base || ours) of logits (batch, tokens, vocabulary), mean over the tokens of a mask.

    The gradient of `ours` at a token is (p_ours - p_base) / tokens. It is computed with the value,
    some tokens at a time, and written over the logits of the base, which nobody needs any more: so
    beside `ours` one tensor of that size is held, and no softmax as a whole.
    """

    @staticmethod
    def forward(ctx: Any, ours: Tensor, base: Tensor, mask: Tensor) -> Tensor:
        counted, vocabulary = mask.flatten().nonzero().flatten(), ours.shape[-1]
        gradient = base.to(ours.dtype).contiguous()
        rows, base_rows = (logits.view(-1, vocabulary) for logits in (ours.contiguous(), gradient))
        total = torch.zeros((), device=ours.device)
        for places in torch.split(counted, max(1, _CHUNK_LOGITS // vocabulary)):
            log_p, log_q = (each[places].float().log_softmax(-1) for each in (base_rows, rows))
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            base_rows[places] = ((log_q.exp() - p) / len(counted)).to(ours.dtype)
        base_rows[mask.flatten() == 0] = 0
        ctx.save_for_backward(gradient)
        return total / len(counted)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outer[0]), None, None  # in place: PyTorch refuses a second backward
