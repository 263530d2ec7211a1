"""The pocket world never changes: its base and every published number stand on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import astuple
from itertools import islice
from typing import Any

import pytest

from forgetless.data.pocket.corpus import documents, tokenizer_documents
from forgetless.data.pocket.functions import functions
from forgetless.data.pocket.knowledge import facts, knowledge_text, questions
from forgetless.data.pocket.problems import problems
from forgetless.data.pocket.series import series

MADE: dict[str, Callable[[], Any]] = {
    "corpus": lambda: list(islice(documents(0), 20_000)),
    "tokenizer": lambda: tokenizer_documents(0)[:12_000],
    "facts": lambda: list(map(astuple, facts())),
    "knowledge": knowledge_text,
    "held out": lambda: [[q.id, q.prompt] for q in questions("held_out")],
    "problems train": lambda: list(map(astuple, problems(2000, 0, "train"))),
    "problems test": lambda: list(map(astuple, problems(500, 0, "test"))),
    "functions train": lambda: list(map(astuple, functions(1000, 0, "train"))),
    "functions test": lambda: list(map(astuple, functions(300, 0, "test"))),
    "series train": lambda: list(map(astuple, series(2000, 0, "train"))),
    "series test": lambda: list(map(astuple, series(500, 0, "test"))),
}
PINS = {
    "corpus": "b8ecc54c996fb4d4",
    "tokenizer": "cb2d89f6bc987953",
    "facts": "597b094c5a87a848",
    "knowledge": "bd224caed6540cfd",
    "held out": "39c6035e57a2ef6e",
    "problems train": "1711b3d73bf6ce2c",
    "problems test": "b0b8b39117a2b77e",
    "functions train": "3eb0ab22be7412ad",
    "functions test": "76eabf4c1169b277",
    "series train": "945cc59d7fe0ea06",
    "series test": "5b6bea2c2ee9106d",
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_is_what_was_always_made(name: str) -> None:
    text = json.dumps(MADE[name](), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == PINS[name]
