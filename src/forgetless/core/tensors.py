"""Tensors in a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from forgetless.core.errors import UserError, reading


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors with metadata, equal ones as equal bytes: safetensors alone puts the metadata
    into the header in an order of chance.
    """
    save_file(dict(tensors), file, metadata=dict(metadata))
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # the same characters in another order
            opened.seek(8)
            opened.write(text.ljust(size))


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
