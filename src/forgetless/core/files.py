"""Files that are whole or absent, locks that die with their process, and YAML.

A file is written under a temporary name, flushed to the disk and renamed; a folder likewise.
Whatever bears its final name is complete.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from forgetless.core.errors import UserError

_TEMPORARY = ".tmp-"


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:12]}-{path.name}")


def _flush(path: Path) -> None:
    """Ask the system to bring a file or the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _flush(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; a number that is not finite becomes null."""
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, the whole file or nothing."""
    lines = [json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return content


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; empty when there is no such file."""
    if not path.exists():
        return []
    # Not splitlines(): an answer may hold U+2028, which JSON leaves as it is.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the name ``path`` when the block ends well.

    A folder that had the name is replaced. When the block raises, nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _flush(file)
        if path.exists():
            path.rename(_temporary(path))
        temporary.rename(path)
        _flush(path.parent)
    finally:
        for left in path.parent.glob(f"{_TEMPORARY}*-{path.name}"):
            remove(left)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path, name: str = "") -> None:
    """Delete what killed writers left of ``name...``, or of everything in and below ``folder``.

    Only for the holder of the lock on these files.
    """
    pattern = f"{_TEMPORARY}*-{name}*"
    for left in folder.glob(pattern) if name else folder.rglob(pattern):
        remove(left)


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file ``path``; gives False when another process has it and ``wait`` is off.

    The lock is the operating system's, so a process that is killed lets go of it. The empty file
    stays: deleting it would let two processes hold two files of one name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def folder_name(name: str) -> str:
    """The name as that of a folder: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "unnamed"


class _Loader(yaml.SafeLoader):
    """YAML in which ``1e-5`` is a number (YAML 1.1 says a string) and no key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise UserError(f"the key {key.value!r} is given twice (again in line {line})")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\d[\d_]*\.?[\d_]*[eE][-+]?\d+|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?"
        r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises ``UserError`` naming the line that cannot be read."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain data only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise UserError(f"not valid YAML: {where}{getattr(error, 'problem', error)}") from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is a folder, empty, not YAML, or not a mapping of keys to values.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the YAML file itself")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path} (looked in {path.absolute().parent})")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a recipe is YAML") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if content is None:
        raise UserError(f"{path} is empty; see recipes/own-model.yaml for a recipe to start from")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} must hold keys and values such as 'base: pocket'")
    return content
