"""A run on a base in 4 or 8 bits: it starts at the base, leaves it alone, and exports for both."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from forgetless.adapters.folders import load
from forgetless.core.files import read_json, write_json
from forgetless.models.load import load_model
from forgetless.models.quantised import bytes_as_loaded, packed_layers, quantisation
from forgetless.models.targets import target_layers
from forgetless.models.weights import is_quantised, linear_weight
from forgetless.recipes.checking import check
from forgetless.recipes.identity import base_words, run_id
from forgetless.recipes.recipe import Recipe
from forgetless.studies.folder import RunFolder
from forgetless.studies.run import run
from forgetless.training.launch import Launch
from tests.families import FAMILIES
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures"]

NEEDS = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; 'make test-quantised' installs it",
)
FORMATS = pytest.mark.parametrize("quantise", ["nf4", "int8"])


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def stored(model: Any) -> list[torch.Tensor]:
    """The packed numbers of every layer."""
    layers: list[Any] = list(target_layers(model).values())
    return [layer.weight.data.clone() for layer in layers]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(4, 20).reshape(2, 8)
    found: torch.Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return found


# ---- a whole run ---------------------------------------------------------------------------------


@NEEDS
@pytest.mark.parametrize(
    ("method", "quantise"),
    [("pissa", "nf4"), ("lora_null_v1", "int8"), ("lora_null_v2", "nf4")],
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_run_on_a_packed_base(
    method: str, quantise: Any, tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    # float32, since in bfloat16 rounding hides what is compared at the end.
    how: dict[str, Any] = {"quantise": quantise, "dtype": "float32"}
    done = run(recipe_of(tiny_base, tiny_files, **{"adapter.method": method, **how}), tmp_path)
    folder = RunFolder(done.folder)
    assert done.record["start"]["equals_base"]
    assert {row["task"] for row in done.scores} == {"sums", "prose", "kl"}

    base = load_model(str(tiny_base), **how)
    before, untouched = logits(base), stored(base)
    assert all(is_quantised(layer) for layer in target_layers(base).values())
    native: Any = load(base, folder.native)
    trained = logits(native)
    assert not torch.equal(trained, before)
    with native.disable_adapter():
        assert torch.equal(logits(native), before)
    assert all(torch.equal(a, b) for a, b in zip(stored(native), untouched, strict=True))

    # The export is a plain LoRA: PEFT alone loads it, on the packed base and on the stored one.
    packed = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.float32, quantization_config=quantisation(quantise, torch.float32)
    )
    alone = PeftModel.from_pretrained(packed, folder.adapter)
    torch.testing.assert_close(logits(alone), trained, atol=1e-5, rtol=0)
    whole = AutoModelForCausalLM.from_pretrained(tiny_base)
    without = logits(whole)
    assert not torch.equal(without, before)
    on_stored = logits(PeftModel.from_pretrained(whole, folder.adapter)) - without
    on_packed = trained - before
    assert torch.cosine_similarity(on_stored.flatten(), on_packed.flatten(), dim=0) > 0.9


@NEEDS
def test_a_packed_base_has_scores_of_its_own(
    tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_base, tiny_files, **{"training.steps": 1})
    both = [run({**recipe, "quantise": quantise}, tmp_path) for quantise in (None, "nf4")]
    assert both[0].folder.name != both[1].folder.name
    for task in ("sums", "prose"):
        scores = [read_json(RunFolder(each.folder).scores("base", task)) for each in both]
        assert scores[0] != scores[1], task


@NEEDS
def test_what_is_not_packed_is_bfloat16_unless_the_recipe_says_otherwise(tiny_base: Path) -> None:
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        model: Any = load_model(str(tiny_base), quantise="nf4", dtype=dtype)
        assert model.get_input_embeddings().weight.dtype == expected
        assert model.model.layers[0].mlp.up_proj.compute_dtype == expected
        assert linear_weight(model.model.layers[0].mlp.up_proj).dtype == expected


# ---- what is said before any weight is loaded ----------------------------------------------------


def test_a_missing_bitsandbytes_is_named(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        return None if name == "bitsandbytes" else object()

    monkeypatch.setattr("forgetless.models.quantised.find_spec", absent)
    for quantise in ("nf4", "int8"):
        (found,) = check(Recipe.parse(tiny_recipe, {"quantise": quantise}))
        assert found.startswith(f"quantise: {quantise!r} needs bitsandbytes, which is not inst")
        assert "pip install 'forgetless[quantised]'" in found


def test_a_device_that_bitsandbytes_does_not_know_is_named(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = SimpleNamespace(__version__="0.50.2", supported_torch_devices={"cuda", "cpu"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", known)
    monkeypatch.setattr("forgetless.models.quantised.find_spec", lambda name: object())
    monkeypatch.setattr("forgetless.recipes.checking.device_of", lambda: torch.device("meta"))
    (found,) = check(Recipe.parse(tiny_recipe, {"quantise": "nf4"}))
    assert found.endswith("does not run on meta in bitsandbytes 0.50.2, which takes cpu, cuda")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"adapter.method": "full"},
            "quantise: packed weights cannot be trained, as method 'full'",
        ),
        ({"sequence.between": "merge"}, "quantise: nothing can be merged into packed weights"),
    ],
)
def test_what_packed_weights_cannot_be_used_for(
    tiny_recipe: dict[str, Any],
    changes: dict[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("forgetless.recipes.checking.unavailable", lambda device: None)
    (found,) = check(Recipe.parse(tiny_recipe, {"quantise": "nf4", **changes}))
    assert found.startswith(expected)


def test_a_base_that_is_packed_already_or_a_classifier_is_refused(
    tiny_base: Path,
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("forgetless.recipes.checking.unavailable", lambda device: None)
    packed = tmp_path / "packed"
    shutil.copytree(tiny_base, packed)
    config = read_json(packed / "config.json")
    how = quantisation("nf4", torch.bfloat16).to_dict()
    write_json(packed / "config.json", {**config, "quantization_config": how})
    recipe = Recipe.parse({**tiny_recipe, "base": str(packed)})
    assert check(recipe) == []
    (twice,) = check(recipe.override({"quantise": "int8"}))
    assert twice == "quantise: the base is stored in fewer bits already; leave quantise out"
    (full,) = check(recipe.override({"adapter.method": "full"}))
    assert full.startswith("base: packed weights cannot be trained")
    found = check(recipe.override({"base": "pocket-vision", "quantise": "nf4"}))
    assert "quantise: fewer bits are for causal language models" in found


@pytest.mark.parametrize("strategy", ["FSDP2", "ZeRO-2"])
def test_shards_of_packed_weights_are_refused(
    strategy: Any, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgetless.recipes.checking.unavailable", lambda device: None)
    launch = Launch(2, 0, strategy)
    monkeypatch.setattr("forgetless.recipes.checking.this_launch", lambda: launch)
    asked = {"quantise": "nf4", "device_map": "auto"}
    found = check(Recipe.parse(tiny_recipe, asked))
    assert f"quantise: {strategy} cannot cut packed weights; train in one process" in found
    assert "device_map: is for one process; leave it out, or run without a launcher" in found


# ---- the other ways to load ----------------------------------------------------------------------


def test_what_decides_the_weights_is_in_the_id(tiny_recipe: dict[str, Any]) -> None:
    def ids(**changes: Any) -> tuple[str, list[str]]:
        recipe = Recipe.parse({**tiny_recipe, "adapter": {"method": "lora_null_v1"}}, changes)
        return run_id(recipe), base_words(recipe)

    plain = ids()
    assert ids(device_map="auto") == plain
    others = [ids(quantise="nf4"), ids(quantise="int8"), ids(attn_implementation="eager")]
    for which in (0, 1):
        assert len({str(found[which]) for found in (plain, *others)}) == 4


def test_attention_and_placing_are_those_that_were_asked_for(tiny_base: Path) -> None:
    eager = load_model(str(tiny_base), attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert torch.equal(
        logits(load_model(str(tiny_base), device_map={"": "cpu"})),
        logits(load_model(str(tiny_base))),
    )
    nowhere = load_model(str(tiny_base), device_map={"": "meta"})
    assert all(weight.is_meta for weight in nowhere.parameters())


def test_an_attention_that_is_not_installed_is_named(tiny_recipe: dict[str, Any]) -> None:
    asked = {"attn_implementation": "flash_attention_3"}
    (found,) = check(Recipe.parse(tiny_recipe, asked))
    assert found.startswith("attn_implementation: ")
    assert check(Recipe.parse(tiny_recipe, {"attn_implementation": "eager"})) == []


# ---- bytes ---------------------------------------------------------------------------------------


@NEEDS
@FORMATS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bytes_of_a_packed_base_are_counted(family: str, quantise: Any, tmp_path: Path) -> None:
    plain = FAMILIES[family].model()
    plain.save_pretrained(tmp_path)
    packed = load_model(str(tmp_path), quantise=quantise)
    expected = 0
    for weight in (*packed.parameters(), *packed.buffers()):
        expected += weight.numel() * weight.element_size()
        state = getattr(weight, "quant_state", None)
        if state is not None:
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            expected += sum(part.numel() * part.element_size() for part in parts)
        scales = getattr(weight, "SCB", None)
        expected += 0 if scales is None else scales.numel() * 4
    names = {name for name, _ in packed_layers(plain)}
    assert names == {n for n, m in packed.named_modules() if hasattr(m, "source_cls")}
    for weight in plain.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    assert bytes_as_loaded(plain, quantise) == expected
