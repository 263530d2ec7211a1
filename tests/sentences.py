"""Files of labelled sentences, and tiny text classifiers that read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tests.tiny import tokenizer

CLASSES = ("sport", "trade", "world")
FAMILIES = {
    "bert": (BertConfig, BertForSequenceClassification),
    "distilbert": (DistilBertConfig, DistilBertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
    "llama": (LlamaConfig, LlamaForSequenceClassification),
}
WORDS = {"sport": "match goal", "trade": "stock sold", "world": "peace vote"}


def save_classifier(folder: Path, family: str = "bert", **changes: Any) -> Path:
    """A classifier of two layers with random weights, with its tokenizer of characters."""
    torch.manual_seed(0)
    config_class, model_class = FAMILIES[family]
    words = tokenizer()
    config = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "type_vocab_size": 2 if family == "bert" else 1,
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: number for number, name in enumerate(CLASSES)},
    }
    model = model_class(config_class(**{**config, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0) if weight.ndim == 2 else weight.add_(0.02)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    if family == "bert":
        file = folder / "tokenizer_config.json"
        names = ["input_ids", "token_type_ids", "attention_mask"]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_input_names": names}))
    return folder


def write_rows(file: Path, rows: Sequence[object]) -> Path:
    """One JSON object a line."""
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def sentences(classes: Sequence[str], count: int, key: str = "sentence") -> list[dict[str, Any]]:
    """So many rows of each class, of different lengths."""
    return [
        {key: f"{'a ' * (number % 4)}{WORDS[name]} {number}", "label": name}
        for number in range(count)
        for name in classes
    ]
