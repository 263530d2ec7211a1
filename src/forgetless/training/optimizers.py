"""The optimisers of a recipe: what `transformers.Trainer` calls them, and what each needs.

Importing this module loads no torch, so that recipes can be read without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forgetless.training.settings import TrainingSettings


@dataclass(frozen=True)
class Optimizer:
    """What is special to an optimiser.

    Attributes:
        name: of the one in `TrainingArguments.optim`; of one of ours the class, with its module.
        state_bytes: what it keeps for each trained float32 weight. Moments have the number format
            of their weights, unless they have 8 bits; rows and columns are left out.
        reads: which of the settings `betas` and `eps` it has.
        in_8_bits: whether bitsandbytes keeps its moments.
        by_entry: whether it treats every number of a weight alike, wherever the others are, so
            that it works on shards.
    """

    name: str
    state_bytes: int
    reads: tuple[str, ...] = ()
    in_8_bits: bool = False
    by_entry: bool = False


OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer("adamw_torch_fused", 8, ("betas", "eps"), by_entry=True),
    "adamw_8bit": Optimizer("adamw_8bit", 2, ("betas", "eps"), in_8_bits=True),
    "paged_adamw_8bit": Optimizer("paged_adamw_8bit", 2, ("betas", "eps"), in_8_bits=True),
    "lion": Optimizer("forgetless.training.lion.Lion", 4, ("betas",), by_entry=True),
    "adafactor": Optimizer("adafactor", 0),
    "sgd": Optimizer("sgd", 0, by_entry=True),
}


def optimizer_options(
    settings: TrainingSettings,
) -> tuple[dict[str, Any], tuple[type[Any], dict[str, Any]] | None]:
    """What of `TrainingArguments` chooses and sets the optimiser, and a class of ours with its own.

    The class is None where Trainer has one of that name.
    """
    kind = OPTIMIZERS[settings.optimizer]
    arguments: dict[str, Any] = {}
    if settings.betas is not None:
        arguments["adam_beta1"], arguments["adam_beta2"] = settings.betas
    if settings.eps is not None:
        arguments["adam_epsilon"] = settings.eps
    module, dot, name = kind.name.rpartition(".")
    if not dot:
        return {"optim": kind.name, **arguments}, None
    given = {key: getattr(settings, key) for key in kind.reads}
    own = {key: value for key, value in given.items() if value is not None}
    return arguments, (getattr(import_module(module), name), {"lr": settings.learning_rate, **own})


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
    import torch  # slow, and not needed to read a recipe

    if torch.accelerator.is_available():
        return None
    import bitsandbytes  # optional

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
