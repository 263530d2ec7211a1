"""Every example script trains, resumes exactly, and exports what it trained."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from forgetless.models.load import load_model
from tests.families import token_batch

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINERS = ["trainer", "trl_sft", "trl_dpo", "trl_grpo", "torch_loop"]


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in (*TRAINERS, "peft_only", "sequence_loop"):
        sys.modules.pop(name, None)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=token_batch()["input_ids"]).logits
    return found


def moves(model: Any) -> dict[str, torch.Tensor]:
    return {name: w.detach() for name, w in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("name", TRAINERS)
def test_an_example_trains_resumes_and_exports(name: str, tmp_path: Path) -> None:
    main = importlib.import_module(name).main
    whole, half = tmp_path / "whole", tmp_path / "half"
    trained = main(["--out", str(whole), "--steps", "4"])
    assert any(moved.abs().max() > 0 for moved in moves(trained).values())

    exported = PeftModel.from_pretrained(load_model("pocket"), str(whole / "adapter"))
    assert torch.allclose(logits(exported), logits(trained), atol=1e-4)
    with trained.disable_adapter():
        assert torch.equal(logits(trained), logits(load_model("pocket")))

    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "checkpoint-4", ignore_errors=True)
    resumed = main(["--out", str(half), "--steps", "4", "--resume"])
    expected = moves(trained)
    assert all(torch.equal(move, expected[key]) for key, move in moves(resumed).items())


def test_a_sequence_by_hand_is_thirty_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("sequence_loop")
    batches = module.training_batches
    monkeypatch.setattr(module, "training_batches", lambda *given: list(batches(*given))[:4])
    text = (EXAMPLES / "sequence_loop.py").read_text()
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 30
    R = module.main(str(tmp_path), steps=2, limit=4)
    assert [len(row) for row in R] == [3, 3, 3]
    assert R[0][0] == 1.0
    base = load_model("pocket")
    first, both = logits(base), base
    for number in (1, 2):
        model = PeftModel.from_pretrained(both, str(tmp_path / f"adapter-{number}"))
        both = model.merge_and_unload()
        assert not torch.equal(logits(both), first)


def test_a_start_goes_through_a_tool_that_knows_only_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = importlib.import_module("peft_only").main(["--out", str(tmp_path), "--steps", "2"])
    said = capsys.readouterr().out
    assert "pocket_recall" in said
    assert "small: rank 4, relative error" in said
    served, small = (
        PeftModel.from_pretrained(load_model("pocket"), str(tmp_path / folder))
        for folder in ("trained", "small")
    )
    assert torch.allclose(logits(served), logits(model), atol=1e-5)
    assert not torch.equal(logits(small), logits(model))
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(base, logits(load_model("pocket")))
    assert not torch.equal(logits(model), base)


def test_every_example_is_tested() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {
        *TRAINERS,
        "peft_only",
        "sequence_loop",
    }
