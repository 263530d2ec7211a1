"""`attach(keep=...)`: the text to keep itself, or a file of it, in place of its statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from forgetless.adapters.attachment import attach
from forgetless.core.errors import UserError
from forgetless.data.texts import batches
from forgetless.models.load import load_model, load_tokenizer
from forgetless.statistics.collection import collect

pytest_plugins = ["tests.tiny_fixtures"]


@pytest.mark.filterwarnings("ignore:.*fewer tokens than they have inputs")
@pytest.mark.parametrize("kind", ["text", "a line", "file", "path"])
def test_a_text_or_a_file_is_what_its_statistics_are(
    kind: str, tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    file = tiny_files / "old.txt"
    if kind == "a line":
        file = tmp_path / "line.txt"
        file.write_text("It was the best of times, it was the worst of times.")
    keep: Any = {"file": str(file), "path": file}.get(kind, file.read_text())
    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    stats = collect(model, batches(str(file), model, tokenizer))
    wanted = attach(model, "lora_null_v1", 2, stats=stats).state_dict()
    found = attach(load_model(str(tiny_base)), "lora_null_v1", 2, keep=keep).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_it_is_read_where_the_method_needs_it_alone(tiny_base: Path) -> None:
    attach(load_model(str(tiny_base)), "pissa", 2, keep="no-such-file.txt")
    with pytest.raises(FileNotFoundError, match=r"no such file: no-such-file\.txt"):
        attach(load_model(str(tiny_base)), "lora_null_v1", 2, keep="no-such-file.txt")
    with pytest.raises(FileNotFoundError, match=r"no such file: my old\.txt"):
        attach(load_model(str(tiny_base)), "lora_null_v1", 2, keep="my old.txt")


@pytest.mark.filterwarnings("ignore:.*fewer tokens than they have inputs")
def test_what_cannot_be(tiny_base: Path, tiny_files: Path) -> None:
    model = load_model(str(tiny_base))
    stats = collect(model, [{"input_ids": torch.arange(4, 40)[None]}])
    with pytest.raises(UserError, match="give stats= or keep=, not both"):
        attach(model, "lora_null_v1", 2, stats=stats, keep=str(tiny_files / "old.txt"))
    model.name_or_path = ""
    with pytest.raises(UserError, match=r"loaded from nowhere; pass stats=forgetless\.collect"):
        attach(model, "lora_null_v1", 2, keep=str(tiny_files / "old.txt"))
    assert not any("lora" in name for name, _ in model.named_modules())
