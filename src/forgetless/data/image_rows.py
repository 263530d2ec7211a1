"""Images with a class in folders, rows and arrays, as `forgetless.data` reads them. No torch.

An image is a file, or lies in a row as bytes, base64 or an array. Nothing is decoded here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from forgetless.core.errors import UserError, first_few
from forgetless.core.hashing import content_hash

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})
"""Endings of the files that are images in a class folder; others are passed over."""

OTHER_IMAGES = frozenset(
    {".avif", ".dng", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".npy", ".psd", ".svg", ".tga"}
)
"""Endings of images that are not read, and so are no files to pass over in silence."""

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "class")
"""What columns of rows may be called, in the order in which they are looked for."""

MAX_UNPACKED = 200
"""Times its size that an npz file may unpack to where that is more than `MIN_BOMB_BYTES`."""

MIN_BOMB_BYTES = 1 << 30

_NOT_IMAGES = frozenset({"text", "messages", "conversations", "prompt", "sentence"})
"""Columns beside which an image and a label are not what is learned."""


class Picture(str):
    """The file of an image or the name of one of the pocket world; of one in a row, its place.

    Attributes:
        content: of an image in a row: the bytes of its file, an arrow value of these, or an array
            of 8 bits a colour, (height, width) or (height, width, channels). Otherwise None.
    """

    __slots__ = ("content",)
    content: Any

    def __new__(cls, name: str | Path, content: Any = None) -> Picture:
        made = super().__new__(cls, name)
        made.content = content
        return made


def hash_of(image: str) -> str:
    """SHA-256 of an image's content: the same for a file and for its bytes in a row."""
    content = content_of(image)
    if content is None:
        return content_hash(image)
    if not isinstance(content, bytes):
        content = f"{content.shape}".encode() + content.tobytes()
    return hashlib.sha256(f".:{hashlib.sha256(content).hexdigest()}\n".encode()).hexdigest()


def content_of(image: str) -> Any:
    """The bytes or the array of an image in a row; None of a file."""
    content: Any = getattr(image, "content", None)
    return content.as_py() if hasattr(content, "as_py") else content


def columns_of(row: Mapping[str, Any] | Iterable[str]) -> tuple[str, str] | None:
    """The columns that hold the image and its class, or None."""
    names = set(row)
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    label = next((name for name in LABEL_COLUMNS if name in names), None)
    return (image, label) if image and label and not names & _NOT_IMAGES else None


def picture_of(value: Any, path: Path, place: str) -> Picture:
    """The image of a cell.

    Args:
        value: the path of a file, from the folder of `path`; base64, also as a data URI; bytes; an
            array; or a mapping with "bytes" or else "path", as `datasets` has them.
        path: of the file or folder that holds the cell.
        place: of the row in it.

    Raises:
        UserError: none of these, or a file that is none.
    """
    name = f"{path}, {place}"
    if isinstance(value, Picture):
        return value
    if isinstance(value, Mapping):
        if value.get("bytes") is None and value.get("path") is None:
            raise UserError("the image has neither 'bytes' nor a 'path'")
        inner = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value.get("bytes") is not None and isinstance(inner, str):
            return Picture(name, _from_base64(inner))
        return picture_of(inner, path, place)
    if isinstance(value, str):
        if value.startswith("data:"):
            return Picture(name, _from_base64(value.partition(",")[2]))
        return _named(value, path, name)
    if hasattr(value, "as_buffer"):
        empty = value.as_buffer().size == 0
    elif isinstance(value, bytes) or hasattr(value, "tobytes"):
        empty = len(value) == 0
    else:
        shown = "nothing (null)" if value is None else type(value).__name__
        raise UserError(f"the image must be a path, base64 or bytes, got {shown}")
    if empty:
        raise UserError("the image is empty (0 bytes)")
    return Picture(name, value)


def _named(value: str, path: Path, name: str) -> Picture:
    """An image by its path; a text that is the name of no file may be base64."""
    if not value.strip():
        raise UserError("the image has an empty path")
    # Longer than any path, or with the beginning that the bytes of an image have in base64.
    if len(value) > 1024 or value.startswith(("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0")):
        return Picture(name, _from_base64(value))
    file = (path if path.is_dir() else path.parent) / value
    require_file(file, str(file))
    return Picture(file)


def _from_base64(text: str) -> bytes:
    try:
        found = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as problem:
        raise UserError(f"the image is broken base64 ({problem})") from None
    if not found:
        raise UserError("the image is empty (0 bytes)")
    return found


