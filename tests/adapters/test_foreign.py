"""Adapters from elsewhere are told apart: another base's, one that does nothing, an old layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from forgetless.adapters.folders import load, save
from forgetless.adapters.foreign import check_adapter, require_usable
from forgetless.core.errors import UserError
from forgetless.models.targets import target_layers
from tests.adapters.test_attachment import trained
from tests.adapters.test_repair import base, from_peft, updates


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from_peft().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def with_tensors(folder: Path, changed: dict[str, Tensor]) -> Path:
    save_file(changed, folder / "adapter_model.safetensors")
    return folder


def with_config(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


def problem(folder: Path, family: str = "llama") -> str:
    with pytest.raises(UserError) as raised:
        require_usable(folder, base(family))
    return str(raised.value)


def test_a_fitting_adapter_has_no_problem(folder: Path) -> None:
    found = require_usable(folder, base())
    assert set(found.layers) == set(target_layers(base()))
    assert (found.problems, found.notes, found.besides) == ((), (), ())
    expected = {name: float(delta.norm()) / 2 for name, delta in updates(from_peft()).items()}
    assert found.layers == pytest.approx(expected, rel=1e-5)
    assert found.norm == pytest.approx(sum(n**2 for n in expected.values()) ** 0.5, rel=1e-5)


def test_an_anchored_folder_is_measured_by_what_it_moves(tmp_path: Path) -> None:
    model = trained("llama", "pissa")
    save(model, tmp_path / "native")
    found = require_usable(tmp_path / "native", base())
    expected = {name: float(delta.norm()) / 1.5 for name, delta in updates(model).items()}
    assert found.layers == pytest.approx(expected, rel=1e-4)


def test_an_adapter_of_another_architecture_matches_nothing(folder: Path) -> None:
    assert "0 of its 14 layers are in this base" in problem(folder, "gpt2")


def test_names_with_another_beginning_are_explained(folder: Path) -> None:
    moved = {
        key.replace("model.model.layers", "model.language_model.model.layers"): tensor
        for key, tensor in tensors(folder).items()
    }
    said = problem(with_tensors(folder, moved))
    assert "0 of its 14 layers" in said
    assert "is called 'model.layers.0.mlp.down_proj' here" in said


def test_a_partial_match_lists_what_is_missing(folder: Path) -> None:
    moved = {
        key.replace("layers.1.", "layers.7."): tensor for key, tensor in tensors(folder).items()
    }
    said = problem(with_tensors(folder, moved))
    assert "7 of its 14 layers" in said
    assert "model.layers.7.mlp.down_proj" in said


def test_another_shape_is_no_match(folder: Path) -> None:
    found = tensors(folder)
    key = next(key for key in found if "o_proj.lora_A" in key)
    found[key] = torch.ones(4, 31)
    assert "13 of its 14 layers" in problem(with_tensors(folder, found))


def test_an_untrained_adapter_changes_nothing(folder: Path) -> None:
    zero = {k: t * 0 if ".lora_B." in k else t for k, t in tensors(folder).items()}
    assert "zero in every layer" in problem(with_tensors(folder, zero))


def test_single_layers_that_change_nothing_are_noted(folder: Path) -> None:
    some = {k: t * 0 if "q_proj.lora_B." in k else t for k, t in tensors(folder).items()}
    (note,) = require_usable(with_tensors(folder, some), base()).notes
    assert note.startswith("2 of its 14 layers change nothing")


def test_a_hardly_trained_adapter_is_noted(folder: Path) -> None:
    small = {k: t * 1e-9 if ".lora_B." in k else t for k, t in tensors(folder).items()}
    (note,) = require_usable(with_tensors(folder, small), base()).notes
    assert "hardly trained" in note


def test_nan_is_a_problem_with_its_layer(folder: Path) -> None:
    found = tensors(folder)
    key = next(key for key in found if "up_proj.lora_A" in key)
    found[key][0, 0] = float("nan")
    assert "NaN or infinity in model.layers.0.mlp.up_proj" in problem(with_tensors(folder, found))


def test_stacked_experts_of_an_older_peft_are_refused(folder: Path) -> None:
    for version, written in ((None, "a PEFT before 0.18"), ("0.18.1", "PEFT 0.18.1")):
        changed = with_config(
            folder, target_parameters=["mlp.experts.down_proj"], peft_version=version
        )
        said = problem(changed)
        assert f"written by {written}" in said
        assert "save it with 0.19 or later" in said
    newer = with_config(folder, peft_version="0.21.2")
    assert check_adapter(newer, base()).problems == ()


def test_a_model_of_replicated_layers_is_not_the_base(folder: Path) -> None:
    changed = with_config(folder, layer_replication=[[0, 1], [0, 2]])
    assert "its layer_replication makes" in problem(changed)
    with pytest.raises(UserError, match="its layer_replication makes"):
        load(base(), changed)


def test_a_layer_that_is_not_linear_is_told_as_what_it_is(tmp_path: Path) -> None:
    from_peft("vit", target_modules=["projection"]).save_pretrained(tmp_path)
    told = "not so: vit.embeddings.patch_embeddings.projection, a Conv2d and not linear"
    assert told in problem(tmp_path, "vit")


def test_what_is_trained_besides_is_listed(tmp_path: Path) -> None:
    from_peft(target_modules=["q_proj"], modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    assert require_usable(tmp_path, base()).besides == ("base_model.model.lm_head.weight",)


def test_another_vocabulary_is_a_problem(folder: Path) -> None:
    found = tensors(folder) | {"base_model.model.lm_head.weight": torch.ones(90, 32)}
    assert "has 90 tokens, the base 100" in problem(with_tensors(folder, found))
    tokenizer = {"model": {"vocab": {"a": 0, "b": 99}}, "added_tokens": [{"id": 100}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has token 100, and the base knows only 0..99" in problem(folder)


def test_another_class_is_noted(folder: Path) -> None:
    changed = with_config(folder, auto_mapping={"base_model_class": "OtherForCausalLM"})
    (note,) = require_usable(changed, base()).notes
    assert "was made for a OtherForCausalLM" in note


def test_what_is_no_adapter_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        check_adapter(tmp_path, base())
    assert "not a LoRA" in problem(with_config(folder, peft_type="IA3"))
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        check_adapter(folder, base())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no complete adapter"):
        check_adapter(folder, base())
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        check_adapter(folder, base())
