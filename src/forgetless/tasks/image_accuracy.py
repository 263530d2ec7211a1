"""Images recognised under the base's own head, or under the new one."""

from dataclasses import dataclass
from pathlib import Path

from forgetless.data.forms import Kind
from forgetless.tasks.accuracy import HeadAccuracy


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
    kinds = frozenset[Kind]({"image"})

    path: str | Path
    name: str = "image_accuracy"
    limit: int | None = None
    head: str | None = None


TASK = ImageAccuracy
