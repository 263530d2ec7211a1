"""Small pictures in four domains: handwritten digits, shapes, letters and patterns. No torch.

Forty classes, ten a domain, in colour, 16 x 16 pixels. The shipped image classifier knows the
digits and the shapes; letters and patterns are new tasks. Digits are those of the UCI data set
"Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, CC BY 4.0, as scikit-learn
ships them, in digits.npz); everything else is drawn here. A picture is decided by its class, its
split and its number, so that any part of the world can be drawn again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 16
"""Pixels of a side."""

ImageSplit = Literal["train", "test"]

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "digits": tuple(f"digit {digit}" for digit in range(10)),
    "shapes": (
        "circle",
        "ring",
        "square",
        "triangle",
        "plus",
        "star",
        "diamond",
        "heart",
        "arrow",
        "moon",
    ),
    "letters": tuple(f"letter {letter}" for letter in "AEFHKLTXYZ"),
    "patterns": (
        "horizontal stripes",
        "vertical stripes",
        "rising stripes",
        "falling stripes",
        "checkerboard",
        "dots",
        "grid",
        "rings",
        "zigzag",
        "bricks",
    ),
}
"""Domain -> its classes. The base knows the first two."""

CLASSES: tuple[str, ...] = tuple(name for names in DOMAINS.values() for name in names)

_TEST_DIGITS = 40
"""Of the scans of each digit, so many are for the test split; the others are for training."""

_SCALE = 6
"""Drawn so many times larger and averaged, for smooth edges."""

Points = Sequence[tuple[float, float]]

_STROKES: Mapping[str, Sequence[Points]] = {
    "A": [[(-0.8, 1), (0, -1), (0.8, 1)], [(-0.45, 0.25), (0.45, 0.25)]],
    "E": [[(0.7, -1), (-0.7, -1), (-0.7, 1), (0.7, 1)], [(-0.7, 0), (0.5, 0)]],
    "F": [[(0.7, -1), (-0.7, -1), (-0.7, 1)], [(-0.7, 0), (0.5, 0)]],
    "H": [[(-0.75, -1), (-0.75, 1)], [(0.75, -1), (0.75, 1)], [(-0.75, 0), (0.75, 0)]],
    "K": [[(-0.7, -1), (-0.7, 1)], [(0.75, -1), (-0.7, 0.1)], [(-0.2, -0.2), (0.75, 1)]],
    "L": [[(-0.65, -1), (-0.65, 1), (0.7, 1)]],
    "T": [[(-0.8, -1), (0.8, -1)], [(0, -1), (0, 1)]],
    "X": [[(-0.75, -1), (0.75, 1)], [(0.75, -1), (-0.75, 1)]],
    "Y": [[(-0.8, -1), (0, 0), (0.8, -1)], [(0, 0), (0, 1)]],
    "Z": [[(-0.75, -1), (0.75, -1), (-0.75, 1), (0.75, 1)]],
}
"""Letters as lines through points, x to the right and y down, in -1..1."""

_POLYGONS: Mapping[str, Points] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "plus": [
        *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
        *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    ],
    "star": [
        (radius * np.sin(np.pi * corner / 5), -radius * np.cos(np.pi * corner / 5))
        for corner, radius in enumerate([1.1, 0.45] * 5)
    ],
    "diamond": [(0, -1.1), (0.7, 0), (0, 1.1), (-0.7, 0)],
    "arrow": [*[(0, -1), (0.95, 0), (0.35, 0), (0.35, 1)], *[(-0.35, 1), (-0.35, 0), (-0.95, 0)]],
}


@dataclass(frozen=True)
class Pictures:
    """Pictures with their classes.

    Attributes:
        pixels: (n, 16, 16, 3), red, green and blue in 0..255.
    """

    pixels: NDArray[np.uint8]
    labels: tuple[str, ...]


def pictures(classes: Sequence[str], split: ImageSplit, per_class: int, first: int = 0) -> Pictures:
    """`per_class` pictures of each class of a split, class after class.

    The scans of a digit are used again, with other colours and places, where there are fewer.

    Args:
        classes: of `CLASSES`.
        split: "train" or "test"; they share no scan and no drawing.
        per_class: how many of each, at least 1.
        first: number of the first of each; there is no last one.

    Raises:
        ValueError: an unknown class or split, or fewer than one picture.
    """
    unknown = [name for name in classes if name not in CLASSES]
    if unknown:
        raise ValueError(f"unknown class {unknown[0]!r}; known: {', '.join(CLASSES)}")
    if split not in get_args(ImageSplit):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    numbers = range(first, first + per_class)
    drawn = [_picture(name, split, number) for name in classes for number in numbers]
    labels = tuple(name for name in classes for _ in range(per_class))
    return Pictures(np.stack(drawn) if drawn else np.empty((0, SIZE, SIZE, 3), np.uint8), labels)


def _picture(name: str, split: ImageSplit, number: int) -> NDArray[np.uint8]:
    """One picture: a mask in two colours that differ enough, and a little noise."""
    seed = blake2b(f"{name}/{split}/{number}".encode(), digest_size=8).digest()
    random = np.random.default_rng(int.from_bytes(seed, "little"))
    if name in DOMAINS["digits"]:
        mask = _digit_mask(int(name.removeprefix("digit ")), split, number, random)
    elif name in DOMAINS["patterns"]:
        mask = _pattern_mask(name, random)
    else:
        mask = _drawn_mask(name, random)
    ink, paper = random.uniform(0, 1, 3), random.uniform(0, 1, 3)
    while abs(ink.mean() - paper.mean()) < 0.3:
        ink, paper = random.uniform(0, 1, 3), random.uniform(0, 1, 3)
    colours = mask[..., None] * ink + (1 - mask[..., None]) * paper
    noisy = colours + random.normal(0, 0.03, colours.shape)
    return np.asarray(np.round(255 * noisy.clip(0, 1)), dtype=np.uint8)


@cache
def _scans() -> Mapping[int, Any]:
    """The scans of each digit, (n, 8, 8), in 0..16."""
    with np.load(Path(__file__).parent / "digits.npz") as file:
        pixels, labels = file["pixels"], file["labels"]
    return {digit: pixels[labels == digit] for digit in range(10)}


def _digit_mask(digit: int, split: ImageSplit, number: int, random: Any) -> NDArray[np.float64]:
    scans = _scans()[digit]
    scans = scans[:_TEST_DIGITS] if split == "test" else scans[_TEST_DIGITS:]
    scan = Image.fromarray((scans[number % len(scans)] * 15.9375).astype(np.uint8))
    side = int(random.integers(13, SIZE + 1))
    left, top = (int(at) for at in random.integers(0, SIZE - side + 1, 2))
    paper = Image.new("L", (SIZE, SIZE))
    paper.paste(scan.resize((side, side), Image.Resampling.BILINEAR), (left, top))
    return np.asarray(paper, dtype=np.float64) / 255


def _drawn_mask(name: str, random: Any) -> NDArray[np.float64]:
    """A shape or a letter: turned, moved and sized a little."""
    angle, radius = random.normal(0, 0.16), random.uniform(0.3, 0.42) * SIZE
    middle = (SIZE / 2 + random.uniform(-1.5, 1.5), SIZE / 2 + random.uniform(-1.5, 1.5))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    def place(points: Points) -> list[tuple[float, float]]:
        placed = (np.asarray(points) @ turn.T * radius + middle) * _SCALE
        return [(float(x), float(y)) for x, y in placed]

    paper = Image.new("L", (SIZE * _SCALE, SIZE * _SCALE))
    draw = ImageDraw.Draw(paper)
    if name.startswith("letter "):
        width = int(random.uniform(1.3, 2.2) * _SCALE)
        for stroke in _STROKES[name[-1]]:
            draw.line(place(stroke), fill=255, width=width, joint="curve")
    elif name in _POLYGONS:
        draw.polygon(place(_POLYGONS[name]), fill=255)
    else:
        _draw_round(name, draw, place)
    return _averaged(np.asarray(paper, dtype=np.float64) / 255)


def _draw_round(name: str, draw: ImageDraw.ImageDraw, place: Callable[[Points], Any]) -> None:
    def disc(x: float, y: float, radius: float, fill: int) -> None:
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        points = [(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles]
        draw.polygon(place(points), fill=fill)

    if name == "heart":
        disc(-0.45, -0.4, 0.52, 255)
        disc(0.45, -0.4, 0.52, 255)
        draw.polygon(place([(-0.93, -0.2), (0.93, -0.2), (0, 1)]), fill=255)
        return
    disc(0, 0, 1, 255)
    if name == "ring":
        disc(0, 0, 0.55, 0)
    elif name == "moon":
        disc(0.5, -0.25, 0.85, 0)


def _pattern_mask(name: str, random: Any) -> NDArray[np.float64]:
    """A pattern over the whole picture, of some period and phase."""
    period = random.uniform(4.0, 6.5)
    along = (np.arange(SIZE * _SCALE) + 0.5) / _SCALE
    x, y = np.meshgrid(along, along)
    x, y = x / period + random.uniform(), y / period + random.uniform()
    tilt = random.normal(0, 0.06)
    x, y = x + tilt * y, y - tilt * x

    def wave(t: NDArray[np.float64]) -> NDArray[np.bool_]:
        return (t % 1) < 0.5

    if name == "horizontal stripes":
        mask = wave(y)
    elif name == "vertical stripes":
        mask = wave(x)
    elif name in ("rising stripes", "falling stripes"):
        mask = wave((x + y if name == "rising stripes" else x - y) / np.sqrt(2))
    elif name == "checkerboard":
        mask = wave(x) ^ wave(y)
    elif name == "dots":
        mask = ((x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2) < 0.09
    elif name == "grid":
        mask = ((x % 1) < 0.25) | ((y % 1) < 0.25)
    elif name == "rings":
        middle = SIZE / period / 2
        mask = wave(np.hypot(x - x.min() - middle, y - y.min() - middle) * 1.2)
    elif name == "zigzag":
        mask = wave(y + abs(x / 1.2 % 1 - 0.5))
    else:  # bricks
        row = np.floor(2 * y)
        mask = ((2 * y % 1) > 0.3) & (((x + 0.5 * (row % 2)) % 1) > 0.18)
    return _averaged(mask.astype(np.float64))


def _averaged(large: NDArray[np.float64]) -> NDArray[np.float64]:
    """A drawing at its final size: the mean over each pixel."""
    small: NDArray[np.float64] = large.reshape(SIZE, _SCALE, SIZE, _SCALE).mean((1, 3))
    return small
