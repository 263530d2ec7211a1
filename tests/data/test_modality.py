"""The contract between a kind of model and everything that is done to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from forgetless.adapters.attachment import attach
from forgetless.core.errors import UserError
from forgetless.core.processes import Processes
from forgetless.data.batches import Padding, TokenRows
from forgetless.data.examples import load_examples
from forgetless.data.language import MODALITY
from forgetless.data.mixture import Mixture
from forgetless.data.modality import Rows, load_processor, longest_first, modality_of
from forgetless.data.packing import IGNORED
from forgetless.data.tokens import tokenize
from forgetless.models.load import load_model
from forgetless.tasks import TASKS
from forgetless.training.devices import Share
from forgetless.training.loop import train
from forgetless.training.settings import TrainingSettings
from tests.families import FAMILIES, image_batch

pytest_plugins = ["tests.tiny_fixtures"]


def test_a_base_has_its_modality_by_name_and_by_class(tiny_base: Path) -> None:
    model = load_model(str(tiny_base))
    assert modality_of(str(tiny_base)) is modality_of("pocket") is MODALITY
    assert modality_of(model) is modality_of(attach(model, "lora", rank=2)) is MODALITY
    assert isinstance(load_processor(str(tiny_base)), MODALITY.processor_type)
    assert issubclass(MODALITY.processor_type, PreTrainedTokenizerBase)
    assert {MODALITY.loss_task, MODALITY.distance_task} <= TASKS.keys()


def test_a_base_of_no_modality_is_named(tmp_path: Path) -> None:
    FAMILIES["t5"].model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a T5ForConditionalGeneration, not a causal language"):
        modality_of(str(tmp_path))


def test_the_probe_is_that_of_the_config(tiny_base: Path) -> None:
    first, second = (MODALITY.probe(load_model(str(tiny_base))) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load_model(str(tiny_base))(**first).logits.shape[:2] == (4, 32)


def test_rows_are_made_of_examples_and_of_tokens(tiny_base: Path, tiny_files: Path) -> None:
    processor = load_processor(str(tiny_base))
    examples = load_examples(tiny_files / "train.jsonl")
    rows = MODALITY.rows(examples, processor, max_length=16, pack=False)
    again = MODALITY.rows(tokenize(examples, processor, max_length=16), processor)
    assert isinstance(rows, Rows)
    assert isinstance(Mixture([rows, again], [1, 1], 0), Rows)
    assert rows.fingerprint == again.fingerprint
    parts = longest_first([rows[index] for index in range(5)], 2)
    assert [len(part) for part in parts] == [2, 2, 1]
    for part in parts:
        joined = rows.join(part)
        assert all(torch.equal(joined[name], value) for name, value in Padding()(part).items())


def test_a_mixture_asks_every_source_whether_it_fits(tiny_base: Path, tiny_files: Path) -> None:
    examples, processor = load_examples(tiny_files / "train.jsonl"), load_processor(str(tiny_base))
    rows = MODALITY.rows(examples, processor, max_length=16)
    unknown = TokenRows(tokenize(examples, processor, max_length=16))
    unknown.flat["input_ids"][0] = 10**6
    with pytest.raises(UserError, match="the token 1000000"):
        Mixture([rows, unknown], [1, 1], 0).require_fitting(load_model(str(tiny_base)))


class Pictures:
    """Rows of another modality: images with a class each."""

    several = False
    fingerprint = "pictures"

    def __init__(self, number: int) -> None:
        self.batch = image_batch(number)

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**{name: each[index] for name, each in self.batch.items()}, "lengths": [1]}

    @property
    def tokens(self) -> int:
        return len(self)

    def join(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in rows]) for name in self.batch}

    def require_fitting(self, model: Any) -> None:
        assert model.config.num_channels == 1


def test_rows_of_another_modality_are_trained_on(tmp_path: Path) -> None:
    """Training asks the rows and nothing else: no token is named on its way."""
    model = attach(FAMILIES["vit"].model(), "pissa", rank=2)
    rows = Pictures(12)
    with torch.no_grad():
        before = float(model(**rows.batch).loss)
    settings = TrainingSettings(steps=12, batch_size=6, learning_rate=1e-2)
    done = train(model, None, rows, settings, tmp_path)
    with torch.no_grad():
        assert float(model.eval()(**rows.batch).loss) < before
    assert done.tokens == 12 * 6


def test_a_process_without_a_row_learns_nothing_from_anothers() -> None:
    tokens = datasets.Dataset.from_dict({"input_ids": [[3, 4, 5]], "labels": [[IGNORED, 4, 5]]})
    for rows in (Pictures(1), TokenRows(tokens)):
        batch = Share(rows.join, Processes(index=1, count=2))([rows[0]])
        assert batch["tokens"] == sum(rows[0]["lengths"])
        assert bool((batch["labels"] == IGNORED).all())
