"""What is measured of classifiers beside accuracy: calibration, neighbours, drift, classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import forgetless as fl
from forgetless.core.errors import UserError
from forgetless.core.metrics import calibration_error
from forgetless.data.examples import load_examples
from forgetless.data.modality import load_processor
from forgetless.models.heads import add_head
from forgetless.models.load import load_model
from forgetless.scores.comparison import by_class, compare
from forgetless.scores.showing import sentence
from forgetless.tasks import make_task, neighbours
from forgetless.tasks.evaluation import Scores
from forgetless.tasks.journal import resuming
from tests.images import CLASSES, save_classifier, save_images
from tests.sentences import save_classifier as save_text_classifier
from tests.sentences import sentences, write_rows


def test_the_calibration_error_is_its_formula() -> None:
    # Two in the bin of 0.9 to 1 with a confidence of 0.95, one of them right; one right at 0.5.
    found = calibration_error([0.95, 0.95, 0.5], [1, 0, 1], bins=10)
    assert found == pytest.approx(2 / 3 * abs(0.5 - 0.95) + 1 / 3 * abs(1 - 0.5))
    assert calibration_error([1.0, 1.0], [1, 1]) == 0
    assert calibration_error([1.0, 0.0], [0, 1]) == 1
    random = np.random.default_rng(0)
    p = random.uniform(0.2, 1, 200_000)
    assert calibration_error(p, random.uniform(size=200_000) < p) < 0.01
    with pytest.raises(ValueError, match="as many confidences as answers"):
        calibration_error([], [])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_classifier(folder / "vit")
    save_text_classifier(folder / "llama", "llama")
    save_images(folder / "images", dict.fromkeys(CLASSES, 5))
    save_images(folder / "others", {"cross": 6, "ring": 6, "star": 6}, seed=1)
    write_rows(folder / "rows.jsonl", sentences(("sport", "trade", "world"), 4))
    return folder


def measured(world: Path, base: str, model: Any, **task: Any) -> Any:
    spec = {"name": "t", **task, "path": str(world / task["path"])}
    return fl.evaluate(model, spec, load_processor(str(world / base)))["t"]


def test_accuracy_says_how_sure_the_head_was(world: Path) -> None:
    model, reader = load_model(str(world / "vit")), load_processor(str(world / "vit"))
    found = measured(world, "vit", model, kind="image_accuracy", path="images")
    with torch.no_grad():
        pixels = [reader.pixels(r["image"]) for r in load_examples(world / "images")]
        p = model(pixel_values=torch.stack(pixels)).logits.softmax(-1).amax(-1)
    right = [item.score for item in found.items]
    assert found.extra["calibration_error"] == pytest.approx(calibration_error(p, right), abs=1e-5)


def test_neighbours_are_those_of_the_features(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reader = load_model(str(world / "vit")), load_processor(str(world / "vit"))
    examples = load_examples(world / "others")
    with torch.no_grad():
        pixels = torch.stack([reader.pixels(record["image"]) for record in examples])
        hidden = model.vit(pixel_values=pixels).last_hidden_state[:, 0]
    similar = normalize(hidden) @ normalize(hidden).T
    labels, right = [record["label"] for record in examples], []
    for row in range(len(labels)):
        similar[row, row] = -2
        best = similar[row].topk(3).indices.tolist()
        weights = dict.fromkeys(labels, 0.0)
        for place in best:
            weights[labels[place]] += float((similar[row, place] / 0.07).exp())
        right.append(max(weights, key=lambda name: weights[name]) == labels[row])
    for at_once in (1 << 22, 40):
        monkeypatch.setattr(neighbours, "_SIMILARITIES", at_once)
        found = measured(world, "vit", model, kind="neighbours", path="others", k=3)
        assert [item.score == 1 for item in found.items] == right
    assert found.value > 0.9  # the classes have colours of their own

    adapted = fl.attach(add_head(model, ["a", "b"]), "lora", 2, 2)
    again = measured(world, "vit", adapted, kind="neighbours", path="others", k=3)
    assert again.items == found.items
    everywhere = fl.attach(load_model(str(world / "vit")), "pissa", 3, 3)  # on the head as well
    again = measured(world, "vit", everywhere, kind="neighbours", path="others", k=3)
    assert again.items == found.items


def test_neighbours_are_found_among_other_examples(world: Path) -> None:
    task = {"kind": "neighbours", "path": "images", "train": str(world / "images"), "k": 1}
    model = load_model(str(world / "vit"))
    assert measured(world, "vit", model, **task).value == 1  # each finds itself
    assert measured(world, "vit", model, **{**task, "train": None}).n == 15
    llama = load_model(str(world / "llama"))
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    rows = {"kind": "neighbours", "path": "rows.jsonl", "train": str(world / "rows.jsonl"), "k": 1}
    assert measured(world, "llama", llama, **rows).value == 1
    assert all(torch.equal(before[name], weight) for name, weight in llama.state_dict().items())
    assert llama(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3)  # the head is back


def test_what_is_wrong_with_neighbours_is_told(world: Path) -> None:
    path = str(world / "images")
    for changes, words in (
        ({"k": 0}, "k must be a whole number"),
        ({"train_limit": 3}, "train_limit is for the examples of train"),
        ({"train": str(world / "rows.jsonl")}, "different kinds of examples"),
        ({"path": "nowhere"}, "a folder or a file of images or sentences"),
    ):
        with pytest.raises(UserError, match=words):
            make_task({"kind": "neighbours", "path": path, **changes})
    one = make_task({"kind": "neighbours", "path": path, "limit": 1})
    with pytest.raises(UserError, match="two examples or more"):
        one.evaluate(load_model(str(world / "vit")), load_processor(str(world / "vit")))
    with pytest.raises(UserError, match="not for a text classifier"):
        one.evaluate(load_model(str(world / "llama")), load_processor(str(world / "llama")))


@pytest.mark.parametrize("base", ["vit", "llama"])
def test_the_drift_is_a_kl_under_the_own_head(base: str, world: Path, tmp_path: Path) -> None:
    path = "others" if base == "vit" else "rows.jsonl"
    if base == "llama":  # the classes do not matter, and need not be there
        write_rows(tmp_path / "rows.jsonl", [{"text": f"{n} rows"} for n in range(6)])
        path = str(tmp_path / "rows.jsonl")
    reference = load_model(str(world / base))
    model = fl.attach(add_head(load_model(str(world / base)), ["a", "b"]), "lora", 2, 2)
    task = {"kind": "class_kl", "path": path}
    still = measured(world, base, model, **task)
    assert still.value == 0
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    found = measured(world, base, model, **task)
    assert 0 < found.value < 5
    assert 0 <= found.extra["top1_agreement"] <= 1
    (row,) = compare(Scores([still]), Scores([found]))
    assert "nats per example away" in sentence(row)
    assert "likeliest class agrees" in sentence(row)
    made = make_task({**task, "name": "t", "path": str(world / path)})
    processor = load_processor(str(world / base))
    apart = made.evaluate(model, processor, reference=reference, batch_size=4)
    assert apart.value == pytest.approx(found.value, rel=1e-5)
    with resuming(tmp_path / "partial.jsonl", "a"):
        assert made.evaluate(model, processor).items == found.items
    with pytest.raises(UserError, match="needs the base to compare with"):
        made.evaluate(load_model(str(world / base)), processor)
    if base == "vit":
        with torch.no_grad():
            pixels = [processor.pixels(r["image"]) for r in load_examples(world / "others")]
            ours, base_ = (
                one.eval()(pixel_values=torch.stack(pixels)).logits[:, :3].log_softmax(-1)
                for one in (model, reference)
            )
        expected = (base_.exp() * (base_ - ours)).sum(-1).mean()
        assert found.value == pytest.approx(float(expected), rel=1e-3)


def test_a_comparison_says_what_each_class_is_taken_for(world: Path) -> None:
    model, processor = load_model(str(world / "vit")), load_processor(str(world / "vit"))
    task = {"kind": "image_accuracy", "name": "t", "path": str(world / "images")}
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([5.0, 0.0, 0.0]))
    before = fl.evaluate(model, task, processor)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))
    (row,) = compare(before, fl.evaluate(model, task, processor))
    assert [(c.name, c.n, c.before, c.after, c.taken_for) for c in row.classes] == [
        ("bars", 5, 5, 0, {"dots": 5}),
        ("wedge", 5, 0, 0, {"dots": 5}),
        ("dots", 5, 0, 5, {}),
    ]
    assert row.classes == by_class(row.changes)
    assert row.to_json()["classes"][0]["taken_for"] == {"dots": 5}
    assert "calibration error 0." in sentence(row)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("kind", ["sentence_accuracy", "class_kl", "neighbours"])
def test_sentences_longer_than_the_model_are_cut_off(
    family: str, kind: str, tmp_path: Path
) -> None:
    base = str(save_text_classifier(tmp_path / "base", family))
    model = fl.attach(load_model(base), "random_slice", 2, 2)
    rows = sentences(("sport", "trade"), 3, "sentence")
    found: list[Any] = []
    for tail in (" goal" * 40, " sold" * 40):
        longer = [{**row, "sentence": f"{row['sentence']:<64}{tail}"} for row in rows]
        file = write_rows(tmp_path / f"{len(found)}.jsonl", longer)
        with pytest.warns(UserWarning, match="6 of 6 sentences have more than 6[34] tokens; their"):
            found.append(fl.evaluate(model, {"kind": kind, "name": "t", "path": file})["t"])
    one, other = found
    assert one.value == other.value
    assert [item.answer for item in one.items] == [item.answer for item in other.items]
