"""Files that are whole or absent, locks that end with their process, and YAML.

A file or a folder is written under a temporary name, flushed to the disk and renamed, so whatever
bears its final name is complete. A file is replaced in one step everywhere. A folder is exchanged
for the new one in one step on Linux and macOS: its name stands for a whole folder at every moment.
Elsewhere, and on file systems that cannot exchange two names (some network ones), two renames
follow each other, and a reader who comes between them finds nothing. Of several writers at once
the last one wins, whole. A reader who opens several files of a folder one by one while it is
replaced may get some of each.
"""

import ctypes
import errno
import glob
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import xxhash
import yaml
from filelock import FileLock, Timeout

from forgetless.core.errors import UserError
from forgetless.core.hashing import CHECKSUM, checksum, known_checksum

_log = logging.getLogger(__name__)

_TEMPORARY = ".tmp-"
_numbers = count(uuid.uuid4().int % 2**16)
"""Of temporary names, so that no two threads have the same. The first is random: a killed process
of the same id, as in a container, may have left some."""
_PATIENCE_SECONDS = 1
"""How long a lock is waited for without a word."""

# ---- writing -------------------------------------------------------------------------------------


def require_place(path: str | Path) -> None:
    """Raise ``UserError`` where nothing can be written at ``path``: before the work, not after."""
    place = Path(os.path.realpath(path)).parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{path} cannot be written: {place} is a file, not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: {place} may not be written to")


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path``; what is written to it is ``path`` when the block ends well.

    When the block raises, the old file stays as it was. A link is followed, not replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(
    path: str | Path, keep: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """A temporary folder that takes the name ``path`` when the block ends well.

    A folder that had the name is replaced. When the block raises, it stays as it was.

    Args:
        path: the folder; a link is followed, not replaced.
        keep: whether a file or folder of this name, directly in the old folder, goes into the new
            one, where the block did not write one of that name itself.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary, old = temporary_name(path), temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        while not _take_over(path, temporary, keep):
            pass
        for file in [*sorted(temporary.rglob("*")), temporary]:
            flush(file)
        _put(temporary, path, old)
        flush(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            with suppress(OSError):  # another writer was faster
                old.rename(path)
        raise
    finally:
        for left in (temporary, old):  # the first is by now the old folder, if it was exchanged
            remove(left)


def temporary_name(path: Path) -> Path:
    """A new name beside ``path`` that says which process of which machine uses it."""
    writer = f"{_machine()}{os.getpid():06x}{next(_numbers) % 2**16:04x}"
    return path.with_name(f"{_TEMPORARY}{writer}-{path.name}")


@cache
def _machine() -> str:
    """Four hex digits for where process ids are those of this process: host and container."""
    container = "/proc/self/ns/pid"
    inside = os.readlink(container) if os.path.islink(container) else ""
    return hashlib.sha256(f"{platform.node()} {inside}".encode()).hexdigest()[:4]


def _remove_abandoned(path: Path) -> None:
    """Delete what writers of ``path`` left that were killed on this machine."""
    for left in path.parent.glob(f"{_TEMPORARY}*-{glob.escape(path.name)}"):
        if _lives(left) is False:
            remove(left)


def _lives(temporary: Path) -> bool | None:
    """Whether the process that uses a temporary name lives; None for one of another machine."""
    from psutil import pid_exists  # takes 50 ms, which writing has no need of else

    writer = re.match(f"{_TEMPORARY}{_machine()}([0-9a-f]{{6}})", temporary.name)
    return pid_exists(int(writer[1], 16)) if writer else None


def flush(path: Path) -> None:
    """Ask the system to bring a file, or the names in a folder, to the disk."""
    on_windows = os.name == "nt"  # which opens no folders, and flushes what may be written only
    if path.is_symlink() or (on_windows and path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_over(old: Path, new: Path, keep: Callable[[str], bool]) -> bool:
    """Link what is kept of an old folder into the new one; False if it was replaced meanwhile.

    Who replaced it may be emptying it while it is listed here, so that no link fails and names are
    missing all the same: it must still bear its name at the end.
    """
    with ExitStack() as until_compared:
        try:
            before = until_compared.enter_context(_held_open(old))
            names = [name for name in sorted(os.listdir(old)) if keep(name)]
        except (FileNotFoundError, NotADirectoryError):
            return True
        taken = [new / name for name in names if not (new / name).exists()]
        fault = None
        try:
            for target in taken:
                _link(old / target.name, target)
        except (FileNotFoundError, shutil.Error) as problem:
            fault = problem
        same = False
        with suppress(FileNotFoundError):
            same = os.path.samestat(before, old.stat())
        if same and fault is not None:
            raise fault
        if same:
            return True
    for target in taken:
        remove(target)
    return False


@contextmanager
def _held_open(folder: Path) -> Iterator[os.stat_result]:
    """Which folder it is; none made meanwhile gets its number. Windows opens no folders."""
    if os.name == "nt":
        yield folder.stat()
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield os.fstat(descriptor)
    finally:
        os.close(descriptor)


def _link(old: Path, new: Path) -> None:
    """A second name for a file, or for all files below a folder; a copy where there can be none."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=link)
    else:
        link(str(old), str(new))


def _put(new: Path, path: Path, old: Path) -> None:
    """Rename a folder to ``path``; what had the name before is then at ``new`` or at ``old``."""
    taken = errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EACCES
    while True:
        try:
            new.rename(path)
            return
        except OSError as problem:
            if problem.errno not in taken:
                raise
        if _exchange(new, path):
            return
        remove(old)
        with suppress(FileNotFoundError):  # another writer was faster
            path.rename(old)


def _exchange(a: Path, b: Path) -> bool:
    """Let two files or folders swap their names in one step; False where that cannot be."""
    if os.name == "nt":
        return False
    library, names = ctypes.CDLL(None), (os.fsencode(a), os.fsencode(b))
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE, on macOS RENAME_SWAP
    if hasattr(library, "renameat2"):
        return bool(library.renameat2(here, names[0], here, names[1], swap) == 0)
    return hasattr(library, "renamex_np") and bool(library.renamex_np(*names, swap) == 0)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path, name: str = "") -> None:
    """Delete what killed writers left of ``name...``, or of everything in and below ``folder``.

    Also what writers of other machines left, of which nobody here knows whether they live: only
    for the holder of the lock on these files.
    """
    pattern = f"{_TEMPORARY}{'?' * 14}-{glob.escape(name)}*"
    for left in folder.glob(pattern) if name else folder.rglob(pattern):
        if not _lives(left):
            remove(left)


