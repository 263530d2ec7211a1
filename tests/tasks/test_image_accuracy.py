"""Accuracy under a classifier's own head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import forgetless as fl
from forgetless.core.errors import UserError
from forgetless.data.examples import load_examples
from forgetless.data.modality import load_processor
from forgetless.models.load import load_model
from forgetless.scores.comparison import compare
from forgetless.tasks import Item, TaskResult, make_task
from forgetless.tasks.journal import resuming
from tests.families import FAMILIES
from tests.images import save_classifier, save_images


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_classifier(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"), {"bars": 5, "dots": 5, "wedge": 5})


def test_it_is_the_share_that_the_head_finds_likeliest(base: str, folder: Path) -> None:
    model, reader = load_model(base), load_processor(base)
    found = fl.evaluate(model, {"kind": "image_accuracy", "path": str(folder)}, reader)
    result = found["image_accuracy"]
    examples = load_examples(folder)
    with torch.no_grad():
        pixels = torch.stack([reader.pixels(record["image"]) for record in examples])
        logits = model(pixel_values=pixels).logits
    labels = torch.tensor([reader.classes[record["label"]] for record in examples])
    assert result.value == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert result.extra["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
    )
    assert result.right_or_wrong
    assert [item.expected for item in result.items[:3]] == ["bars", "dots", "wedge"]
    assert result.items[0].prompt == "bars/00.png"
    assert {item.answer for item in result.items} <= set(reader.classes)


def test_what_is_not_recognised_comes_with_a_picture(
    base: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task({"kind": "image_accuracy", "path": str(folder)})
    model, reader = load_model(base), load_processor(base)
    items = task.evaluate(model, reader).items
    wrong = [item for item in items if item.score == 0]
    assert 2 <= len(wrong) < len(items)
    assert all(bool(item.picture) == (item.score == 0) for item in items)
    assert [Item.from_json(item.to_json()) for item in items] == list(items)
    assert "picture" not in next(item for item in items if item.score == 1).to_json()
    monkeypatch.setattr("forgetless.tasks.accuracy._MOST_PICTURES", 1)
    assert [item.id for item in task.evaluate(model, reader).items if item.picture] == [wrong[0].id]


def test_a_comparison_has_the_picture_of_whichever_did_not_recognise_it() -> None:
    def scores(right: bool, picture: str) -> dict[str, TaskResult]:
        item = Item("0", "a.png", "bars", "bars" if right else "dots", float(right), 1.0, picture)
        return {"t": TaskResult("t", "accuracy", 1.0, 0.0, 1, True, "same", items=(item,))}

    for before, after in (((True, ""), (False, "p")), ((False, "p"), (True, ""))):
        [row] = compare(scores(*before), scores(*after)).rows
        assert row.changes[0].picture == "p"
        assert "picture" not in row.changes[0].to_json()


def test_neither_batch_size_nor_the_kind_of_processor_changes_it(base: str, folder: Path) -> None:
    task = make_task({"kind": "image_accuracy", "path": str(folder)})
    model, reader = load_model(base), load_processor(base)
    whole = task.evaluate(model, reader)
    assert task.evaluate(model, reader.processor, batch_size=2).items == whole.items
    assert fl.evaluate(model, task)[task.name].items == whole.items  # by the model's own folder


def test_the_model_is_left_as_it_was(base: str, folder: Path, tmp_path: Path) -> None:
    task = make_task({"kind": "image_accuracy", "path": str(folder)})
    model = load_model(base).train()
    model.classifier.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    random = torch.get_rng_state()
    result = task.evaluate(model, load_processor(base), batch_size=4)
    assert all(module.training for module in model.modules())
    assert [w.requires_grad for w in model.classifier.parameters()] == [False, False]
    assert model.vit.embeddings.cls_token.requires_grad
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    with resuming(tmp_path / "partial.jsonl", "a"):
        task.evaluate(model, load_processor(base), batch_size=4)
    model.classifier = torch.nn.Identity()  # is not asked again
    with resuming(tmp_path / "partial.jsonl", "a"):
        assert task.evaluate(model, load_processor(base), batch_size=4).items == result.items


def test_mistakes_show_when_the_task_is_made(tmp_path: Path) -> None:
    for path, words in (
        (str(tmp_path / "nowhere"), "must be a folder or a file of images"),
        ("pocket:knowledge", "unknown pocket images"),
        (str(tmp_path), "holds no data set"),
    ):
        with pytest.raises(UserError, match=words):
            make_task({"kind": "image_accuracy", "path": path})
    with pytest.raises(UserError, match="limit must be a whole number"):
        make_task({"kind": "image_accuracy", "path": "pocket:digits", "limit": 0})


def test_tasks_of_one_modality_refuse_models_of_another(base: str, folder: Path) -> None:
    with pytest.raises(UserError, match="'kl' is not for an image classifier, which this model is"):
        fl.evaluate(
            load_model(base),
            {"kind": "kl", "path": "pocket:held"},
            load_processor(base),
            reference=load_model(base),
        )
    task = {"kind": "image_accuracy", "path": str(folder)}
    with pytest.raises(UserError, match="not for a causal language model"):
        fl.evaluate(FAMILIES["llama"].model(), task, load_processor(base))
    with pytest.raises(UserError, match="holds examples of kind 'image'"):
        make_task({"kind": "perplexity", "path": str(folder)})


def test_the_shipped_classifier_recognises_what_it_knows() -> None:
    task = {"kind": "image_accuracy", "path": "pocket:shapes:test", "limit": 50}
    assert fl.evaluate(load_model("pocket-vision"), task)["image_accuracy"].value > 0.9
