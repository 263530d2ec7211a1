"""A text is shared out: nothing twice, nothing lost, and the held part stands for the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forgetless.core.errors import UserError
from forgetless.data.held import hold_out, write_texts
from forgetless.data.texts import read_examples


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
