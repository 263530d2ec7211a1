"""Recipes: YAML in, checked settings out; the run id; every mistake named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from forgetless.cli.demo import definition
from forgetless.core.errors import RecipeError, UserError
from forgetless.core.hashing import content_hash
from forgetless.core.settings import parse_assignments, with_overrides
from forgetless.recipes import identity
from forgetless.recipes.checking import check, load_recipe
from forgetless.recipes.recipe import Recipe
from forgetless.recipes.study import StudyRecipe
from tests.tiny import recipe_of, save_base, save_files

pytest_plugins = ["tests.tiny_fixtures", "tests.quick_python"]


def run_id(recipe: dict[str, Any], **changes: Any) -> str:
    return identity.run_id(Recipe.parse(recipe, changes))


# ---- overrides -----------------------------------------------------------------------------------


def test_assignments_are_typed_as_in_yaml() -> None:
    given = ["training.learning_rate=1e-4", "adapter.target_modules=[q_proj, v_proj]", "name=a=b"]
    assert parse_assignments(given) == {
        "training.learning_rate": 1e-4,
        "adapter.target_modules": ["q_proj", "v_proj"],
        "name": "a=b",
    }


@pytest.mark.parametrize("wrong", ["training.steps", "=3", ""])
def test_an_assignment_without_key_or_value(wrong: str) -> None:
    with pytest.raises(UserError, match="takes key=value"):
        parse_assignments([wrong])


def test_overrides_leave_the_given_mapping_alone() -> None:
    given = {"training": {"steps": 3}}
    changed = with_overrides(given, {"training.learning_rate": 0.1, "data.train": "x"})
    assert changed == {"training": {"steps": 3, "learning_rate": 0.1}, "data": {"train": "x"}}
    assert given == {"training": {"steps": 3}}


def test_one_duration_replaces_the_other(tiny_recipe: dict[str, Any]) -> None:
    recipe = Recipe.parse(tiny_recipe, {"training.epochs": 2})
    assert (recipe.training.epochs, recipe.training.steps) == (2, None)
    assert recipe.override({"training.steps": 7}).training.epochs is None


def test_what_no_yaml_could_hold_is_refused() -> None:
    inside: dict[str, Any] = {}
    inside["itself"] = inside
    for content in ({("a", "b"): 1}, inside):
        with pytest.raises(UserError, match="plain values, and text as keys"):
            Recipe.parse(content)  # type: ignore[arg-type]


# ---- the recipe and its id -----------------------------------------------------------------------


def test_yaml_of_a_recipe_reads_back_to_an_equal_one(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = Recipe.parse(tiny_recipe, {"name": "näme: {odd}", "training.learning_rate": 1e-5})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(file) == recipe


def test_a_recipe_never_changes(tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.parse(tiny_recipe).seed = 3


SAME_WEIGHTS: list[dict[str, Any]] = [
    {"name": "another"},
    {"tasks": {"learning": [], "forgetting": ["pocket_recall"]}},
    {"export.rank": 1},
    {"training.checkpoint_every": 1, "training.log_every": 7},
    {"adapter.alpha": 4.0},
    {"calibration.samples": 3},  # pissa reads no statistics
]
OTHER_WEIGHTS: list[dict[str, Any]] = [
    {"seed": 1},
    {"dtype": "bfloat16"},
    {"adapter.rank": 3},
    {"adapter.method": "milora"},
    {"adapter.target_modules": ["q_proj"]},
    {"data.limit": 5},
    {"data.max_length": 31},
    {"training.learning_rate": 2e-2},
    {"training.steps": 5},
    {"training.weight_decay": 0.1},
]


@pytest.mark.parametrize("changes", SAME_WEIGHTS, ids=str)
def test_the_id_leaves_out_what_does_not_decide_the_weights(
    tiny_recipe: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert run_id(tiny_recipe, **changes) == run_id(tiny_recipe)


def test_layers_have_no_order_and_patterns_have_one(tiny_recipe: dict[str, Any]) -> None:
    def with_layers(*names: str) -> set[Any]:
        null = Recipe.parse(
            tiny_recipe, {"adapter.method": "lora_null_v1", "adapter.target_modules": list(names)}
        )
        return {identity.run_id(null), json.dumps(identity.input_keys(null))}

    found = with_layers("q_proj", "v_proj")
    assert with_layers("v_proj", "q_proj") == with_layers("q_proj", "v_proj", "q_proj") == found
    assert not found & with_layers("q_proj")

    patterns = [{"self_attn.q_proj": 1, "q_proj": 2}, {"q_proj": 2, "self_attn.q_proj": 1}]
    assert len({run_id(tiny_recipe, **{"adapter.rank_pattern": p}) for p in patterns}) == 2


def test_how_many_texts_are_read_together_decides_nothing(tiny_recipe: dict[str, Any]) -> None:
    null = {"adapter.method": "lora_null_v1"}
    ids = {run_id(tiny_recipe, **null, **{"calibration.batch_size": n}) for n in (1, 8, 64)}
    assert ids == {run_id(tiny_recipe, **null)}


@pytest.mark.parametrize("changes", OTHER_WEIGHTS, ids=str)
def test_the_id_holds_what_decides_the_weights(
    tiny_recipe: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert run_id(tiny_recipe, **changes) != run_id(tiny_recipe)


def test_the_id_follows_content_not_names(tiny_base: Path, tmp_path: Path) -> None:
    def recipe(base: Path) -> Recipe:
        return Recipe.parse(
            recipe_of(base, tmp_path / "files", **{"adapter.method": "lora_null_v1"})
        )

    files = save_files(tmp_path / "files")
    same = save_base(tmp_path / "copy")
    assert content_hash(same) == content_hash(tiny_base)
    (same / "README.md").write_text("notes")  # decides nothing
    before = identity.run_id(recipe(tiny_base))
    assert identity.run_id(recipe(same)) == before
    (files / "old.txt").write_text("other knowledge to keep")
    after = identity.run_id(recipe(same))
    assert after != before
    (files / "train.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    assert identity.run_id(recipe(same)) not in (before, after)
    assert identity.run_id(recipe(save_base(tmp_path / "other", seed=1))) != identity.run_id(
        recipe(same)
    )


def test_full_fine_tuning_has_no_adapter_settings(tiny_recipe: dict[str, Any]) -> None:
    full = {"adapter.method": "full"}
    assert run_id(tiny_recipe, **full) == run_id(tiny_recipe, **full, **{"adapter.rank": 9})


def test_calibration_counts_where_the_method_reads_it(tiny_recipe: dict[str, Any]) -> None:
    null = {"adapter.method": "lora_null_v1"}
    assert run_id(tiny_recipe, **null) != run_id(tiny_recipe, **null, **{"calibration.samples": 3})


def test_the_runs_of_the_demo_keep_their_ids() -> None:
    """An id once given finds its run in every later version, as long as the pocket base stays."""
    assert set(StudyRecipe.parse(definition()).recipes()) == {
        "full-4a2653b6f2",
        "intermediate-04b8270e3a",
        "lora-62ef1d3cc4",
        "lora_null_v1-3b777c587d",
        "lora_null_v2-3e26d13ff0",
        "milora-dc733d506c",
        "pissa-fb31306932",
    }


def test_the_id_is_the_same_in_another_process(tiny_recipe: dict[str, Any], python: str) -> None:
    code = (
        "import json, sys; from forgetless.recipes.recipe import Recipe;"
        "from forgetless.recipes.identity import run_id;"
        "print(run_id(Recipe.parse(json.load(sys.stdin))))"
    )
    found = subprocess.run(
        [python, "-c", code],
        input=json.dumps(tiny_recipe),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == run_id(tiny_recipe)


def test_the_shares_of_replay_decide_the_run(tiny_recipe: dict[str, Any], tiny_files: Path) -> None:
    new, old = str(tiny_files / "train.jsonl"), str(tiny_files / "test.jsonl")

    def with_replay(share: float) -> str:
        sources = [{"path": new, "weight": 1 - share}, {"path": old, "weight": share}]
        return run_id(tiny_recipe, **{"data.train": sources})

    assert with_replay(0.1) == with_replay(0.1)
    assert len({run_id(tiny_recipe), with_replay(0.1), with_replay(0.2)}) == 3


def test_penalties_decide_the_run(tiny_recipe: dict[str, Any], tiny_files: Path) -> None:
    def penalised(**settings: Any) -> str:
        return run_id(tiny_recipe, penalties=[{"kind": "kl", "weight": 1, **settings}])

    texts = [str(tiny_files / name) for name in ("old.txt", "test.jsonl")]
    ids = {run_id(tiny_recipe), penalised(), penalised(weight=2)}
    assert len(ids | {penalised(source=text) for text in texts}) == 5


# ---- mistakes ------------------------------------------------------------------------------------

NAN = float("nan")
FORM_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"lerning": 1}, "lerning: unknown key; did you mean 'training'?"),
    ({"training.learning_rat": 1e-3}, "unknown key; did you mean 'learning_rate'?"),
    ({"zzz": 1}, "zzz: unknown key; known keys: name, base"),
    ({"training.learning_rate": "fast"}, "training.learning_rate: must be a number, got 'fast'"),
    ({"training.learning_rate": NAN}, "training.learning_rate: must be a finite number, got nan"),
    ({"training.learning_rate": 0}, "training.learning_rate: must be greater than 0, got 0"),
    ({"training.steps": 1.5}, "training.steps: must be a whole number, got 1.5"),
    ({"training.steps": True}, "training.steps: must be a whole number, got True"),
    (
        {"training.steps": 5, "training.epochs": 1},
        "one of steps, epochs and tokens, got steps=5 and epochs=1",
    ),
    ({"training.steps": None}, "training: give one of steps, epochs and tokens, got none of them"),
    (
        {"training.schedule": "cosin"},
        "training.schedule: must be 'cosine', 'linear', 'constant' or",
    ),
    ({"training": None}, "training: must be a mapping of keys to values, got nothing"),
    ({"adapter": "lora"}, "adapter: must be a mapping of keys to values, got 'lora'"),
    ({"tasks": ["kl:self"]}, "got ['kl:self']; its keys are learning, forgetting"),
    ({"adapter.rank": 0}, "adapter.rank: must be greater than or equal to 1, got 0"),
    ({"adapter.dropout": 1.0}, "adapter.dropout: must be less than 1, got 1.0"),
    ({"adapter.target_modules": 5}, "adapter.target_modules: must be 'all-linear', 'attention'"),
    ({"adapter.target_modules": []}, "adapter.target_modules: must be 'all-linear', 'attention'"),
    ({"base": None}, "base: must be text, got nothing"),
    ({"base": ""}, "base: must be text that is not empty, got ''"),
    ({"data": None}, "data: must be a mapping of keys to values, got nothing"),
    ({"data": {}}, "data.train: missing; every recipe needs it"),
    ({"data.train": None}, "data.train: must be a file or a list of {path: file, weight"),
    ({"data.train": NAN}, "data.train: must be a file or a list of {path: file, weight"),
    ({"data.train": [{"path": "a", "weight": 0}]}, "data.train: must be a file or a list of"),
    ({"data.train": [{"path": "a"}]}, "data.train: must be a file or a list of"),
    ({"data.pack": "perhaps"}, "data.pack: must be 'auto', true or false, got 'perhaps'"),
    ({"export.rank": "half"}, "export.rank: must be 'exact', 'requested' or a whole number"),
    ({"tasks.learning": "sums"}, "tasks.learning: must be a list, got 'sums'"),
    ({"tasks.learning": [None]}, "number 1 must be a task's name or a mapping"),
    ({"seed": -1}, "seed: must be greater than or equal to 0, got -1"),
    ({"dtype": "int8"}, "dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', got 'int8'"),
]


@pytest.mark.parametrize(("changes", "message"), FORM_MISTAKES, ids=lambda value: str(value)[:60])
def test_a_value_of_the_wrong_form_is_named(
    tiny_recipe: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(tiny_recipe, changes)
    assert any(message in problem for problem in caught.value.problems), caught.value.problems


CONTENT_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"base": "/no/such/folder"}, "base: base '/no/such/folder' does not exist"),
    ({"base": "no-such-model"}, "base: base 'no-such-model' is no folder"),
    ({"base": "{files}"}, "is no model: it has no config.json"),
    ({"adapter.method": "loar"}, "unknown method 'loar'; did you mean 'lora'?"),
    ({"adapter.options": {"position": 0.5}}, "adapter.options: unknown option of method 'pissa'"),
    (
        {"adapter.method": "intermediate", "adapter.options": {"position": 2}},
        "adapter.options: position must be",
    ),
    (
        {"adapter.rank": 33},
        "rank must be in 1..16 for layer 'model.layers.0.self_attn.k_proj' (16, 32), got 33 "
        "(and 3 more of this shape)",
    ),
    ({"adapter.target_modules": ["nope"]}, "adapter.target_modules: target_modules ['nope']"),
    ({"adapter.target_modules": "(["}, "is no regular expression"),
    ({"data.train": "absent.jsonl"}, "data.train: no such file: absent.jsonl"),
    (
        {"data.train": [{"path": "absent.jsonl", "weight": 1}]},
        "data.train: no such file: absent.jsonl",
    ),
    ({"data.format": "messages"}, "train.jsonl is 'prompt_completion'"),
    *(
        ({"data.limit": 4, "calibration.source": "self", wanted: {}}, "has 4 examples, too few to")
        for wanted in ("repair", "dial")
    ),
    (
        {"adapter.method": "lora_null_v1", "calibration.source": "absent.txt"},
        "calibration.source: no such file: absent.txt",
    ),
    ({"penalties": [{"kind": "l3", "weight": 1}]}, "penalties.0: unknown penalty 'l3'"),
    (
        {"penalties": [{"kind": "kl", "weight": 1, "source": "absent.txt"}]},
        "penalties.0: no such file: absent.txt",
    ),
    ({"tasks.learning": ["pocket_recal"]}, "tasks.learning.0: unknown task 'pocket_recal'"),
    ({"tasks.learning": [{"kind": "perplexity"}]}, "task 'perplexity' needs a 'path'"),
    ({"tasks.learning": ["pocket_recall"] * 2}, "tasks.learning.1: a second task named"),
]


@pytest.mark.parametrize(("changes", "message"), CONTENT_MISTAKES, ids=lambda v: str(v)[:60])
def test_what_a_value_refers_to_is_checked(
    tiny_recipe: dict[str, Any], tiny_files: Path, changes: dict[str, Any], message: str
) -> None:
    if changes.get("base") == "{files}":
        changes = {"base": str(tiny_files)}
    problems = check(Recipe.parse(tiny_recipe, changes))
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a", "completion": NaN}\n', "'completion' must be text, got float nan"),
        ('{"prompt": "a", "completion": null}\n', "'completion' must be text, got nothing"),
        ('{"prompt": "a", "completion": ""}\n', "'completion' is empty"),
        ('{"prompt": \n', "no valid JSON"),
        ('{"question": "a"}\n', "expected one of"),
    ],
)
def test_broken_training_data(
    tiny_recipe: dict[str, Any], tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(content)
    (problem,) = check(Recipe.parse(tiny_recipe, {"data.train": str(file)}))
    assert problem.startswith("data.train: ")
    assert message in problem


def test_a_sound_recipe_has_no_problems_and_no_weight_is_read(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"not weights at all")
    assert check(Recipe.parse(tiny_recipe, {"base": str(base)})) == []


def test_all_problems_are_shown_together(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    changes = {
        "training.learning_rat": 1e-3,
        "dtype": "bf16",
        "adapter.rank": 33,
        "data.train": "absent.jsonl",
        "tasks.forgetting": ["pocket_recal"],
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, changes)
    shown = str(caught.value)
    for part in (
        "learning_rat: unknown",
        "dtype: must",
        "rank must",
        "absent.jsonl",
        "recal'; did",
    ):
        assert part in shown
    assert shown.startswith(f"{file}: 8 problems")


def test_a_study_is_not_a_recipe(tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="this is a study"):
        Recipe.parse({"recipe": tiny_recipe, "axes": {"seed": [0]}})


def test_importing_recipes_imports_no_torch() -> None:
    code = "import sys, forgetless.recipes.recipe, forgetless.studies.folder;"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
