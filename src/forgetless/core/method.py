"""What a method is, and how it becomes the start of one adapted layer.

A method chooses two small matrices, A (rank, in) and B (out, rank), for one weight W (out, in).
`decompose` checks what it is given, calls the method in float64, and returns the start.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from forgetless.core.cache import once, uncached
from forgetless.core.errors import unknown
from forgetless.core.linalg import is_finite

NEEDS: Mapping[str, str] = {
    "second_moment": "mean of x xᵀ over the tokens of the calibration text, (in, in)",
    "task_moment": "the same over the tokens of the new task, (in, in)",
    "gradient": "gradient of the new task's loss with respect to W, (out, in)",
}
"""Everything that a method may ask for besides W, and what it is."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The two matrices that a method chooses.

    Attributes:
        A: down-projection, (rank, in).
        B: up-projection, (out, rank).
    """

    A: Tensor
    B: Tensor

    @classmethod
    def balanced(cls, U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> Factors:
        """B = U √(S / scaling) and A = √(S / scaling) Vh, so that scaling · B A = U diag(S) Vh."""
        root = (S / scaling).sqrt()
        return cls(A=root[:, None] * Vh, B=U * root)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The start of one layer: W = residual + start, and which of A and B training moves.

    Attributes:
        W: the weight, (out, in), float32 or float64.
        A: down-projection at step 0, (rank, in), of W's dtype.
        B: up-projection at step 0, (out, rank), of W's dtype.
        scaling: what multiplies B A; alpha / rank, or alpha / √rank in rsLoRA.
        trains: the names of the matrices that training moves, of "A" and "B".
    """

    W: Tensor
    A: Tensor
    B: Tensor
    scaling: float
    trains: tuple[str, ...]

    @property
    def start(self) -> Tensor:
        """The product scaling · B A, (out, in)."""
        return self.scaling * (self.B @ self.A)

    @property
    def residual(self) -> Tensor:
        """W - start, (out, in): what the papers store in place of W."""
        return self.W - self.start

    @property
    def starts_at_zero(self) -> bool:
        """Whether A or B is all zero, so that the start adds nothing to the base."""
        return not (bool(self.A.any()) and bool(self.B.any()))


