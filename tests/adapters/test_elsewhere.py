"""An adapter that PEFT wrote, brought in: exactly as it is, or refused in words."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from forgetless.adapters.folders import export, load, save
from forgetless.cli.commands.measuring import measure
from forgetless.cli.commands.sharing import export_adapter
from forgetless.core.errors import UserError
from forgetless.models.load import load_model
from forgetless.training.loop import train
from tests.training.test_loop import settings

pytest_plugins = ["tests.tiny_fixtures"]

IDS = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "ranks": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 1},
    },
    "regex": {"target_modules": r".*\.layers\.1\.self_attn\.(q|k)_proj"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}
MORE: dict[str, tuple[dict[str, Any], str]] = {
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [5]}, "trainable_tokens"),
    "bias": ({"target_modules": ["q_proj"], "lora_bias": True}, r"lora_B\.bias"),
    "activated": (
        {"target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6]},
        "alora_invocation_tokens",
    ),
}


def base_of(folder: Path) -> Any:
    return load_model(str(folder), dtype="float32")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def made_elsewhere(base: Path, folder: Path, **config: Any) -> PeftModel:
    """Trained a little, one could say, and saved by PEFT alone."""
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config)
    model = get_peft_model(base_of(base), settings)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape))
    model.save_pretrained(str(folder))
    return model


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # of PEFT itself
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_is_loaded_saved_exported_and_compared_exactly(
    kind: str, tiny_base: Path, tmp_path: Path
) -> None:
    theirs = made_elsewhere(tiny_base, tmp_path / "peft", **KINDS[kind])
    expected = logits(theirs)
    with no_warning():
        loaded = load(base_of(tiny_base), tmp_path / "peft")
        assert torch.equal(logits(loaded), expected)
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), logits(base_of(tiny_base)))
        save(loaded, tmp_path / "saved")
        assert torch.equal(logits(load(base_of(tiny_base), tmp_path / "saved")), expected)
        report = export(loaded, tmp_path / "exported")
        again = PeftModel.from_pretrained(base_of(tiny_base), str(tmp_path / "exported"))
    assert report.exact
    assert torch.allclose(logits(again), expected, atol=1e-5)
    assert set(load_file(tmp_path / "exported" / "adapter_model.safetensors")) == set(
        load_file(tmp_path / "peft" / "adapter_model.safetensors")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_peft_would(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    """The same weights are trained, and a step gives the same numbers."""
    made_elsewhere(tiny_base, tmp_path / "peft", **KINDS[kind])
    ours = load(base_of(tiny_base), tmp_path / "peft", trainable=True)
    theirs = PeftModel.from_pretrained(
        base_of(tiny_base), str(tmp_path / "peft"), is_trainable=True
    )
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    trained = {n: w for n, w in theirs.named_parameters() if w.requires_grad}
    assert {n for n, w in ours.named_parameters() if w.requires_grad} == set(trained)
    assert all(torch.equal(w, trained[n]) for n, w in ours.named_parameters() if w.requires_grad)


def test_it_is_recompressed(tiny_base: Path, tmp_path: Path) -> None:
    expected = logits(made_elsewhere(tiny_base, tmp_path / "peft", **KINDS["plain"]))
    report = export_adapter(tmp_path / "peft", tmp_path / "small", rank=2, base=str(tiny_base))
    assert report.rank == 2
    assert 0 < report.relative_error < 1
    small = PeftModel.from_pretrained(base_of(tiny_base), str(tmp_path / "small"))
    assert not torch.allclose(logits(small), expected, atol=1e-2)


def test_it_is_measured(tiny_base: Path, tiny_files: Path, tmp_path: Path) -> None:
    made_elsewhere(tiny_base, tmp_path / "peft", **KINDS["rslora"])
    task = {"kind": "perplexity", "path": str(tiny_files / "old.txt"), "name": "prose"}
    found = measure(str(tiny_base), [task], adapter=tmp_path / "peft", cache=tmp_path / "cache")
    assert found.adapted is not None
    assert found.comparison is not None
    assert found.adapted["prose"].value != found.base["prose"].value


def test_it_is_trained_on(tiny_base: Path, tiny_files: Path, tmp_path: Path) -> None:
    from forgetless.data.examples import load_examples
    from forgetless.models.load import load_tokenizer

    made_elsewhere(tiny_base, tmp_path / "peft", **KINDS["dora"])
    model = load(base_of(tiny_base), tmp_path / "peft", trainable=True)
    before = logits(model)
    examples = load_examples(tiny_files / "train.jsonl")
    tokenizer = load_tokenizer(str(tiny_base))
    train(model.train(), tokenizer, examples, settings(steps=2), tmp_path / "training")
    assert not torch.equal(logits(model), before)
    report = export(model, tmp_path / "exported")
    again = PeftModel.from_pretrained(base_of(tiny_base), str(report.folder))
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


# ---- more than a LoRA ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MORE)
@pytest.mark.filterwarnings("ignore")
def test_what_an_export_would_lose_is_refused(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    """It can be loaded, measured and saved all the same."""
    config, named = MORE[kind]
    expected = logits(made_elsewhere(tiny_base, tmp_path / "peft", **config))
    loaded = load(base_of(tiny_base), tmp_path / "peft")
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(UserError, match=f"more than the A and B of linear layers.*{named}"):
        export(loaded, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    save(loaded, tmp_path / "saved")
    assert torch.equal(logits(load(base_of(tiny_base), tmp_path / "saved")), expected)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")  # PEFT's
def test_an_adapter_for_a_base_that_peft_changes_is_refused(
    tiny_base: Path, tmp_path: Path
) -> None:
    """PEFT takes PiSSA's start out of the base it loads: adapter-off would not be the base."""
    config = {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    model = made_elsewhere(tiny_base, tmp_path / "peft", **config)
    with pytest.raises(
        UserError, match=r"init_lora_weights='pissa'.*path_initial_model_for_weight"
    ):
        load(base_of(tiny_base), tmp_path / "peft")

    # What the message asks for.
    torch.manual_seed(0)
    start = get_peft_model(
        base_of(tiny_base), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config)
    )
    start.peft_config["default"].init_lora_weights = True
    start.save_pretrained(str(tmp_path / "start"))
    model.save_pretrained(
        str(tmp_path / "converted"),
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    converted = load(base_of(tiny_base), tmp_path / "converted")
    assert torch.allclose(logits(converted), logits(model), atol=1e-4)


# ---- folders that are wrong ----------------------------------------------------------------------


def test_wrong_folders_are_told_apart(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    made_elsewhere(tiny_base, folder, **KINDS["plain"])
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, values = load_file(weights), json.loads(config.read_text())

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            load(base_of(tiny_base), folder)

    save_file({n: w for n, w in whole.items() if "layers.0.mlp.up_proj" not in n}, weights)
    refused(r"do not belong together: these are missing: .*layers\.0\.mlp\.up_proj\.lora_A")
    save_file(whole, weights)
    config.write_text(json.dumps({**values, "target_modules": ["q_proj"]}))
    refused("do not belong together: these fit nowhere")
    config.write_text(json.dumps({**values, "peft_type": "LOHA"}))
    refused("type 'LOHA'; only LoRA can be loaded")
    config.write_text(json.dumps(values))
    weights.rename(folder / "adapter_model.bin")
    refused("adapter_model.bin is a pickle")


def test_an_adapter_that_names_another_base_says_so(tiny_base: Path, tmp_path: Path) -> None:
    made_elsewhere(tiny_base, tmp_path / "peft", **KINDS["plain"])
    config = tmp_path / "peft" / "adapter_config.json"
    values = json.loads(config.read_text())

    def named(name: str) -> None:
        config.write_text(json.dumps({**values, "base_model_name_or_path": name}))

    cached = f"/cache/models--someone--{tiny_base.name}/snapshots/0123"
    for same in (
        str(tiny_base),
        f"someone/{tiny_base.name}",
        f"/elsewhere/{tiny_base.name}/",
        cached,
    ):
        named(same)
        with no_warning():
            load(base_of(tiny_base), tmp_path / "peft")
    named("someone/other-model")
    with pytest.warns(UserWarning, match="is for the base someone/other-model, and this is"):
        load(base_of(tiny_base), tmp_path / "peft")


def test_settings_of_a_newer_peft_are_not_dropped_silently(tiny_base: Path, tmp_path: Path) -> None:
    made_elsewhere(tiny_base, tmp_path / "peft", **KINDS["plain"])
    config = tmp_path / "peft" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "use_tomorrow": True, "off_tomorrow": False}))
    with pytest.warns(UserWarning, match="this PEFT does not know use_tomorrow$"):
        load(base_of(tiny_base), tmp_path / "peft")
