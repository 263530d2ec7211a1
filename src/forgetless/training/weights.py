"""The weights that a training moves: found, remembered in memory or in a file, and put back."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from forgetless.core.errors import UserError
from forgetless.core.files import new_file
from forgetless.core.tensors import require_intact, write_tensors


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that ask for gradients, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def trained_copy(model: nn.Module, device: str | None = None) -> dict[str, Tensor]:
    """These weights as they are now, on their own device where none is given."""
    weights = trained_weights(model)
    return {n: w.detach().to(device or w.device, copy=True) for n, w in weights.items()}


@torch.no_grad()
def put_back(model: nn.Module, copied: Mapping[str, Tensor]) -> None:
    """Set the weights that were copied to what they were then."""
    for name, weight in model.named_parameters():
        if name in copied:
            weight.copy_(copied[name])


class KeptWeights:
    """The trained weights of a step to which a training may go back, in a file of its folder.

    A file and not memory, so that a whole model fits beside its optimiser and a stopped training
    can be resumed. Every checkpoint gets a link to the file as it was then.

    Args:
        folder: the trainer's ``output_dir``.
    """

    NAME = "inside-budget.safetensors"

    def __init__(self, folder: Path) -> None:
        self.file = folder / self.NAME

    def keep(self, model: nn.Module, step: int, tokens: int) -> None:
        """Write the weights of `model` that are trained, after a step and so many tokens."""
        weights = {name: w.contiguous() for name, w in trained_copy(model, "cpu").items()}
        with new_file(self.file) as file:
            write_tensors(weights, file, {"step": str(step), "tokens": str(tokens)})

    @torch.no_grad()
    def restore(self, model: nn.Module) -> tuple[int, int]:
        """Give the weights back to `model`; returns the step and the tokens that they are from."""
        trained = trained_weights(model)
        require_intact(self.file)
        with safe_open(self.file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - it is no mapping
                trained[name].copy_(content.get_tensor(name))
            kept = content.metadata()
        return int(kept["step"]), int(kept["tokens"])

    def add_to(self, checkpoint: Path) -> None:
        """Let a checkpoint have the file as it is now."""
        _link(self.file, checkpoint / self.NAME)

    def take_from(self, checkpoint: Path) -> None:
        """Go back to the file that a checkpoint has."""
        if not (checkpoint / self.NAME).is_file():
            raise UserError(
                f"{checkpoint} has no {self.NAME}, the weights that 'rollback' may need; "
                "continue a checkpoint of a training that had the budget from its start"
            )
        _link(checkpoint / self.NAME, self.file)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    with new_file(target) as unfinished:
        try:
            os.link(source, unfinished)
        except OSError:
            shutil.copyfile(source, unfinished)
