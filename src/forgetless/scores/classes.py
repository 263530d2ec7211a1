"""What a classifier's items say of each class: how much is right, and what it is taken for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forgetless.scores.comparison import Change


@dataclass
class ClassChange:
    """One class under the base model and under another.

    Attributes:
        name: of the class.
        n: items of it.
        before: how many the base got right.
        after: how many the other does.
        taken_for: the other model's wrong answers with their counts, the most frequent first.
    """

    name: str
    n: int = 0
    before: int = 0
    after: int = 0
    taken_for: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def by_class(changes: Iterable[Change]) -> list[ClassChange]:
    """The classes of a task's items, those that lost most first: the confusion, row by row.

    An answer is right where it is the item's own class.
    """
    found: dict[str, ClassChange] = {}
    wrong: dict[str, Counter[str]] = {}
    for change in changes:
        row = found.setdefault(change.expected, ClassChange(change.expected))
        row.n += 1
        row.before += change.before == change.expected
        row.after += change.after == change.expected
        if change.after != change.expected:
            wrong.setdefault(change.expected, Counter())[change.after] += 1
    for name, answers in wrong.items():
        found[name].taken_for = dict(answers.most_common())
    return sorted(found.values(), key=lambda row: ((row.after - row.before) / row.n, row.name))
