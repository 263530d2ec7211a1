"""Hashes of what files hold: SHA-256 for identity, XXH3 to see whether one was damaged."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

CHECKSUM = "xxh3"
"""What the checksum of a file or of a JSON object is called where it stands in there."""


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


def checksums(folder: Path, counts: Callable[[Path], bool] = lambda file: True) -> dict[str, str]:
    """Name below the folder -> size and XXH3 of each file that counts."""
    return {
        file.relative_to(folder).as_posix(): sized_checksum(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and counts(file)
    }


def sized_checksum(file: Path) -> str:
    """Size and XXH3 of a file, with a space between."""
    return f"{file.stat().st_size} {checksum(file)}"


def first_damaged(folder: Path, written: Mapping[str, str]) -> Path | None:
    """The first file that is not as its checksum says; sizes are looked at first."""
    files = {folder / name: checksum.split(" ") for name, checksum in written.items()}
    for file, (size, _) in files.items():
        if not file.is_file() or file.stat().st_size != int(size):
            return file
    return next((file for file, (_, sum_) in files.items() if checksum(file) != sum_), None)


def checksum(file: Path, start: int = 0, before: bytes = b"") -> str:
    """XXH3 of some bytes, if any, and of a file from a byte of it on."""
    digest = xxhash.xxh3_128(before)
    with file.open("rb") as content:
        content.seek(start)
        while part := content.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def known_checksum(content: Mapping[str, Any]) -> str | None:
    """What stands under `CHECKSUM`, or under the same name but for one character, which is damage.

    None where neither is there: it is of another program, or of a former version.
    """
    if CHECKSUM in content:
        return str(content[CHECKSUM])
    like = (name for name in content if len(name) == len(CHECKSUM))
    wrong = (sum(a != b for a, b in zip(name, CHECKSUM, strict=True)) for name in like)
    return f"not under {CHECKSUM}" if 1 in wrong else None
