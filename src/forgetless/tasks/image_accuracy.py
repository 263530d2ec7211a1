"""Images recognised under the base's own head, or under the new one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from forgetless.core.errors import unknown
from forgetless.data.forms import Kind, Record
from forgetless.data.texts import POCKET_PICTURES
from forgetless.tasks.accuracy import HeadAccuracy

__all__ = ["ImageAccuracy"]


@dataclass(frozen=True)
class ImageAccuracy(HeadAccuracy):
    """The share of images of which the model's head finds their class the likeliest.

    An item is an image; one that is not recognised comes with a thumbnail. `extra` has the mean
    loss, - log p of the class, with its standard error.

    Attributes:
        path: a folder with a folder of images for each class, another source of images (see
            docs/images.md), or images of the pocket world (``pocket:digits:test``). Classes go by
            the names that the model's config has.
        name: of the task.
        limit: the first so many images only; the classes come in turn.
        head: own, new or all, of a model with a new head; its classes decide where it is not given.

    Raises:
        UserError: settings out of range, no such folder, or no images.
    """

    kind = "image_accuracy"
    summary = "images recognised under the base's own head or the new one"
    modality = "images"
    kinds = frozenset[Kind]({"image"})

    path: str | Path
    name: str = "image_accuracy"
    limit: int | None = None
    head: str | None = None

    def problems(self) -> Iterable[str | None]:
        """Of path, limit and head, as far as that shows without reading."""
        if str(self.path).startswith("pocket:"):
            if str(self.path).removesuffix(":test") not in POCKET_PICTURES:
                yield str(unknown("pocket images", str(self.path), POCKET_PICTURES))
        elif not isinstance(self.path, str | Path) or not Path(self.path).exists():
            yield f"path must be a folder or a file of images with their classes, got {self.path!r}"
        yield from super().problems()

    def picture(self, record: Record) -> str:
        """A thumbnail of the image."""
        from forgetless.data.pictures import thumbnail  # loads PIL

        return thumbnail(record["image"])


TASK = ImageAccuracy
