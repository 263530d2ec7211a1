"""Sentences with a class, as a text classifier reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from forgetless.core.errors import UserError
from forgetless.data.examples import load_examples
from forgetless.data.modality import Rows, load_processor, modality_of, training_batches
from forgetless.models.load import load_model
from forgetless.recipes.checking import check
from forgetless.recipes.recipe import Recipe
from tests.sentences import CLASSES, FAMILIES, save_classifier, sentences, write_rows

pytest_plugins = ["tests.tiny_fixtures"]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_classifier(tmp_path_factory.mktemp("base"), request.param))


@pytest.mark.parametrize("pairs", [False, True])
def test_a_batch_gives_what_each_row_alone_gives(base: str, pairs: bool, tmp_path: Path) -> None:
    """Padding on the right, of which the last-token pooling of a decoder takes no notice."""
    rows = sentences(CLASSES, 4)
    if pairs:
        rows = [
            {"sentence1": row["sentence"], "sentence2": "so " * (n % 3 + 1), "label": row["label"]}
            for n, row in enumerate(rows)
        ]
    examples = load_examples(write_rows(tmp_path / "rows.jsonl", rows))
    model, reader = load_model(base), load_processor(base)
    modality = modality_of(base)
    read = modality.rows(examples, reader, max_length=64)
    assert isinstance(read, Rows)
    batch = read.join([read[number] for number in range(len(read))])
    assert int(batch["attention_mask"].sum()) == read.tokens < batch["input_ids"].numel()
    plain = AutoModelForSequenceClassification.from_pretrained(base).eval()
    with torch.no_grad():
        together = model(**batch)
        is_bert = plain.config.model_type == "bert"
        assert ("token_type_ids" in batch) is is_bert
        for number, row in enumerate(rows):
            texts = [row["sentence1"], row["sentence2"]] if pairs else [row["sentence"]]
            given = reader.processor(*texts, return_tensors="pt")
            alone = plain(**given).logits[0]
            assert torch.allclose(together.logits[number], alone, atol=1e-5)
    labels = torch.tensor([CLASSES.index(row["label"]) for row in rows])
    expected = torch.nn.functional.cross_entropy(together.logits, labels)
    assert float(together.loss) == pytest.approx(float(expected), rel=1e-5)


def test_labels_are_names_or_numbers_beside_a_sentence_or_a_text(base: str, tmp_path: Path) -> None:
    named = write_rows(tmp_path / "named.jsonl", sentences(CLASSES, 2))
    numbers = [{**row, "label": CLASSES.index(row["label"])} for row in sentences(CLASSES, 2)]
    numbered = write_rows(tmp_path / "numbered.jsonl", numbers)
    texts = write_rows(tmp_path / "texts.jsonl", sentences(CLASSES, 2, "text"))
    table = tmp_path / "table.csv"
    lines = [f"{row['sentence']},{row['label']}" for row in numbers]
    table.write_text("\n".join(["text,label", *lines]))
    reader, modality = load_processor(base), modality_of(base)
    prints = {
        modality.rows(load_examples(file), reader).fingerprint
        for file in (named, numbered, texts, table)
    }
    assert len(prints) == 1
    other = write_rows(tmp_path / "other.jsonl", [{**row, "label": 0} for row in numbers])
    assert modality.rows(load_examples(other), reader).fingerprint not in prints
    assert load_examples(texts).fingerprint == load_examples(_without_labels(texts)).fingerprint


def _without_labels(file: Path) -> Path:
    """What a language model reads of texts does not depend on a label beside them."""
    rows = [{"text": record["text"]} for record in load_examples(file)]
    return write_rows(file.with_name("plain.jsonl"), rows)


GOOD: list[Any] = sentences(CLASSES, 2)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "is empty"),
        ([{"label": "sport"}], "line 1: has the keys 'label'"),
        ([{"sentence": "a match"}], "line 1: has the keys 'sentence'"),
        ([*GOOD, {"sentence": "a match"}], "line 7: has the keys 'sentence', but the first"),
        ([*GOOD, {"sentence": "a", "label": "art"}], "line 7: .* no class 'art'; its 3 .* 'sport'"),
        ([*GOOD, {"sentence": "a", "label": 3}], "line 7: .* no class 3; .* 0 to 2"),
        ([*GOOD, {"sentence": "a", "label": -1}], "line 7: .* no class -1"),
        ([*GOOD, {"sentence": "a", "label": None}], "line 7: 'label' must be a class"),
        ([*GOOD, {"sentence": "a", "label": 0.5}], "line 7: 'label' must be .* float 0.5"),
        ([*GOOD, {"sentence": "a", "label": True}], "line 7: 'label' must be .* bool True"),
        ([*GOOD, {"sentence": "a", "label": ["sport"]}], "line 7: 'label' must be .* list"),
        ([*GOOD, {"sentence": " ", "label": 0}], "line 7: 'sentence' is empty"),
        ([*GOOD, {"sentence": 5, "label": 0}], "line 7: 'sentence' must be text, got int 5"),
        ([*GOOD, {"sentence1": "a", "sentence2": "b", "label": 0}], "line 7: .* the first row"),
        ([*GOOD, "a match"], "line 7: expected an object"),
        (sentences(["sport"], 3), "all 3 rows have the label 'sport'"),
        ([{"text": "a match"}, {"text": "sold"}], "line 1: has no label"),
        ([{"prompt": "a", "completion": "b"}], "kind 'prompt_completion'"),
    ],
)
def test_a_mistake_in_the_data_is_one_line(
    base: str, rows: list[Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any weight is loaded."""
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    file = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = {"base": base, "data": {"train": str(file)}, "training": {"steps": 1}}
    problems = check(Recipe.parse({**recipe, "adapter": {"method": "lora", "rank": 2}}))
    assert len([problem for problem in problems if problem.startswith("data.train")]) == 1
    with pytest.raises(AssertionError if not problems else UserError, match=words):
        raise UserError("\n".join(problems))
    assert "\n" not in problems[0]


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("bert", {"id2label": {0: "score"}, "label2id": {"score": 0}}, "1 outputs"),
        ("bert", {"problem_type": "multi_label_classification"}, "3 outputs for multi_label"),
        ("llama", {"pad_token_id": None}, "pad_token_id None"),
    ],
)
def test_a_head_that_gives_no_class_is_refused(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save_classifier(tmp_path, family, **changes)
    with pytest.raises(UserError, match=words):
        load_processor(str(tmp_path))


@pytest.mark.filterwarnings("ignore:1 of 2 sentences have more than")
def test_a_sentence_beyond_the_positions_is_named_or_cut(base: str, tmp_path: Path) -> None:
    rows = [{"sentence": "long " * 40, "label": 0}, {"sentence": "short", "label": 1}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    model, reader, modality = load_model(base), load_processor(base), modality_of(base)
    most = 63 if model.config.model_type == "roberta" else 64
    with pytest.raises(UserError, match=f"model has {most} positions; .* set max_length to {most}"):
        modality.rows(load_examples(file), reader, max_length=512).require_fitting(model)
    with pytest.warns(UserWarning, match=f"1 of 2 sentences have more than {most} tokens; their "):
        cut = modality.rows(load_examples(file), reader, max_length=most)
    cut.require_fitting(model)
    model(**cut.join([cut[0]]))
    (learned,) = training_batches(str(file), model, reader, max_length=512)
    assert learned["input_ids"].shape[1] == most
    longest = modality.batches(str(file), model, reader)[0]
    assert longest["input_ids"].shape[1] == most
    model(**longest)
