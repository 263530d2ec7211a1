"""Text in any language, in folders and files with names in any language, through the main verbs."""

from __future__ import annotations

import ast
import io
import json
import shlex
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forgetless.adapters.card import usage
from forgetless.cli import main
from forgetless.core.files import read_json, read_jsonl
from forgetless.recipes.recipe import Recipe
from tests.cli.test_cli import forgetless  # noqa: F401 - a fixture
from tests.tiny import SPECIAL, save_base

pytest_plugins = ["tests.tiny_fixtures"]

PAIRS = [
    ("德国的首都是哪里？", "柏林"),
    ("日本の首都は？", "東京"),
    ("ما هي عاصمة مصر؟", "القاهرة"),
    ("Wie heißt „groß“ auf Türkisch?", "büyük"),
    ("🇫🇷 → 🗼?", "👩‍👩‍👧 Paris"),
    ("עיר הבירה של ישראל?", "ירושלים"),
]
KEPT = "Die Straße führt über Köln.\n\n長い文章もあります。\n\nوهذا نص آخر.\n\nИ это тоже 🙂.\n"


def of_bytes() -> PreTrainedTokenizerFast:
    """One token a byte, so that a text of any language comes back as it was."""
    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a base, rows to learn, rows to test and text to keep."""
    folder = tmp_path / "Größe & Maß 数据 📁 #1"
    folder.mkdir()
    save_base(folder / "模型 für alle", words=of_bytes())
    for name, pairs in (("обучение 训练", PAIRS * 4), ("テスト", PAIRS)):
        rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    asked = [{"question": prompt, "answer": answer} for prompt, answer in PAIRS]
    (folder / "問題.json").write_text(json.dumps(asked), encoding="utf-8")
    (folder / "zu behalten.txt").write_text(KEPT * 3, encoding="utf-8")
    return folder


def test_from_a_new_recipe_to_the_page_and_the_plain_adapter(
    place: Path,
    forgetless: Any,  # noqa: F811
) -> None:
    base, recipe, plain = place / "模型 für alle", place / "رسالة.yaml", place / "出力"
    learned, kept = place / "обучение 训练.jsonl", place / "zu behalten.txt"
    tested, questions = place / "テスト.jsonl", place / "問題.json"

    told = forgetless("new", base, learned, "--keep", kept, "--test", tested, "--out", recipe)
    commands = [shlex.split(line) for line in told.out.splitlines() if "forgetless " in line]
    assert commands[0] == ["forgetless", "data", str(base), str(learned)]
    assert commands[-1] == ["forgetless", "run", str(recipe)]
    assert f"base: {base}\n" in recipe.read_text(encoding="utf-8").replace("'", "")
    assert Recipe.load(str(recipe)).base == str(base)
    assert forgetless(*commands[0][1:]).code == 0

    short = ["--set", "training.steps=2", "--set", "name=試験 ü", "--out", place / "runs – 実行"]
    told = forgetless("run", recipe, *short)
    assert told.code == 0
    (run,) = (file.parent for file in (place / "runs – 実行").glob("*/*/run.json"))
    assert told.out.splitlines()[-1] == str(run)
    items = read_jsonl(run / "items" / "final" / "new_task.jsonl")
    assert [item["prompt"] for item in items] == [prompt + answer for prompt, answer in PAIRS]
    code = ast.walk(ast.parse("\n".join(usage(run / "adapter", str(base)))))
    named = {node.value for node in code if isinstance(node, ast.Constant)}
    assert {str(base), str(run / "adapter")} <= named

    asked = ["chat", run, PAIRS[2][0], "--max-new-tokens", 2]
    assert json.loads(forgetless(*asked, "--json").out)["prompt"] == PAIRS[2][0]
    assert forgetless("export", run, "--out", plain).code == 0
    assert read_json(plain / "adapter_config.json")["base_model_name_or_path"] == str(base)
    tasks = f"perplexity:{kept},generate:{questions}"
    measured = ["--adapter", plain, "--tasks", tasks, "--max-new-tokens", 2]
    assert forgetless("eval", base, *measured, "--report", place / "页").code == 0
    assert forgetless("report", run.parent).code == 0
    for page in (place / "页", run.parent):
        (index,) = page.rglob("index.html")
        assert f"base {place.name}/{base.name}" in unescape(index.read_text(encoding="utf-8"))


def test_what_a_terminal_cannot_show_does_not_end_a_command(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="latin-1"))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["data", str(place / "模型 für alle"), str(place / "テスト.jsonl")])
    assert PAIRS[0][1].encode("latin-1", "backslashreplace") in shown.getvalue()
