"""Plain data as bytes: all that a program and the test of it may say to each other.

Numbers, texts and containers of them are JSON, with a name where JSON has no such type. The reader
builds these and nothing else: no class, function or code of the sender's comes to life on the other
side. What is none of them stays where it is, and a handle to it travels instead.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

Handle = tuple[int, bool]
"""Number of an object of the program's, and whether it counts as true."""

_LARGEST_MESSAGE = 16 << 20
_LARGEST_INT = 1 << 53
_AS_THEY_ARE = (type(None), bool, float, str)
_GROUPS: dict[str, Any] = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}
_TO: dict[type, Callable[[Any], Any]] = {
    int: hex,
    complex: lambda value: [value.real, value.imag],
    bytes: lambda value: value.hex(),
    bytearray: lambda value: value.hex(),
    Decimal: str,
    Fraction: str,
}
_FROM: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "complex": lambda parts: complex(*parts),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "Decimal": Decimal,
    "Fraction": Fraction,
}


def encode(value: Any, handle: Callable[[Any], Handle]) -> bytes:
    """A value as bytes; of a class derived from a plain one, what it has of that."""

    def form(value: Any) -> Any:
        for kind in type(value).__mro__:
            name = kind.__name__
            if kind in _AS_THEY_ARE or (kind is int and abs(value) < _LARGEST_INT):
                return value
            if kind in _TO:
                return [name, _TO[kind](value)]
            if kind is dict:
                return [name, [[form(key), form(inner)] for key, inner in value.items()]]
            if _GROUPS.get(name) is kind:
                return [name, [form(inner) for inner in value]]
        return ["handle", handle(value)]

    return json.dumps(form(value)).encode()


def decode(data: bytes, resolve: Callable[[Handle], Any]) -> Any:
    """The value in some bytes.

    Raises:
        Exception: of many kinds, where the bytes are no value.
    """

    def value(form: Any) -> Any:
        if not isinstance(form, list):
            return form
        name, content = form
        if name == "handle":
            number, truth = content
            return resolve((int(number), bool(truth)))
        if name == "dict":
            return {value(key): value(inner) for key, inner in content}
        if name in _GROUPS:
            return _GROUPS[name](map(value, content))
        return _FROM[name](content)

    return value(json.loads(data, object_pairs_hook=_refuse))


def _refuse(pairs: object) -> None:
    raise ValueError("objects of JSON mean nothing here")


def send(pipe: int, data: bytes) -> None:
    """Write a message: its length and its content."""
    left = memoryview(struct.pack("<I", len(data)) + data)
    while left:
        left = left[os.write(pipe, left) :]


def receive(pipe: int, largest: int = _LARGEST_MESSAGE) -> bytes | None:
    """The next message; None where the other side has ended.

    Raises:
        ValueError: longer than `largest`.
    """
    data, wanted = bytearray(), 4
    while len(data) < wanted:
        part = os.read(pipe, min(wanted - len(data), 1 << 20))
        if not part:
            return None
        data += part
        if wanted == len(data) == 4:
            wanted += struct.unpack("<I", data)[0]
            if wanted > largest:
                raise ValueError(f"a message of {wanted} bytes")
    return bytes(data[4:])
