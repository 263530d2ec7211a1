"""The model of a training: whether it can be trained, and what is changed on it meanwhile."""

import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch
from torch import nn
from torch._inductor import config as inductor

from forgetless.core.errors import UserError
from forgetless.models.state import checkpoint_activations
from forgetless.models.text import without_cache
from forgetless.training.settings import TrainingSettings
from forgetless.training.weights import trained_weights

# ---- what a model must be ------------------------------------------------------------------------


def require_trainable(model: Any, settings: TrainingSettings) -> None:
    """Refuse a model without weights to train, and LoRA+ where only one of A and B is trained.

    Warns of trained weights in 16 bits.

    Raises:
        UserError: no weight asks for gradients; a ratio between two rates of which one has no use.
    """
    trained = trained_weights(model)
    if not trained:
        raise UserError("no weight of the model asks for gradients; attach an adapter first")
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in trained.values()):
        warnings.warn(
            "the trained weights are stored in 16 bits, which lose small updates; load the model "
            "with dtype 'float32' (training in precision 'bf16' is as fast)",
            stacklevel=3,
        )
    both = all(any(factor in name for name in trained) for factor in ("lora_A", "lora_B"))
    if settings.loraplus_ratio != 1 and not both:
        raise UserError(
            "loraplus_ratio is the rate of B over that of A, got "
            f"{settings.loraplus_ratio:g}, but this model does not train both; leave it at 1 and "
            "set learning_rate, or choose a method that trains A and B"
        )


def compile_problems(settings: TrainingSettings) -> Iterator[str]:
    """What this machine lacks to compile the model, where that is asked for."""
    if not settings.compile:
        return
    key, without = "training.compile", "or leave it at false"
    names = [name for name in inductor.cpp.cxx if name]
    headers = Path(sysconfig.get_path("include"))
    if torch.accelerator.is_available():
        if find_spec("triton") is None:
            yield f"{key}: needs triton, which is not installed: pip install triton, {without}"
    elif not any(map(which, names)):
        yield (
            f"{key}: needs a C++ compiler, and there is no {' or '.join(names)}; install one (apt "
            f"install g++), name yours in the environment variable CXX, {without}"
        )
    elif not (headers / "Python.h").is_file():
        yield (
            f"{key}: needs the headers of Python, and {headers} has no Python.h; install them (apt "
            f"install python3-dev), {without}"
        )


# ---- what is changed meanwhile -------------------------------------------------------------------


@contextmanager
def prepared(model: Any, settings: TrainingSettings) -> Iterator[None]:
    """The model with dropout and checkpointing as a training asks; at the end it is as it was.

    Undoes what `Trainer` changes too. What was compiled is forgotten: otherwise every training of a
    study adds to the versions of the same code, and past a limit PyTorch runs it uncompiled.
    """
    training, use_cache = model.training, getattr(model.config, "use_cache", False)
    own_attributes = set(vars(model))
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    try:
        with attention_dropout(model, settings.attention_dropout), without_cache(model):
            yield
    finally:
        if settings.compile:
            torch.compiler.reset()
        if settings.gradient_checkpointing:
            checkpoint_activations(model, on=False)
        for added in set(vars(model)) - own_attributes:  # the forward that casts to bf16
            delattr(model, added)
        model.config.use_cache = use_cache
        model.train(training)


_DROPOUTS = ("attention_dropout", "attn_dropout", "dropout", "dropout_prob")
"""What attention modules call it: a number, or an `nn.Dropout` beside which GPT-2 reads it."""


@contextmanager
def attention_dropout(model: nn.Module, p: float) -> Iterator[None]:
    """Drop each attention weight with probability `p` while `model` is in training mode.

    0 leaves the model as it was built. At the end of the block it is again as before.

    Raises:
        UserError: no attention module of the model has a dropout to set.
    """
    if p == 0:
        yield
        return
    before: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name in _DROPOUTS if "Attention" in type(module).__name__ else ():
            rate = getattr(module, name, None)
            if isinstance(rate, nn.Dropout):
                before.append((rate, "p", rate.p))
                break
            if isinstance(rate, float | int) and not isinstance(rate, bool):
                before.append((module, name, rate))
                break
    if not before:
        raise UserError(
            f"attention_dropout is {p:g}, but no attention module of {type(model).__name__} has a "
            "dropout to set; set it to 0"
        )
    for owner, name, _ in before:
        setattr(owner, name, p)
    try:
        yield
    finally:
        for owner, name, rate in before:
            setattr(owner, name, rate)
