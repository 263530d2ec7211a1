"""Files of tensors: equal ones have equal bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from forgetless.core.errors import UserError
from forgetless.core.tensors import read_tensors, write_tensors


def test_equal_tensors_are_equal_files(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    metadata = {f"key {n}": f'"{n}" é\n{{}}' for n in range(12)}
    contents = set()
    for number in range(4):
        file = tmp_path / f"{number}.safetensors"
        write_tensors(tensors, file, metadata)
        contents.add(file.read_bytes())
    assert len(contents) == 1
    assert all(torch.equal(read_tensors(file)[name], tensors[name]) for name in tensors)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata().items() >= metadata.items()


def test_every_byte_counts(tmp_path: Path) -> None:
    """One that is another is found, in the header, the checksum's name too, and behind it."""
    tensors, file = {"a": torch.arange(6.0)}, tmp_path / "0.safetensors"
    write_tensors(tensors, file, {"format": "pt"})
    content = file.read_bytes()
    for place in range(8, len(content)):
        other = tmp_path / f"{place}.safetensors"
        other.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=other.name):
            read_tensors(other)
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(read_tensors(file)["a"], tensors["a"])
