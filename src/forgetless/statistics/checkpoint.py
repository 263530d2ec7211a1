"""What an interrupted collection has done, in a folder: finished matrices and unfinished sums.

Each process has a folder of its own, rank-0-of-1 and so on, with a safetensors file for every
finished matrix and one for the sums of the pass under way. progress.json says what they hold; it is
replaced last, so that it is true at any moment.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.core.errors import UserError
from forgetless.core.files import write_json
from forgetless.core.processes import Processes
from forgetless.core.tensors import read_tensors, write_tensors
from forgetless.statistics.collector import Batch, Collector
from forgetless.statistics.moments import OnDisk

SECONDS = 60.0
"""Between two times that the sums are written; more where writing takes longer than 5 %."""
_SHARE = 20


class Checkpoint:
    """Reads and writes the folder of one process.

    Attributes:
        finished: leader -> matrix, on disk.
        tokens: leader -> tokens of its matrix, for finished ones.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], processes: Processes) -> None:
        self._folder = folder / f"rank-{processes.index}-of-{processes.count}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._file = self._folder / "progress.json"
        self._record: dict[str, Any] = {"identity": self._identity, "finished": {}, "sums": None}
        if self._file.exists():
            self._record = json.loads(self._file.read_text())
        if self._record["identity"] != self._identity:
            raise UserError(
                f"{folder} holds the progress of another collection (other model, layers or "
                "options); delete it or give another folder"
            )
        self._next_file = 1 + max(map(_number, self._folder.glob("*.safetensors")), default=-1)

    @property
    def finished(self) -> OnDisk:
        files = {n: self._folder / e["file"] for n, e in self._record["finished"].items()}
        return OnDisk(files)

    @property
    def tokens(self) -> dict[str, int]:
        return {name: entry["tokens"] for name, entry in self._record["finished"].items()}

    def forget(self, names: Iterable[str]) -> None:
        """Take finished matrices back, which not every process has."""
        for name in names:
            self._record["finished"].pop(name)

    def add(self, name: str, matrix: Tensor, tokens: int) -> None:
        """Write a finished matrix."""
        self._record["finished"][name] = {"file": self._write({name: matrix}), "tokens": tokens}

    def finish_pass(self) -> None:
        """All matrices of a pass are written: say so, and drop its sums."""
        self._record["sums"] = None
        self._replace_record()

    def follow(
        self, batches: Iterable[tuple[int, Batch]], collector: Collector, names: list[str]
    ) -> Iterator[tuple[int, Batch]]:
        """The batches that are left of a pass; sums are written from time to time.

        Raises:
            UserError: the batches before are not those whose sums were written.
        """
        done, digest = self._take_over(collector, names), hashlib.sha256()
        batches = iter(batches)
        for _, batch in itertools.islice(batches, done):
            _add_to_digest(digest, batch)
        if done and digest.hexdigest() != self._record["sums"]["digest"]:
            raise UserError(
                f"{self._folder.parent} holds the progress of a collection on other batches; "
                "delete it or give another folder"
            )
        written, pause = time.monotonic(), SECONDS
        for count, (number, batch) in enumerate(batches, start=done + 1):
            _add_to_digest(digest, batch)
            yield number, batch
            now = time.monotonic()
            if now - written >= pause:
                self._write_sums(collector, names, count, digest.hexdigest())
                written = time.monotonic()
                pause = max(SECONDS, _SHARE * (written - now))

    def _take_over(self, collector: Collector, names: list[str]) -> int:
        """Give the collector the sums of an interrupted pass; how many batches they are of."""
        sums = self._record["sums"]
        if sums is None or sums["names"] != names:
            return 0
        collector.resume(read_tensors(self._folder / sums["file"]), sums["tokens"])
        done: int = sums["batches"]
        return done

    def _write_sums(self, collector: Collector, names: list[str], count: int, digest: str) -> None:
        self._record["sums"] = {
            "names": names,
            "file": self._write(collector.sums),
            "tokens": {name: collector.tokens[name] for name in collector.sums},
            "batches": count,
            "digest": digest,
        }
        self._replace_record()

    def _write(self, tensors: Mapping[str, Tensor]) -> str:
        file = self._folder / f"{self._next_file}.safetensors"
        self._next_file += 1
        write_tensors(tensors, file)
        return file.name

    def _replace_record(self) -> None:
        write_json(self._file, self._record, checked=True)
        used = {entry["file"] for entry in self._record["finished"].values()}
        used |= {self._record["sums"]["file"]} if self._record["sums"] else set()
        for file in self._folder.glob("*.safetensors"):
            if file.name not in used:
                file.unlink()


def model_identity(base: nn.Module, layers: Mapping[str, nn.Module]) -> str:
    """SHA-256 of names, shapes, formats and the first values of the model's weights."""
    digest = hashlib.sha256("\n".join(layers).encode())
    for name, weight in base.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        if not weight.is_meta:
            digest.update(_bytes_of(weight.detach().reshape(-1)[:16]))
    return digest.hexdigest()


def _add_to_digest(digest: Any, batch: Batch) -> None:
    for name, value in sorted(batch.items()):
        digest.update(f"{name} {getattr(value, 'shape', value)}".encode())
        if isinstance(value, Tensor):
            digest.update(_bytes_of(value))


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _number(file: Path) -> int:
    return int(file.stem)
