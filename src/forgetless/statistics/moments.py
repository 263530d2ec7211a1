"""Statistics: the second moments of many layers' inputs, in memory or on disk."""

from __future__ import annotations

import functools
import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from forgetless.core.errors import reading
from forgetless.core.tensors import require_intact
from forgetless.statistics.files import FileFormat

_FORMAT = FileFormat("statistics", version=1, make="'forgetless stats'")


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """The inputs of one layer.

    Attributes:
        second_moment: mean of x x^T over tokens, (in, in), float64, symmetric; not centred.
        tokens: how many tokens the mean is over.
    """

    second_moment: Tensor
    tokens: int

    def tail_energy(self, rank: int) -> float:
        """Share of the inputs' energy that lies in their `rank` weakest directions.

            (sum of the rank smallest eigenvalues of second_moment) / trace

        Returns:
            A number in 0..rank / in; 0 where the inputs do not span the space.

        Raises:
            ValueError: rank is not in 1..in.
        """
        size = self.second_moment.shape[0]
        if not 1 <= rank <= size:
            raise ValueError(f"rank must be in 1..{size} for inputs of size {size}, got {rank}")
        trace = float(self.second_moment.trace())
        tail = float(torch.linalg.eigvalsh(self.second_moment)[:rank].clamp(min=0).sum())
        return tail / trace if trace > 0 else 0.0


class Statistics(Mapping[str, LayerStatistics]):
    """Layer name -> `LayerStatistics`; layers with the same input share one matrix.

    `collect` makes one, `save` and `load` keep it, `a + b` is the statistics of both texts,
    weighted by their tokens, and `Statistics.mixture` weighs them as it is told. What was loaded,
    or collected under a memory budget, stays on disk until a layer is asked for.

    Attributes:
        metadata: `dtype` of the model that was measured, `tokens` (the largest count of any
            layer), and the versions of `torch` and `transformers`.
    """

    _matrices: Mapping[str, Tensor]
    _matrix_of: dict[str, str]
    _tokens: dict[str, int]

    def __init__(
        self, layers: Mapping[str, LayerStatistics], metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.metadata = dict(metadata or {})
        if isinstance(layers, Statistics):
            self._matrices, self._matrix_of = layers._matrices, layers._matrix_of
            self._tokens = layers._tokens
            return
        layers = dict(layers)  # which holds all matrices at once, so that no two share an identity
        names: dict[int, str] = {}
        self._matrix_of = {n: names.setdefault(id(s.second_moment), n) for n, s in layers.items()}
        self._tokens = {name: layer.tokens for name, layer in layers.items()}
        self._matrices = {name: layers[name].second_moment for name in names.values()}

    @classmethod
    def of(
        cls,
        matrices: Mapping[str, Tensor],
        matrix_of: Mapping[str, str],
        tokens: Mapping[str, int],
        metadata: Mapping[str, Any],
    ) -> Statistics:
        statistics = cls({}, metadata)
        statistics._matrices = matrices
        statistics._matrix_of = dict(matrix_of)
        statistics._tokens = dict(tokens)
        return statistics

    def __getitem__(self, layer: str) -> LayerStatistics:
        return LayerStatistics(self._matrices[self._matrix_of[layer]], self._tokens[layer])

    def shape(self, layer: str) -> tuple[int, ...]:
        """(in, in) of one layer's second moment, without reading it."""
        return shape_of(self._matrices, self._matrix_of[layer])

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrix_of)

    def __len__(self) -> int:
        return len(self._matrix_of)

    def __contains__(self, layer: object) -> bool:
        return layer in self._matrix_of

    def __repr__(self) -> str:
        tokens = max(self._tokens.values(), default=0)
        return (
            f"<Statistics of {len(self)} layers, {len(self._matrices)} matrices, {tokens} tokens>"
        )

    @property
    def shared_inputs(self) -> list[tuple[str, ...]]:
        """The layers of each matrix, for instance q_proj, k_proj and v_proj of one block."""
        groups: dict[str, list[str]] = {}
        for layer, matrix in self._matrix_of.items():
            groups.setdefault(matrix, []).append(layer)
        return [tuple(group) for group in groups.values()]

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both texts together: every token counts the same.

        Raises:
            ValueError: the two are not of the same layers, with the same sizes.
        """
        if not isinstance(other, Statistics):
            return NotImplemented
        _check_same_layers(self, other)
        made: dict[tuple[str, str], LayerStatistics] = {}
        for name in self:
            key = (self._matrix_of[name], other._matrix_of[name])
            if key not in made:
                made[key] = _merged(name, self[name], other[name])
        layers = {n: made[self._matrix_of[n], other._matrix_of[n]] for n in self}
        tokens = {name: layer.tokens for name, layer in layers.items()}
        return Statistics(layers, _merged_metadata([self, other], tokens))

    @classmethod
    def mixture(cls, parts: Sequence[tuple[Statistics, float]]) -> Statistics:
        """The statistics of several texts, of which each has its weight, however long it is.

            second_moment = sum of weight_i second_moment_i / sum of weight_i

        Args:
            parts: statistics of the same layers, each with a positive weight. They are read when
                a layer is asked for, so their files must stay until the mixture is saved.

        Returns:
            `tokens` are those of all texts together.

        Raises:
            ValueError: no parts, a weight that is not positive, or other layers or sizes.
        """
        if not parts or not all(0 < weight < math.inf for _, weight in parts):
            raise ValueError(
                "a mixture needs statistics with positive weights, got the weights "
                f"{[weight for _, weight in parts]}"
            )
        first, total = parts[0][0], sum(weight for _, weight in parts)
        for other, _ in parts[1:]:
            _check_same_layers(first, other)
        matrix_of: dict[str, str] = {}
        terms: dict[str, list[tuple[float, Mapping[str, Tensor], str]]] = {}
        names: dict[tuple[str, ...], str] = {}
        for layer in first:
            keys = tuple(part._matrix_of[layer] for part, _ in parts)
            matrix_of[layer] = names.setdefault(keys, layer)
            terms[matrix_of[layer]] = [
                (weight / total, part._matrices, key)
                for (part, weight), key in zip(parts, keys, strict=True)
            ]
        tokens = {layer: sum(part._tokens[layer] for part, _ in parts) for layer in first}
        metadata = _merged_metadata([part for part, _ in parts], tokens)
        metadata["weights"] = [weight / total for _, weight in parts]
        return cls.of(Mixed(terms), matrix_of, tokens, metadata)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: every matrix once, the rest as JSON in its header.

        Args:
            path: a file that ends in .safetensors, or a folder, which is made if need be and gets
                `statistics.safetensors`. An older file is replaced in one step.

        Returns:
            The file.
        """
        layers = {n: {"matrix": self._matrix_of[n], "tokens": self._tokens[n]} for n in self}
        content = json.dumps({"metadata": self.metadata, "layers": layers})
        return _FORMAT.write(path, self._matrices, statistics=content)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """What `save` wrote. Matrices are read when a layer is asked for.

        Raises:
            UserError: there is no such file, or it does not hold statistics.
        """
        header, _ = _FORMAT.header(path)
        file = _FORMAT.file(path)
        with reading(file, "make it again"):
            saved = json.loads(header["statistics"])
            layers = saved["layers"]
            matrix_of = {name: layer["matrix"] for name, layer in layers.items()}
            return cls.of(
                OnDisk(dict.fromkeys(matrix_of.values(), file)),
                matrix_of,
                {name: layer["tokens"] for name, layer in layers.items()},
                saved["metadata"],
            )


