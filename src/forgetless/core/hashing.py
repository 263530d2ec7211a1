"""SHA-256 of what files hold, whatever they are called and wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder."""
    path = Path(path)
    return files_hash(path.rglob("*") if path.is_dir() else [path], path)


def files_hash(files: Iterable[Path], root: Path) -> str:
    """SHA-256 of the contents of some files and of their names below `root`; folders are skipped.

    A file that was not changed since is not read again.
    """
    digest = hashlib.sha256()
    for file in filter(Path.is_file, sorted(files)):
        status = file.stat()
        name = file.relative_to(root).as_posix()
        digest.update(f"{name}:{_file_hash(file, status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _file_hash(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
