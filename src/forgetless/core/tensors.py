"""Tensors in a safetensors file, with a checksum of all of it in the header's metadata."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from forgetless.core.errors import UserError, reading
from forgetless.core.hashing import CHECKSUM, checksum, known_checksum

_UNKNOWN = "0" * 32
"""What stands for the checksum in the text that it is the checksum of."""


def write_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors with metadata, equal ones as equal bytes: safetensors alone puts the metadata
    into the header in an order of chance.
    """
    save_file(dict(tensors), file, metadata={**(metadata or {}), CHECKSUM: _UNKNOWN})
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, "these are the same characters in another order"
        known = checksum(file, 8 + size, before=text)
        opened.seek(8)
        opened.write(text.replace(_UNKNOWN.encode(), known.encode(), 1))


def read_tensors(file: str | Path, *, finite: bool = False) -> dict[str, Tensor]:
    """Name -> tensor.

    Of a file of safetensors; where it is to be `finite`, a value that is infinite or NaN is a
    fault.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, or has such a value.
    """
    with reading(file, "write it again"):
        found = load_file(file)
    require_intact(file)
    for name, tensor in found.items() if finite else ():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{file} has values that are not finite, in {name}: the training that wrote it "
                "diverged, or it is damaged"
            )
    return found


def require_intact(file: str | Path) -> None:
    """Compare a safetensors file with the checksum that `write_tensors` gave it, if it did.

    A file that was not changed since is not read again.

    Raises:
        UserError: it holds something else than what was written.
    """
    status = Path(file).stat()
    if not _is_intact(Path(file), status.st_size, status.st_mtime_ns):
        raise UserError(f"{file} is damaged: it does not hold what was written; write it again")


@lru_cache(maxsize=4096)
def _is_intact(file: Path, size: int, modified: int) -> bool:
    with file.open("rb") as opened:
        text = opened.read(int.from_bytes(opened.read(8), "little"))
    known = known_checksum(json.loads(text).get("__metadata__", {}))
    if known is None:  # of another program, or of a former version
        return True
    unknown = text.replace(known.encode(), _UNKNOWN.encode(), 1)
    return bool(known == checksum(file, 8 + len(text), before=unknown))
