"""Every way to start an adapter: one file a method, one line a name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any

from torch import Tensor

from forgetless.core.errors import unknown
from forgetless.core.method import Decomposition, Method
from forgetless.core.plugins import is_named, named, offered

_NAMES = (
    "lora",
    "pissa",
    "milora",
    "intermediate",
    "random_slice",
    "lora_null_v1",
    "lora_null_v2",
    "lora_null_zero",
    "activation_slice",
    "corda_kpm",
    "corda_ipm",
    "eva",
    "olora",
    "lora_ga",
    "mica",
    "sc_lora",
    "inflora",
    "full",
)


def _fault(name: str, found: Any) -> str:
    """What keeps an object from being the method of that name, or of any where it is empty."""
    if not isinstance(found, Method):
        return f"it is a {type(found).__name__}"
    return "" if name in ("", found.name) else f"the method calls itself {found.name!r}"


METHODS: Mapping[str, Method] = MappingProxyType(
    {name: import_module(f"forgetless.methods.{name}").METHOD for name in _NAMES}
    | offered("forgetless.methods", "method", _NAMES, _fault)
)
"""Name -> method, in the order in which they are shown: ours, then those of other packages."""


def find(method: str | Method) -> Method:
    """The method of that name in `METHODS`, or ``module:name``; a `Method` is returned as it is.

    Raises:
        ValueError: the name is not known.
    """
    if isinstance(method, Method):
        return method
    if is_named(method):
        found: Method = named(method, "method", partial(_fault, ""))
        return found
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return METHODS[method]


def known(method: str) -> Method | None:
    """The same; None where the name is not known."""
    try:
        return find(method)
    except ValueError:
        return None


def decompose(
    W: Tensor,
    rank: int,
    method: str | Method,
    scaling: float = 1.0,
    second_moment: Tensor | None = None,
    gradient: Tensor | None = None,
    *,
    task_moment: Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> Decomposition:
    """The start of a low-rank adapter for one weight.

    The method runs in float64 whatever the dtype of W: that costs little beside its accuracy (see
    `forgetless.core.linalg`). Nothing that is passed in is changed.

    Args:
        W: the weight, (out, in), as `torch.nn.Linear` holds it.
        rank: 1..min(out, in).
        method: a name in `METHODS`, ``module:name``, or a `Method` of one's own.
        scaling: what will multiply B A; positive.
        second_moment: mean of x xᵀ over tokens, (in, in), not centred; CorDA calls it a covariance.
            Of the text to keep; a method that looks at the new task alone takes it as task_moment.
        gradient: gradient of the task's loss with respect to W, (out, in).
        task_moment: the second moment over the new task's tokens, (in, in).
        seed: decides what a random method draws; the others ignore it.
        **options: the method's own; see ``METHODS[name].options``.

    Returns:
        A start with A and B in W's dtype; bfloat16 and float16 are raised to float32.
        What the method does not need of `second_moment`, `gradient`, `task_moment` is ignored.

    Raises:
        ValueError: an unknown method or option, a rank or scaling out of range, a need that is
            missing, or a matrix with the wrong shape, NaN or infinity.
        TypeError: W or a needed matrix is no floating-point tensor.
    """
    return find(method).decompose(
        W,
        rank,
        scaling,
        second_moment=second_moment,
        gradient=gradient,
        task_moment=task_moment,
        seed=seed,
        **options,
    )
