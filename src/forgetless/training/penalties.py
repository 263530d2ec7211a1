"""Penalties: what a training pays, at every step, for leaving what the model knew.

A penalty is a function of the model that is added to the loss, times its weight. It sees the model
once before the first step, at its start, and then once an optimiser step.

=================  =====================================================  ====================
kind               value                                                  source
=================  =====================================================  ====================
``l2_start``       1/2 sum (w - w_start)^2 over the trained weights       L2-SP, 1802.01483
``kl``             KL(base || model) a token, on texts of the old         Learning without
                   knowledge                                              Forgetting, 1606.09282
``ewc``            1/2 sum F (w - w_start)^2, F the diagonal Fisher       EWC, 1612.00796
                   information of the model at its start on such texts
``orthogonality``  sum ||A_old A^T||_F^2 over layers and earlier          O-LoRA, 2310.14152
                   adapters
=================  =====================================================  ====================

In an adapter the trained weights are those of A and B. Where B starts at zero (plain LoRA), the
Fisher information of A is zero at the start: there EWC holds B alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.adapters.anchored import plain_factors
from forgetless.adapters.folders import down_projections
from forgetless.adapters.layer import adapted_layers
from forgetless.core.errors import UserError, unknown
from forgetless.data.texts import batches
from forgetless.models.load import adapter_off, evaluating
from forgetless.training.restoring import trained_copy, trained_weights

__all__ = ["PENALTIES", "Penalty", "make_penalty"]


class Penalty(Protocol):
    """One term of the loss."""

    weight: float

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """Look at the model before its first step."""

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        """The value at this step, a scalar with a graph; not yet times the weight."""


@dataclass
class L2Start:
    """Squared distance of the trained weights from their start.

    Attributes:
        weight: of the penalty.
    """

    weight: float

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """Remember the start."""
        self._start = trained_copy(model)

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        """1/2 sum (w - w_start)^2."""
        squares = [
            (w - self._start[name]).square().sum() for name, w in trained_weights(model).items()
        ]
        return torch.stack(squares).sum() / 2


@dataclass
class HeldTexts:
    """Texts of the old knowledge, as batches of tokens.

    Attributes:
        weight: of the penalty.
        source: as in a recipe's calibration: "self", a file, or a text of the pocket world.
        samples: sequences.
        max_length: tokens of the longest.
        batch_size: sequences a step.
    """

    weight: float
    source: str = "self"
    samples: int = 256
    max_length: int = 256
    batch_size: int = 8
    _batches: list[dict[str, Tensor]] = field(default_factory=list, repr=False)

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """Read the texts."""
        found = batches(
            self.source,
            cast("PreTrainedModel", model),
            tokenizer,
            samples=self.samples,
            max_length=self.max_length,
            batch_size=self.batch_size,
            seed=seed,
        )
        # They come sorted by length, and a penalty should not be short for a while, then long.
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        device = next(model.parameters()).device
        self._batches = [
            {name: value.to(device) for name, value in found[i].items()} for i in order.tolist()
        ]


@dataclass
class KLToBase(HeldTexts):
    """KL(base || model) a token, on a new batch of the texts at every step.

    The base is the model with its adapter off; where the weights themselves are trained, a frozen
    copy of them, which takes their memory once more.
    """

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """Read the texts and, without an adapter, copy the base."""
        super().prepare(model, tokenizer, seed)
        self._base = None if isinstance(model, PeftModel) else copy.deepcopy(model).eval()
        if self._base is not None:
            self._base.requires_grad_(False)

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        """Sum over the vocabulary of p_base (log p_base - log p_model), mean over tokens."""
        batch = self._batches[step % len(self._batches)]
        base = self._base_logits(model, batch).float().log_softmax(-1)
        ours = model(**batch, use_cache=False).logits.float().log_softmax(-1)
        each = F.kl_div(ours, base, reduction="none", log_target=True).sum(-1)
        mask = batch["attention_mask"].to(each)
        return (each * mask).sum() / mask.sum()

    def _base_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor
        if self._base is not None:
            # Where accelerate has wrapped a model's forward in autocast, this is the plain one.
            mixed = hasattr(model, "_original_forward")
            device = batch["input_ids"].device.type
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=mixed):
                logits = self._base(**batch, use_cache=False).logits
        else:
            assert isinstance(model, PeftModel)
            with evaluating(model), adapter_off(model):
                logits = model(**batch, use_cache=False).logits
        return logits


@dataclass
class EWC(HeldTexts):
    """Distance from the start, each weight by its Fisher information on the texts.

    F = mean over sequences of (d log p(sequence) / dw)^2, the empirical Fisher information, from
    one backward pass a sequence before the first step.
    """

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """Read the texts, measure F and remember the start."""
        super().prepare(model, tokenizer, seed)
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
        self._batches = []

    def _sequences(self) -> Sequence[Tensor]:
        """Every text alone, (1, tokens), without padding."""
        return [
            ids[mask.bool()][None]
            for batch in self._batches
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


@dataclass
class Orthogonality:
    """Overlap of the adapter's inputs with those of earlier adapters.

    The paper's adapters start at B = 0. One with a start of its own (A0, B0) has the inputs A0 + dA
    and dA: half of the overlap of A0 stays, and the pull moves the model off its base by itself.

    Attributes:
        weight: of the penalty.
        adapters: folders of LoRAs, exported or native, ours or PEFT's.
    """

    weight: float
    adapters: Sequence[str] = ()

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """Read every earlier A."""
        if not isinstance(model, PeftModel):
            raise UserError("the penalty 'orthogonality' needs an adapter; full has none")
        if not self.adapters:
            raise UserError("the penalty 'orthogonality' needs 'adapters', folders of earlier ones")
        device = next(model.parameters()).device
        self._earlier = [
            {name: A.to(device).float() for name, A in down_projections(folder).items()}
            for folder in self.adapters
        ]
        layers = adapted_layers(model, model.active_adapter)
        names = {
            n for n, m in layers.items() if m.lora_A[model.active_adapter].weight.requires_grad
        }
        if not names:
            raise UserError("the penalty 'orthogonality' moves A, which this method freezes")
        for folder, found in zip(self.adapters, self._earlier, strict=True):
            if not names & found.keys():
                raise UserError(f"{folder} adapts none of the layers that are trained now")

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        """Sum of ||A_old A^T||_F^2."""
        assert isinstance(model, PeftModel)
        total = torch.zeros((), device=next(model.parameters()).device)
        adapter = model.active_adapter
        for name, module in adapted_layers(model, adapter).items():
            A, _ = plain_factors(module, adapter)
            for earlier in self._earlier:
                if name in earlier:
                    total = total + (earlier[name] @ A.float().mT).square().sum()
        return total


PENALTIES: Mapping[str, Callable[..., Penalty]] = {
    "l2_start": L2Start,
    "kl": KLToBase,
    "ewc": EWC,
    "orthogonality": Orthogonality,
}


def make_penalty(spec: Mapping[str, Any]) -> Penalty:
    """The penalty that a recipe names: ``{kind: kl, weight: 0.1, source: old.txt}``.

    Raises:
        UserError: an unknown kind or setting, or a weight that is not positive.
    """
    settings = dict(spec)
    kind = settings.pop("kind", None)
    if kind not in PENALTIES:
        raise unknown("penalty", str(kind), PENALTIES)
    known = [n for n in PENALTIES[kind].__dataclass_fields__ if not n.startswith("_")]  # type: ignore[attr-defined]
    for name in settings:
        if name not in known:
            raise unknown(f"setting of penalty {kind!r}:", name, known)
    weight = settings.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
        raise UserError(f"penalty {kind!r} needs a positive weight, got {weight!r}")
    return PENALTIES[kind](**settings)


def _log_likelihood(model: nn.Module, ids: Tensor) -> Tensor:
    """Sum of the log-probabilities of a sequence's tokens, the first one given."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return -loss * (ids.numel() - 1)
