"""What processors of classifiers have in common: the numbers of classes, under one head or two."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from forgetless.core.errors import UserError
from forgetless.models.heads import head_classes
from forgetless.models.load import config_of

HeadName = Literal["own", "new", "all"]
HEADS: tuple[HeadName, ...] = ("own", "new", "all")
"""The base's own head, the new one beside it, and the classes of both at once."""


@dataclass(frozen=True, kw_only=True)
class ClassReader(ABC):
    """The part of a classifier's processor that turns classes into numbers.

    Attributes:
        processor: of the base, as transformers has it.
        classes: of the head under which labels are read, name -> number of the logit; none of a
            base without a head.
        new: of a new head beside the base's own, until it is decided which one is meant.
        is_new: whether `classes` are those of the new head, which go by their names alone.
    """

    load_processor: ClassVar[Callable[..., Any]]
    processor: Any
    classes: Mapping[str, int]
    new: Mapping[str, int] = field(default_factory=dict)
    is_new: bool = False

    @classmethod
    @abstractmethod
    def of(cls, processor: Any, config: Any) -> Self:
        """The reader of a model by its config."""

    @classmethod
    def load(cls, base: str, *, weights: bool = True) -> Self:
        """The reader of a base by its name."""
        processor = cls.load_processor(base, weights=weights)
        return cls.of(processor, config_of(base, weights=weights))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor beside a model, whose config has the classes."""
        self.processor.save_pretrained(folder)

    def number(self, label: str | int) -> int | None:
        """The number of a class by its name or, of the base's own head, by its number; or None."""
        if self.is_new:
            return self.classes.get(str(label))
        if isinstance(label, str) and label not in self.classes and label.strip().isdecimal():
            label = int(label)  # as a CSV file writes it
        if isinstance(label, int):
            return label if label in self.classes.values() else None
        return self.classes.get(label)

    def with_new(self, classes: Sequence[str]) -> Self:
        """The reader of the base with a new head for these classes."""
        first = len(self.classes)
        return replace(self, new={name: first + number for number, name in enumerate(classes)})

    def under(self, head: HeadName) -> Self:
        """The reader of the labels of one head, or of both.

        Raises:
            UserError: there is no new head.
        """
        if head == "new" and not self.new and not self.is_new:
            raise UserError("head 'new': this model has no new head, only the base's own")
        if not self.new:
            return self
        if head == "new":
            return replace(self, classes=self.new, new={}, is_new=True)
        more = self.new if head == "all" else {}
        return replace(self, classes={**more, **self.classes}, new={})

    def reading(self, labels: Iterable[Any], source: str, head: HeadName | None = None) -> Self:
        """The reader for some labels: under the head that has them all, or both if neither has.

        Raises:
            UserError: a class that no head has, or two heads that have them all.
        """
        if head == "own" and self.new and not self.classes:
            raise UserError(f"{source}: the base is an encoder, and has no head of its own")
        if head is not None or not self.new:
            return self.under(head or "own")
        found = {str(label): label for label in labels}.values()
        own, new = self.under("own"), self.under("new")
        missing = [[x for x in found if each.number(x) is None] for each in (own, new)]
        if neither := [label for label in missing[0] if label in missing[1]]:
            known = some(own.classes) or "none"
            raise UserError(
                f"{source}: neither head has the class {some(map(str, neither))}; the base's own "
                f"classes are {known}, the new ones {some(new.classes)}"
            )
        if not any(missing):
            raise UserError(
                f"{source}: the base's own head and the new one both have these classes; say which "
                "is meant, for a task by head: own or head: new"
            )
        return own if not missing[0] else new if not missing[1] else self.under("all")

    def keeping(self, labels: Iterable[Any]) -> Self:
        """The reader for what is to be kept: under the new head if this alone has all the labels.

        Otherwise it is under the own one, which may not have them.
        """
        found = set(map(str, labels))
        has_all = bool(found) and found <= self.new.keys() and not found <= self.classes.keys()
        return self.under("new" if has_all else "own")

    def require_known(self, labels: Iterable[Any], source: str) -> None:
        """See to it that the head has every class; a missing label is none.

        Raises:
            UserError: which it does not have.
        """
        unknown = [x for x in set(labels) if x is not None and self.number(x) is None]
        if unknown:
            count = len(self.classes)
            raise UserError(
                f"{source}: the head of this base has no class {some(sorted(unknown, key=str))}; "
                f"its {count} classes are {some(self.classes)}, or 0 to {count - 1}; adapter.head: "
                "new trains a new head for others"
            )


def own_and_new(config: Any) -> dict[str, Any]:
    """The classes of a model by its config, as `ClassReader` has them."""
    own, new = head_classes(config)
    return {
        "classes": {name: number for number, name in enumerate(own)},
        "new": {name: len(own) + number for number, name in enumerate(new)},
    }


def some(names: Iterable[str | int]) -> str:
    """The first eight, for a message."""
    first = [repr(name) for name in islice(names, 9)]
    return ", ".join(first[:8]) + (", ..." if len(first) > 8 else "")


def require_reader(reader: Any, kind: type[ClassReader], given: str, pack: object) -> None:
    """Raise that examples with a class cannot be packed, or were given ``given`` as a reader."""
    if pack is True:
        raise UserError("examples with a class cannot be packed; leave data.pack out")
    if not isinstance(reader, kind):
        raise UserError(
            f"{given} alone does not know the classes of the head; give "
            "forgetless.data.modality.load_processor(base)"
        )
