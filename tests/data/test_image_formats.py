"""Images in rows, arrays and folders: the same ones, whatever holds them."""

from __future__ import annotations

import base64
import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from forgetless.core.errors import UserError
from forgetless.data.examples import load_examples, source_hash
from forgetless.data.image_rows import Picture, content_of
from forgetless.data.images import MODALITY
from forgetless.data.modality import load_processor
from tests.images import CLASSES, save_classifier, save_images

Rows = list[tuple[Path, str]]

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = datasets.Features({
    "image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES)),
})  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_classifier(tmp_path_factory.mktemp("base")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_images(tmp_path / "images", {"bars": 3, "dots": 2, "wedge": 2})


def rows_of(folder: Path) -> Rows:
    """The files with their classes, as class folders give them."""
    return [(Path(record["image"]), record["label"]) for record in load_examples(folder)]


def text(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def as_jsonl(cell: Callable[[Path], Any], key: str = "image", label: str = "label") -> Any:
    def write(rows: Rows, out: Path) -> Path:
        lines = [json.dumps({key: cell(file), label: name, "more": 1}) for file, name in rows]
        (out / "rows.jsonl").write_text("\n".join(lines))
        return out / "rows.jsonl"

    return write


def as_csv(rows: Rows, out: Path) -> Path:
    with (out / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "img"])
        writer.writerows(
            [name, f"../images/{image.parent.name}/{image.name}"] for image, name in rows
        )
    return out / "rows.csv"


def table(rows: Rows, cells: Any, names: bool = False) -> pa.Table:
    """Images beside their classes, which are numbers of named ones on request."""
    labels = [CLASSES.index(name) if names else name for _, name in rows]
    schema = FEATURES.arrow_schema if names else None
    return pa.table({"image": cells, "label": pa.array(labels)}, schema=schema)


def structs(rows: Rows) -> Any:
    return pa.array([{"bytes": file.read_bytes(), "path": None} for file, _ in rows], STRUCT)


def as_parquet(rows: Rows, out: Path, cells: Any, names: bool = False) -> Path:
    pyarrow.parquet.write_table(table(rows, cells, names), out / "rows.parquet", row_group_size=3)
    return out / "rows.parquet"


def as_arrow(rows: Rows, out: Path, writer: Any) -> Path:
    found = table(rows, structs(rows), names=True)
    with writer(str(out / "rows.arrow"), found.schema) as file:
        file.write_table(found, max_chunksize=2)
    return out / "rows.arrow"


def as_datasets(rows: Rows, out: Path) -> Path:
    columns = {"image": [str(file) for file, _ in rows], "label": [name for _, name in rows]}
    datasets.Dataset.from_dict(columns, features=FEATURES).save_to_disk(out / "saved")
    return out / "saved"


FORMATS: dict[str, Callable[[Rows, Path], Path]] = {
    "jsonl of paths": as_jsonl(lambda file: os.path.relpath(file, file.parents[2] / "out")),
    "jsonl of absolute paths": as_jsonl(str, "img", "class"),
    "jsonl of base64": as_jsonl(text, label="fine_label"),
    "jsonl of data URIs": as_jsonl(lambda file: f"data:image/png;base64,{text(file)}"),
    "jsonl as datasets has it": as_jsonl(lambda file: {"bytes": text(file), "path": None}),
    "csv": as_csv,
    "parquet of structs": lambda rows, out: as_parquet(rows, out, structs(rows)),
    "parquet of bytes": lambda rows, out: as_parquet(
        rows, out, pa.array([file.read_bytes() for file, _ in rows])
    ),
    "parquet of paths": lambda rows, out: as_parquet(
        rows, out, pa.array([str(file) for file, _ in rows])
    ),
    "parquet of structs with paths": lambda rows, out: as_parquet(
        rows, out, pa.array([{"bytes": None, "path": str(file)} for file, _ in rows], STRUCT)
    ),
    "parquet with class names": lambda rows, out: as_parquet(rows, out, structs(rows), names=True),
    "arrow stream": lambda rows, out: as_arrow(rows, out, pa.ipc.new_stream),
    "arrow file": lambda rows, out: as_arrow(rows, out, pa.ipc.new_file),
    "datasets folder": as_datasets,
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_images_are_read_from_every_format(
    name: str, base: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    path = FORMATS[name](rows_of(folder), tmp_path / "out")
    usual, found = load_examples(folder), load_examples(path)
    assert [record["label"] for record in found] == [record["label"] for record in usual]
    assert found.kind == "image"
    assert found.fingerprint == usual.fingerprint
    reader = load_processor(base)
    MODALITY.check(found, reader)
    ours, theirs = (MODALITY.rows(each, reader) for each in (found, usual))
    assert all(
        torch.equal(ours[number]["pixel_values"], theirs[number]["pixel_values"])
        for number in range(len(theirs))
    )
    assert ours[1]["labels"] == theirs[1]["labels"]
    few = load_examples(path, limit=2)
    assert few.where == [
        f"{path}, {'line' if path.suffix == '.jsonl' else 'row'} {n}" for n in (1, 2)
    ]


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_arrays_are_images(
    names: bool, channels: tuple[int, ...], base: str, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 9, 7, *channels)).astype(np.uint8)
    labels = [0, 2, 1, 0]
    if names:
        np.savez(tmp_path / "a.npz", images=pixels, labels=labels, classes=np.array(CLASSES))
    else:
        named = np.array([[CLASSES[label]] for label in labels])
        np.savez(tmp_path / "a.npz", images=pixels, labels=named)
    found = load_examples(tmp_path / "a.npz")
    reader = load_processor(base)
    MODALITY.check(found, reader)
    assert [CLASSES.index(record["label"]) for record in found] == labels
    Image.fromarray(pixels[1].reshape(9, 7, *channels[channels == (1,) :])).save(tmp_path / "1.png")
    rows = MODALITY.rows(found, reader)
    assert torch.equal(rows[1]["pixel_values"], reader.pixels(str(tmp_path / "1.png")))
    pixels[3, 0, 0] ^= 1
    np.savez(tmp_path / "b.npz", images=pixels, labels=[CLASSES[label] for label in labels])
    assert load_examples(tmp_path / "b.npz").fingerprint != found.fingerprint


def test_bytes_of_arrow_stay_in_the_file_until_they_are_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    rows = rows_of(folder)
    before = pa.total_allocated_bytes()
    for path in (as_arrow(rows, tmp_path, pa.ipc.new_file), as_datasets(rows, tmp_path)):
        records = load_examples(path).records
        kept = [record["image"].content for record in records]
        assert all(isinstance(content, pa.BinaryScalar) for content in kept)
        assert content_of(records[0]["image"]) == rows[0][0].read_bytes()
        assert pa.total_allocated_bytes() - before < 10_000


def test_images_that_rows_name_decide_what_a_source_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    def hash_of(path: Path) -> str:
        return source_hash(str(path), lambda name: load_examples(name).fingerprint)

    outside = FORMATS["jsonl of paths"](rows_of(folder), tmp_path / "out")
    before, unchanged = hash_of(outside), outside.read_bytes()
    inside = hash_of(folder)
    (folder / "dots" / "00.png").write_bytes((folder / "dots" / "01.png").read_bytes())
    assert outside.read_bytes() == unchanged
    assert hash_of(outside) != before
    assert hash_of(folder) != inside


def test_a_picture_is_a_name_with_its_content() -> None:
    picture = Picture("rows.jsonl, line 1", b"abc")
    assert json.dumps({"image": picture}) == '{"image": "rows.jsonl, line 1"}'
    assert content_of(picture) == b"abc"
    assert content_of("a.png") is None


def test_columns_that_are_no_images_are_listed(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pa.table({"photo": ["a.png"], "label": ["x"]}), tmp_path / "a.parquet"
    )
    with pytest.raises(
        UserError, match=r"the keys 'label', 'photo'; expected .*image \+ label \(or"
    ):
        load_examples(tmp_path / "a.parquet")
