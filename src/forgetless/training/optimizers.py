"""The optimisers of a recipe: what `transformers.Trainer` calls them, and what each needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from forgetless.training.lion import Lion
from forgetless.training.settings import TrainingSettings

__all__ = ["OPTIMIZERS", "optimizer_arguments", "optimizer_class", "optimizer_problems"]


@dataclass(frozen=True)
class _Kind:
    """What is special to an optimiser.

    Attributes:
        name: of the one in `TrainingArguments.optim`; None where the class is ours.
        reads: which of the settings `betas` and `eps` it has.
        in_8_bits: whether bitsandbytes keeps its moments.
    """

    name: str | None
    reads: tuple[str, ...] = ()
    in_8_bits: bool = False


OPTIMIZERS: Mapping[str, _Kind] = {
    "adamw": _Kind("adamw_torch_fused", ("betas", "eps")),
    "adamw_8bit": _Kind("adamw_8bit", ("betas", "eps"), in_8_bits=True),
    "paged_adamw_8bit": _Kind("paged_adamw_8bit", ("betas", "eps"), in_8_bits=True),
    "lion": _Kind(None, ("betas",)),
    "adafactor": _Kind("adafactor"),
    "sgd": _Kind("sgd"),
}


def optimizer_arguments(settings: TrainingSettings) -> dict[str, Any]:
    """The arguments of `TrainingArguments` that choose and set the optimiser."""
    found: dict[str, Any] = {}
    if (name := OPTIMIZERS[settings.optimizer].name) is not None:
        found["optim"] = name
    if settings.betas is not None:
        found["adam_beta1"], found["adam_beta2"] = settings.betas
    if settings.eps is not None:
        found["adam_epsilon"] = settings.eps
    return found


def optimizer_class(settings: TrainingSettings) -> tuple[type[Lion], dict[str, Any]] | None:
    """The class with its arguments where Trainer has none of that name, else None."""
    if settings.optimizer != "lion":
        return None
    betas = {} if settings.betas is None else {"betas": tuple(settings.betas)}
    return Lion, {"lr": settings.learning_rate, **betas}


def optimizer_problems(settings: TrainingSettings) -> Iterator[str]:
    """What keeps the optimiser from running on this machine, or is set and not read."""
    kind = OPTIMIZERS[settings.optimizer]
    for name in ("betas", "eps"):
        if getattr(settings, name) is not None and name not in kind.reads:
            yield f"training.{name}: the optimizer {settings.optimizer!r} has none; leave it out"
    if kind.in_8_bits and (problem := _without_bitsandbytes()):
        yield (
            f"training.optimizer: {settings.optimizer!r} {problem}; or use 'adafactor' or 'lion', "
            "which need less memory than 'adamw' too"
        )


def _without_bitsandbytes() -> str | None:
    """Why no optimiser of bitsandbytes runs here; None where one does."""
    if find_spec("bitsandbytes") is None:
        return "needs bitsandbytes, which is not installed: pip install 'forgetless[quantised]'"
    if torch.accelerator.is_available():
        return None
    import bitsandbytes

    weight = torch.nn.Parameter(torch.zeros(64, 64))  # smaller ones are kept in 32 bits
    weight.grad = torch.ones_like(weight)
    try:
        bitsandbytes.optim.AdamW8bit([weight]).step()
    except (RuntimeError, AttributeError, NotImplementedError):
        return (
            f"does not run without a GPU in bitsandbytes {bitsandbytes.__version__} (0.50 does): "
            "pip install -U bitsandbytes"
        )
    return None