def is_statistics(source: str | Path) -> bool:
    """Whether there are saved statistics at a path, by its name alone."""
    path = Path(source)
    return path.suffix == ".safetensors" or _FORMAT.file(path).is_file()


class OnDisk(Mapping[str, Tensor]):
    """Matrices in safetensors files, mapped into memory one at a time when asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)

    def __getitem__(self, name: str) -> Tensor:
        with self._opened(name) as opened:
            require_intact(self._files[name])
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one, from its file's header."""
        with self._opened(name) as opened:
            return tuple(opened.get_slice(name).get_shape())

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        file = self._files[name]
        with reading(file, "make it again"), safe_open(file, framework="pt") as opened:
            yield opened

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Spilled(OnDisk):
    """Matrices moved out of memory; their files are deleted together with this object."""

    def __init__(self) -> None:
        super().__init__({})
        self._folder = Path(tempfile.mkdtemp(prefix="forgetless-statistics-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def add(self, name: str, matrix: Tensor) -> None:
        """Write one matrix."""
        file = self._folder / f"{len(self._files)}.safetensors"
        save_file({name: matrix}, file)
        self._files[name] = file


class Mixed(Mapping[str, Tensor]):
    """Weighted sums of matrices, each made when it is asked for.

    Args:
        parts: name -> the terms of its sum, each with its weight and where its matrix is found.
    """

    def __init__(self, parts: Mapping[str, Sequence[tuple[float, Mapping[str, Tensor], str]]]):
        self._parts = parts

    def __getitem__(self, name: str) -> Tensor:
        terms = (matrices[key] * weight for weight, matrices, key in self._parts[name])
        return functools.reduce(Tensor.add_, terms)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one."""
        _, matrices, key = self._parts[name][0]
        return shape_of(matrices, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def shape_of(matrices: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a matrix, which stays on disk where it is there."""
    if isinstance(matrices, OnDisk | Mixed):
        return matrices.shape(name)
    return tuple(matrices[name].shape)


def _check_same_layers(a: Statistics, b: Statistics) -> None:
    differing = sorted(set(a) ^ set(b))
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            "only statistics of the same layers can be added; in one of the two only: "
            f"{', '.join(differing[:3])}{more}"
        )
    for name in a:
        (size, _), (other, _) = a.shape(name), b.shape(name)
        if size != other:
            raise ValueError(f"layer {name!r} has {size} inputs in one and {other} in the other")


def _merged(name: str, a: LayerStatistics, b: LayerStatistics) -> LayerStatistics:
    tokens = a.tokens + b.tokens
    if tokens == 0:
        raise ValueError(f"layer {name!r} has no tokens in either of the two")
    moment = a.second_moment * (a.tokens / tokens) + b.second_moment * (b.tokens / tokens)
    return LayerStatistics(moment, tokens)


def _merged_metadata(parts: Sequence[Statistics], tokens: Mapping[str, int]) -> dict[str, Any]:
    """Values that agree are kept; those that differ are listed, so that nothing is hidden."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for part in parts for key in part.metadata):
        values = {str(p.metadata[key]): p.metadata[key] for p in parts if key in p.metadata}
        alone = next(iter(values.values()))
        merged[key] = alone if len(values) == 1 else ", ".join(sorted(values))
    return merged | {"tokens": max(tokens.values(), default=0)}
