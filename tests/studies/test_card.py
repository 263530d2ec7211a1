"""The model card of an exported adapter: valid, complete, and free of this machine's folders."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

import forgetless as fl
from forgetless.adapters.card import Card, _base_name
from forgetless.cli.commands.sharing import export_adapter
from forgetless.core.files import read_json, write_json
from forgetless.models.load import load_model
from forgetless.recipes.recipe import Recipe
from forgetless.scores.comparison import compare
from forgetless.studies.card import score_paragraphs, write_run_card
from forgetless.studies.folder import RunFolder
from forgetless.studies.run import run as run_recipe
from tests.families import FAMILIES
from tests.scores.test_comparison import answers
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures"]

CONFIG: dict[str, Any] = {
    "r": 8,
    "task_type": "CAUSAL_LM",
    "target_modules": ["v_proj", "q_proj"],
    "rank_pattern": {},
}
HUB = "meta-llama/Llama-2-7b-hf"


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def metadata_of(text: str) -> dict[str, Any]:
    """The front matter, read as model hubs read it."""
    card = ModelCard(text)
    block = yaml.safe_load(text.split("---\n")[1])
    assert card.data.to_dict() == block  # type: ignore[no-untyped-call]
    return dict(block)


def code_of(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of an anchored adapter of rank 2, trained on files."""
    old = str(tiny_files / "old.txt")
    recipe = recipe_of(
        tiny_base,
        tiny_files,
        name="done",
        penalties=[{"kind": "kl", "weight": 0.1, "source": old, "samples": 4}],
        probes={"forgetting": [old], "max_kl": 9.0},
        **{"training.attention_dropout": 0.25},
    )
    return run_recipe(recipe, tmp_path_factory.mktemp("runs")).folder


def test_a_run_s_card_is_complete(finished: Path) -> None:
    text = text_of(finished / "adapter")
    data = metadata_of(text)
    assert data["base_model"] == "tiny-llama"
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["lora", "forgetless", "pissa"]
    assert "license" not in data
    for said in (
        "A LoRA adapter of rank 4 for **tiny-llama**",
        "from the start `pissa`",
        "Meng et al. 2024",
        "| `sums` | learning | loss |",
        "| `prose` | forgetting | loss |",
        "| `kl` | forgetting | kl | 0 |",
        "| rank and alpha in training | 2, 4 |",
        "| training data | train.jsonl |",
        "| error of the export | none, it is exact |",
        "warm-up 0.03, attention dropout 0.25, weight decay 0, float32 |",
        "| penalties | kl (weight=0.1, source=old.txt, samples=4) |",
        "| budget of forgetting | KL to the base at most 9 |",
        "| steps | 4 |",
        "| seed | 0 |",
        "forgetless 0",
        "one training with one seed",
        "set `base_model` above",
    ):
        assert said in text
    assert "knowledge to keep | none" in text


