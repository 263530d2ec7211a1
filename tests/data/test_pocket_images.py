"""The pictures of the pocket world, and the small classifier that knows half of their classes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, ViTForImageClassification

from forgetless.data.pocket import images
from forgetless.data.pocket.images import CLASSES, DOMAINS, pictures
from forgetless.data.pocket.pretrain_images import KNOWN
from forgetless.models.pocket import image_base_path


def test_four_domains_of_ten_classes_have_pictures_of_one_size() -> None:
    assert [len(names) for names in DOMAINS.values()] == [10] * 4
    drawn = pictures(CLASSES, "train", 2)
    assert drawn.pixels.shape == (80, 16, 16, 3)
    assert drawn.labels[:3] == ("digit 0", "digit 0", "digit 1")


def test_a_picture_is_decided_by_its_class_split_and_number() -> None:
    some = ("digit 3", "star", "letter K", "bricks")
    drawn = pictures(some, "test", 3)
    again = pictures(some, "test", 2, first=1)
    assert np.array_equal(drawn.pixels[[1, 2, 4, 5, 7, 8, 10, 11]], again.pixels)
    assert not np.array_equal(drawn.pixels, pictures(some, "train", 3).pixels)


def test_the_scans_of_the_splits_are_apart() -> None:
    for scans in images._scans().values():
        kept = {hashlib.sha256(scan.tobytes()).hexdigest() for scan in scans[:40]}
        assert not kept & {hashlib.sha256(scan.tobytes()).hexdigest() for scan in scans[40:]}
        assert len(scans) > 100


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": ["cat"]}, "unknown class 'cat'"),
        ({"split": "valid"}, "split must be"),
        ({"per_class": 0}, "per_class must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_said(given: dict[str, object], message: str) -> None:
    asked = {"classes": ["star"], "split": "test", "per_class": 1} | given
    with pytest.raises(ValueError, match=message):
        pictures(**asked)  # type: ignore[arg-type]


def test_the_shipped_classifier_knows_the_digits_and_the_shapes() -> None:
    folder = image_base_path()
    model = ViTForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    drawn = pictures(KNOWN, "test", 20)
    with torch.no_grad():
        inputs = processor(list(drawn.pixels), return_tensors="pt")
        found = model(**inputs).logits.argmax(-1).tolist()
    right = [
        model.config.id2label[guess] == name
        for guess, name in zip(found, drawn.labels, strict=True)
    ]
    assert sum(right) / len(right) > 0.93
    assert (folder / "model.safetensors").stat().st_size < 3_000_000
