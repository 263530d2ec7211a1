"""Images opened and made small."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from forgetless.core.errors import UserError
from forgetless.data.pictures import open_image, thumbnail


def pixels_of(source: str) -> Image.Image:
    """The image in a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_a_small_image_keeps_its_pixels(tmp_path: Path) -> None:
    file = tmp_path / "small.png"
    noise = np.random.default_rng(0).integers(0, 255, (20, 32, 3)).astype(np.uint8)
    Image.fromarray(noise).save(file)
    assert np.array_equal(np.asarray(pixels_of(thumbnail(str(file)))), noise)
    drawn = thumbnail("pocket:digit 3/test/7")
    assert drawn.startswith("data:image/png;base64,")
    assert np.array_equal(
        np.asarray(pixels_of(drawn)), np.asarray(open_image("pocket:digit 3/test/7"))
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
def test_a_large_image_becomes_small_and_loses_what_a_camera_wrote(
    mode: str, tmp_path: Path
) -> None:
    file = tmp_path / ("large.gif" if mode == "P" else "large.jpg")
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    more: dict[str, Any] = {} if mode == "P" else {"exif": exif}
    Image.new("RGB", (1200, 400), (200, 30, 30)).convert(mode).save(file, **more)
    source = thumbnail(str(file))
    found = pixels_of(source)
    assert (found.size, found.format, found.mode) == ((96, 32), "WEBP", "RGB")
    assert len(source) < 2000
    assert b"taken at home" not in base64.b64decode(source.partition(",")[2])


def test_a_damaged_image_has_no_thumbnail(tmp_path: Path) -> None:
    file = tmp_path / "cut.jpg"
    Image.new("RGB", (300, 300), (9, 99, 9)).save(file)
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(UserError, match=r"cut.jpg is a damaged image"):
        thumbnail(str(file))