def test_a_budget_that_ended_the_training_is_told_with_the_step_of_the_weights(
    tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    budget = {"max_kl": 1e-4, "every": 1, "on_exceed": "rollback"}
    recipe = recipe_of(
        tiny_base, tiny_files, probes={"forgetting": [str(tiny_files / "old.txt")], **budget}
    )
    found = run_recipe(recipe, tmp_path, evaluate=False)
    trained, text = found.record["training"], text_of(found.folder / "adapter")
    over = trained["exceeded"]
    said = f"| steps | {over['kept_step']}; ended by the budget: at step {over['step']} kl reached"
    assert said in text
    assert trained["steps"] == over["kept_step"]
    assert f"| final loss | {trained['final_loss']:.4g} |" in text


def test_no_card_names_a_folder_of_this_machine(finished: Path, tiny_base: Path) -> None:
    text = text_of(finished / "adapter")
    assert str(tiny_base.parent) not in text
    assert not re.search(r"(?<![\w:/.<])/\w+/", text.replace("/ ", " "))


def test_code_in_a_card_is_python(finished: Path) -> None:
    codes = code_of(text_of(finished / "adapter"))
    assert len(codes) == 2
    for code in codes:
        ast.parse(code)
    assert 'AutoModelForCausalLM.from_pretrained("tiny-llama")' in codes[0]
    assert "max_lora_rank=8)" in codes[1]


def test_the_card_is_rewritten_with_new_scores_until_somebody_makes_it_theirs(
    finished: Path,
) -> None:
    run, file = RunFolder(finished), finished / "adapter" / "README.md"
    before = file.read_text()
    score = read_json(run.scores("final", "kl"))
    try:
        write_json(run.scores("final", "kl"), score | {"value": 9.75})
        write_run_card(run)
        assert "| `kl` | forgetting | kl | 0 | 9.75 |" in file.read_text()
        file.write_text("my own words")
        write_run_card(run)
        assert file.read_text() == "my own words"
    finally:
        write_json(run.scores("final", "kl"), score)
        file.write_text(before)


def test_before_the_scores_are_measured_the_card_says_so(
    tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    recipe = Recipe.parse(recipe_of(tiny_base, tiny_files, **{"training.steps": 1}))
    run = run_recipe(recipe, tmp_path, evaluate=False)
    text = text_of(run.folder / "adapter")
    assert "Not measured." in text
    assert "| `kl`" not in text
    assert "| steps | 1 |" in text


def test_an_export_of_a_run_has_the_run_s_card_and_its_own_rank(
    finished: Path, tmp_path: Path
) -> None:
    report = export_adapter(finished, tmp_path / "small", rank=1)
    text = text_of(tmp_path / "small")
    assert "| `prose` | forgetting |" in text
    assert "adapter of rank 1 for" in text
    assert f"{report.relative_error:.2g} of the update's norm was cut off" in text


def test_export_alone_writes_a_card_without_scores(tiny_base: Path, tmp_path: Path) -> None:
    model = fl.attach(load_model(str(tiny_base)), "intermediate", rank=2, position=0.25)
    fl.export(model, tmp_path / "a")
    text = text_of(tmp_path / "a")
    assert metadata_of(text)["tags"] == ["lora", "forgetless", "intermediate"]
    assert "| options | position=0.25 |" in text
    assert "Not measured." in text
    assert str(tiny_base.parent) not in text


def test_a_lora_of_another_library_has_a_card_too(tmp_path: Path) -> None:
    model = get_peft_model(FAMILIES["llama"].model(), LoraConfig(r=2, target_modules=["q_proj"]))
    fl.export(model, tmp_path / "a")
    text = text_of(tmp_path / "a")
    assert "base_model" not in metadata_of(text)
    assert "for **its base model**" in text
    assert "It was made with forgetless" not in text


def test_text_of_a_user_s_own_is_left_alone(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Mine.")
    model = fl.attach(load_model(str(tiny_base)), "lora", rank=2)
    fl.export(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine."


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (HUB, HUB),
        ("/home/me/.cache/hub/models--meta-llama--Llama-2-7b-hf/snapshots/01c7", HUB),
        ("/data/models/my-base/", "my-base"),
        ("C:\\models\\my-base", "my-base"),
        ("../my-base", "my-base"),
        ("gpt2", "gpt2"),
        ("pocket", "pocket"),
        ("", ""),
    ],
)
def test_a_base_goes_by_a_name_that_says_nothing_of_the_machine(base: str, name: str) -> None:
    assert _base_name(base) == name


def test_the_pocket_base_is_known_by_its_name() -> None:
    from forgetless.models.pocket import base_path

    text = Card(base=str(base_path()), config=CONFIG).text
    assert 'load_model("pocket")' in code_of(text)[0]
    assert "LLM(base, enable_lora=True, max_lora_rank=8)" in code_of(text)[1]
    for code in code_of(text):
        ast.parse(code)


def test_a_base_on_the_hub_needs_no_warning() -> None:
    text = Card(base=HUB, config=CONFIG).text
    assert metadata_of(text)["base_model"] == HUB
    assert "local model" not in text
    assert f'from_pretrained("{HUB}")' in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 24}, "max_lora_rank=32)"),
        ({"r": 8, "rank_pattern": {"q_proj": 60}}, "max_lora_rank=64)"),
        ({"r": 1024}, "vLLM serves ranks up to 512"),
        ({"use_dora": True}, "vLLM does not serve DoRA"),
        (
            {"modules_to_save": ["lm_head"]},
            "vLLM does not serve modules that were trained in whole",
        ),
    ],
)
def test_what_vllm_needs_or_cannot_serve(change: dict[str, Any], said: str) -> None:
    assert said in Card(base=HUB, config=CONFIG | change).text


def test_a_model_of_another_kind_has_no_vllm_code() -> None:
    text = Card(base="google/vit-base", config=CONFIG | {"task_type": None}).text
    assert "vllm" not in text.lower()
    assert "pipeline_tag" not in metadata_of(text)
    assert "AutoModel, AutoProcessor" in text


def test_learning_comes_first_and_averages_and_gaps_are_named() -> None:
    names = ("triviaqa", "nq_open", "webqs", "skill")
    base = {name: answers(1, 1, 1, 0, name=name) for name in names}
    tuned = {name: answers(1, 1, 0, 0, name=name) for name in names}
    comparison = compare({**base, "more": base["skill"]}, tuned)
    card = Card(HUB, CONFIG, scores=score_paragraphs(comparison, frozenset({"skill"})))
    lines = card.text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| `"))
    assert lines[first].startswith("| `skill` | learning | accuracy | 0.75 | 0.5 | -0.25 |")
    assert "| LoRA-Null Avg1(Per) | 1.0000 | 0.6667 |" in lines
    assert "Not measured for both: more." in lines
    assert "| 4 |" in lines[first]
    assert card.text == replace(card).text
