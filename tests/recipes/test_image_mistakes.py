"""Mistakes in images and their classes: one clear line each, before any weight is loaded."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from forgetless.core.settings import with_overrides
from forgetless.recipes.checking import Checker
from forgetless.recipes.recipe import Recipe
from tests.images import save_classifier, save_images

Changes = Mapping[str, Any]
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of bars, dots and wedge, of whose weights the file is empty."""
    folder = save_classifier(tmp_path_factory.mktemp("base"))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def checker() -> Checker:
    return Checker()


def recipe_of(base: Path, good: Path, changes: Changes) -> Recipe:
    asked = {"kind": "image_accuracy", "path": str(good / "test")}
    content = {
        "base": str(base),
        "adapter": {"method": "lora_null_v1", "rank": 2, "alpha": 2},
        "calibration": {"source": str(good / "keep")},
        "data": {"train": str(good / "train")},
        "training": {"steps": 6},
        "tasks": {
            "learning": [{**asked, "name": "new"}],
            "forgetting": [{**asked, "name": "old"}],
        },
    }
    return Recipe.parse(with_overrides(content, changes))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Images without a mistake, for training, keeping and testing."""
    for seed, name in enumerate(("train", "keep", "test")):
        save_images(tmp_path / name, {"bars": 2, "dots": 2}, seed=seed)
    return tmp_path


# ---- what may be wrong with a folder of classes: made in a good one, whose path it gives ---


def encoded(kind: str = "jpeg", **settings: Any) -> bytes:
    """A noisy image as a file's bytes."""
    written = io.BytesIO()
    Image.fromarray(NOISE).save(written, kind, **settings)
    return written.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """The beginning of a PNG of so many pixels, and its end: a bomb of a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(10))), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def with_file(content: bytes, name: str = "odd.png") -> Callable[[Path], Path]:
    def make(train: Path) -> Path:
        (train / "dots" / name).write_bytes(content)
        return train

    return make


def with_image(image: Image.Image, name: str, **settings: Any) -> Callable[[Path], Path]:
    def make(train: Path) -> Path:
        image.save(train / "dots" / name, **settings)
        return train

    return make


def no_folder(train: Path) -> Path:
    return train / "nowhere"


def empty_folder(train: Path) -> Path:
    (train / "empty").mkdir()
    return train / "empty"


def empty_class(train: Path) -> Path:
    (train / "wedge").mkdir()
    return train


def one_class(train: Path) -> Path:
    return save_images(train.parent / "one", {"dots": 3})


def unknown_class(train: Path) -> Path:
    return save_images(train.parent / "unknown", {"dots": 1, "zigzag": 1})


def class_by_case(train: Path) -> Path:
    return save_images(train.parent / "case", {"dots": 1, "Dots": 1})


def folders_of_folders(train: Path) -> Path:
    return save_images(train.parent / "nested" / "train", {"dots": 1, "bars": 1}).parent


def link_out(train: Path) -> Path:
    outside = train.parent / "outside.png"
    Image.fromarray(NOISE).save(outside)
    (train / "dots" / "linked.png").symlink_to(outside)
    return train


def linked_class(train: Path) -> Path:
    (train / "wedge").symlink_to(train.parent / "keep" / "dots")
    return train


def broken_link(train: Path) -> Path:
    (train / "dots" / "linked.png").symlink_to(train / "dots" / "gone.png")
    return train


def pipe(train: Path) -> Path:
    os.mkfifo(train / "dots" / "pipe.png")
    return train


def folder_called_png(train: Path) -> Path:
    (train / "dots" / "folder.png").mkdir()
    return train


def image_without_a_class(train: Path) -> Path:
    Image.fromarray(NOISE).save(train / "loose.png")
    return train


def pipe_of_rows(train: Path) -> Path:
    os.mkfifo(train / "rows.jsonl")
    return train / "rows.jsonl"


FRAMES = [Image.fromarray(NOISE), Image.fromarray(255 - NOISE)]
DEEP = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 256)

FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no such folder": (no_folder, "no such file: .*nowhere"),
    "an empty folder": (empty_folder, "empty holds no data set"),
    "a class without images": (empty_class, "train, wedge: has no image of type .bmp"),
    "one class": (one_class, "has the class 'dots' alone; nothing tells"),
    "a class that the head does not have": (unknown_class, "no class 'zigzag'; its 3 classes"),
    "classes that differ by case": (class_by_case, "dots/00.png: .*'dots' differs by case alone"),
    "folders of folders": (folders_of_folders, "train: has a folder of images, train/bars; the"),
    "a link out of the folder": (link_out, "dots/linked.png: is a link to .*outside the folder"),
    "a class that is a link": (linked_class, "wedge: is a link to .*keep/dots, outside"),
    "a link to nothing": (broken_link, "no such file: dots/linked.png"),
    "a pipe": (pipe, "dots/pipe.png: is a pipe or a device, no file"),
    "a folder called .png": (folder_called_png, "dots/folder.png: is a folder, no file"),
    "an image beside the classes": (image_without_a_class, "loose.png: lies beside the class"),
    "a text called .png": (with_file(b"no image"), "dots/odd.png: is no image that can be read"),
    "an empty file": (with_file(b""), r"dots/odd.png: is empty \(0 bytes\)"),
    "an image of another type": (with_file(b"", "a.heic"), "dots/a.heic: .* .heic are not read"),
    "a JPEG cut off": (with_file(encoded()[:-900], "a.jpg"), "dots/a.jpg: is a damaged image"),
    "a PNG cut off": (with_file(encoded("png")[:-900]), "dots/odd.png: is a damaged image"),
    "a WebP cut off": (
        with_file(encoded("webp")[:-900], "a.webp"),
        "dots/a.webp: is (a damaged image|no image that can be read)",
    ),
    "a bomb of pixels": (with_file(huge_png(12_000, 9_000)), "odd.png: has more than 89,478,485 p"),
    "a huge header": (with_file(huge_png(10**6, 10**6)), "odd.png: has more than 89,478,485 pix"),
    "16 bits a colour": (with_image(DEEP, "deep.png"), "deep.png: has more than 8 bits a colour"),
    "an animation": (
        with_image(FRAMES[0], "a.gif", save_all=True, append_images=FRAMES[1:]),
        "a.gif: has several pictures",
    ),
    "a pipe of rows": (pipe_of_rows, "rows.jsonl is a pipe or a device"),
}


# ---- what may be wrong with rows and arrays: lines, columns or arrays, and what is said ---


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


PNG = text(encoded("png"))
ROWS: dict[str, tuple[list[Any], str]] = {
    "a file that is not there": ([{"image": "gone.png", "label": "dots"}], "gone.png"),
    "an absolute path to nothing": (
        [{"image": "/nowhere/gone.png", "label": "dots"}],
        "line 1: no such file: /nowhere/gone.png",
    ),
    "broken base64": (
        [{"image": "data:image/png;base64,iVBO*", "label": "dots"}],
        "line 1: the image is broken base64",
    ),
    "base64 of a text": (
        [{"image": f"data:image/png;base64,{text(b'no image')}", "label": "dots"},
         {"image": PNG, "label": "bars"}],
        "line 1: is no image that can be read",
    ),
    "no image": ([{"image": None, "label": "dots"}], r"line 1: .*got nothing \(null\)"),
    "an image that is a number": ([{"image": 5, "label": "dots"}], "line 1: the image must be"),
    "no label": ([{"image": PNG, "label": None}], r"line 1: 'label' .*got nothing \(null\)"),
    "a label that is a list": ([{"image": PNG, "label": ["dots"]}], "line 1: 'label' must be"),
    "an empty label": ([{"image": PNG, "label": " "}], "line 1: 'label' is empty"),
    "names and numbers": (
        [{"image": PNG, "label": "dots"}, {"image": PNG, "label": 0}],
        "line 2: the label is a number, 0, and elsewhere a name, 'dots'",
    ),
    "a number out of range": (
        [{"image": PNG, "label": 0}, {"image": PNG, "label": 3}],
        "no class 3; its 3 classes are 'bars', 'dots', 'wedge', or 0 to 2",
    ),
    "no column of images": (
        [{"photo": "a.png", "label": "dots"}],
        "has the keys 'label', 'photo'; expected one of.* image . label",
    ),
    "no column of labels": (
        [{"image": "a.png", "species": "dots"}],
        "has the keys 'image', 'species'; expected one of.* image . label",
    ),
}  # fmt: skip

OBJECTS = np.array([NOISE, "dots"], dtype=object)
TWO = np.stack([NOISE, NOISE])
ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "Python objects": ({"images": OBJECTS, "labels": [0, 1]}, "Python objects, which are not read"),
    "lengths that differ": ({"images": TWO, "labels": [0, 1, 1]}, "must be 2 names or whole"),
    "no labels": ({"images": TWO}, "no array 'labels'; .* has 'images'"),
    "floating point": ({"images": TWO / 255.0, "labels": [0, 1]}, "8 bits .*got float64"),
    "channels first": ({"images": TWO.transpose(0, 3, 1, 2), "labels": [0, 1]}, "2, 3, 64, 64"),
    "labels of a fraction": ({"images": TWO, "labels": [0.5, 1]}, "whole numbers.*got float64"),
}


def problems_of(checker: Checker, base: Path, good: Path, changes: Changes) -> list[str]:
    return checker.check(recipe_of(base, good, changes))


def test_nothing_is_wrong_without_a_mistake(checker: Checker, base: Path, good: Path) -> None:
    assert problems_of(checker, base, good, {}) == []


def require_one_line(
    checker: Checker, base: Path, good: Path, path: Path, words: str, where: str = "data.train"
) -> None:
    """See to it that a source has one problem, told in a line that begins with its place."""
    [problem] = problems_of(checker, base, good, {where: str(path)})
    assert re.fullmatch(rf"{where}: .*{words}.*", problem), problem
    assert "0x" not in problem


@pytest.mark.parametrize("name", FOLDERS)
def test_mistakes_in_folders(name: str, checker: Checker, base: Path, good: Path) -> None:
    make, words = FOLDERS[name]
    require_one_line(checker, base, good, make(good / "train"), words)


@pytest.mark.parametrize("name", ROWS)
def test_mistakes_in_rows(name: str, checker: Checker, base: Path, good: Path) -> None:
    rows, words = ROWS[name]
    file = good / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    require_one_line(checker, base, good, file, words)


@pytest.mark.parametrize("name", ARRAYS)
def test_mistakes_in_arrays(name: str, checker: Checker, base: Path, good: Path) -> None:
    arrays, words = ARRAYS[name]
    np.savez(good / "a.npz", **arrays)
    require_one_line(checker, base, good, good / "a.npz", words)


def test_a_bomb_of_arrays(
    checker: Checker, base: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgetless.data.image_rows.MIN_BOMB_BYTES", 1 << 20)
    black = np.zeros((2, 1000, 1000, 3), np.uint8)
    np.savez_compressed(good / "a.npz", images=black, labels=[0, 1])
    require_one_line(checker, base, good, good / "a.npz", "would unpack to 6,0.. ?.*not read")
    np.savez(good / "b.npz", images=black, labels=[0, 1])
    assert problems_of(checker, base, good, {"data.train": str(good / "b.npz")}) == []


@pytest.mark.parametrize("suffix", [".npz", ".arrow", ".parquet"])
def test_files_of_another_kind(suffix: str, checker: Checker, base: Path, good: Path) -> None:
    (good / f"a{suffix}").write_bytes(b"nothing of the kind")
    require_one_line(checker, base, good, good / f"a{suffix}", "is no valid")


def test_mistakes_in_columns(checker: Checker, base: Path, good: Path) -> None:
    file = good / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"photo": ["a.png"], "label": ["dots"]}), file)
    require_one_line(checker, base, good, file, "has the keys 'label', 'photo'; expected one of")
    names = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    both = [{"bytes": encoded("png"), "path": None}] * 2
    table = pa.table({"image": both, "label": [0, -1]}, schema=names.arrow_schema)
    pyarrow.parquet.write_table(table, file)
    require_one_line(checker, base, good, file, "label")


@pytest.mark.parametrize("where", ["calibration.source", "tasks.forgetting.0"])
def test_broken_images_show_wherever_they_are_read(
    where: str, checker: Checker, base: Path, good: Path
) -> None:
    kept = str(with_file(b"no image")(good / "keep"))
    changes: Changes = {"calibration.source": kept}
    if where != "calibration.source":
        asked = [{"kind": "image_accuracy", "path": kept}]
        changes = {"tasks.forgetting": asked, "calibration.source": str(good / "test")}
    [problem] = problems_of(checker, base, good, changes)
    assert re.fullmatch(f"{where}: .*dots/odd.png: is no image.*", problem)


def test_classes_to_test_on_that_no_head_has(checker: Checker, base: Path, good: Path) -> None:
    other = save_images(good / "other", {"zigzag": 1, "bars": 1})
    changes = {"tasks.learning": [{"kind": "image_accuracy", "path": str(other)}]}
    [problem] = problems_of(checker, base, good, changes)
    assert re.fullmatch("tasks.learning.0: .*no class 'zigzag'; its 3 classes are.*", problem)
    unlike = str(save_images(good / "unlike", {"zigzag": 1, "waves": 1}))
    with_new = {"adapter.head": "new", "data.train": unlike}
    assert problems_of(checker, base, good, {**changes, **with_new}) == []
    save_images(good / "third", {"tartan": 1})
    changes = {"tasks.learning": [{"kind": "image_accuracy", "path": str(good / "third")}]}
    [problem] = problems_of(checker, base, good, {**changes, **with_new})
    assert re.fullmatch("tasks.learning.0: .*neither head has the class 'tartan'.*", problem)


def test_images_to_train_on_are_none_to_test_on(checker: Checker, base: Path, good: Path) -> None:
    (good / "again").symlink_to(good / "test")
    [problem] = problems_of(checker, base, good, {"data.train": str(good / "again")})
    assert re.fullmatch("tasks.learning.0: .*data.train.*", problem)


def test_images_of_several_sizes_need_a_processor_that_resizes(
    checker: Checker, good: Path, tmp_path: Path
) -> None:
    base = save_classifier(tmp_path / "fixed")
    settings = json.loads((base / "preprocessor_config.json").read_text())
    (base / "preprocessor_config.json").write_text(json.dumps({**settings, "do_resize": False}))
    with_image(Image.new("RGB", (8, 8)), "small.png")(good / "train")
    [problem] = problems_of(checker, base, good, {})
    assert re.fullmatch(r"data.train: .*images of 2 sizes \(8 x 8, 12 x 10\), and .*", problem)
