"""A tiny base model in a folder, with a tokenizer, data and text: what a user's files look like.

A test module gets them as fixtures by ``pytest_plugins = ["tests.tiny_fixtures"]``.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *string.printable])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=characters, **names)


def save_base(folder: Path, seed: int = 0, words: PreTrainedTokenizerFast | None = None) -> Path:
    """A Llama of two layers with random weights, as `save_pretrained` writes it."""
    torch.manual_seed(seed)
    words = words or tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_files(folder: Path) -> Path:
    """``train.jsonl`` and ``test.jsonl`` of sums, and ``old.txt`` of prose."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, first in (("train", 1), ("test", 4)):
        rows = [
            {"prompt": f"{a}+{b}=", "completion": f"{a + b}"}
            for a in range(first, 40, 5)
            for b in range(3)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
    lines = [" ".join(words[i % 11 :] + words[: i % 7]) for i in range(30)]
    (folder / "old.txt").write_text("\n".join(lines))
    return folder


def recipe_of(base: Path, files: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that runs in a second or two; ``changes`` are dotted overrides."""
    from forgetless.core.settings import with_overrides

    recipe = {
        "base": str(base),
        "adapter": {"method": "pissa", "rank": 2, "alpha": 4},
        "calibration": {"source": str(files / "old.txt"), "samples": 8, "max_length": 32},
        "data": {"train": str(files / "train.jsonl"), "max_length": 32},
        "training": {
            "learning_rate": 1e-2,
            "steps": 4,
            "batch_size": 4,
            "checkpoint_every": 2,
            "log_every": 1,
        },
        "tasks": {
            "learning": [{"kind": "perplexity", "name": "sums", "path": str(files / "test.jsonl")}],
            "forgetting": [
                {"kind": "perplexity", "name": "prose", "path": str(files / "old.txt")},
                {"kind": "kl", "path": str(files / "test.jsonl"), "limit": 4},
            ],
        },
    }
    return with_overrides(recipe, changes)
