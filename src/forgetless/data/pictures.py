"""Images of files and of the pocket world: opened, checked, and made small for a page. No torch."""

import base64
import io
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from forgetless.core.errors import UserError
from forgetless.data.files import POCKET
from forgetless.data.image_rows import content_of
from forgetless.data.pocket.images import pictures

THUMBNAIL_SIDE = 96
"""Pixels of the longer side of a thumbnail."""

SMALL_SIDE = 32
"""Pixels of a side up to which a thumbnail has every pixel as it is."""

MAX_PIXELS = 89_478_485
"""Of an image: what PIL takes without a warning."""

_TOO_MANY = f"has more than {MAX_PIXELS:,} pixels by its header; make it smaller"
_CONVERT = "convert it to one of 8 bits a colour"

_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
"""What the last bytes of a file hold where nothing is missing."""


def open_image(image: str) -> Image.Image:
    """An image whose header was read; of one of the pocket world or of an array, all of it.

    Raises:
        UserError: no image, an animated one, more than 8 bits a colour, or too many pixels.
    """
    if image.startswith(POCKET):
        label, split, number = image.removeprefix(POCKET).rsplit("/", 2)
        return Image.fromarray(_drawn(label, split, int(number)))
    content = content_of(image)
    if content is not None and not isinstance(content, bytes):
        return Image.fromarray(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # told below
            found = Image.open(image if content is None else io.BytesIO(content))
    except Image.DecompressionBombError:
        raise UserError(f"{image} {_TOO_MANY}") from None
    except (OSError, ValueError, SyntaxError) as problem:
        raise UserError(f"{image} is no image that can be read ({_said(problem)})") from None
    odd = None
    if found.width * found.height > MAX_PIXELS:
        odd = _TOO_MANY
    elif found.mode.startswith(("I", "F")):
        odd = f"has more than 8 bits a colour (mode {found.mode}); {_CONVERT}"
    elif getattr(found, "is_animated", False) and found.format != "MPO":  # a camera's second view
        odd = f"has several pictures; {_CONVERT}"
    if odd is not None:
        found.close()
        raise UserError(f"{image} {odd}")
    return found


def require_whole(image: str) -> None:
    """Raise what is wrong with an image as far as its header and its end tell.

    It is decoded only where its last bytes do not tell that it is whole.

    Raises:
        UserError: as `open_image`, or a file that was cut off.
    """
    if image.startswith(POCKET):
        return
    with open_image(image) as found:
        end = _ENDS.get(found.format or "")
        file = getattr(found, "fp", None)
        if found.format is None or file is None:  # of an array
            return
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 16))
        is_whole = end is not None and end in file.read()
    if not is_whole:
        converted(image, "RGB")


def _said(problem: Exception) -> str:
    """What PIL says, without the address of an object in memory."""
    return re.sub(r"<_io\.BytesIO object at 0x\w+>", "its bytes", str(problem))


def converted(image: str, mode: str, *, near: int | None = None) -> Image.Image:
    """An image as one of a mode, decoded.

    The mode is "RGB" or "L". Where one is decoded faster, a coarser image with sides of at least
    `near` pixels is enough.

    Raises:
        UserError: as `open_image`, or a damaged image.
    """
    with open_image(image) as found:
        try:
            if near is not None:
                found.draft(mode, (near, near))
            return found.convert(mode)
        except (OSError, ValueError, SyntaxError) as problem:
            raise UserError(f"{image} is a damaged image ({_said(problem)})") from None


def cell_of(image: str) -> str:
    """What a row of JSON says for an image: the path of its file, or its content as a data URI.

    Raises:
        UserError: as `converted`.
    """
    content = content_of(image)
    if content is None and not image.startswith(POCKET):
        return str(Path(image).resolve())
    if not isinstance(content, bytes):
        written = io.BytesIO()
        with open_image(image) as found:
            found.save(written, format="png")
        content = written.getvalue()
    return f"data:;base64,{base64.b64encode(content).decode()}"


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
