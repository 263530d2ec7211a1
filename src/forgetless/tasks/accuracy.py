"""What a classifier finds likeliest under one of its heads: what such tasks have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from forgetless.core.metrics import mean_stderr
from forgetless.data.examples import Examples, require_kind
from forgetless.data.forms import Kind, Record
from forgetless.data.texts import read_examples
from forgetless.tasks.base import Item, Task, TaskResult, whole_number

if TYPE_CHECKING:
    from forgetless.tasks.base import Model

__all__ = ["HeadAccuracy"]

_ROWS = 64
"""Rows at once where nothing else is asked for."""

_MOST_PICTURES = 1000
"""Items of a result that keep a picture: more than a page can hold."""


class HeadAccuracy(Task):
    """The share of examples of which the model's head finds their class the likeliest.

    A model with a new head, see `forgetless.models.heads`, is asked under the head that has all of
    the classes: the base's own or the new one. Classes of both are told apart over both at once.

    An item is an example. `extra` has the mean loss, - log p of the class, with its standard error.

    Attributes:
        kinds: of the examples that are read.
        path: of the examples.
        limit: the first so many only.
        head: "own", "new" or "all" where it is not the classes that say which is asked.
    """

    kinds: ClassVar[frozenset[Kind]]
    path: str | Path
    limit: int | None
    head: str | None

    def problems(self) -> Iterable[str | None]:
        """Of limit and head."""
        yield whole_number("limit", self.limit, optional=True)
        if self.head not in (None, "own", "new", "all"):
            yield f"head must be own, new or all, got {self.head!r}"

    @cached_property
    def examples(self) -> Examples:
        """What the task shows."""
        found = read_examples(self.path, self.limit)
        require_kind(found, self.kinds)
        found.require_whole()
        return found

    def content(self) -> Sequence[object]:
        """The examples and their classes, and under which head if that is given."""
        return (self.examples.fingerprint, *([] if self.head is None else [self.head]))

    def shown(self, place: str, record: Record) -> str:
        """What an item says that the model was given."""
        return place

    def picture(self, record: Record) -> str:
        """A small copy of what the model was given, as a data URI; empty for what is a text."""
        return ""

    def measure(
        self, model: Model, processor: Any, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The share that `model` recognises."""
        import torch
        from torch.nn.functional import cross_entropy

        from forgetless.data.modality import modality_of
        from forgetless.models.load import evaluating
        from forgetless.tasks.inference import device_of, require_numbers
        from forgetless.tasks.journal import in_batches

        modality = modality_of(model)
        assert modality.labels is not None
        reader = modality.reader(processor, model.config).reading(
            modality.labels(self.examples), self.examples.source, self.head
        )
        rows = modality.rows(self.examples, reader, max_length=None)
        rows.require_fitting(model)
        names = {number: name for name, number in reader.classes.items()}
        asked_of = torch.tensor(sorted(names))
        size = batch_size or _ROWS
        parts = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        dtype = next(model.parameters()).dtype

        def answers(places: Sequence[int]) -> list[list[float]]:
            """The likeliest class, the right one and its loss."""
            batch = rows.join([rows[place] for place in places])
            labels = batch.pop("labels")
            for name, value in batch.items():
                batch[name] = value.to(
                    device_of(model), dtype if value.is_floating_point() else value.dtype
                )
            logits = model(**batch).logits.float().cpu()[:, asked_of]
            require_numbers(logits)
            losses = cross_entropy(logits, torch.searchsorted(asked_of, labels), reduction="none")
            found = asked_of[logits.argmax(-1)].float()
            return torch.stack([found, labels.float(), losses], dim=1).tolist()

        asked = [dict(record) for record in self.examples]
        with evaluating(model):
            found = in_batches(self.kind, asked, parts, answers)
        wrong = [place for place, (answer, label, _) in enumerate(found) if answer != label]
        with_picture = frozenset(wrong[:_MOST_PICTURES])
        items = [
            Item(
                id=str(number),
                prompt=self.shown(place, record),
                expected=names[int(label)],
                answer=names[int(answer)],
                score=float(answer == label),
                picture=self.picture(record) if number in with_picture else "",
            )
            for number, (place, record, (answer, label, _)) in enumerate(
                zip(self.examples.places, self.examples, found, strict=True)
            )
        ]
        loss = mean_stderr([loss for *_, loss in found], [1.0] * len(found))
        extra = {"loss": loss.value, "loss_stderr": loss.stderr}
        return TaskResult.of_items(self, items, metric="accuracy", extra=extra)