def folder_name(name: str) -> str:
    """The name as that of a folder: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "unnamed"


# ---- text and JSON -------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: Any, *, checked: bool = False) -> None:
    """Write JSON, whole or not at all; a number that is not finite becomes null.

    Where it is `checked`, an object gets a checksum, so that `read_json` finds damage that is JSON
    still.
    """
    content = with_checksum(_finite(content)) if checked else _finite(content)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of its entries as the last one, for `is_as_written`."""
    return {**content, CHECKSUM: json_checksum(content)}


def is_as_written(content: dict[str, Any]) -> bool:
    """Whether an object has the entries that its checksum is of; takes the checksum out."""
    known = known_checksum(content)
    content.pop(CHECKSUM, None)
    return known is None or known == json_checksum(content)


def json_checksum(content: Any) -> str:
    """XXH3 of plain values, whatever the order of their keys."""
    text = json.dumps(content, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode())


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, the whole file or nothing."""
    lines = [json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_json(path: Path, *, damaged_as_missing: bool = False) -> dict[str, Any]:
    """The object in a JSON file without its checksum; empty when there is no such file.

    A damaged file can be as good as none, which the log then says.

    Raises:
        UserError: it is damaged; the message names it and says what to do.
    """
    objects = _objects(path, lambda text: [text], damaged_as_missing)
    return objects[0] if objects else {}


def read_jsonl(
    path: Path,
    *,
    damaged_as_missing: bool = False,
    growing: bool = False,
    written: str | None = None,
) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; empty when there is no such file.

    Args:
        path: the file.
        damaged_as_missing: as for `read_json`.
        growing: whether it is appended to, so that its last line may be half of one.
        written: the `checksum` of the file, where it is known; it is then damaged if it is gone.

    Raises:
        UserError: as `read_json`.
    """

    def lines(text: str) -> list[str]:
        # Not splitlines(): an answer may hold U+2028, which JSON leaves as it is.
        found = text.split("\n")
        return [line for line in (found[:-1] if growing else found) if line]

    return _objects(path, lines, damaged_as_missing, written)


