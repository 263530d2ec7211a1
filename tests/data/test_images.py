"""Class folders and what an image classifier reads of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModelForImageClassification, ViTImageProcessorPil

from forgetless.core.errors import UserError
from forgetless.data.examples import load_examples
from forgetless.data.images import MODALITY, ImageReader, ImageRows
from forgetless.data.mixture import Mixture
from forgetless.data.modality import load_processor, modality_of, training_batches
from forgetless.data.packing import IGNORED
from forgetless.data.settings import AugmentSettings
from forgetless.data.texts import fingerprint, read_examples
from forgetless.models.load import head_of, load_model, meta_model
from tests.images import CLASSES, VIT_SIZES, save_classifier, save_images


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_classifier(tmp_path_factory.mktemp("base")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_images(tmp_path / "images", {"bars": 3, "dots": 2, "wedge": 4})


def test_some_classes_of_a_source_are_read_alone(folder: Path) -> None:
    few = load_examples(f"{folder}#wedge, bars", limit=3)
    assert [record["label"] for record in few] == ["bars", "wedge", "bars"]
    assert few.fingerprint != load_examples(folder, limit=3).fingerprint
    with pytest.raises(UserError, match="no class 'bar'; its classes are bars; dots; wedge"):
        load_examples(f"{folder}#bar,dots")
    drawn = load_examples("pocket:pictures:test#ring,letter A")
    assert {record["label"] for record in drawn} == {"ring", "letter A"}
    assert len(drawn) == 100
    assert read_examples("pocket:letters:test#letter A").fingerprint == fingerprint(
        "pocket:pictures:test#letter A"
    )
    (odd := folder.parent / "a#b").mkdir()
    shutil.move(folder, odd / "in")
    assert len(load_examples(odd / "in")) == 9


def test_classes_come_in_turn_and_a_limit_has_all_of_them(folder: Path) -> None:
    (folder / "bars" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    for place in (folder, folder / "bars"):
        (place / "._00.png").write_bytes(b"\0\5\x16\7 of macOS, no image")
    labels = [record["label"] for record in load_examples(folder)]
    assert labels == ["bars", "dots", "wedge"] * 2 + ["bars", "wedge", "wedge"]
    few = load_examples(folder, limit=3)
    assert [record["label"] for record in few] == list(CLASSES)
    assert few.kind == "image"
    assert few.where[0] == f"{folder}, bars/00.png"


def test_the_content_of_the_images_decides_and_not_their_place(
    folder: Path, tmp_path: Path
) -> None:
    before = load_examples(folder).fingerprint
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert fingerprint(str(moved)) == before
    (moved / "dots" / "00.png").write_bytes((moved / "dots" / "01.png").read_bytes())
    assert load_examples(moved).fingerprint != before


@pytest.mark.parametrize("name", ["pocket:digits", "pocket:shapes:test", "pocket:patterns"])
def test_the_pocket_world_has_images(name: str) -> None:
    examples = read_examples(name, 20)
    assert (examples.kind, len({record["label"] for record in examples})) == ("image", 10)
    assert examples.fingerprint != read_examples(name, 10).fingerprint


def test_folders_that_cannot_be_read_are_named(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"images, empty: has no image of type .*\.png"):
        load_examples(folder)


# ---- the reader ----------------------------------------------------------------------------------


def test_pixels_are_those_of_the_bases_own_processor(base: str, folder: Path) -> None:
    reader = load_processor(base)
    assert isinstance(reader, ImageReader)
    assert dict(reader.classes) == {name: number for number, name in enumerate(CLASSES)}
    file = folder / "dots" / "00.png"
    pixels = reader.pixels(str(file))
    small = Image.open(file).resize((8, 8), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(pixels, expected.float(), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_modes_of_eight_bits_become_colours(mode: str, base: str, tmp_path: Path) -> None:
    file = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new("RGB", (9, 9), (255, 255, 255)).convert(mode).save(file)
    assert load_processor(base).pixels(str(file)).shape == (3, 8, 8)


def broken_images(folder: Path) -> dict[str, Path]:
    """Files that are no image of 8 bits, by what is said of them."""
    files = {
        "is no image that can be read": folder / "text.png",
        "is a damaged image": folder / "cut.png",
        "more than 8 bits a colour": folder / "deep.png",
        "several pictures": folder / "moving.gif",
    }
    folder.mkdir(parents=True, exist_ok=True)
    files["is no image that can be read"].write_text("no image")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "whole.png")
    files["is a damaged image"].write_bytes((folder / "whole.png").read_bytes()[:6000])
    (folder / "whole.png").unlink()
    Image.fromarray(noise[..., 0].astype(np.uint16) * 256).save(folder / "deep.png")
    frames = [Image.fromarray(noise), Image.fromarray(255 - noise)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return files


def test_files_that_are_no_such_images_are_named(base: str, tmp_path: Path) -> None:
    reader = load_processor(base)
    for words, file in broken_images(tmp_path / "images" / "bars").items():
        with pytest.raises(UserError, match=f"{file.name} .*{words}|{file.name} {words}"):
            reader.pixels(str(file))
    with pytest.raises(UserError, match=r"4 bad rows: bars/cut.png: is a damaged .*and 1 more"):
        MODALITY.check(load_examples(tmp_path / "images"), reader)


def test_classes_that_the_head_does_not_have_are_named(base: str, tmp_path: Path) -> None:
    images = save_images(tmp_path, {"bars": 1, "zigzag": 1})
    for refuse in (MODALITY.check, MODALITY.rows):
        with pytest.raises(UserError, match=r"no class 'zigzag'; its 3 classes are 'bars', 'dots'"):
            refuse(load_examples(images), load_processor(base))


def test_the_processor_goes_beside_a_saved_model(base: str, tmp_path: Path) -> None:
    load_model(base).save_pretrained(tmp_path)
    load_processor(base).save_pretrained(tmp_path)
    again = load_processor(str(tmp_path))
    assert again.fingerprint == load_processor(base).fingerprint


# ---- rows, batches, probe ------------------------------------------------------------------------


def test_rows_are_pixels_and_numbers_of_classes(base: str, folder: Path) -> None:
    examples, reader = load_examples(folder), load_processor(base)
    rows = MODALITY.rows(examples, reader, max_length=512, pack="auto")
    batch = rows.join([rows[0], rows[1], rows[0]])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1, 0]
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])
    assert (rows.tokens, rows.several) == (len(rows), False) == (9, False)
    assert rows.fingerprint == MODALITY.rows(load_examples(folder), reader).fingerprint
    assert rows.fingerprint != MODALITY.rows(load_examples(folder, limit=8), reader).fingerprint
    with pytest.raises(UserError, match="cannot be packed"):
        MODALITY.rows(examples, reader, pack=True)
    with pytest.raises(UserError, match="does not know the classes"):
        MODALITY.rows(examples, reader.processor)


def test_decoded_images_are_kept_up_to_a_bound(
    base: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgetless.data.images.KEPT_BYTES", 2 * 3 * 8 * 8 * 4)
    reader = load_processor(base)
    rows, alike = (ImageRows(load_examples(folder), reader) for _ in range(2))
    other = ImageRows(load_examples(folder, limit=3), reader)

    def read(rows: ImageRows) -> list[torch.Tensor]:
        return [rows[index]["pixel_values"] for index in range(3)]

    def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> list[bool]:
        assert all(map(torch.equal, one, two))
        return [a is b for a, b in zip(one, two, strict=True)]

    first = read(rows)
    assert same(first, read(rows)) == [True, True, False]
    assert same(first, read(alike)) == [True, True, False]  # of whatever data set has this content
    others = read(other)  # and the one in use before goes
    assert same(others, read(other)) == [True, True, False]
    assert same(first, read(rows)) == [False, False, False]


def test_images_to_keep_may_be_of_any_class(base: str, tmp_path: Path) -> None:
    images = str(save_images(tmp_path, {"dots": 4, "zigzag": 4}))
    model, reader = load_model(base), load_processor(base)
    options: dict[str, Any] = {"samples": 5, "batch_size": 2, "seed": 1}
    made = MODALITY.batches(images, model, reader, **options)
    assert [len(batch["pixel_values"]) for batch in made] == [2, 2, 1]
    assert {int(label) for batch in made for label in batch["labels"]} == {1, IGNORED}
    again = MODALITY.batches(images, model, reader.processor, **options)
    assert all(
        torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(made, again, strict=True)
    )
    with pytest.raises(UserError, match="says nothing by itself"):
        MODALITY.batches("self", model, reader)


def test_batches_of_training_data_have_their_classes(base: str, folder: Path) -> None:
    made = training_batches(str(folder), load_model(base), load_processor(base), batch_size=4)
    assert [len(batch["labels"]) for batch in made] == [4, 4, 1]
    assert sorted(torch.cat([batch["labels"] for batch in made]).tolist()) == sorted(
        [0] * 3 + [1] * 2 + [2] * 4
    )


def test_the_probe_is_that_of_the_config(base: str) -> None:
    probe = MODALITY.probe(load_model(base))
    assert probe["pixel_values"].shape == (4, 3, 8, 8)
    assert torch.equal(probe["pixel_values"], MODALITY.probe(load_model(base))["pixel_values"])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_probe_is_of_the_images_that_a_model_of_texts_and_images_reads(kind: str) -> None:
    config = CONFIG_MAPPING[kind](vision_config=VIT_SIZES | {"num_channels": 1}, num_labels=2)
    model = AutoModelForImageClassification.from_config(config)
    assert model(**MODALITY.probe(model)).logits.shape == (4, 2)
    assert ImageReader.of(ViTImageProcessorPil(), config).channels == 1


@pytest.mark.parametrize("build", [load_model, meta_model])
def test_a_processor_of_another_size_shows_before_training(
    build: Any, folder: Path, tmp_path: Path
) -> None:
    other = save_classifier(tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 16, "width": 16}
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    rows = MODALITY.rows(load_examples(folder), load_processor(str(other)))
    with pytest.raises(UserError, match=r"cannot read .*\(3, 16, 16\)"):
        rows.require_fitting(build(str(other)))


def test_each_modality_refuses_the_others_examples(base: str, folder: Path) -> None:
    model, language = load_model(base), modality_of("pocket")
    with pytest.raises(UserError, match="of kind 'text', and here those of kind 'image' are read"):
        MODALITY.batches("pocket:knowledge", model, load_processor(base))
    with pytest.raises(UserError, match="of kind 'image', and here those of kind 'messages' or"):
        language.rows(load_examples(folder), load_processor("pocket"))
    with pytest.raises(UserError, match="of kind 'image', and here"):
        language.batches(str(folder), load_model("pocket"), load_processor("pocket"))


def test_a_base_with_no_processor_is_named(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    head = head_of(str(tmp_path))
    assert head is not None
    assert head.noun == "an image classifier"
    with pytest.raises(UserError, match="no image processor that can be loaded"):
        load_processor(str(tmp_path))


def test_training_images_vary_by_seed_epoch_and_place_alone(base: str, folder: Path) -> None:
    reader, examples = load_processor(base), load_examples(folder)
    plain = MODALITY.rows(examples, reader)
    how = {"augment": AugmentSettings(flip=True, crop=1), "seed": 3}
    rows, again = (MODALITY.rows(examples, reader, **how) for _ in range(2))
    assert isinstance(rows, ImageRows)
    assert rows.fingerprint == again.fingerprint != plain.fingerprint

    def pixels(given: Any) -> list[torch.Tensor]:
        return [given[index]["pixel_values"] for index in range(len(given))]

    first, still = pixels(rows), pixels(plain)
    rows.set_epoch(1)
    second = pixels(rows)
    Mixture([rows, rows], [1, 1], seed=0).set_epoch(1)
    assert all(map(torch.equal, second, pixels(rows)))
    assert all(map(torch.equal, first, reversed([again[n]["pixel_values"] for n in
        reversed(range(len(again)))])))  # fmt: skip
    assert not all(map(torch.equal, first, second))
    assert all(map(torch.equal, still, pixels(plain)))
    padded = [torch.nn.functional.pad(each, (1, 1, 1, 1)) for each in still]
    for found, whole in zip([*first, *second], [*padded, *padded], strict=True):
        side = found.shape[-1]
        moved = [whole[:, a : a + side, b : b + side] for a in range(3) for b in range(3)]
        mirrored = [
            torch.nn.functional.pad(whole[:, 1:-1, 1:-1].flip(-1), (1, 1, 1, 1))[
                :, a : a + side, b : b + side
            ]
            for a in range(3)
            for b in range(3)
        ]
        assert any(torch.equal(found, each) for each in [*moved, *mirrored])
    batches = MODALITY.batches(str(folder), load_model(base), reader, samples=4, batch_size=4)
    assert all(any(torch.equal(x, y) for y in still) for x in batches[0]["pixel_values"])
