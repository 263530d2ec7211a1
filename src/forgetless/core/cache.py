"""Nothing is decomposed twice: spectra by a weight's content, and work on a shared input.

    with cached_spectra(whole=True):         # or cached_spectra("spectra"), for other processes too
        for position in (0, 0.25, 0.5, 1):   # each weight is decomposed at the first
            decompose(W, 16, "intermediate", position=position)

`attach` opens `shared_inputs` itself: q_proj, k_proj and v_proj have one input, and what a method
computes from its second moment alone is computed once for the three.
"""

import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from forgetless.core.errors import UserError
from forgetless.core.files import new_file
from forgetless.core.tensors import require_intact, write_tensors

T = TypeVar("T")
K = TypeVar("K")

_log = logging.getLogger(__name__)


class SpectrumCache:
    """What was asked of spectra, by the content of their weights: in a folder, or in memory.

    Attributes:
        folder: one safetensors file for every slice of a weight; None keeps in memory.
        most_bytes: beyond it, what was not asked for longest goes first.
        whole: whether all of a weight's triples are kept as soon as some are asked for,
            (out + in) · min(out, in) float64 numbers; otherwise each slice, rank · (out + in).
    """

    def __init__(
        self, folder: str | Path | None = None, most_bytes: float = math.inf, whole: bool = False
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.most_bytes = most_bytes
        self.whole = whole
        self._held: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def kept(self, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make()`` returns, on the CPU, or returned for the same key before."""
        found = self._find(key)
        if found is None:
            found = {name: tensor.cpu().contiguous() for name, tensor in make().items()}
            self._keep(key, found)
        return found

    def _find(self, key: str) -> dict[str, Tensor] | None:
        if self.folder is None:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)
        file = self.folder / f"{key}.safetensors"
        try:
            found = load_file(file)  # mapped: a slice takes memory for its own part alone
            require_intact(file)
            os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))
            return found
        except FileNotFoundError:
            return None
        except (UserError, SafetensorError) as damage:
            _log.warning("%s is decomposed again: %s", file, damage)
            return None

    def _keep(self, key: str, found: dict[str, Tensor]) -> None:
        if self.folder is None:
            self._held[key] = found
            sizes = {k: sum(t.nbytes for t in held.values()) for k, held in self._held.items()}
            for old in _beyond(sizes, self.most_bytes):
                del self._held[old]
            return
        with new_file(self.folder / f"{key}.safetensors") as unfinished:
            write_tensors(found, unfinished)
        if self.most_bytes == math.inf:
            return
        files = []
        for file in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process was quicker
                status = file.stat()
                files.append((status.st_atime_ns, file, status.st_size))
        for file in _beyond({file: size for _, file, size in sorted(files)}, self.most_bytes):
            file.unlink(missing_ok=True)


def _beyond(sizes: Mapping[K, int], most: float) -> list[K]:
    """The first of these without which the others fit."""
    excess, first = sum(sizes.values()) - most, []
    for key, size in sizes.items():
        if excess > 0:
            first.append(key)
            excess -= size
    return first


def content_key(M: Tensor) -> str:
    """A 128-bit hash of shape, dtype and every entry of a matrix."""
    content = M.detach().cpu().contiguous()
    digest = xxhash.xxh3_128(f"{tuple(content.shape)} {content.dtype}".encode())
    digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


_spectra: ContextVar[SpectrumCache | None] = ContextVar("spectra", default=None)


@contextmanager
def cached_spectra(
    folder: str | Path | None = None, most_bytes: float | None = None, *, whole: bool = False
) -> Iterator[SpectrumCache]:
    """Within it, what a slice takes of a weight is computed once; the numbers are the same.

    Args:
        folder: where to keep it, for other processes and times too; it is made if need be, files
            appear whole or not at all, and a damaged one is made again.
        most_bytes: how much to keep; what was not asked for longest goes first. Without a folder
            2 GiB by default, with one everything.
        whole: decompose a weight once for all slices, ranks and methods, and keep all of it. It
            takes longer than one end of the spectrum would, and up to four times the space of a
            float32 weight; the triples are those of the whole SVD, equal to those of a single slice
            up to rounding.

    Yields:
        The cache.
    """
    if most_bytes is None:
        most_bytes = 2**31 if folder is None else math.inf
    cache = SpectrumCache(folder, most_bytes, whole)
    token = _spectra.set(cache)
    try:
        yield cache
    finally:
        _spectra.reset(token)


@contextmanager
def uncached() -> Iterator[None]:
    """Within it nothing is looked up or kept: for matrices of no model."""
    spectra, shared = _spectra.set(None), _shared.set(None)
    try:
        yield
    finally:
        _spectra.reset(spectra)
        _shared.reset(shared)


def active_cache() -> SpectrumCache | None:
    """The cache of the innermost `cached_spectra`, if there is one."""
    return _spectra.get()


class _Shared:
    """Results by the tensor that they were computed from; of the newest tensors only."""

    def __init__(self, newest: int) -> None:
        self._newest = newest
        self._of: list[tuple[Tensor, int, dict[Hashable, Any]]] = []

    def results(self, M: Tensor) -> dict[Hashable, Any]:
        for entry in self._of:
            if entry[0] is M and entry[1] == M._version:
                return entry[2]
        results: dict[Hashable, Any] = {}
        self._of = [*self._of, (M, M._version, results)][-self._newest :]
        return results


_shared: ContextVar[_Shared | None] = ContextVar("shared", default=None)


@contextmanager
def shared_inputs() -> Iterator[None]:
    """Within it, `once` remembers what it made from the two newest tensors.

    The tensors are told apart by identity and must not be changed behind torch's back.
    """
    token = _shared.set(_Shared(newest=2))
    try:
        yield
    finally:
        _shared.reset(token)


def once(M: Tensor, what: Hashable, make: Callable[[], T]) -> T:
    """``make()``, or what it returned for the same tensor and the same ``what`` before.

    Outside of `shared_inputs` nothing is remembered.
    """
    shared = _shared.get()
    if shared is None:
        return make()
    results = shared.results(M)
    if what not in results:
        results[what] = make()
    result: T = results[what]
    return result