def require_file(file: Path, name: str) -> None:
    """Raise what keeps a path from being a file with something in it; nothing is opened."""
    try:
        status = file.stat()
    except OSError as problem:
        raise UserError(f"no such file: {name} ({problem.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise UserError(f"{name} is {kind}, no file")
    if status.st_size == 0:
        raise UserError(f"{name} is empty (0 bytes)")


# ------------------------------------------------------------------------------- class folders


def class_folders(path: Path) -> dict[str, list[Path]]:
    """The images in each folder of a folder, by the folder's name; nothing where there are none.

    Hidden ones are passed over: macOS puts a ``._name.png`` that is none beside each image.

    Raises:
        UserError: everything that is no class folder with images among others that are.
    """

    def images(files: Iterable[Path]) -> list[Path]:
        shown = (x for x in files if not x.name.startswith("."))
        return sorted(x for x in shown if x.suffix.lower() in IMAGES)

    folders = [f for f in sorted(path.iterdir()) if f.is_dir() and not f.name.startswith(".")]
    found = {f.name: images(f.rglob("*")) for f in folders}
    if not any(found.values()):
        return {}
    problems = []
    for folder in folders:
        inner = next((x for x in found[folder.name] if x.parent != folder), None)
        other = next((x for x in folder.iterdir() if x.suffix.lower() in OTHER_IMAGES), None)
        if not found[folder.name]:
            problems.append(f"{folder.name}: has no image of type {', '.join(sorted(IMAGES))}")
        if inner is not None:
            problems.append(
                f"{folder.name}: has a folder of images, {inner.parent.relative_to(path)}; the "
                f"images of a class lie in its folder itself (are the classes in {folder}?)"
            )
        if other is not None:
            problems.append(
                f"{other.relative_to(path)}: images of type {other.suffix} are not read; convert "
                "them, or take them away"
            )
        problems += _no_files([folder, *found[folder.name]], path)
    if loose := images(path.iterdir()):
        problems.append(f"{loose[0].name}: lies beside the class folders, and so has no class")
    if problems:
        few = first_few(problems) if len(problems) > 1 else problems[0]
        raise UserError(f"{path}, {few}")
    return found


def _no_files(paths: Sequence[Path], path: Path) -> Iterator[str]:
    """What of a class's folder and its images lies elsewhere or is no file."""
    root = path.resolve()
    for number, file in enumerate(paths):
        name = file.relative_to(path).as_posix()
        # What a link leads to is not in the folder's hash, or not to be found where it was copied.
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            yield f"{name}: is a link to {file.resolve()}, outside the folder; copy that"
        elif number > 0:
            try:
                require_file(file, name)
            except UserError as problem:
                yield f"{name}: {str(problem).removeprefix(f'{name} ')}"


def in_turn(path: Path, classes: Mapping[str, list[Path]]) -> Iterator[tuple[str, Any]]:
    """The images of class folders as rows, one of each class in turn."""
    for files in zip_longest(*classes.values()):
        for label, file in zip(classes, files, strict=True):
            if file is not None:
                place = file.relative_to(path).as_posix()
                yield place, {"image": Picture(file), "label": label}


# -------------------------------------------------------------------------- arrow and numpy


def class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the classes by column, which `datasets` writes into an arrow schema."""
    written = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(written)["info"]["features"] if written else {}
        return {
            column: list(feature["names"])
            for column, feature in features.items()
            if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError):
        return {}


def arrow_rows(batches: Iterable[Any], schema: Any) -> Iterator[tuple[str, Any]]:
    """The image and the class of each row; the bytes of an image are read when they are needed.

    The schema has columns for which `columns_of` is not None.
    """
    image, label = columns_of(schema.names) or ("", "")
    names, number = class_names(schema).get(label), 0
    for batch in batches:
        images = _cells(batch.column(image))
        for cell, found in zip(images, batch.column(label).to_pylist(), strict=True):
            number += 1
            if names and type(found) is int and 0 <= found < len(names):
                found = names[found]
            yield f"row {number}", {"image": cell, "label": found}


def _cells(column: Any) -> Iterator[Any]:
    """What `picture_of` takes; bytes stay in arrow's memory, which may be a file's."""
    from pyarrow import types  # optional

    for chunk in getattr(column, "chunks", [column]):
        kind = chunk.type
        if types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
            parts = {field.name: child for field, child in zip(kind, chunk.flatten(), strict=True)}
            for content, path in zip(parts["bytes"], parts["path"], strict=True):
                yield {"bytes": content if content.is_valid else None, "path": path.as_py()}
        elif types.is_binary(kind) or types.is_large_binary(kind):
            yield from (cell if cell.is_valid else None for cell in chunk)
        else:
            yield from chunk.to_pylist()


def npz_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The images of an array "images" with their classes in "labels".

    Labels are names, or numbers that may count an array "classes" of names.

    Raises:
        UserError: no such arrays, or none of images of 8 bits a colour.
    """
    import numpy as np

    if not zipfile.is_zipfile(path):  # numpy would take it for a pickle
        raise UserError(f"{path} is no valid npz file; write it with numpy.savez")
    with zipfile.ZipFile(path) as packed:
        size = sum(part.file_size for part in packed.infolist())
    if size > max(MAX_UNPACKED * path.stat().st_size, MIN_BOMB_BYTES):
        raise UserError(
            f"{path} would unpack to {size:,} bytes, which no images do; it is not read"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files if name in _ARRAYS}
            names = sorted(file.files)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, MemoryError, KeyError) as problem:
        if "pickle" in str(problem):
            raise UserError(
                f"{path} holds Python objects, which are not read since they can run code; save "
                "plain arrays of numbers"
            ) from None
        raise UserError(f"{path} is no valid npz file ({problem})") from None
    missing = [name for name in _ARRAYS[:2] if name not in found]
    if missing:
        raise UserError(
            f"{path} has no array {missing[0]!r}; it needs 'images' and 'labels' and has "
            f"{', '.join(map(repr, names)) or 'none'}"
        )
    images, labels = found["images"], found["labels"]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    channels = images.shape[3:]
    if images.dtype != np.uint8:
        raise UserError(f"{path}: 'images' must be of 8 bits a colour (uint8), got {images.dtype}")
    if images.ndim not in (3, 4) or channels not in ((), (1,), (3,), (4,)) or not images.size:
        raise UserError(
            f"{path}: 'images' must be (number, height, width) or (number, height, width, 3), got "
            f"{images.shape}"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iuU":
        raise UserError(
            f"{path}: 'labels' must be {len(images)} names or whole numbers, one an image, got "
            f"{labels.dtype} of shape {labels.shape}"
        )
    classes = [str(name) for name in found.get("classes", ())]
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True), start=1):
        if classes and type(label) is int and 0 <= label < len(classes):
            label = classes[label]
        pixels = image[..., 0] if channels == (1,) else image
        yield f"image {number}", {"image": pixels, "label": label}


_ARRAYS = ("images", "labels", "classes")
