"""Images recognised under the base's own head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetless.core.errors import unknown
from forgetless.core.metrics import mean_stderr
from forgetless.data.examples import Examples, require_kind
from forgetless.data.texts import POCKET_PICTURES, read_examples
from forgetless.tasks.base import Item, Task, TaskResult, whole_number

if TYPE_CHECKING:
    from forgetless.tasks.base import Model

__all__ = ["ImageAccuracy"]

_ROWS = 64
"""Images at once where nothing else is asked for."""


@dataclass(frozen=True)
class ImageAccuracy(Task):
    """The share of images of which the model's own head finds their class the likeliest.

    An item is an image. `extra` has the mean loss, - log p of the class, with its standard error.

    Attributes:
        path: a folder with a folder of images for each class, or images of the pocket world
            (``pocket:digits:test``). Classes go by the names that the model's config has.
        name: of the task.
        limit: the first so many images only; the classes come in turn.

    Raises:
        UserError: settings out of range, no such folder, or no images.
    """

    kind = "image_accuracy"
    summary = "images recognised under the base's own head"
    modality = "images"

    path: str | Path
    name: str = "image_accuracy"
    limit: int | None = None

    def problems(self) -> Iterable[str | None]:
        """Of path and limit, as far as that shows without reading."""
        if str(self.path).startswith("pocket:"):
            if str(self.path).removesuffix(":test") not in POCKET_PICTURES:
                yield str(unknown("pocket images", str(self.path), POCKET_PICTURES))
        elif not isinstance(self.path, str | Path) or not Path(self.path).is_dir():
            yield f"path must be a folder with a folder of images for each class, got {self.path!r}"
        yield whole_number("limit", self.limit, optional=True)

    @cached_property
    def examples(self) -> Examples:
        """What the task shows."""
        found = read_examples(self.path, self.limit)
        require_kind(found, {"image"})
        return found

    def content(self) -> Sequence[object]:
        """The images and their classes."""
        return (self.examples.fingerprint,)

    def measure(
        self, model: Model, processor: Any, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The share that `model` recognises."""
        import torch
        from torch.nn.functional import cross_entropy

        from forgetless.data.images import ImageReader, ImageRows
        from forgetless.models.load import evaluating
        from forgetless.tasks.inference import device_of, require_numbers
        from forgetless.tasks.journal import in_batches

        reader = ImageReader.of(processor, model.config)
        reader.require_known(self.examples)
        rows = ImageRows(self.examples, reader)
        names = {number: name for name, number in reader.classes.items()}
        size = batch_size or _ROWS
        parts = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        dtype = next(model.parameters()).dtype

        def answers(places: Sequence[int]) -> list[list[float]]:
            """The class that the model finds likeliest, and the loss of the right one."""
            batch = rows.join([rows[place] for place in places])
            pixels = batch["pixel_values"].to(device_of(model), dtype)
            logits = model(pixel_values=pixels).logits.float().cpu()
            require_numbers(logits)
            losses = cross_entropy(logits, batch["labels"], reduction="none")
            return torch.stack([logits.argmax(-1).float(), losses], dim=1).tolist()

        with evaluating(model):
            found = in_batches("images", [r["image"] for r in self.examples], parts, answers)
        items = [
            Item(
                id=str(number),
                prompt=place,
                expected=record["label"],
                answer=names.get(int(answer), str(int(answer))),
                score=float(int(answer) == reader.classes[record["label"]]),
            )
            for number, (place, record, (answer, _)) in enumerate(
                zip(self.examples.places, self.examples, found, strict=True)
            )
        ]
        loss = mean_stderr([loss for _, loss in found], [1.0] * len(found))
        extra = {"loss": loss.value, "loss_stderr": loss.stderr}
        return TaskResult.of_items(self, items, metric="accuracy", extra=extra)


TASK = ImageAccuracy
