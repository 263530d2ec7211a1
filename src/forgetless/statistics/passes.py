"""How much memory the matrices may take at a time, and which layers then go together."""

import re
from collections.abc import Iterable, Mapping, Sequence

from forgetless.core.errors import UserError

FLOAT64 = 8
"""Bytes of a number in a sum."""

_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12} | {
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40
}  # fmt: skip


def parse_budget(budget: int | str, shapes: Mapping[str, tuple[int, int]]) -> int:
    """The budget in bytes, at least the largest of the matrices.

    `shapes` are those of each layer's float64 matrix; the budget may be text such as "2GiB".

    Raises:
        UserError: no such unit, or too little for the largest matrix.
    """
    number = parse_bytes(budget) if isinstance(budget, str) else budget
    largest = max(shapes, key=lambda name: shapes[name][0] * shapes[name][1])
    need = matrix_bytes(shapes[largest])
    if number < need:
        rows, columns = shapes[largest]
        raise UserError(
            f"memory_budget must be at least {need} bytes ({need / 2**20:.1f} MiB), for the "
            f"{rows} x {columns} matrix of layer {largest!r} with {columns} inputs, got {number} "
            "bytes"
        )
    return number


def parse_bytes(text: str, name: str = "memory_budget") -> int:
    """The bytes that a text such as "2GiB" means.

    The number alone will do; `name` is the setting's, for messages.

    Raises:
        UserError: no such unit, or no number.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", text.lower())
    if not match or (match[2] or "b") not in _UNITS:
        raise UserError(f"{name} must be bytes or text such as '2GiB' or '500MB', got {text!r}")
    return int(float(match[1]) * _UNITS[match[2] or "b"])


def matrix_bytes(shape: tuple[int, int]) -> int:
    """Bytes of a float64 matrix."""
    return FLOAT64 * shape[0] * shape[1]


def passes(
    groups: Iterable[Sequence[str]], shapes: Mapping[str, tuple[int, int]], budget: int | None
) -> list[list[str]]:
    """Layer names of each pass, in the given order; the layers of a group share one matrix.

    Groups come in the order in which the model calls them; without a budget there is one pass.
    """
    planned: list[list[str]] = []
    free = 0
    for group in groups:
        need = matrix_bytes(shapes[group[0]])
        if not planned or (budget is not None and need > free):
            planned.append([])
            free = budget or 0
        planned[-1].extend(group)
        free -= need
    return planned
