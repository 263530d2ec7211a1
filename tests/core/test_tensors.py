"""Files of tensors: equal ones have equal bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

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
        assert opened.metadata() == metadata
