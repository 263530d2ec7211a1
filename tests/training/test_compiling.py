"""`training.compile`: whole graphs and the same losses; clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless.adapters.attachment import attach
from forgetless.recipes.checking import check
from forgetless.recipes.recipe import Recipe
from forgetless.training import trainer
from forgetless.training.loop import train
from tests.training.test_loop import TOKENIZER, log, settings

pytest_plugins = ["tests.tiny_fixtures"]


def one_layer() -> LlamaForCausalLM:
    """Capturing takes as long as the model has layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_hidden_layers=1, **sizes))


@pytest.fixture
def _without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture model and gradient as for inductor, and run the graphs as they are.

    To write and compile code for them takes a minute for a model of any size.
    """

    def changed(self: Any) -> None:
        as_given(self)
        if self.torch_compile:
            assert self.torch_compile_backend == "inductor"
            self.torch_compile_backend = "aot_eager"

    as_given = trainer._Arguments.__post_init__
    monkeypatch.setattr(trainer._Arguments, "__post_init__", changed)


@pytest.mark.usefixtures("_without_code")
def test_an_anchored_model_is_one_graph_and_learns_the_same(tmp_path: Path) -> None:
    graphs: list[tuple[int, int]] = []

    def count(done: int, steps: int) -> None:
        graphs.append((counters["stats"]["unique_graphs"], len(counters["graph_break"])))

    ids = torch.randint(3, 100, (8, 9), generator=torch.Generator().manual_seed(0)).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    for compiled in (False, True):
        model = attach(one_layer(), "pissa", rank=4, alpha=4, target_modules="mlp")
        values = settings(steps=3, compile=compiled)
        counters.clear()
        train(model, TOKENIZER, rows, values, tmp_path / str(compiled), on_step=count)
    assert graphs[:3] == [(0, 0)] * 3
    assert graphs[3:] == [(1, 0)] * 3  # no break: the anchored layers are in the model's own graph
    for one, other in zip(log(tmp_path / "False"), log(tmp_path / "True"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_a_missing_compiler_is_named_before_anything_is_loaded(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.parse(tiny_recipe, {"training.compile": True})
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("forgetless.training.model.which", lambda name: None)
    (problem,) = check(recipe)
    assert problem.startswith("training.compile: needs a C++ compiler, and there is no g++")
    assert "apt install g++" in problem

    monkeypatch.setattr("forgetless.training.model.which", lambda name: name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (problem,) = check(recipe)
    assert problem.startswith("training.compile: needs the headers of Python")

    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("forgetless.training.model.find_spec", lambda name: None)
    (problem,) = check(recipe)
    assert problem.startswith("training.compile: needs triton, which is not installed")
