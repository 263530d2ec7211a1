"""Every way to start an adapter: one file a method, one line a name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from forgetless.core import Method

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
    "full",
)

METHODS: Mapping[str, Method] = MappingProxyType(
    {name: import_module(f"forgetless.methods.{name}").METHOD for name in _NAMES}
)
"""Name -> method, in the order in which they are shown."""
