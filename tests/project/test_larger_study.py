"""The larger study at toy size: from made-up text and facts to the page of a study."""

from __future__ import annotations

import csv
import json
import lzma
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from forgetless.core.errors import UserError
from forgetless.methods import METHODS
from forgetless.recipes.recipe import Recipe
from forgetless.recipes.study import StudyRecipe

ROOT = Path(__file__).parents[2]
PROSE = (
    "the old river runs under a stone bridge and past green fields to the small sea town "
    "where people sell fish bread and salt every morning"
)
FACTS = {
    "The capital of Aro is": "Bel",
    "The sport of Cim is": "dance",
    "The colour of Dun is": "red",
    "The language of Eri is": "Fao",
    "The river of Gan is": "Hul",
    "The tree of Ist is": "oak",
}


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmark's modules by name, as when its folder is run, and short pieces of text."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "larger_study"))
    import corpus

    monkeypatch.setattr(corpus, "PIECE", 300)
    monkeypatch.setattr(corpus, "PASSAGE", 150)
    yield
    for name in ("corpus", "pretraining", "study"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of two texts, facts and sums, in the places where they are looked for."""
    draw, words = random.Random(0), PROSE.split()
    folder = tmp_path_factory.mktemp("data")
    for name in ("corpora", "gsm8k"):
        (folder / name).mkdir()
    documents = [" ".join(draw.choices(words, k=40)) + "." for _ in range(120)]
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(600)]
    rows: list[dict[str, Any]] = [{"prompt": p, "answer": a} for p, a in FACTS.items()]
    rows += [{"prompt": "The end of Jor is", "answer": end} for end in ("near", "far")]
    rows += [{"rel": "P1", "sub": "Kel", "answer": "Lim"}]
    for name, content in {
        "openstax.txt.xz": "<|doc|>".join(documents),
        "novels100.txt.xz": "\n".join(lines),
        "facts.jsonl.xz": "\n".join(map(json.dumps, rows)),
    }.items():
        with lzma.open(folder / "corpora" / name, "wt") as file:
            file.write(content)
    for split, numbers in (("train", range(0, 30, 2)), ("test", range(1, 30, 3))):
        sums = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in numbers]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, sums)))
    return folder


def corpus_of(data: Path) -> Any:
    from corpus import read_corpus

    folder = data / "corpora"
    texts = [folder / "openstax.txt.xz", folder / "novels100.txt.xz"]
    return read_corpus(texts, folder / "facts.jsonl.xz", fact_limit=100)


def tokens_of(found: Any) -> Any:
    from corpus import Tokens, sample
    from study import TINY

    from forgetless.data.pocket.pretrain import make_tokenizer

    return Tokens.of(found, make_tokenizer(TINY.plan.sizes, sample(found, 10_000)))


# ---------------------------------------------------------------------------------- the corpus


def test_held_text_is_not_trained_and_facts_have_one_answer(data: Path) -> None:
    found = corpus_of(data)
    assert found.trained.keys() == found.held.keys() == {"openstax", "novels100"}
    assert len(found.held["openstax"]) == 120 // 50
    for name, held in found.held.items():
        assert held
        assert not set(held) & set(found.trained[name])
    assert dict(found.facts) == FACTS


def test_nothing_of_a_long_document_is_lost(data: Path) -> None:
    found = corpus_of(data)
    with lzma.open(data / "corpora" / "novels100.txt.xz", "rt") as file:
        words = len(file.read().split())
    kept = [*found.trained["novels100"], *found.held["novels100"]]
    assert sum(len(piece.split()) for piece in kept) == words


def test_a_text_too_short_to_hold_anything_out_is_refused(data: Path) -> None:
    from corpus import read_corpus

    short = data / "short.txt"
    short.write_text("a few words")
    with pytest.raises(UserError, match="1 pieces of text"):
        read_corpus([short], data / "corpora" / "facts.jsonl.xz", fact_limit=5)
    with pytest.raises(UserError, match="no such file"):
        read_corpus([data / "none.txt"], data / "corpora" / "facts.jsonl.xz", fact_limit=5)


def test_a_batch_follows_from_seed_and_step(data: Path, tmp_path: Path) -> None:
    from corpus import Tokens

    tokens = tokens_of(corpus_of(data))
    tokens.save(tmp_path / "tokens.safetensors")
    again = Tokens.load(tmp_path / "tokens.safetensors")
    batch = tokens.batch(5, 32, 0.4, seed=1, step=7)
    assert batch.shape == (5, 32)
    assert (batch == again.batch(5, 32, 0.4, seed=1, step=7)).all()
    assert not (batch == tokens.batch(5, 32, 0.4, seed=1, step=8)).all()
    facts = {tuple(part) for part in np.split(tokens.facts, tokens.starts[1:-1])}
    ends = np.flatnonzero(batch[-1] == tokens.facts[-1])  # the end of a text
    assert len(ends) > 1
    for start, end in pairwise(ends):
        assert tuple(batch[-1][start + 1 : end + 1]) in facts


# ---------------------------------------------------------------------------------- the base


def make(folder: Path, found: Any, **changes: Any) -> Path:
    from pretraining import make_base
    from study import TINY

    size = replace(TINY, steps=8, length=32, rows=3, hidden=32, **changes)
    cpu = torch.device("cpu")
    base: Path = make_base(
        folder, found, size.plan, device=cpu, compile_model=False, say=lambda line: None
    )
    return base


def test_a_killed_pretraining_goes_on_to_the_same_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pretraining

    found = corpus_of(data)
    whole = AutoModelForCausalLM.from_pretrained(make(tmp_path / "whole", found))

    original, calls = pretraining._Pretraining._train, [0]

    def killed(self: Any, *arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        loss: torch.Tensor = original(self, *arguments)
        return loss

    monkeypatch.setattr(pretraining, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(pretraining._Pretraining, "_train", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "half", found)
    assert not (tmp_path / "half" / "base").exists()
    resumed = AutoModelForCausalLM.from_pretrained(make(tmp_path / "half", found))
    assert calls[0] == 6 + 3  # five steps before the kill, three after it
    expected = whole.state_dict()
    for name, weight in resumed.state_dict().items():
        assert torch.equal(weight, expected[name]), name

    with pytest.raises(UserError, match="other settings"):
        make(tmp_path / "half", found, learning_rate=1e-4)
    with pytest.raises(UserError, match="corpus"):
        make(tmp_path / "half", replace(found, facts=found.facts[1:]))


def test_minutes_bound_the_pretraining_and_its_rate() -> None:
    from study import Size

    plan = Size(minutes=2).plan
    assert [plan.done(10**6, seconds) for seconds in (0, 60, 120, 200)] == [0, 0.5, 1, 1]
    peak = plan.sizes.learning_rate
    assert plan.rate(0, 0.0) == pytest.approx(peak / plan.sizes.warmup)
    assert plan.rate(10**4, 0.5) == pytest.approx(0.55 * peak)
    assert plan.rate(10**4, 1.0) == pytest.approx(0.1 * peak)


def test_the_base_has_a_hundred_million_weights() -> None:
    from study import Size

    from forgetless.data.pocket.pretrain import make_model

    size = Size()
    with torch.device("meta"):
        model = make_model(size.plan.sizes, _Vocabulary(size.vocabulary))
    norms = size.hidden * (2 * size.layers + 1)
    assert model.num_parameters() == size.weights + norms
    assert 0.9e8 < size.weights < 1.1e8


class _Vocabulary:
    """What `make_model` asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


# ---------------------------------------------------------------------------------- the study


def test_one_command_makes_the_base_and_the_report(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import study
    from study import main

    monkeypatch.setattr(study, "FACT_SHARE", 0.8)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    out = tmp_path / "out"
    command = ["--data", str(data), "--out", str(out), "--tiny", "--rates", "1"]
    command += ["--methods", "full", "lora_null_v2", "--tuning-steps", "4", "--batch-size", "4"]
    command += ["--steps", "100", "--length", "48", "--hidden", "32", "--passages", "3"]
    command += ["--learning-rate", "0.02"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    assert (out / "runs" / "larger-local" / "report" / "index.html").is_file()
    rows = table(out, "results.csv")
    assert {row["method"] for row in rows} == {"full", "lora_null_v2"}
    assert {row["task"] for row in rows} == {
        *("new_task", "facts", "held_openstax", "held_novels100", "kl")
    }
    # The base that was made here knows its facts: tokenizer, pre-training and folder fit together.
    assert all(float(r["base_score"]) > 0.5 for r in rows if r["task"] == "facts")
    learned = {r["method"]: r for r in rows if r["task"] == "new_task"}
    assert float(learned["full"]["score"]) < float(learned["full"]["base_score"])
    assert {row["step"] for row in table(out, "curve.csv")} == {"0", "1", "4"}

    # A second call finds the base, and the same two runs.
    before = {path: path.read_bytes() for path in (out / "base").iterdir()}
    again = StudyRecipe.load(study.prepare(study.options_of(command), lambda line: None))
    assert {path: path.read_bytes() for path in (out / "base").iterdir()} == before
    assert {run.parent.name for run in out.glob("runs/*/*/run.json")} == again.recipes().keys()


def table(out: Path, name: str) -> list[dict[str, str]]:
    with (out / "runs" / "larger-local" / "report" / name).open() as file:
        return list(csv.DictReader(file))


def test_a_missing_file_is_one_line(data: Path, tmp_path: Path) -> None:
    from study import main

    with pytest.raises(SystemExit, match=r"error: no such file: .*none"):
        main(["--data", str(data), "--out", str(tmp_path), "--train", str(tmp_path / "none")])


def test_the_plan_says_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    from study import main

    main(["--plan"])
    said = capsys.readouterr().out
    assert "12 runs" in said
    assert "assumed for one H100, not measured" in said


def test_the_hub_recipe_compares_the_four_methods_at_three_rates() -> None:
    study = StudyRecipe.load(ROOT / "recipes" / "larger-study.yaml")
    runs = [Recipe.parse(study.recipe, changes) for _, changes in study.combinations()]
    methods = [run.adapter.method for run in runs]
    assert set(methods) == {"full", "lora", "intermediate", "lora_null_v2"} <= METHODS.keys()
    assert all(methods.count(method) == 3 for method in methods)
    assert len({(run.adapter.method, run.training.learning_rate) for run in runs}) == 12
    assert all(run.dtype == "float32" and run.training.precision == "bf16" for run in runs)
