"""Nothing is decomposed twice: spectra by a weight's content, and work on a shared input.

    with cached_spectra("spectra"):          # or cached_spectra() to keep them in memory alone
        for position in (0, 0.25, 0.5, 1):   # each weight is decomposed at the first
            decompose(W, 16, "intermediate", position=position)

`attach` opens `shared_inputs` itself: q_proj, k_proj and v_proj have one input, and what a method
computes from its second moment alone is computed once for the three.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
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

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Rows:
    """All singular triples of a weight as rows, so that a slice of them lies in one piece.

    Attributes:
        left: left singular vectors, (m, out), with m = min(out, in).
        S: singular values, descending, (m,), float64.
        right: right singular vectors, (m, in).
    """

    left: Tensor
    S: Tensor
    right: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the three."""
        return sum(part.nbytes for part in (self.left, self.S, self.right))


class SpectrumCache:
    """Spectra by the content of their weights: in a folder, or else the newest in memory.

    A folder holds one safetensors file a weight, about (out + in) · min(out, in) float32 numbers,
    which is two to three times a bfloat16 weight of a language model.
    """

    def __init__(self, folder: str | Path | None = None, memory_bytes: int = 2**31) -> None:
        self.folder = None if folder is None else Path(folder)
        self.memory_bytes = memory_bytes
        self._held: OrderedDict[str, Rows] = OrderedDict()

    def rows(self, W: Tensor, make: Callable[[Tensor], Rows]) -> Rows:
        """The triples of W, (out, in) in float64, on the CPU, from the cache or from ``make(W)``.

        Where float32 holds W exactly, the vectors are rounded to it before they are kept and
        returned, so that the first call returns what every later one does.
        """
        key = content_key(W)
        found = self._find(key)
        if found is None:
            made, single = make(W), W.float()
            precision = single.dtype if torch.equal(single.to(W), W) else W.dtype
            found = Rows(
                left=made.left.to("cpu", precision).contiguous(),
                S=made.S.to("cpu"),
                right=made.right.to("cpu", precision).contiguous(),
            )
            self._keep(key, found)
        return found

    def _file(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.safetensors"

    def _find(self, key: str) -> Rows | None:
        file = self._file(key)
        if file is None:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)
        try:
            rows = Rows(**load_file(file))  # mapped: a slice takes memory for its own part alone
            require_intact(file)
            return rows
        except FileNotFoundError:
            return None
        except (UserError, SafetensorError) as damage:
            _log.warning("%s is decomposed again: %s", file, damage)
            return None

    def _keep(self, key: str, rows: Rows) -> None:
        file = self._file(key)
        if file is None:
            self._held[key] = rows
            while sum(held.nbytes for held in self._held.values()) > self.memory_bytes:
                self._held.popitem(last=False)
            return
        with new_file(file) as unfinished:
            write_tensors({"left": rows.left, "S": rows.S, "right": rows.right}, unfinished)


def content_key(M: Tensor) -> str:
    """A 128-bit hash of shape, dtype and every entry of a matrix."""
    content = M.detach().cpu().contiguous()
    digest = xxhash.xxh3_128(f"{tuple(content.shape)} {content.dtype}".encode())
    digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


_spectra: ContextVar[SpectrumCache | None] = ContextVar("spectra", default=None)


@contextmanager
def cached_spectra(
    folder: str | Path | None = None, memory_bytes: int = 2**31
) -> Iterator[SpectrumCache]:
    """Within it, a weight is decomposed once, whatever slices, ranks and methods ask for.

    The first decomposition is of the whole weight, which takes longer than one end of it would.

    Args:
        folder: where to keep the spectra, for other processes and times too; it is made if need
            be, files appear whole or not at all, and a damaged one is made again.
        memory_bytes: how much to hold without a folder; what was not asked for longest goes first.

    Yields:
        The cache.
    """
    cache = SpectrumCache(folder, memory_bytes)
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
