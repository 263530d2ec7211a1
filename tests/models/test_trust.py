"""Bases with Python code of their own: run where a recipe says so, and else refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from forgetless.cli import main
from forgetless.core.errors import UserError
from forgetless.models import trust as trusting
from forgetless.models.load import head_of, load_model, load_tokenizer, meta_model
from forgetless.recipes.checking import check
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.studies.run import run
from tests.tiny import recipe_of, save_base, save_files

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(trusting, "_trusted", set())
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr("sys.stdin", None)  # a question would fail
    folder = save_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    parts = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"], "auto_map": parts}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    return folder


def test_without_trust_it_is_refused_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for read in (load_model, meta_model, head_of):
        with pytest.raises(UserError, match="'trust_remote_code: true' in the recipe") as caught:
            read(str(base))
        assert "\n" not in str(caught.value)
    files = save_files(tmp_path / "files")
    (problem, *_) = check(Recipe.parse(recipe_of(base, files)))
    assert "comes with Python code of its own" in problem
    file = tmp_path / "recipe.yaml"
    file.write_text(Recipe.parse(recipe_of(base, files)).to_yaml())
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file), "--check"])
    assert ended.value.code == 2
    assert "comes with Python code of its own" in capsys.readouterr().err


def test_a_tokenizer_with_code_is_refused_alike(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    file.write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "own"}')
    with pytest.raises(UserError, match="comes with Python code of its own"):
        load_tokenizer(str(folder))


def test_with_trust_a_recipe_runs(base: Path, tmp_path: Path) -> None:
    files = save_files(tmp_path / "files")
    recipe = Recipe.parse(recipe_of(base, files, trust_remote_code=True))
    assert check(recipe) == []
    first = run_id(recipe)
    found = run(recipe, tmp_path / "runs")
    adapter = load_file(Path(found.folder) / "adapter" / "adapter_model.safetensors")
    assert any("q_proj.lora_B" in name for name in adapter)
    (base / "own.py").write_text(CODE + "# changed\n")
    assert run_id(recipe) != first


def test_a_base_without_code_keeps_its_id(tmp_path: Path) -> None:
    base, files = save_base(tmp_path / "base"), save_files(tmp_path / "files")
    plain = Recipe.parse(recipe_of(base, files))
    assert run_id(plain) == run_id(Recipe.parse(recipe_of(base, files, trust_remote_code=True)))
