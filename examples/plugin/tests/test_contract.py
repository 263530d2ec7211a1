"""The shipped contract suite, on what this package adds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forgetless_quiet.method import METHOD

import forgetless as fl
from forgetless.data.modality import load_processor
from forgetless.models.load import load_model
from forgetless.testing import check_method, check_penalty, check_task


def test_the_method() -> None:
    check_method(METHOD)
    assert fl.METHODS["quiet_inputs"] is METHOD


def test_the_task(tmp_path: Path) -> None:
    prompts = ["The capital of France is", "The capital of Peru is", "Gold has the symbol"]
    rows = "".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in prompts)
    (tmp_path / "prompts.jsonl").write_text(rows)
    path = str(tmp_path / "prompts.jsonl")
    found = check_task({"kind": "brief", "path": path, "max_new_tokens": 8})
    assert found.n == len(prompts)
    with pytest.raises(ValueError, match="words must be a whole number"):
        check_task({"kind": "brief", "path": path, "words": 0})


def test_the_penalty() -> None:
    model = fl.attach(load_model("pocket"), "lora", rank=2)
    check_penalty({"kind": "l1_start", "weight": 0.1}, model, load_processor("pocket"))
