"""The page of the methods is what the code says."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from forgetless.methods import METHODS
from forgetless.methods.table import as_markdown, as_text, entries

ROOT = Path(__file__).resolve().parents[2]


def without_times(page: str) -> str:
    """The page with its last column left out."""
    return re.sub(r" [^|\n]*\|$", "", page, flags=re.MULTILINE)


def test_the_committed_page_is_the_generated_one() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert without_times(page) == without_times(as_markdown({})), "run: python docs/make.py"


def test_times_come_from_the_committed_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    rows = [{"method": "pissa", "block s": 12.345}, {"method": "olora", "block s": 144.8}]
    (tmp_path / "start.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(make, "TIMES", tmp_path / "start.json")
    page = as_markdown(make.seconds())
    assert re.search(r"^\| `pissa` .* \| 12 s \|$", page, flags=re.MULTILINE)
    assert re.search(r"^\| `olora` .* \| 140 s \|$", page, flags=re.MULTILINE)
    assert re.search(r"^\| `milora` .* \| – \|$", page, flags=re.MULTILINE)
    monkeypatch.setattr(make, "TIMES", tmp_path / "missing.json")
    assert make.seconds() == {}


def test_the_rank_of_an_export_follows_from_the_start() -> None:
    ranks = {entry.name: entry.export_rank for entry in entries()}
    assert ranks["lora"] == ranks["mica"] == ranks["lora_null_v2"] == ranks["eva"] == "r"
    assert ranks["pissa"] == ranks["lora_null_v1"] == ranks["olora"] == "2r"
    assert ranks["full"] == "–"


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_text_fits_the_terminal_and_names_every_method(width: int) -> None:
    lines = as_text(width).splitlines()
    assert max(map(len, lines)) <= width
    assert [line for line in lines if line and not line.startswith(" ")] == list(METHODS)
    for entry in entries():
        if entry.paper != "—":
            assert entry.paper.split()[-1] in as_text(width)
