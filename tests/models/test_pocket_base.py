"""The shipped base model knows its facts and no word problem, and can be made again."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless.data.pocket.corpus import documents
from forgetless.data.pocket.knowledge import questions
from forgetless.data.pocket.pretrain import (
    Settings,
    complete,
    main,
    make_tokenizer,
    pretrain,
    recalled,
)
from forgetless.data.pocket.problems import final_answer, problems
from forgetless.models.pocket import base_path

TINY = Settings(
    steps=4,
    batch_size=2,
    length=32,
    warmup=1,
    vocab_size=400,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    intermediate_size=48,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(base_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(base_path())


def test_the_folder_is_small_and_holds_what_made_it() -> None:
    files = {path.name: path.stat().st_size for path in base_path().iterdir()}
    assert sum(files.values()) <= 10_000_000
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "pretrain.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    } == set(files)


def test_the_log_holds_the_settings_and_the_scores() -> None:
    *steps, final = [
        json.loads(line)
        for line in (base_path() / "pretrain.jsonl").read_text("utf-8").split("\n")[:-1]
    ]
    assert final["settings"]["seed"] == 0
    assert steps[-1]["step"] == final["settings"]["steps"]
    assert final["scores"]["held_out_recall"] >= 0.95
    assert final["scores"]["problems_solved"] < 0.1


def test_the_base_recalls_its_facts_in_the_held_out_phrasing(model: Any, tokenizer: Any) -> None:
    right = recalled(model, tokenizer, questions("held_out"))
    assert sum(right) / len(right) >= 0.95


def test_the_base_solves_hardly_any_word_problem(model: Any, tokenizer: Any) -> None:
    asked = problems(100, seed=1, split="test")
    solutions = complete(model, tokenizer, [problem.prompt for problem in asked], 40)
    pairs = zip(solutions, asked, strict=True)
    assert sum(final_answer(text) == problem.answer for text, problem in pairs) < 10


def test_digits_are_tokens_of_their_own_and_text_survives(tokenizer: Any) -> None:
    assert tokenizer.tokenize("104 + 27 = 131.") == [
        "1",
        "0",
        "4",
        "Ġ+",
        "Ġ2",
        "7",
        "Ġ=",
        "Ġ1",
        "3",
        "1",
        ".",
    ]
    for text in ("São Tomé, Nuku'alofa", "def f(x):\n    return x ** 2", "žluťoučký ☂"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_tokenizer_starts_with_bos_and_pads_on_the_left(tokenizer: Any) -> None:
    batch = tokenizer(["a b c", "a"], padding=True)
    assert batch.input_ids[1][0] == tokenizer.pad_token_id
    assert batch.input_ids[0][0] == tokenizer.bos_token_id
    assert batch.attention_mask[1][0] == 0
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_every_token_of_the_problems_occurs_in_pretraining(tokenizer: Any) -> None:
    known = {token for text in islice(documents(0), 15_000) for token in tokenizer(text).input_ids}
    asked = (*problems(2_000, seed=0), *problems(500, seed=0, split="test"))
    used = {token for p in asked for token in tokenizer(p.prompt + p.completion).input_ids}
    assert tokenizer.convert_ids_to_tokens(sorted(used - known)) == []


def test_a_prompt_is_a_prefix_of_its_problem_in_tokens_too(tokenizer: Any) -> None:
    for problem in problems(200, seed=0):
        prompt = tokenizer(problem.prompt).input_ids
        assert tokenizer(problem.prompt + problem.completion).input_ids[: len(prompt)] == prompt


def test_problems_are_short(tokenizer: Any) -> None:
    lengths = [len(tokenizer(p.prompt + p.completion).input_ids) for p in problems(500, seed=0)]
    assert max(lengths) <= 64


def test_pretraining_twice_gives_the_same_folder(tmp_path: Path) -> None:
    scores = [pretrain(tmp_path / name, TINY, recall_every=2) for name in ("one", "two")]
    assert scores[0] == scores[1]
    assert scores[0]["held_out_recall"] < 0.1
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    tokenizers = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two")]
    assert tokenizers[0] == tokenizers[1]


def test_the_shipped_tokenizer_is_the_one_that_the_script_makes() -> None:
    made = json.loads(make_tokenizer(Settings()).backend_tokenizer.to_str())
    shipped = json.loads((base_path() / "tokenizer.json").read_text("utf-8"))
    assert made["model"] == shipped["model"]


def test_the_command_line_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "--out" in capsys.readouterr().err
