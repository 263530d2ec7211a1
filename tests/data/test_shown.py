"""What is shown of an example is what training gives the model, and what it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forgetless.cli import main
from forgetless.core.errors import UserError
from forgetless.data.examples import Examples, from_rows
from forgetless.data.shown import shown, template_of
from forgetless.data.tokens import tokenize
from forgetless.models.load import load_tokenizer
from tests.tiny import tokenizer

pytest_plugins = ["tests.tiny_fixtures"]

CHAT = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "no", "weight": 0},
    {"role": "user", "content": "b?"},
    {"role": "assistant", "content": "yes"},
]


def only(row: dict[str, Any], words: Any, **options: Any) -> Any:
    (found,) = shown(from_rows([("line 7", row)], "x.jsonl"), words, 3, **options)
    return found


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        (
            {"prompt": "1+1=", "completion": " 2"},
            [("1+1=", False), (" 2</s>", True)],
        ),
        ({"text": "ab"}, [("a", False), ("b</s>", True)]),
        (
            {"messages": CHAT},
            [
                ("User: a?\nAssistant: no</s>\nUser: b?\nAssistant:", False),
                (" yes</s>", True),
                ("\n", False),
            ],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_pieces_are_what_is_shown_and_learned(
    row: dict[str, Any], pieces: list[tuple[str, bool]]
) -> None:
    words = tokenizer()
    found = only(row, words)
    assert [(piece.text, piece.learned) for piece in found.rows[0]] == pieces
    assert found.where == "x.jsonl, line 7"
    encoded = tokenize(from_rows([("line 7", row)], "x.jsonl"), words, pack=False)
    assert found.tokens == len(encoded[0]["input_ids"])
    assert found.learned == sum(label >= 0 for label in encoded[0]["labels"])
    assert "".join(piece.text for piece in found.rows[0]) == words.decode(encoded[0]["input_ids"])


def test_a_blank_between_shown_and_learned_is_kept(shared_data: Path) -> None:
    words = load_tokenizer(str(shared_data / "stories260K" / "hf"))  # a blank before every text
    for completion in (" dog", "dog"):
        found = only({"prompt": "A:", "completion": completion}, words)
        assert [piece.text for piece in found.rows[0]] == ["<s> A:", f"{completion}</s>"]


def test_what_does_not_fit_says_so() -> None:
    with pytest.warns(UserWarning, match="do not fit"):
        found = only({"prompt": "a" * 50, "completion": "b"}, tokenizer(), max_length=20)
    assert found.rows == []
    assert "no example has a token to learn" in found.problem
    with pytest.raises(UserError, match="'image'"):
        shown(Examples("image", [{"image": "a.png", "label": "b"}], "x"), tokenizer(), 1)


def test_templates_are_named() -> None:
    pairs = from_rows([("line 1", {"prompt": "a", "completion": "b"})], "x")
    talks = from_rows([("line 1", {"messages": CHAT})], "x")
    words = tokenizer()
    assert template_of(pairs, words) == "as they are, no chat template"
    assert template_of(talks, words) == "by a plain template"
    words.chat_template = "{{ messages }}"
    assert template_of(talks, words) == "by the tokenizer's chat template"


def test_the_command_marks_what_is_learned(
    tiny_base: Path, tiny_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["data", str(tiny_base), str(tiny_files / "train.jsonl"), "--examples", "2"]
    with pytest.raises(SystemExit) as ended:
        main(asked)
    said = capsys.readouterr().out
    assert not ended.value.code
    assert "24 examples, as they are, no chat template" in said
    assert "1+0=[[1</s>]]" in said
    assert "line 2" in said
    assert "line 3" not in said
    with pytest.raises(SystemExit):
        main([*asked, "--json"])
    first = json.loads(capsys.readouterr().out)[0]
    assert first["rows"][0][-1] == {"text": "1</s>", "learned": True}


def test_the_command_refuses_a_classifier(
    tiny_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "pocket-vision", str(tiny_files / "train.jsonl")])
    assert ended.value.code == 2
    assert "is no language model" in capsys.readouterr().err
