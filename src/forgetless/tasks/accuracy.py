"""Tasks on examples with a class: what they have in common, and accuracy under a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from forgetless.core.errors import unknown
from forgetless.core.metrics import calibration_error, mean_stderr
from forgetless.data.examples import Examples, require_kind
from forgetless.data.forms import Kind, Record
from forgetless.data.sources import Source
from forgetless.data.texts import POCKET_PICTURES, read_examples
from forgetless.tasks.base import Item, Task, TaskResult, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    from forgetless.data.modality import Batch, Rows
    from forgetless.tasks.base import Model


_ROWS = 64
"""Rows at once where nothing else is asked for."""

_BEGINNING = 100
"""Characters of a sentence that an item shows."""

_MOST_PICTURES = 1000
"""Items of a result that keep a picture: more than a page can hold."""


class ClassTask(Task):
    """A task on images or sentences with a class. An item is one of them.

    Attributes:
        kinds: of the examples that are read.
        path: of the examples.
        limit: the first so many only.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"image", "sentence", "text"})
    path: str | Path
    limit: int | None

    @property
    def modality(self) -> str:
        """That of the examples."""
        return "images" if self.examples.kind == "image" else "sentences"

    def problems(self) -> Iterable[str | None]:
        """Of path and limit, as far as that shows without reading."""
        source = Source.of(self.path)
        path = source.name
        if path.startswith("pocket:"):
            if path.removesuffix(":test") not in POCKET_PICTURES:
                yield str(unknown("pocket images", str(self.path), POCKET_PICTURES))
        elif not isinstance(self.path, str | Path) or not source.is_here:
            what = "a folder or a file of images or sentences"
            if self.kinds == {"image"}:
                what = "a folder or a file of images"
            elif "image" not in self.kinds:
                what = "a file of sentences"
            yield f"path must be {what} with their classes, got {self.path!r}"
        yield whole_number("limit", self.limit, optional=True)

    @cached_property
    def examples(self) -> Examples:
        """What the task shows."""
        return self._read(self.path, self.limit)

    def require_known(self, reader: Any, labels: Sequence[Any]) -> None:
        """Raise what of the classes of the examples a model with this reader cannot be asked."""

    def _read(self, path: str | Path, limit: int | None) -> Examples:
        found = read_examples(path, limit)
        require_kind(found, self.kinds)
        found.require_whole()
        return found

    def content(self) -> Sequence[object]:
        """The examples and their classes, which may lie beside raw texts."""
        return (self.examples.fingerprint, *map(str, self.examples.labels))

    def shown(self, place: str, record: Record) -> str:
        """What an item says that the model was given: a place, or the beginning of a sentence."""
        if "image" in record:
            return place
        text = " ".join(str(record.get("sentence", record.get("text"))).split())
        return text if len(text) <= _BEGINNING else f"{text[: _BEGINNING - 1]}…"

    def picture(self, record: Record) -> str:
        """A thumbnail of an image, as a data URI; empty for what is a text."""
        if "image" not in record:
            return ""
        from forgetless.data.pictures import thumbnail  # loads PIL

        return thumbnail(record["image"])

    def answered(self, rights: Sequence[str], answers: Sequence[str]) -> list[Item]:
        """The items of examples with these classes, of which these were found."""
        pairs = list(zip(rights, answers, strict=True))
        wrong = [place for place, (right, answer) in enumerate(pairs) if right != answer]
        with_picture = frozenset(wrong[:_MOST_PICTURES])
        return [
            Item(
                id=str(number),
                prompt=self.shown(place, record),
                expected=right,
                answer=answer,
                score=float(answer == right),
                picture=self.picture(record) if number in with_picture else "",
            )
            for number, (place, record, (right, answer)) in enumerate(
                zip(self.examples.places, self.examples, pairs, strict=True)
            )
        ]


def batch_by_batch(
    model: Model, rows: Rows, batch_size: int | None
) -> tuple[list[range], Callable[[Sequence[int]], tuple[Batch, Tensor]]]:
    """The places of each batch, and what makes of places a batch for `model`, and its labels."""
    from forgetless.tasks.inference import device_of

    size = batch_size or _ROWS
    dtype, device = next(model.parameters()).dtype, device_of(model)

    def batch_of(places: Sequence[int]) -> tuple[Batch, Tensor]:
        batch = rows.join([rows[place] for place in places])
        labels = batch.pop("labels")
        for name, value in batch.items():
            batch[name] = value.to(device, dtype if value.is_floating_point() else value.dtype)
        return batch, labels

    return [range(s, min(s + size, len(rows))) for s in range(0, len(rows), size)], batch_of


def fitting_rows(model: Model, examples: Examples, reader: Any) -> Rows:
    """The examples as the model reads them, sentences as far as it has positions.

    Raises:
        UserError: a token, or an image, is of another model.
    """
    from forgetless.data.modality import modality_of
    from forgetless.models.text import positions_of

    rows = modality_of(model).rows(examples, reader, max_length=positions_of(model))
    rows.require_fitting(model)
    return rows