@dataclass(frozen=True)
class Method:
    """One way to start an adapter.

    Attributes:
        name: its name in `METHODS`.
        summary: what it does, in one line.
        paper: authors, title and arXiv id, or "—".
        trains: the matrices that training moves: "A" and "B", one of them, or "W".
        factors: ``(W, rank, scaling, *, needs…, generator, options…) -> Factors``; None when there
            is no adapter. W comes in float64, but see `copies_weight`. A keyword of `NEEDS` is a
            need, ``generator`` is a seeded `torch.Generator`, and every other keyword with a
            default is an option. Needs come in float32 or float64, as they were given. A method
            that is random with some of its options only gives ``generator`` the default None; it is
            passed all the same.
        share_ranks: ``(eigenvalues, ranks, rho) -> ranks`` of a method whose option ``rho`` moves
            ranks between layers, by the eigenvalues of its task moments; see
            `forgetless.methods.eva.redistribute_ranks`.
        reads_weight: whether `factors` looks at the entries of W. Where it does not, it is given
            zeros of W's shape that take no memory, in place of a float64 copy of every weight.
        copies_weight: whether `factors` is given that copy. One that only multiplies W, by
            `forgetless.core.linalg.projected_svd`, or seldom looks at it, takes it as it is, in
            float32 or float64.
    """

    name: str
    summary: str
    paper: str
    trains: tuple[str, ...]
    factors: Callable[..., Factors] | None
    share_ranks: Callable[..., dict[str, int]] | None = None
    reads_weight: bool = True
    copies_weight: bool = True

    @cached_property
    def _keywords(self) -> dict[str, Any]:
        """The keyword-only parameters of `factors` and their defaults."""
        if self.factors is None:
            return {}
        parameters = inspect.signature(self.factors).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def needs(self) -> frozenset[str]:
        """The names in `NEEDS` that it asks for."""
        return frozenset(self._keywords) & frozenset(NEEDS)

    @property
    def options(self) -> dict[str, Any]:
        """The name and the default of every option."""
        return {
            name: default
            for name, default in self._keywords.items()
            if default is not inspect.Parameter.empty and name != "generator"
        }

    @property
    def draws(self) -> bool:
        """Whether it is random whatever its options, so that the seed decides the start."""
        return self._keywords.get("generator", None) is inspect.Parameter.empty

    def check(
        self,
        rank: int,
        shape: tuple[int, ...],
        options: Mapping[str, Any],
        layer: str | None = None,
    ) -> None:
        """Raise the error that `decompose` would, from the shape of W alone.

        The values of options are tried on a 2 x 2 weight; `layer` is for the message.

        Raises:
            ValueError: rank outside 1..min(out, in), an unknown option, or a bad value of one.
        """
        for name in options:
            if name not in self.options:
                raise unknown(f"option of method {self.name!r}", name, self.options)
        if self.factors is None:
            return
        if not isinstance(rank, int) or not 1 <= rank <= min(shape):
            where = f"a {shape} weight" if layer is None else f"layer {layer!r} {shape}"
            raise ValueError(f"rank must be in 1..{min(shape)} for {where}, got {rank!r}")
        if options:
            eye = torch.eye(2, dtype=torch.float64, device="cpu")
            with uncached():
                self._call(eye, 1, 1.0, dict.fromkeys(self.needs, eye), 0, options)

    def decompose(
        self,
        W: Tensor,
        rank: int,
        scaling: float = 1.0,
        *,
        second_moment: Tensor | None = None,
        gradient: Tensor | None = None,
        task_moment: Tensor | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Decomposition:
        """The start of a low-rank adapter for one weight; see `forgetless.decompose`."""
        if self.factors is None:
            raise ValueError(
                f"method {self.name!r} trains the weights themselves and has no A and B; "
                "train the model without an adapter"
            )
        if not (math.isfinite(scaling) and scaling > 0):
            raise ValueError(f"scaling must be a positive number, got {scaling!r}")
        _check_matrix("W", W)
        _check_finite("W", W)
        out_features, in_features = W.shape
        self.check(rank, (out_features, in_features), options)
        if task_moment is None and "second_moment" not in self.needs:
            task_moment = second_moment  # of one weight there is no other text that it could be of
        given = {"second_moment": second_moment, "task_moment": task_moment, "gradient": gradient}
        inputs = {}
        for name in sorted(self.needs):
            value = given[name]
            if value is None:
                raise ValueError(
                    f"method {self.name!r} needs {name}, the {NEEDS[name]}; collect it with "
                    f"forgetless.collect or 'forgetless stats' and pass {name}="
                )
            _check_matrix(name, value, tuple(W.shape) if name == "gradient" else (in_features,) * 2)
            inputs[name] = _as_input(name, value, W.device)
        W = _at_least_float32(W)
        if not self.reads_weight:
            read = W.new_zeros((), dtype=torch.float64).expand_as(W)
        else:
            read = W.double() if self.copies_weight else W
        factors = self._call(read, rank, scaling, inputs, seed, options)
        return Decomposition(
            W=W,
            A=factors.A.to(W).contiguous(),
            B=factors.B.to(W).contiguous(),
            scaling=float(scaling),
            trains=self.trains,
        )

    def _call(
        self,
        W: Tensor,
        rank: int,
        scaling: float,
        inputs: Mapping[str, Tensor],
        seed: int,
        options: Mapping[str, Any],
    ) -> Factors:
        """The factors for checked arguments."""
        assert self.factors is not None
        keywords = {**inputs, **options}
        if "generator" in self._keywords:
            keywords["generator"] = torch.Generator("cpu").manual_seed(seed)
        return self.factors(W, rank, scaling, **keywords)


def check_number(name: str, value: object, low: float, high: float = math.inf) -> float:
    """`value` as a float, if it is a number in low..high.

    Raises:
        ValueError: it is not; the message names the option.
    """
    if isinstance(value, (int, float)) and low <= value <= high:
        return float(value)
    allowed = f"in {low:g}..{high:g}" if math.isfinite(high) else f"of at least {low:g}"
    raise ValueError(f"{name} must be a number {allowed}, got {value!r}")


def _at_least_float32(M: Tensor) -> Tensor:
    """M without its graph, in float64 if it was, otherwise in float32."""
    M = M.detach() if M.requires_grad else M  # detach makes a new tensor, `once` needs the same
    return M.to(torch.float64 if M.dtype == torch.float64 else torch.float32)


def _as_input(name: str, M: Tensor, device: torch.device) -> Tensor:
    """What a method needs, where W is; the very same tensor for each layer that shares it."""

    def checked() -> Tensor:
        _check_finite(name, M)
        return _at_least_float32(M).to(device)

    return once(M, ("input", device), checked)


def _check_matrix(name: str, value: object, shape: tuple[int, ...] | None = None) -> None:
    """Raise unless `value` is a floating-point matrix of that shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point matrix, got {value.dtype}")
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(value.shape)}")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def _check_finite(name: str, M: Tensor) -> None:
    """Raise where an entry of `M` is NaN or infinite."""
    if not is_finite(M):
        raise ValueError(f"{name} holds NaN or infinity; check the weights and the data behind it")
