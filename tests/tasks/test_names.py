"""What a task may be called, and which tasks a name stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forgetless.cli.values import task_specs
from forgetless.core.errors import UserError
from forgetless.recipes.checking import check
from forgetless.recipes.recipe import Recipe
from forgetless.tasks import SUITES, TASKS, make_task, make_tasks
from forgetless.tasks.names import resolved
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures"]

KINDS = {kind: task.defaults() for kind, task in TASKS.items()}


def kinds_of(spec: Any) -> list[str]:
    """What a spec stands for: kinds of ours, or names of the harness."""
    return [str(settings.get("task", settings["kind"])) for settings in resolved(spec, KINDS)]


def test_a_kind_comes_before_a_task_of_the_harness() -> None:
    assert resolved("perplexity", KINDS) == [{"kind": "perplexity"}]
    assert resolved("hellaswag", KINDS) == [{"kind": "lm_eval", "task": "hellaswag"}]
    assert resolved({"kind": "sciq", "limit": 3, "name": "s"}, KINDS) == [
        {"kind": "lm_eval", "task": "sciq", "limit": 3, "name": "s"}
    ]
    assert resolved({"name": "winogrande"}, KINDS) == [
        {"kind": "lm_eval", "task": "winogrande", "name": "winogrande"}
    ]


def test_a_kind_and_its_file_are_one_name_wherever_a_task_is_named(tmp_path: Path) -> None:
    named = {"kind": "perplexity", "path": "a/notes.txt", "name": "perplexity_notes"}
    assert resolved("perplexity:a/notes.txt", KINDS) == [named]
    assert resolved({"kind": "perplexity:a/notes.txt", "name": "old"}, KINDS) == [
        {**named, "name": "old"}
    ]
    assert task_specs("perplexity:a/notes.txt") == [named]
    for wrong in ("perplexty:a/notes.txt", "perplexty:notes"):
        with pytest.raises(UserError, match="'perplexty"):
            make_task(wrong)
    (tmp_path / "notes.txt").write_text("some text\n")
    (tmp_path / "other.txt").write_text("some more\n")
    made = make_tasks([f"perplexity:{tmp_path}/{name}.txt" for name in ("notes", "other")])
    assert [task.name for task in made] == ["perplexity_notes", "perplexity_other"]


def test_suites_stand_for_the_papers_tasks() -> None:
    assert kinds_of("commonsense") == ["hellaswag", "arc_challenge", "winogrande"]
    assert kinds_of("world-knowledge") == ["triviaqa", "nq_open", "webqs"]
    assert kinds_of("math") == ["gsm8k", "hendrycks_math"]
    assert kinds_of("code") == ["humaneval", "mbpp"]
    assert len(kinds_of("papers")) == 10 == len(SUITES["papers"])


def test_a_suite_hands_its_settings_on() -> None:
    found = resolved({"kind": "commonsense", "limit": 7, "data_dir": "here"}, KINDS)
    assert all((task["limit"], task["data_dir"]) == (7, "here") for task in found)


def test_a_suite_is_several_tasks(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make_tasks({"kind": "commonsense", "data_dir": str(tmp_path)})
    lines = str(caught.value).splitlines()
    assert [line.split("'")[1] for line in lines] == list(SUITES["commonsense"])


def test_options_of_the_command_line_go_to_the_tasks_that_have_them() -> None:
    found = task_specs("kl:a/b.txt, hellaswag,pocket_recall", limit=3, num_fewshot=2, data_dir=None)
    assert found == [
        {"kind": "kl", "path": "a/b.txt", "name": "kl_b", "limit": 3},
        {"kind": "lm_eval", "task": "hellaswag", "limit": 3, "num_fewshot": 2},
        {"kind": "pocket_recall", "limit": 3},
    ]


def test_a_yaml_file_finds_its_data_beside_it(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "some text"}\n')
    (tmp_path / "prose.yaml").write_text("kind: perplexity\npath: texts.jsonl\n")
    task = make_task(str(tmp_path / "prose.yaml"))
    assert task.name == "prose"
    again = make_task({"kind": str(tmp_path / "prose.yaml"), "name": "other", "max_length": 9})
    assert (again.name, again.fingerprint == task.fingerprint) == ("other", False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "is empty"),
        ("path: a.txt\n", "mine.yaml: a task needs a 'kind', one of multiple_choice"),
        ("kind: perplexty\n", "did you mean 'perplexity'"),
        ("kind: perplexity\npath: gone.txt\n", "no such file: gone.txt"),
        ("kind: perplexity\npth: a\n", "unknown setting of task 'perplexity': 'pth'"),
        ("kind: [a\n", "not valid YAML: line 2"),
    ],
)
def test_what_is_wrong_with_a_yaml_file_is_said(
    content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises((UserError, FileNotFoundError), match=message):
        make_task(str(tmp_path / "mine.yaml"))


def test_a_recipe_names_them_too(tiny_base: Path, tiny_files: Path, tmp_path: Path) -> None:
    (tmp_path / "prose.yaml").write_text(f"kind: perplexity\npath: {tiny_files / 'old.txt'}\n")
    recipe = recipe_of(tiny_base, tiny_files)
    recipe["tasks"]["forgetting"] = [str(tmp_path / "prose.yaml"), {"kind": "math", "limit": 0}]
    problems = check(Recipe.parse(recipe))
    assert len(problems) == 1
    assert problems[0].startswith(
        "tasks.forgetting.1: task 'lm_eval': limit must be a whole number"
    )
    recipe["tasks"]["forgetting"] = [{"kind": str(tmp_path / "prose.yaml"), "limit": 2}]
    assert check(Recipe.parse(recipe)) == []
