"""What a classifier finds likeliest under its own head: the part of such tasks that is the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from forgetless.core.metrics import mean_stderr
from forgetless.data.examples import Examples, require_kind
from forgetless.data.forms import Kind, Record
from forgetless.data.texts import read_examples
from forgetless.tasks.base import Item, Task, TaskResult

if TYPE_CHECKING:
    from forgetless.tasks.base import Model

__all__ = ["HeadAccuracy"]

_ROWS = 64
"""Rows at once where nothing else is asked for."""

_MOST_PICTURES = 1000
"""Items of a result that keep a picture: more than a page can hold."""


class HeadAccuracy(Task):
    """The share of examples of which the model's own head finds their class the likeliest.

    An item is an example. `extra` has the mean loss, - log p of the class, with its standard error.

    Attributes:
        kinds: of the examples that are read.
        path: of the examples.
        limit: the first so many only.
    """

    kinds: ClassVar[frozenset[Kind]]
    path: str | Path
    limit: int | None

    @cached_property
    def examples(self) -> Examples:
        """What the task shows."""
        found = read_examples(self.path, self.limit)
        require_kind(found, self.kinds)
        return found

    def content(self) -> Sequence[object]:
        """The examples and their classes."""
        return (self.examples.fingerprint,)

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
        reader: Any = modality.processor_type.of(processor, model.config)  # type: ignore[attr-defined]
        rows = modality.rows(self.examples, reader, max_length=None)
        rows.require_fitting(model)
        names = {number: name for name, number in reader.classes.items()}
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
            logits = model(**batch).logits.float().cpu()
            require_numbers(logits)
            losses = cross_entropy(logits, labels, reduction="none")
            return torch.stack([logits.argmax(-1).float(), labels.float(), losses], dim=1).tolist()

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
                answer=names.get(int(answer), str(int(answer))),
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
