"""What holds of a classifier of any modality: its starts and its continued runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import forgetless as fl
from forgetless.adapters.attachment import attach
from forgetless.data.examples import load_examples
from forgetless.data.modality import load_processor, modality_of
from forgetless.models.load import load_model
from forgetless.models.state import adapter_off
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.gradients import collect_gradients
from forgetless.studies.run import run


@cache
def _needs(base: str, keep: str, train: Path, classes: Sequence[str]) -> dict[str, Any]:
    """What starts are made from: statistics of the text to keep, and gradients of the task."""
    model = load_model(base, new_classes=classes)
    reader, modality = load_processor(base), modality_of(model)
    if classes:
        reader = reader.with_new(classes)
    stats = fl.collect(model, modality.batches(keep, model, reader, samples=12, batch_size=4))
    rows = modality.rows(load_examples(train), reader, max_length=64)
    labelled = [rows.join([rows[index] for index in range(4)])]
    return {
        "stats": stats, "task_stats": stats, "gradients": collect_gradients(model, labelled)
    }  # fmt: skip


def check_start(
    method: str, base: Path, keep: Path, train: Path, classes: Sequence[str] = ()
) -> None:
    """At step 0 and with the adapter off the model is the base bit for bit.

    With `classes` it has a new head for them.
    """
    model = load_model(str(base), new_classes=classes)
    probe = modality_of(model).probe(model)
    with torch.no_grad():
        before = model(**probe).logits
    needs = _needs(str(base), str(keep), train, tuple(classes))
    adapted = attach(model, method, rank=2, alpha=2, **needs)
    with torch.no_grad():
        assert torch.equal(adapted(**probe).logits, before)
        adapted.train()
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.01)
        adapted.eval()
        assert not torch.equal(adapted(**probe).logits, before)
        with adapter_off(adapted):
            assert torch.equal(adapted(**probe).logits, before)


def check_stopped(recipe: Recipe, out: Path) -> None:
    """A run that is stopped after its third step comes to the scores and weights of a whole one."""
    whole = run(recipe, out / "whole")

    def stop(event: Any) -> None:
        if event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, out / "stopped", listen=stop)
    again = run(recipe, out / "stopped")
    assert [row["score"] for row in again.scores] == [row["score"] for row in whole.scores]
    for file in whole.folder.rglob("*.safetensors"):
        assert file.read_bytes() == (again.folder / file.relative_to(whole.folder)).read_bytes()
