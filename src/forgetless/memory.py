"""What a training step takes in memory, from the shapes of a model alone.

The step is run on tensors that have shapes and no content (`FakeTensorMode`), and every storage
that is alive is counted. So activations, logits and their gradients are those of the model's own
code, for any architecture, and nothing large is ever held.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["StepMemory", "step_memory"]

MOMENTS = {"adamw": 2, "lion": 1, "sgd": 0}
"""Numbers that an optimiser keeps for each trained weight."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step, by part.

    Attributes:
        weights: of the base model.
        adapter: trained matrices and the frozen start that they move away from.
        gradients: of what is trained, float32.
        optimizer: its moments.
        activations: most that is alive at once besides, at the turn from forward to backward or
            inside the backward pass; logits included.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations


def step_memory(
    model: Any,
    *,
    rank: int | None,
    anchored: bool = False,
    target_modules: str | list[str] = "all-linear",
    batch_size: int,
    length: int,
    optimizer: str = "adamw",
    bf16: bool = False,
    gradient_checkpointing: bool = False,
) -> StepMemory:
    """The memory of one step on batches of `batch_size` x `length` tokens.

    Args:
        model: a causal language model, on the meta device or not; it gets adapters of its own, so
            give one that is not needed otherwise. Its number format is that of the base.
        rank: of the adapter; None for full fine-tuning.
        anchored: whether the adapter has a frozen start beside what is trained.
        target_modules: as in PEFT.
        batch_size: sequences of a forward pass.
        length: tokens of each.
        optimizer: a key of `MOMENTS`.
        bf16: whether the forward pass runs under bfloat16 autocast.
        gradient_checkpointing: whether layers are recomputed in the backward pass.

    Returns:
        What the tensors hold. A process holds more: the interpreter with its libraries, and what
        the allocator keeps of memory that was freed.
    """
    weights = _bytes(model.parameters()) + _bytes(model.buffers())
    if gradient_checkpointing:
        # The name before transformers 5.20 was gradient_checkpointing_enable.
        new = hasattr(model, "activation_checkpointing_enable")
        switch = "activation_checkpointing" if new else "gradient_checkpointing"
        getattr(model, switch + "_enable")({"use_reentrant": False})
    if rank is not None:
        config = LoraConfig(r=rank, target_modules=target_modules, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        if gradient_checkpointing:
            model.enable_input_require_grads()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return StepMemory(
        weights=weights,
        adapter=0 if rank is None else 4 * trained * (2 if anchored else 1),
        gradients=4 * trained,
        optimizer=4 * trained * MOMENTS[optimizer],
        activations=_activations(model.train(), batch_size, length, bf16),
    )


def _activations(model: nn.Module, batch_size: int, length: int, bf16: bool) -> int:
    """Most bytes alive at once in a forward and a backward pass, weights and gradients aside."""
    step = _Step(model)
    with FakeTensorMode():
        content = {name: _fake(p, p.requires_grad) for name, p in step.named_parameters()}
        content |= {name: _fake(b, False) for name, b in step.named_buffers()}
        for weight in content.values():
            if weight.requires_grad:
                weight.grad = torch.empty_like(weight)
        tokens = torch.zeros((batch_size, length), dtype=torch.long)
        with _Alive() as alive, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            functional_call(step, content, (tokens,))
    return int(alive.most)


class _Step(nn.Module):
    """Forward and backward in one call, since checkpointing calls the layers in both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> None:
        self.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def _fake(like: Tensor, trained: bool) -> Tensor:
    """A weight of that shape without content, where the CPU would hold it."""
    dtype = torch.float32 if trained else like.dtype
    return torch.empty(like.shape, dtype=dtype, device="cpu").requires_grad_(trained)


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage from when it is made to when it is let go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
