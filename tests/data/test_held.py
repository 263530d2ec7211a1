"""A text is shared out: nothing twice, nothing lost, and the held part stands for the whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from forgetless.core.errors import UserError
from forgetless.data.examples import Examples, load_examples
from forgetless.data.held import hold_out, write_texts
from forgetless.data.image_rows import hash_of
from forgetless.data.pictures import open_image
from forgetless.data.texts import read_examples
from tests.images import save_images


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(found: Examples) -> list[tuple[str, str]]:
    """What each example says, and its class."""
    said = [
        hash_of(record["image"])
        if found.kind == "image"
        else " ".join(str(record.get(key)) for key in ("sentence", "pair", "text"))
        for record in found
    ]
    labels = found.labels or [record["label"] for record in found]
    return list(zip(said, map(str, labels), strict=True))


def test_one_in_five_is_held_out_and_none_is_in_both(tmp_path: Path) -> None:
    asked = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(23)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    rest, held = (rows(path) for path in hold_out(file, tmp_path / "parts"))
    assert held == asked[4::5]
    assert sorted(map(str, rest + held)) == sorted(map(str, asked))


def test_a_single_document_is_cut_at_white_space(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(2000)]
    (tmp_path / "old.txt").write_text(" ".join(words))
    parts = hold_out(tmp_path / "old.txt", tmp_path / "parts")
    rest, held = ([row["text"].split() for row in rows(path)] for path in parts)
    assert sorted(word for text in rest + held for word in text) == sorted(words)
    assert len(held) >= 2
    shares = sum(map(len, held)) / len(words)
    assert 0.1 < shares < 0.3


def test_a_short_document_has_two_parts_too(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("a b c d e f g h i j k l")
    rest, held = (rows(path) for path in hold_out(tmp_path / "old.txt", tmp_path / "parts"))
    assert len(held) >= 1
    assert len(rest) >= 4


def test_the_pocket_worlds_texts_and_texts_in_memory(tmp_path: Path) -> None:
    rest, held = hold_out("pocket:knowledge", tmp_path / "pocket")
    assert len(rows(rest)) > 3 * len(rows(held)) > 0
    rest, held = write_texts([f"text {i}" for i in range(10)] + [" "], tmp_path / "said")
    assert [row["text"] for row in rows(held)] == ["text 4", "text 9"]
    assert read_examples(rest).kind == "text"


def test_too_little_to_share_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    with pytest.raises(UserError, match="4 examples, too few"):
        hold_out(tmp_path / "few.jsonl", tmp_path / "parts")
    with pytest.raises(FileNotFoundError):
        hold_out(tmp_path / "nowhere.txt", tmp_path / "parts")


def test_of_examples_with_a_class_one_in_five_of_each_is_held_out(tmp_path: Path) -> None:
    save_images(tmp_path / "images", {"bars": 10, "dots": 5, "wedge": 10})
    said = [{"sentence": f"{label} {n}", "label": label} for label in "ab" for n in range(10)]
    pairs = [{"sentence1": "x", "sentence2": str(n), "label": n % 2} for n in range(10)]
    beside = [
        {"text": f"{label} " * 300 + str(n), "label": label} for label in "ab" for n in range(5)
    ]
    for name, rows_of in (("said", said), ("pairs", pairs), ("beside", beside)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    sources = [tmp_path / "images", *(tmp_path / f"{n}.jsonl" for n in ("said", "pairs", "beside"))]
    for source, classes in zip(sources, (3, 2, 2, 2), strict=True):
        parts = hold_out(source, tmp_path / "parts", kinds={"image", "sentence", "text"})
        whole, rest, held = (load_examples(path) for path in (source, *parts))
        assert whole.kind == rest.kind == held.kind
        assert len({label for _, label in contents(held)[:classes]}) == classes
        assert len(held) == len(whole) // 5
        assert sorted(contents(rest) + contents(held)) == sorted(contents(whole))


def test_pairs_without_a_class_are_shared_out_and_read_again(tmp_path: Path) -> None:
    """They are what the task `retrieval` has, and so a text to keep."""
    file = tmp_path / "pairs.jsonl"
    asked = [{"sentence1": f"a{i}", "sentence2": f"b{i}"} for i in range(11)]
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    parts = [rows(path) for path in hold_out(file, tmp_path, kinds={"sentence"})]
    assert sorted(map(str, parts[0] + parts[1])) == sorted(map(str, asked))
    assert len(read_examples(tmp_path / "held.jsonl")) == 2


def test_images_of_the_pocket_world_and_of_rows_keep_every_pixel(tmp_path: Path) -> None:
    for source in ("pocket:digits:test", str(tmp_path / "grey.npz")):
        if source.endswith(".npz"):
            pixels = np.random.default_rng(0).integers(0, 256, (10, 9, 7), np.uint8)
            np.savez(source, images=pixels, labels=np.arange(10) % 2)
        rest, held = hold_out(source, tmp_path / "parts", limit=20, kinds={"image"})
        before = {open_image(r["image"]).tobytes() for r in read_examples(source, 20)}
        after = [open_image(r["image"]).tobytes() for p in (rest, held) for r in load_examples(p)]
        assert set(after) == before
        assert len(after) == len(before)


def test_of_many_classes_with_few_examples_some_are_held_out_all_the_same(tmp_path: Path) -> None:
    save_images(tmp_path / "images", {"bars": 4, "dots": 4})
    rest, held = hold_out(tmp_path / "images", tmp_path / "parts", kinds={"image"})
    assert (len(rows(rest)), len(rows(held))) == (7, 1)
    with pytest.raises(UserError, match="kind 'image'"):
        hold_out(tmp_path / "images", tmp_path / "parts")
