"""Runs in an object store, for machines that have no disk in common.

<url>/<study>/<run id>/objects/<checksum>    what files hold
<url>/<study>/<run id>/run.json              which files the run has, and its record; written last

Objects are not changed once they are listed, so what is listed is whole, whatever is going on: an
upload that was cut short lists nothing, and an object that does not hold what its name says is not
taken. Whoever takes up a run continues with what was uploaded last.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from forgetless.core.errors import UserError
from forgetless.core.files import (
    is_as_written,
    lock,
    new_folder,
    read_json,
    with_checksum,
    write_json,
)
from forgetless.core.hashing import sized_checksum
from forgetless.studies.folder import RunFolder
from forgetless.studies.stages import Event, Listener
from forgetless.training.checkpoints import SEAL

_log = logging.getLogger(__name__)

_NOTE = ".share.json"
"""In the folder of a run: what was listed when it was last like what lies in the store."""

_LOCKS = ".lock", ".lock.holder"
_ATTEMPTS = 5


class Share:
    """The runs of a study as they lie in an object store.

    Args:
        url: of a folder there, as fsspec has it: s3://bucket/folder, gs://..., file:///mnt/...
        study: its name.

    Raises:
        UserError: there is no such kind of store, or a package for it is missing.
    """

    def __init__(self, url: str, study: str) -> None:
        from fsspec.core import url_to_fs

        try:
            self._store, root = url_to_fs(url)
        except (ImportError, ValueError) as problem:
            raise UserError(
                f"--share {url} cannot be used: {problem} (pip install s3fs for s3://, gcsfs for "
                "gs://; file:///folder needs nothing)"
            ) from None
        self._root = f"{root.rstrip('/')}/{study}"

    def record(self, run: RunFolder) -> dict[str, Any]:
        """What run.json said when the run was last uploaded; nothing where it never was."""
        found: dict[str, Any] = self._listed(run).get("record", {})
        return found

    def fetch(self, run: RunFolder) -> None:
        """Make the folder what was uploaded last, if another machine did that.

        For the holder of the run's lock. Where an object is damaged or gone the folder stays as it
        is, which the log says.
        """
        listed = self._listed(run)
        if not listed or read_json(run.path / _NOTE, damaged_as_missing=True) == listed:
            return
        try:
            with new_folder(run.path, keep=lambda name: name in _LOCKS) as new:
                for name, known in listed["files"].items():
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    self._get(run, name, known, new / name)
                write_json(new / _NOTE, listed, checked=True)
        except (OSError, _DamageError) as problem:
            _log.warning("%s in the store is not taken: %s", run.path.name, problem)

    def fetch_all(self, runs: Iterable[RunFolder]) -> None:
        """The same for several, whose locks nobody has for long."""
        for run in runs:
            with lock(run.lock):
                self.fetch(run)

    def put(self, run: RunFolder) -> None:
        """Upload what is new, and list it; for the holder of the run's lock.

        Raises:
            OSError: the store cannot be written, or a file was changed meanwhile.
        """
        before = read_json(run.path / _NOTE, damaged_as_missing=True)
        files = {file.relative_to(run.path).as_posix(): _known(file) for file in _files(run)}
        if files == before.get("files"):
            return
        there = set(before.get("files", {}).values())
        for name, known in files.items():
            if known not in there:
                self._store.makedirs(self._place(run, "objects"), exist_ok=True)
                self._store.put_file(str(run.path / name), self._object(run, known))
                if _known(run.path / name) != known:
                    raise OSError(f"{run.path / name} changed while it was uploaded")
        listed = {"files": files, "record": run.read()}
        text = json.dumps(with_checksum(listed)).encode()
        self._store.pipe_file(self._place(run, "run.json"), text)
        write_json(run.path / _NOTE, listed, checked=True)
        for known in there - set(files.values()):
            with suppress(OSError):
                self._store.rm_file(self._object(run, known))

    @contextmanager
    def during(self, run: RunFolder, listen: Listener) -> Iterator[Listener]:
        """Take up a run where it was left, upload it as it goes on, and when it ends.

        Gives what is to listen to it: after each stage and each sealed checkpoint it is uploaded.
        """
        self.fetch(run)
        if run.before is not None:
            self.fetch_all([run.before])
        sealed: list[Path] = []

        def told(event: Event) -> None:
            nonlocal sealed
            found = sorted(run.checkpoints.glob(f"*/{SEAL}"))
            if event.message or found != sealed:
                try:
                    self.put(run)
                    sealed = found
                except OSError as problem:  # the next upload has it too
                    _log.warning("%s is not uploaded for now: %s", run.path, problem)
            listen(event)

        try:
            yield told
        finally:
            for attempt in range(_ATTEMPTS):
                try:
                    self.put(run)
                    break
                except OSError:
                    if attempt == _ATTEMPTS - 1:
                        raise
                    time.sleep(2**attempt)

    def _listed(self, run: RunFolder) -> dict[str, Any]:
        """What was listed last; nothing where nothing was, or where it is not whole."""
        for _ in range(_ATTEMPTS):
            try:
                found: dict[str, Any] = json.loads(
                    self._store.cat_file(self._place(run, "run.json"))
                )
                if is_as_written(found):
                    return found
            except FileNotFoundError:
                return {}
            except ValueError:
                pass
            time.sleep(0.2)  # it is just being written, on a disk
        _log.warning("%s in the store is damaged; it is as good as none", run.path.name)
        return {}

    def _get(self, run: RunFolder, name: str, known: str, target: Path) -> None:
        """One file, from the folder as it is or from the store."""
        here = run.path / name
        if here.is_file() and _known(here) == known:
            shutil.copy2(here, target)
            return
        self._store.get_file(self._object(run, known), str(target))
        if _known(target) != known:
            raise _DamageError(f"{name} does not hold what was uploaded")

    def _object(self, run: RunFolder, known: str) -> str:
        return self._place(run, f"objects/{known.replace(' ', '-')}")

    def _place(self, run: RunFolder, name: str) -> str:
        return f"{self._root}/{run.path.name}/{name}"


class _DamageError(Exception):
    """An object is not what its name says."""


def _known(file: Path) -> str:
    """Size and checksum of a file; one that was not changed since is not read again."""
    status = file.stat()
    return _known_as(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _known_as(file: Path, size: int, modified: int) -> str:
    return sized_checksum(file)


def _files(run: RunFolder) -> Iterator[Path]:
    """The files of a run that another machine needs, but for what is half written."""
    for folder, below, names in os.walk(run.path):
        path = Path(folder)
        is_whole = path.parent != run.checkpoints or (path / SEAL).exists()
        below[:] = [name for name in below if is_whole and not name.startswith(".")]
        for name in names if is_whole else ():
            if not (name.startswith(".") or name.endswith(".partial.jsonl")):
                yield path / name