def of_any_class(model: Model, examples: Examples, reader: Any) -> Rows:
    """The same of examples of whatever classes or none."""
    count, one = len(examples), "any"
    records = [{**record, "label": one} for record in examples]
    beside = [one] * count if examples.kind == "text" else ()
    alike = replace(examples, records=records, labels=beside)
    any_reader = replace(reader, new={}).with_new([one]).under("new")
    return fitting_rows(model, alike, any_reader)


def unit_vectors(
    model: Any,
    examples: Examples,
    processor: Any,
    batch_size: int | None,
    read: Callable[[Any, Batch], Tensor],
) -> Tensor:
    """What `read` makes of the model and a batch, (examples, width), float32, of length 1."""
    import torch
    from torch.nn.functional import normalize

    from forgetless.core.progress import counted
    from forgetless.data.modality import modality_of
    from forgetless.models.state import evaluating
    from forgetless.tasks.inference import require_numbers

    rows = of_any_class(model, examples, modality_of(model).reader(processor, model.config))
    parts, batch_of = batch_by_batch(model, rows, batch_size)
    found = []
    with evaluating(model):
        for places in counted(parts, "features", "batches"):
            vectors = read(model, batch_of(places)[0]).float()
            require_numbers(vectors)
            found.append(normalize(vectors, dim=-1))
    return torch.cat(found)


class HeadAccuracy(ClassTask):
    """The share of examples of which the model's head finds their class the likeliest.

    A model with a new head, see `forgetless.models.heads`, is asked under the head that has all of
    the classes: the base's own or the new one. Classes of both are told apart over both at once.

    `extra` has the mean loss, - log p of the class, with its standard error, and the calibration
    error of the likeliest class's p, see `forgetless.core.metrics.calibration_error`. Where the
    examples have fewer classes than the head it also has `task_accuracy`, the share of which the
    class is the likeliest of those that the examples have, with its standard error: what is called
    task-incremental, where the accuracy itself is class-incremental.

    Attributes:
        head: "own", "new" or "all" where it is not the classes that say which is asked.
    """

    head: str | None

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        yield from super().problems()
        if self.head not in (None, "own", "new", "all"):
            yield f"head must be own, new or all, got {self.head!r}"

    def require_known(self, reader: Any, labels: Sequence[Any]) -> None:
        """Raise which classes the head that is asked does not have."""
        source = self.examples.source
        reader.reading(labels, source, self.head).require_known(labels, source)

    def content(self) -> Sequence[object]:
        """The examples and their classes, and under which head if that is given."""
        return (*super().content(), *([] if self.head is None else [{"head": self.head}]))

    def measure(
        self, model: Model, processor: Any, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The share that `model` recognises."""
        import torch
        from torch.nn.functional import cross_entropy

        from forgetless.data.modality import modality_of
        from forgetless.models.state import evaluating
        from forgetless.tasks.inference import require_numbers
        from forgetless.tasks.journal import in_batches

        modality = modality_of(model)
        assert modality.labels is not None
        reader = modality.reader(processor, model.config).reading(
            modality.labels(self.examples), self.examples.source, self.head
        )
        rows = fitting_rows(model, self.examples, reader)
        names = {number: name for name, number in reader.classes.items()}
        asked_of = torch.tensor(sorted(names))
        labels = [reader.number(label) for label in modality.labels(self.examples)]
        present = torch.tensor(sorted({number for number in labels if number is not None}))
        parts, batch_of = batch_by_batch(model, rows, batch_size)

        def answers(places: Sequence[int]) -> list[list[float]]:
            """The likeliest class, its p, the right one, its loss, the likeliest of the task."""
            batch, labels = batch_of(places)
            logits = model(**batch).logits.float().cpu()[:, asked_of]
            require_numbers(logits)
            losses = cross_entropy(logits, torch.searchsorted(asked_of, labels), reduction="none")
            found, p = asked_of[logits.argmax(-1)], logits.softmax(-1).amax(-1)
            of_task = present[logits[:, torch.searchsorted(asked_of, present)].argmax(-1)]
            columns = [found.float(), p, labels.float(), losses, of_task.float()]
            return torch.stack(columns, dim=1).tolist()

        asked = [dict(record) for record in self.examples]
        with evaluating(model):
            found = in_batches(self.kind, asked, parts, answers, "confidence", "of its task")
        rights = [names[int(label)] for _, _, label, *_ in found]
        items = self.answered(rights, [names[int(answer)] for answer, *_ in found])
        loss = mean_stderr([loss for *_, loss, _ in found], [1.0] * len(found))
        extra = {
            "loss": loss.value,
            "loss_stderr": loss.stderr,
            "calibration_error": calibration_error(
                [p for _, p, *_ in found], [item.score for item in items]
            ),
        }
        if len(present) < len(names):
            of_task = mean_stderr([float(best == label) for _, _, label, _, best in found])
            extra |= {"task_accuracy": of_task.value, "task_accuracy_stderr": of_task.stderr}
        return TaskResult.of_items(self, items, metric="accuracy", extra=extra)
