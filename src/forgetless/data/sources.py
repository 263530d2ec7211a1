"""What a source of rows is called: where they are, and which of them are read by which names.

====================================  ==========================================================
``train.jsonl``                       a file, a folder, ``hub:ID:CONFIG:SPLIT`` or ``pocket:...``
``digits.npz#3,4``                    its rows of some classes
``train.csv#prompt=q,completion=a``   two of its columns, by names that are known here
``train.jsonl#held=0.1``              a tenth of its rows, chosen by their content
``train.jsonl#rest=0.1``              the others
====================================  ==========================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from forgetless.core.errors import UserError, first_few
from forgetless.data.files import HUB, POCKET, raw_rows, require_counts
from forgetless.data.forms import form_of
from forgetless.data.image_rows import hash_of

_HELD, _REST = "held", "rest"


@dataclass(frozen=True)
class Source:
    """What the name of a source says.

    Attributes:
        name: of the file, the folder or the data set.
        classes: those that are read; all where there are none.
        columns: what a row calls a column here -> what it is called there.
        share: of its rows that is held out; None where it has no two parts.
        held: whether these are read, and not the others.
    """

    name: str
    classes: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    share: float | None = None
    held: bool = False

    @classmethod
    def of(cls, text: str | Path) -> Source:
        """What is written; see above.

        Raises:
            UserError: a share that is none.
        """
        text = str(text)
        name, mark, parts = text.rpartition("#")
        if not mark or not parts or Path(text).exists():
            return cls(text)
        found = cls(name)
        for part in parts.split(","):
            key, equals, value = (word.strip() for word in part.partition("="))
            if not equals:
                found = replace(found, classes=(*found.classes, key))
            elif key in (_HELD, _REST):
                found = replace(found, share=_share(value, text), held=key == _HELD)
            else:
                found = replace(found, columns={**found.columns, key: unquote(value)})
        return found

    def __str__(self) -> str:
        parts = [*self.classes]
        parts += [f"{ours}={quote(theirs, safe=' ')}" for ours, theirs in self.columns.items()]
        if self.share is not None:
            parts.append(f"{_HELD if self.held else _REST}={self.share}")
        return f"{self.name}#{','.join(parts)}" if parts else self.name

    @property
    def is_here(self) -> bool:
        """Whether its file or folder is there; of what is no file that is not asked."""
        return self.name.startswith((HUB, POCKET)) or Path(self.name).exists()


def _share(value: str, text: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(f"{text}: the share that is held out must be between 0 and 1, got {value}")
    return share


def read_rows(path: str | Path, *, limit: int | None = None) -> Iterator[tuple[str, Any]]:
    """The raw rows of a source, one after the other, each with its place such as ``"line 7"``."""
    require_counts(limit=limit)
    source = Source.of(path)
    if not source.classes and source.share is None:
        return raw_rows(source.name, columns=source.columns, limit=limit)
    rows = raw_rows(source.name, columns=source.columns)
    if source.classes:
        rows = _of_classes(rows, source)
    if source.share is not None:
        rows = _of_part(rows, source, source.share)
    return islice(rows, limit)


def _of_classes(rows: Iterable[tuple[str, Any]], source: Source) -> Iterator[tuple[str, Any]]:
    """The rows of some classes, in the order of the source."""
    rows = list(rows)
    labels = [str(row.get("label")) if isinstance(row, Mapping) else "" for _, row in rows]
    if unknown := [name for name in source.classes if name not in labels]:
        known = first_few(sorted({label for label in labels if label != "None"}))
        raise UserError(
            f"{source.name} has no class {unknown[0]!r}; its classes are {known or 'none'}"
        )
    pairs = zip(rows, labels, strict=True)
    return (row for row, label in pairs if label in source.classes)


def _of_part(
    rows: Iterable[tuple[str, Any]], source: Source, share: float
) -> Iterator[tuple[str, Any]]:
    """The rows that are held out, or the others.

    A row's content alone decides, so that it stays on its side whatever stands around it, and what
    comes twice is on one side.
    """
    read = passed = 0
    for place, row in rows:
        if (_place_of(row) < share) == source.held:
            read += 1
            yield place, row
        else:
            passed += 1
    if not read:
        raise UserError(
            f"{source.name}: of its {passed} rows, none is in the part "
            f"{_HELD if source.held else _REST}={share}; give another share, or more rows"
        )


def _place_of(row: Any) -> float:
    """A number in 0..1 that the content of a row decides: what is shown and learned, no id."""
    # A task may ask rows of another form, and what is wrong with a row is told where it is read.
    with suppress(UserError, TypeError):
        row = form_of(row, "").convert(row, "")
    if isinstance(row, Mapping) and isinstance(row.get("image"), str):
        row = {**row, "image": hash_of(row["image"])}
    digest = hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
