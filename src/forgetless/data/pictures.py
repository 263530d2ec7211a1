"""Images of files and of the pocket world: opened, checked, and made small for a page. No torch."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from typing import Any

from PIL import Image

from forgetless.core.errors import UserError
from forgetless.data.files import POCKET
from forgetless.data.pocket.images import pictures

__all__ = ["converted", "open_image", "thumbnail"]

THUMBNAIL_SIDE = 96
"""Pixels of the longer side of a thumbnail."""

SMALL_SIDE = 32
"""Pixels of a side up to which a thumbnail has every pixel as it is."""


def open_image(image: str) -> Image.Image:
    """An image whose header was read; of one of the pocket world, all of it.

    Args:
        image: a file, or an image of the pocket world.

    Raises:
        UserError: a file that is no image, an animated one, or more than 8 bits a colour.
    """
    if image.startswith(POCKET):
        label, split, number = image.removeprefix(POCKET).rsplit("/", 2)
        return Image.fromarray(_drawn(label, split, int(number)))
    try:
        found = Image.open(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise UserError(f"{image} is no image that can be read ({problem})") from None
    odd = None
    if found.mode.startswith(("I", "F")):
        odd = f"more than 8 bits a colour (mode {found.mode})"
    elif getattr(found, "is_animated", False) and found.format != "MPO":  # a camera's second view
        odd = "several pictures"
    if odd is not None:
        found.close()
        raise UserError(f"{image} has {odd}; convert it to one of 8 bits a colour")
    return found


def converted(image: str, mode: str, *, near: int | None = None) -> Image.Image:
    """An image as one of a mode, decoded.

    Args:
        image: as of `open_image`.
        mode: "RGB" or "L".
        near: pixels of a side for which a coarser one is enough, where that is decoded faster.

    Raises:
        UserError: as `open_image`, or a damaged image.
    """
    with open_image(image) as found:
        try:
            if near is not None:
                found.draft(mode, (near, near))
            return found.convert(mode)
        except (OSError, ValueError, SyntaxError) as problem:
            raise UserError(f"{image} is a damaged image ({problem})") from None


def thumbnail(image: str) -> str:
    """A small copy of an image as a data URI, without its metadata.

    It is a PNG with the same pixels for an image of up to 32 a side, which a page may enlarge, and
    else a WebP of at most 96.

    Raises:
        UserError: as `converted`.
    """
    small = converted(image, "RGB", near=THUMBNAIL_SIDE)
    kind: dict[str, Any] = {"format": "png", "optimize": True}
    if max(small.size) > SMALL_SIDE:
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        kind = {"format": "webp", "quality": 50, "method": 4}
    small.info = {}
    written = io.BytesIO()
    small.save(written, **kind)
    return f"data:image/{kind['format']};base64,{base64.b64encode(written.getvalue()).decode()}"


@lru_cache(maxsize=1 << 15)
def _drawn(label: str, split: Any, number: int) -> Any:
    """One image of the pocket world: drawing it takes longer than classifying it."""
    return pictures([label], split, 1, number).pixels[0]
