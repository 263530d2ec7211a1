"""Task files of lm-eval's form that bring code: refused by name, and a check runs none of it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from forgetless.core.errors import UserError
from forgetless.tasks import make_task
from forgetless.tasks.harness.own_code import own_code

pytest_plugins = ["tests.quick_python"]

pytest.importorskip("lm_eval")

PLAIN = """
task: own
dataset_path: json
test_split: test
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
output_type: generate_until
doc_to_text: '{{{{question}}}}'
doc_to_target: '{{{{answer}}}}'
generation_kwargs: {{until: ['.'], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
HELPERS = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("x")
def docs(rows):
    return rows
def score(items):
    return 1.0
"""
CODE = {
    "documents": ("process_docs: !function helpers.docs", "process_docs (!function helpers.docs)"),
    "nested": (
        "filter_list: [{name: a, filter: [{function: custom, filter_fn: !function helpers.docs}]}]",
        "filter_fn (!function helpers.docs)",
    ),
    "class": ("class: !function helpers.docs", "class (!function helpers.docs)"),
    "anything importable": ("process_docs: !function os.system", "process_docs (!function os.sys"),
    "metric": (
        "metric_list: [{metric: !function helpers.score, aggregation: mean}]",
        "metric (!function helpers.score)",
    ),
    "script of a metric": (
        "metric_list: [{metric: ./helpers.py}]",
        "metric_list (the metric './helpers.py', a script",
    ),
    "metric of the hub": (
        "metric_list: [{metric: exact_match, hf_evaluate: true}]",
        "metric_list (the metric 'exact_match', a script",
    ),
    "included": ("include: inner.yaml", "process_docs (!function helpers.docs) in {folder}/inner"),
    "included twice": ("include: [outer.yaml]", "in {folder}/inner.yaml"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "helpers.py").write_text(HELPERS)
    (tmp_path / "inner.yaml").write_text("process_docs: !function helpers.docs\ninclude: own.yaml")
    (tmp_path / "outer.yaml").write_text("include: inner.yaml")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    return tmp_path


def written(folder: Path, more: str) -> str:
    file = folder / "own.yaml"
    text = PLAIN.format(folder=folder)
    if more.startswith("metric_list"):
        text = text[: text.index("metric_list")]
    file.write_text(f"{text}{more}\n")
    return str(file)


@pytest.mark.parametrize("name", CODE)
def test_code_is_refused_with_what_would_run(name: str, folder: Path) -> None:
    line, said = CODE[name]
    with pytest.raises(UserError) as caught:
        make_task(written(folder, line))
    message = str(caught.value)
    assert said.format(folder=folder) in message
    assert "--allow-code-execution" in message
    assert "allow_code_execution: true" in message
    assert not (folder / "ran").exists()


def test_code_runs_when_it_is_allowed_and_no_sooner(folder: Path) -> None:
    file = written(folder, CODE["documents"][0])
    task = make_task({"kind": file, "allow_code_execution": True})
    assert not (folder / "ran").exists()
    assert len(task.fingerprint) == 16
    assert (folder / "ran").exists()


def test_a_file_without_code_needs_no_leave(folder: Path) -> None:
    assert make_task(written(folder, "")).name == "own"
    assert own_code(folder / "own.yaml") == []


def test_files_of_the_harness_may_be_included(folder: Path) -> None:
    from forgetless.tasks.harness.index import tasks_folder

    file = folder / "more.yaml"
    file.write_text(f"include: {tasks_folder() / 'gsm8k' / 'gsm8k.yaml'}\ntask: mine\n")
    assert own_code(file) == []
    assert any("!function" in path.read_text() for path in tasks_folder().rglob("*.yaml"))


@pytest.mark.parametrize(
    "text",
    ["task: x\ndoc_to_text: !!python/object/apply:os.system [id]\n", "task: [\n", "[" * 9999],
)
def test_what_cannot_be_read_is_not_loaded(text: str, folder: Path) -> None:
    (folder / "own.yaml").write_text("task: own\ninclude: bad.yaml\n")
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml cannot be read"):
        make_task(str(folder / "own.yaml"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch ' ~ ran) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ question.__class__.__base__ }}",
    ],
)
def test_templates_reach_nothing(template: str, folder: Path) -> None:
    file = written(folder, f'doc_to_text: "{template}"'.replace("ran", f"'{folder}/ran'"))
    with pytest.raises(UserError, match="unsafe"):
        make_task(file)
    assert not (folder / "ran").exists()


WATCHED = """
import sys
def hook(event, given):
    place = {{"exec": 0, "compile": 1, "open": 0}}.get(event)
    where = "" if place is None else given[place]
    where = str(getattr(where, "co_filename", where))
    if where.startswith({folder!r}) and where.endswith(".py"):
        print("RAN", event, where, flush=True)
    if event in ("os.system", "builtins.input"):
        print("RAN", event, given, flush=True)
sys.addaudithook(hook)
sys.argv = ["forgetless", "run", {recipe!r}, "--check"]
from forgetless.cli import main
main()
"""


@pytest.mark.parametrize("allowed", [True, False])
def test_a_check_runs_nothing_of_the_user_s(allowed: bool, folder: Path, python: str) -> None:
    """Not even where it is allowed; an audit hook sees what is opened, compiled and executed."""
    file = written(folder, CODE["documents"][0])
    task = json.dumps({"kind": file, "allow_code_execution": allowed})
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "base: pocket\ndata: {train: pocket:problems}\nadapter: {method: lora, rank: 2}\n"
        f"training: {{steps: 1}}\ntasks: {{learning: [{task}]}}\n"
    )
    done = subprocess.run(
        [python, "-c", WATCHED.format(folder=str(folder), recipe=str(recipe))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "1000"},
    )
    assert "RAN" not in done.stdout, done.stdout
    assert not (folder / "ran").exists()
    assert (done.returncode == 0) == allowed, done.stdout + done.stderr
    assert ("would run code of its own" in done.stdout + done.stderr) != allowed
