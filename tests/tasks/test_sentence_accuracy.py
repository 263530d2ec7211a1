"""Accuracy of a text classifier under its own head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import forgetless as fl
from forgetless.core.errors import UserError
from forgetless.models.load import load_model, load_tokenizer
from forgetless.tasks import make_task
from tests.sentences import CLASSES, save_classifier, sentences, write_rows
from tests.tiny import tokenizer


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_is_the_share_that_the_head_finds_likeliest(family: str, tmp_path: Path) -> None:
    base = str(save_classifier(tmp_path / "base", family))
    rows = sentences(CLASSES, 5, "text")
    task = make_task(
        {"kind": "sentence_accuracy", "path": write_rows(tmp_path / "rows.jsonl", rows)}
    )
    model = load_model(base)
    result = fl.evaluate(model, task)[task.name]
    with torch.no_grad():
        logits = torch.cat(
            [
                model(input_ids=tokenizer()(row["text"], return_tensors="pt")["input_ids"]).logits
                for row in rows
            ]
        )
    labels = torch.tensor([CLASSES.index(row["label"]) for row in rows])
    assert result.value == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert result.extra["loss"] == pytest.approx(loss.item(), rel=1e-4)
    again = task.evaluate(model, load_tokenizer(base), batch_size=2)
    assert [item.answer for item in again.items] == [item.answer for item in result.items]
    other = write_rows(tmp_path / "other.jsonl", [{**row, "label": 0} for row in rows])
    assert make_task({"kind": "sentence_accuracy", "path": other}).fingerprint != task.fingerprint


def test_a_task_on_other_data_or_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="path must be a file of sentences"):
        make_task({"kind": "sentence_accuracy", "path": "nowhere.jsonl"})
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match="'prompt_completion'"):
        make_task({"kind": "sentence_accuracy", "path": prompts})
    file = write_rows(tmp_path / "rows.jsonl", [{"sentence": "a", "label": "unheard of"}])
    base = str(save_classifier(tmp_path / "base"))
    with pytest.raises(UserError, match=r"line 1: .* no class 'unheard of'"):
        fl.evaluate(load_model(base), {"kind": "sentence_accuracy", "path": file})
