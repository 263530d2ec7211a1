"""Penalties: what a training pays, at every step, for leaving what the model knew.

One file a penalty, with its formula and source, and one line in `_CLASSES`. In an adapter the
trained weights are those of A and B. Where B starts at zero (plain LoRA), the Fisher information of
A is zero at the start: there EWC holds B alone.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any

from forgetless.adapters.card import file_name
from forgetless.core.errors import UserError, unknown
from forgetless.core.hashing import content_hash
from forgetless.core.plugins import code_hash, is_named, named, offered
from forgetless.data.examples import source_hash
from forgetless.data.texts import fingerprint
from forgetless.training.penalties.penalty import Penalty

__all__ = ["PENALTIES", "Penalty", "identity_of", "make_penalty", "words_of"]

_CLASSES = {
    "l2_start": "L2Start",
    "kl": "KLToBase",
    "ewc": "EWC",
    "orthogonality": "Orthogonality",
}


def _fault(kind: str, found: Any) -> str:
    """What keeps an object from being a penalty; it may be called as its author likes."""
    if not (isinstance(found, type) and is_dataclass(found) and callable(found)):
        return f"it is no dataclass, but {found!r}"
    wanted = ("check", "prepare", "__call__")
    missing = [name for name in wanted if not hasattr(found, name)]
    missing += [] if "weight" in {field.name for field in fields(found)} else ["weight"]
    return f"it has no {missing[0]!r}" if missing else ""


PENALTIES: Mapping[str, type[Penalty]] = MappingProxyType(
    {
        kind: getattr(import_module(f"forgetless.training.penalties.{kind}"), name)
        for kind, name in _CLASSES.items()
    }
    | offered("forgetless.penalties", "penalty", _CLASSES, _fault)
)
"""Kind -> penalty, in the order in which they are shown: ours, then those of other packages."""


def make_penalty(spec: Mapping[str, Any] | Penalty) -> Penalty:
    """The penalty that a recipe names: ``{kind: kl, weight: 0.1, source: old.txt}``.

    The kind may be ``module:name``; a penalty itself is given back.

    Raises:
        UserError: an unknown kind or setting, or a weight that is not positive.
    """
    if not isinstance(spec, Mapping):
        return spec
    settings = dict(spec)
    kind = str(settings.pop("kind", None))
    made = named(kind, "penalty", partial(_fault, "")) if is_named(kind) else PENALTIES.get(kind)
    if made is None:
        raise unknown("penalty", kind, PENALTIES)
    known = [field.name for field in fields(made)]
    for name in settings:
        if name not in known:
            raise unknown(f"setting of penalty {kind!r}:", name, known)
    weight = settings.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
        raise UserError(f"penalty {kind!r} needs a positive weight, got {weight!r}")
    found: Penalty = made(**settings)
    return found


def identity_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a penalty: its settings, with the content of its files for their names."""
    files = make_penalty(spec).files

    def content(value: Any) -> Any:
        if isinstance(value, str):
            return source_hash(value, fingerprint)
        return [content_hash(folder) for folder in value]

    found = {key: content(value) if key in files else value for key, value in spec.items()}
    return found | ({"code": code_hash(spec["kind"])} if is_named(spec["kind"]) else {})


def words_of(spec: Mapping[str, Any]) -> str:
    """Kind and settings as a card names them, without the folders of this machine."""
    files = make_penalty(spec).files
    shown = []
    for key, value in spec.items():
        if key in files:
            names = [value] if isinstance(value, str) else value
            value = "+".join(file_name(str(name)) for name in names)
        shown += [] if key == "kind" else [f"{key}={value}"]
    return f"{spec['kind']} ({', '.join(shown)})"
