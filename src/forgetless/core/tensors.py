"""Tensors in a safetensors file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from forgetless.core.errors import UserError, reading


def read_tensors(file: str | Path, *, finite: bool = False) -> dict[str, Tensor]:
    """Name -> tensor.

    Args:
        file: of safetensors.
        finite: whether a value that is infinite or no number is a fault.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, or has such a value.
    """
    with reading(file, "write it again"):
        found = load_file(file)
    for name, tensor in found.items() if finite else ():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{file} has values that are not finite, in {name}: the training that wrote it "
                "diverged, or it is damaged"
            )
    return found