def _objects(
    path: Path,
    split: Callable[[str], list[str]],
    damaged_as_missing: bool,
    written: str | None = None,
) -> list[dict[str, Any]]:
    try:
        found = [json.loads(part) for part in split(path.read_text(encoding="utf-8"))]
        if not all(isinstance(each, dict) for each in found):
            damage = f"{path} is damaged (it holds something else than objects)"
        elif written not in (None, checksum(path)) or not all(map(is_as_written, found)):
            damage = f"{path} is damaged (it does not hold what was written)"
        else:
            return found
    except FileNotFoundError:
        if written is None:
            return []
        damage = f"{path} is gone"
    except (ValueError, RecursionError) as problem:  # no JSON, no UTF-8, or nested too deeply
        damage = f"{path} is damaged ({problem})"
    if not damaged_as_missing:
        raise UserError(f"{damage}: delete it and repeat the command that wrote it")
    _log.warning("%s; it is left out", damage)
    return []


# ---- locks ---------------------------------------------------------------------------------------


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file ``path``; gives False when another process has it and ``wait`` is off.

    The lock is the operating system's, so a process that is killed lets go of it. The empty file
    stays: deleting it would let two processes hold two files of one name. Beside it lies who holds
    it, which the log says where somebody has to wait.

    Raises:
        UserError: the file is a link, or nothing can be written there.
    """
    if not path.exists():
        require_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise UserError(f"the lock {path} is a link, which may lead anywhere; delete it")
    taken, holder = FileLock(path), _holder(path)
    try:
        taken.acquire(timeout=_PATIENCE_SECONDS if wait else 0)
    except Timeout:
        if wait:
            _log.warning("waiting for %s, which %s", path, held_by(path))
            taken.acquire(poll_interval=0.5)
    if not taken.is_locked:
        yield False
        return
    try:
        own = {"process": os.getpid(), "host": platform.node(), "since": _now()}
        with suppress(OSError):  # it is for people alone, so the disk need not have it
            holder.write_text(json.dumps(own), encoding="utf-8")
        yield True
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        taken.release()


def is_locked(path: Path) -> bool:
    """Whether anybody holds the lock file ``path``."""
    with lock(path, wait=False) as free:
        return not free


def _holder(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")


def held_by(path: Path) -> str:
    """Who has the lock file ``path``: ``process 4711 on node3 holds since ...``."""
    try:
        found = read_json(_holder(path))
        return "process {process} on {host} holds since {since}".format(**found)
    except (UserError, KeyError):  # it has just taken it, or released it
        return "another process holds"


def _now() -> str:
    return datetime.now(UTC).isoformat(sep=" ", timespec="seconds")


# ---- YAML ----------------------------------------------------------------------------------------

_LARGEST_YAML = 1_000_000
"""Characters of a YAML text with its aliases written out."""


_DEEPEST_YAML = 100
"""Brackets inside each other; what PyYAML takes for them grows with their square."""


class _Loader(yaml.SafeLoader):
    """YAML in which ``1e-5`` is a number; YAML 1.1 says a string."""

    def fetch_flow_collection_start(self, kind: type[yaml.Token]) -> None:
        if self.flow_level >= _DEEPEST_YAML:
            raise RecursionError
        super().fetch_flow_collection_start(kind)


if hasattr(yaml, "CSafeLoader"):

    class _QuickLoader(yaml.CSafeLoader):
        """The same by libyaml, which takes a tenth of the time and can be absent."""
else:
    _QuickLoader = _Loader  # type: ignore[assignment, misc]

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
_QuickLoader.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


_ODD = re.compile(r"[^\n -~]|\?|[>|]#|[^\n]{1000}")
"""Where libyaml is more lenient than PyYAML, and lines that can be deep in each other."""


def _is_plain(text: str) -> bool:
    """Whether libyaml reads a text as PyYAML does: it ends the process where nesting is deep."""
    return text.count("[") + text.count("{") < _DEEPEST_YAML and not _ODD.search(text)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: plain data, every key of which is text and given once.

    Raises:
        UserError: it cannot be read, has other keys, or is too large with its aliases written out;
            the message names the line.
    """
    try:
        loader, node = _composed(text)
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        advice = "; indent with spaces" if "'\\t'" in problem else ""
        raise UserError(f"not valid YAML: {where}{problem}{advice}") from None
    except UserError:
        raise
    except ValueError as error:  # a date or a number that looks like one and is none
        raise UserError(f"not valid YAML: {error}") from None
    except RecursionError:
        raise UserError("not valid YAML: lists or keys are nested too deeply") from None


