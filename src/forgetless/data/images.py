"""Image classifiers: the modality whose data is images with a class, under the base's own head."""

from __future__ import annotations

import hashlib
import json
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from forgetless.core.errors import UserError
from forgetless.data.classes import ClassReader, own_and_new, require_reader
from forgetless.data.examples import Examples, require_kind
from forgetless.data.files import require_counts
from forgetless.data.forms import Kind, Record
from forgetless.data.modality import Batch, Modality, Sample
from forgetless.data.packing import IGNORED
from forgetless.data.pictures import converted, open_image
from forgetless.data.settings import AugmentSettings
from forgetless.data.texts import SELF, read_examples
from forgetless.models.load import load_image_processor
from forgetless.models.state import evaluating

KINDS: frozenset[Kind] = frozenset({"image"})

KEPT_BYTES = 1 << 29
"""Of pixel values that are kept in memory by a process, see `_kept_of`."""

USUAL_SIZE = 224
"""Pixels of a side where a config names none."""


@dataclass(frozen=True, kw_only=True)
class ImageReader(ClassReader):
    """The processor of an image classifier: images become pixel values, classes their numbers.

    Attributes:
        channels: of an image, 3 or 1.
    """

    load_processor = staticmethod(load_image_processor)
    channels: int = 3

    @classmethod
    def of(cls, processor: BaseImageProcessor | ImageReader, config: Any) -> ImageReader:
        """The reader of a model by its config."""
        plain = processor.processor if isinstance(processor, cls) else processor
        channels = getattr(_of_pictures(config), "num_channels", 3)
        return cls(processor=plain, channels=channels, **own_and_new(config))

    def pixels(self, image: str) -> Tensor:
        """The pixel values of an image, (channels, height, width), float32.

        Raises:
            UserError: a file that is no image or a damaged one, or more than 8 bits a colour.
        """
        plain = converted(image, "RGB" if self.channels == 3 else "L")
        values: Tensor = self.processor(images=[plain], return_tensors="pt")["pixel_values"][0]
        return values

    @property
    def pixels_fingerprint(self) -> str:
        """SHA-256 of all that decides pixel values."""
        return _sha256([self.processor.to_dict(), self.channels])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides pixel values and class numbers."""
        return _sha256([self.processor.to_dict(), self.classes, self.channels])


def _of_pictures(config: Any) -> Any:
    """The part of a config that says which images are read; CLIP and its kin have one for texts."""
    return getattr(config, "vision_config", config)


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


_KEPT: OrderedDict[str, dict[int, Tensor]] = OrderedDict()


def _kept_of(content: str) -> dict[int, Tensor]:
    """The pixel values of a data set by their places, as far as this process has kept them.

    The runs of a study read the same images again and again, and so do the epochs of one.
    """
    kept = _KEPT.setdefault(content, {})
    _KEPT.move_to_end(content)
    return kept


def _keep(kept: dict[int, Tensor], index: int, pixels: Tensor) -> None:
    """Keep one more of the last set asked for; the others go, the longest unused one first."""
    while sum(_bytes(some) for some in _KEPT.values()) + pixels.nbytes > KEPT_BYTES:
        if len(_KEPT) == 1:
            return
        _KEPT.popitem(last=False)
    kept[index] = pixels


def _bytes(kept: dict[int, Tensor]) -> int:
    """Of the pixel values of one data set, of which all have one size."""
    return len(kept) * next(iter(kept.values())).nbytes if kept else 0


class ImageRows(torch.utils.data.Dataset[Sample]):
    """Images with the numbers of their classes, decoded when they are first asked for.

    Args:
        examples: of kind ``image``.
        reader: of the base.
        augment: how they are varied; None for not at all.
        seed: of the variations.
    """

    several = False

    def __init__(
        self,
        examples: Examples,
        reader: ImageReader,
        augment: AugmentSettings | None = None,
        seed: int = 0,
    ) -> None:
        self.augment, self.seed, self._epoch = augment, seed, 0
        self.records: Sequence[Record] = examples.records
        self.reader = reader
        self._content = examples.fingerprint
        self._pixels = f"{self._content} {reader.pixels_fingerprint}"

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int) -> None:
        """Vary the images as in this epoch."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> Sample:
        record, kept = self.records[index], _kept_of(self._pixels)
        pixels = kept.get(index)
        if pixels is None:
            pixels = self.reader.pixels(record["image"])
            _keep(kept, index, pixels)
        if self.augment is not None:
            draw = random.Random(f"{self.seed} {self._epoch} {index}")
            pixels = _varied(pixels, self.augment, draw)
        number = self.reader.number(record["label"])
        label = torch.tensor(IGNORED if number is None else number)
        return {"pixel_values": pixels, "labels": label, "lengths": [1]}

    @property
    def tokens(self) -> int:
        """An image counts as one."""
        return len(self)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the images, their classes and how both are read."""
        content = f"{self._content} {self.reader.fingerprint}"
        if self.augment is not None:
            content += f" {self.augment.model_dump()} {self.seed}"
        return hashlib.sha256(content.encode()).hexdigest()

    def join(self, rows: Sequence[Sample]) -> Batch:
        """`pixel_values` (rows, channels, height, width) and `labels` (rows,)."""
        return {
            name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels")
        }

    def require_fitting(self, model: Any) -> None:
        """Run the model, or its shapes alone, on one image.

        Raises:
            UserError: it takes images of another size or other channels.
        """
        pixels, weight = self[0]["pixel_values"][None], next(model.parameters())
        try:
            with evaluating(model):
                model(pixel_values=pixels.to(weight.device, weight.dtype))
        except (ValueError, RuntimeError) as problem:
            raise UserError(
                f"the model cannot read what its image processor makes, {tuple(pixels.shape[1:])} "
                f"for one image: {problem}"
            ) from None


def _varied(pixels: Tensor, how: AugmentSettings, draw: random.Random) -> Tensor:
    """Pixel values (channels, height, width) mirrored or moved at random."""
    if how.flip and draw.random() < 0.5:
        pixels = pixels.flip(-1)
    height, width = pixels.shape[-2:]
    top, left = draw.randint(0, 2 * how.crop), draw.randint(0, 2 * how.crop)
    wide = torch.nn.functional.pad(pixels, (how.crop,) * 4)  # 0 is the processor's mean
    return wide[:, top : top + height, left : left + width]


def _check(examples: Examples, reader: ImageReader) -> None:
    """Raise which classes are unknown, and which files are no images."""
    examples.require_whole()
    reader = _reading(examples, reader)
    if reader.processor.to_dict().get("do_resize", True):
        return
    sizes: set[tuple[int, int]] = set()
    for record in examples:
        with open_image(record["image"]) as image:
            sizes.add(image.size)
    if len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sorted(sizes)[:4])
        raise UserError(
            f"{examples.source} has images of {len(sizes)} sizes ({shown}), and the base's image "
            "processor does not resize them; make them one size"
        )


def _labels(examples: Examples) -> list[str]:
    require_kind(examples, KINDS)
    return [record["label"] for record in examples]


def _reading(examples: Examples, reader: ImageReader) -> ImageReader:
    """The reader for examples of which the head has every class, see `ClassReader`."""
    labels = _labels(examples)
    found = reader.reading(labels, examples.source)
    found.require_known(labels, examples.source)
    return found


def _rows(
    examples: Examples,
    reader: ImageReader,
    *,
    max_length: int | None = None,
    pack: bool | Literal["auto"] = "auto",
    augment: AugmentSettings | None = None,
    seed: int = 0,
) -> ImageRows:
    """Images have no length to be cut at."""
    require_reader(reader, ImageReader, "an image processor", pack)
    reader = _reading(examples, reader)
    return ImageRows(examples, reader, augment, seed)


def _batches(
    source: str,
    model: PreTrainedModel,
    reader: ImageReader,
    *,
    samples: int = 256,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Batch]:
    """Images to keep, of which the classes may be any; `labels` are IGNORED where unknown.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: "self", no images, or a count below 1.
    """
    require_counts(samples=samples, batch_size=batch_size)
    if source == SELF:
        raise UserError("an image classifier says nothing by itself; give a folder of images")
    examples = read_examples(source)
    require_kind(examples, KINDS)
    rows = ImageRows(examples, ImageReader.of(reader, model.config).keeping(_labels(examples)))
    drawn = random.Random(seed).sample(range(len(rows)), min(samples, len(rows)))
    parts = [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
    return [rows.join([rows[index] for index in part]) for part in parts]


def _probe(model: PreTrainedModel) -> Batch:
    """Random pixels, (4, channels, height, width), always the same for a size."""
    config, weight = _of_pictures(model.config), next(model.parameters())
    size = getattr(config, "image_size", None) or USUAL_SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = 4, getattr(config, "num_channels", 3), height, width
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels.to(weight.device, weight.dtype)}


MODALITY = Modality(
    kinds=KINDS,
    processor_name="image processor",
    processor_type=ImageReader,
    load_processor=ImageReader.load,
    check=_check,
    rows=_rows,
    batches=_batches,
    own_texts=None,
    probe=_probe,
    labels=_labels,
    reader=ImageReader.of,
    loss_task="image_accuracy",
    distance_task="class_kl",
)
