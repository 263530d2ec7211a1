"""What a recipe says of the adapter and of its export."""

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from forgetless.core.settings import Count, Name, Section


class AdapterSettings(Section):
    """Which method starts on which layers; ``full`` trains the weights themselves.

    See `forgetless.attach` for every value. ``head: new`` gives a classifier a new head for the
    classes of the training data, a list of names one for these classes, some of which may be for
    later data; see `forgetless.models.heads`.
    """

    method: Name = "lora_null_v1"
    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 16.0
    target_modules: Any = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, Count] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    options: dict[str, Any] = {}
    head: Any = "own"

    @field_validator("target_modules")
    @classmethod
    def _suffixes_or_regex(cls, value: Any) -> str | list[str]:
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
            return list(value)
        raise ValueError(
            "must be 'all-linear', 'attention', 'mlp', one regular expression or a list of layer "
            "names"
        )

    @field_validator("head")
    @classmethod
    def _head(cls, value: Any) -> str | list[str]:
        if value in ("own", "new"):
            return str(value)
        names = value if isinstance(value, list) else []
        named = all(isinstance(name, str) and name for name in names)
        if named and len(names) > 1 and len(set(names)) == len(names):
            return names
        raise ValueError("must be 'own', 'new' or a list of two classes or more, each once")

    @property
    def has_new_head(self) -> bool:
        """Whether classes are learned under a head of their own."""
        return bool(self.head != "own")


IDLE_SWITCHES: Mapping[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "head": "own",
}
"""Switches that decide nothing at these values; a run without them keeps its id."""


class ExportSettings(Section):
    """The rank of the exported adapter: ``exact``, ``requested`` (recompressed) or a number."""

    rank: Any = "exact"

    @field_validator("rank")
    @classmethod
    def _rank(cls, value: Any) -> str | int:
        if value in ("exact", "requested") or (type(value) is int and value >= 1):
            return value  # type: ignore[no-any-return]
        raise ValueError("must be 'exact', 'requested' or a whole number of at least 1")


class RepairSettings(Section):
    """Repair of the trained adapter, measured beside it; see `forgetless.repair`.

    ``strength`` is a number, a list of them, each of which is measured, or ``auto``, which measures
    the usual ones on held-out parts of the texts and takes one: the cheapest within ``max_kl``
    nats per token, or the strongest that gives up at most the share ``max_drop`` of what was
    learned, or the one at the knee. ``keep`` is the text to keep, that of the calibration if it is
    left out; ``task`` the new task's, ``data`` for the training data, null for none. ``scales``
    turn the repaired update as well.
    """

    strength: Any = "auto"
    keep: Name | None = None
    task: Name | None = "data"
    scales: list[float] = [1.0]
    max_kl: Annotated[float, Field(ge=0)] | None = None
    max_drop: Annotated[float, Field(ge=0)] | None = None

    @field_validator("strength")
    @classmethod
    def _auto_or_numbers(cls, value: Any) -> str | list[float]:
        if value == "auto":
            return "auto"
        numbers = value if isinstance(value, list) else [value]
        plain = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
        if numbers and plain and all(0 <= n < float("inf") for n in numbers):
            return [float(number) for number in numbers]
        raise ValueError("must be 'auto', a number from 0, or a list of them")


class DialSettings(Section):
    """Scales at which the trained update is measured as well; see `forgetless.dial`."""

    scales: Annotated[list[float], Field(min_length=1)] = [0.25, 0.5, 0.75]


# ---- comparators ---------------------------------------------------------------------------------

Share = Annotated[float, Field(gt=0, le=1)]


class _Comparator(Section):
    """A way to treat the trained update; see `forgetless.core.comparators`."""

    kind: str

    def _settings(self) -> dict[str, str]:
        """Of folders the last two parts, for those of runs are all called alike."""
        return {
            name.replace("_", " "): "+".join("/".join(Path(part).parts[-2:]) for part in value)
            if isinstance(value, list)
            else str(value)
            for name, value in self.model_dump(exclude={"kind"}).items()
        }

    @property
    def words(self) -> str:
        """Kind and settings, as the page has them."""
        settings = (f"{name} {value}" for name, value in self._settings().items())
        return ", ".join([self.kind.replace("_", " "), *settings])

    @property
    def label(self) -> str:
        """The kind and, after a hyphen, the values: a name for folders and rows."""
        name = "-".join([self.kind, *self._settings().values()])
        name = re.sub(r"[^\w.+-]", "-", name)
        return name if len(name) <= 100 else f"{name[:90]}-{sha256(name.encode()).hexdigest()[:9]}"


class HardProjection(_Comparator):
    kind: Literal["hard_projection"]
    energy: Share = 0.99


class OPLoRA(_Comparator):
    kind: Literal["oplora"]
    directions: Count = 16


class Dare(_Comparator):
    kind: Literal["dare"]
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.5
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Intruders(_Comparator):
    kind: Literal["intruders"]
    keep: Annotated[float, Field(ge=0, le=1)] = 0.25
    top_k: Count = 10
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5


class Ties(_Comparator):
    """With further adapters of the same base, which are folders."""

    kind: Literal["ties"]
    adapters: Annotated[list[Name], Field(min_length=1)]
    keep: Share = 0.2


Comparator = Annotated[
    HardProjection | OPLoRA | Dare | Intruders | Ties, Field(discriminator="kind")
]