def _composed(text: str) -> tuple[Any, yaml.Node | None]:
    """The root of a text, and its loader, which builds plain data only."""
    if _is_plain(text):
        with suppress(yaml.YAMLError):  # PyYAML has the better words for it
            quick = _QuickLoader(text)
            return quick, quick.get_single_node()
    loader = _Loader(text)
    return loader, loader.get_single_node()


def _size(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Characters of a node with its aliases written out; see `parse_yaml`."""
    line = node.start_mark.line + 1
    if node not in known:
        known[node] = 0  # until its size is known, for whatever names it inside itself
        parts = [node.value] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            parts = [part for pair in node.value for part in pair]
        sizes = (len(part) if isinstance(part, str) else _size(part, known) for part in parts)
        known[node] = 1 + sum(sizes)
    elif not known[node]:
        raise UserError(f"line {line}: an alias stands inside of what it names")
    if known[node] > _LARGEST_YAML:
        raise UserError(
            f"line {line}: more than {_LARGEST_YAML:,} characters, aliases (*name) written out"
        )
    return known[node]


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"line {line}: a key must be text, got {_KINDS[type(key)]}")
        if key.tag.rpartition(":")[2] not in ("str", "merge"):
            quoted = f"; write '{key.value}' with quotes" if key.value else ""
            raise UserError(
                f"line {line}: a key must be text, got {key.value or 'nothing'}{quoted}"
            )
        if key.value in seen:
            raise UserError(f"the key {key.value!r} is given twice (again in line {line})")
        seen.add(key.value)


_KINDS = {yaml.SequenceNode: "a list", yaml.MappingNode: "keys and values"}


def not_there(path: str | Path) -> str:
    """What is said of a file that does not exist; of a relative one, where it was looked for too.

    Paths in a recipe are from the working directory, not from the recipe.
    """
    looked = "" if Path(path).is_absolute() else f" (looked in {Path(path).absolute().parent})"
    return f"no such file: {path}{looked}"


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
        raise FileNotFoundError(not_there(path))
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not a text file in UTF-8 (byte {error.start + 1} is none of it); a recipe "
            "is YAML"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if content is None:
        raise UserError(f"{path} is empty; see recipes/own-model.yaml for a recipe to start from")
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values such as 'base: pocket'")
    return content
