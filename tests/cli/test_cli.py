"""The command line: what each verb does, and one clear line for each mistake."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from forgetless.adapters.folders import load
from forgetless.cli import main
from forgetless.cli.tables import print_rates, print_run
from forgetless.core.files import read_json
from forgetless.core.progress import LOUDNESS
from forgetless.models.load import load_model
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.moments import Statistics
from forgetless.studies.folder import curve, results
from forgetless.studies.rate_search import RateSearch
from forgetless.studies.run import Run
from forgetless.studies.run import run as run_recipe
from forgetless.studies.stages import Event
from forgetless.training.rates import Trial, judge
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures"]


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture
def forgetless(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process, where warnings are part of what it says."""

    def call(*arguments: object) -> Outcome:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            with pytest.raises(SystemExit) as ended:
                main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, said.out, said.err)

    return call


@pytest.fixture(scope="module")
def place(
    tiny_base: Path, tiny_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Good files, bad files and one finished run, by the names used in arguments."""
    folder = tmp_path_factory.mktemp("place")
    good = recipe_of(tiny_base, tiny_files)
    studied = {"recipe": good, "axes": {"adapter.method": ["lora", "pissa"]}}
    texts = {
        "recipe.yaml": json.dumps(good),
        "study.yaml": json.dumps(studied),
        "wrong_axis.yaml": json.dumps({**studied, "axes": {"adapter.rank": [1, 99]}}),
        "empty.yaml": "",
        "list.yaml": "- a\n- b\n",
        "broken.yaml": "base: [1, 2\n",
        "twice.yaml": "base: a\nbase: b\n",
        "binary.yaml": "",
        "empty.jsonl": "",
        "nan.jsonl": '{"prompt": "a", "completion": NaN}\n',
        "null.jsonl": '{"prompt": "a", "completion": null}\n',
        "cut.jsonl": '{"prompt": "a", "comp',
        "keys.jsonl": '{"frage": "a", "antwort": "b"}\n',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(b"\x80\x81\x00")
    (folder / "nothing").mkdir()
    (folder / "config_only").mkdir()
    (folder / "config_only" / "config.json").write_text((tiny_base / "config.json").read_text())
    run = run_recipe({**good, "name": "done"}, folder / "runs")
    return {"here": folder, "base": tiny_base, "files": tiny_files, "run": run.folder}


VERBS = (
    *("demo", "methods", "tasks", "stats", "init", "train", "eval", "run", "study", "report"),
    *("compare", "export", "data"),
)

# ---- start ---------------------------------------------------------------------------------------


def test_help_answers_without_torch() -> None:
    code = (
        "import sys\n"
        "from forgetless.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'pydantic', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    for verb in VERBS:
        assert f"\n  {verb} " in found.stdout
    assert "worker" not in found.stdout


def test_no_command_is_help(forgetless: Any) -> None:
    assert forgetless().out == forgetless("--help").out == forgetless("-h").out != ""
    assert forgetless("run", "-h").out == forgetless("run", "--help").out != ""
    assert "--install-completion" in forgetless("-h").out


def test_version(forgetless: Any) -> None:
    import forgetless as package

    assert forgetless("--version") == Outcome(0, f"forgetless {package.__version__}\n", "")


def test_python_dash_m() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "forgetless", "--version"], capture_output=True, check=False
    )
    assert (found.returncode, found.stdout[:10]) == (0, b"forgetless")


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, str]] = [
    # the command itself
    ("rnu recipe.yaml", "No such command 'rnu'"),
    ("run", "Missing argument 'RECIPE'"),
    ("run {here}/recipe.yaml --stps 3", "No such option"),
    ("study {here}/study.yaml --workers two", "Invalid value for '--workers'"),
    ("study {here}/study.yaml --workers 0", "Invalid value for '--workers'"),
    ("eval {base}", "Missing option '--tasks' (see 'forgetless eval --help')"),
    ("--nonsense", "(see 'forgetless --help')"),
    ("run {here}/recipe.yaml --check --out {here}/empty.yaml", "empty.yaml is a file, not a"),
    ("study {here}/study.yaml --check --out {here}/empty.yaml", "empty.yaml is a file, not a"),
    ("study {here}/study.yaml --out {here}/empty.yaml/runs", "empty.yaml is a file, not a"),
    # the recipe's file
    ("run {here}/absent.yaml", "no such file: {here}/absent.yaml"),
    ("run {here}/nothing", "is a folder; give the YAML file itself"),
    ("run {here}/empty.yaml", "is empty; see recipes/own-model.yaml"),
    ("run {here}/list.yaml", "must hold keys and values"),
    ("run {here}/broken.yaml", "not valid YAML: line 2"),
    ("run {here}/twice.yaml", "the key 'base' is given twice (again in line 2)"),
    ("run {here}/binary.yaml", "is not a text file"),
    ("run {here}/study.yaml", "this is a study; run it with 'forgetless study'"),
    ("study {here}/recipe.yaml", "is a recipe, not a study"),
    ("run {here}/recipe.yaml --set training.steps", "--set takes key=value"),
    ("run {here}/recipe.yaml --out {here}/list.yaml", "{here}/list.yaml is a file, not a folder"),
    # keys and values
    ("run {here}/recipe.yaml --set training.learning_rat=1", "did you mean 'learning_rate'?"),
    ("run {here}/recipe.yaml --set lora.rank=1", "lora: unknown key"),
    (
        "run {here}/recipe.yaml --set training.learning_rate=.nan",
        "must be a finite number, got nan",
    ),
    ("run {here}/recipe.yaml --set training.learning_rate=fast", "must be a number, got 'fast'"),
    (
        "run {here}/recipe.yaml --set training.steps=-1",
        "must be greater than or equal to 1, got -1",
    ),
    (
        "run {here}/recipe.yaml --set training.steps=null",
        "give one of steps, epochs and tokens, got none of them",
    ),
    ("run {here}/recipe.yaml --set dtype=int4", "must be 'auto', 'float32', 'bfloat16'"),
    # base
    ("run {here}/recipe.yaml --set base={here}/absent", "absent' does not exist"),
    ("run {here}/recipe.yaml --set base={here}/nothing", "is no model: it has no config.json"),
    ("run {here}/recipe.yaml --set base={here}/config_only", "has a config.json but no weights"),
    ("run {here}/recipe.yaml --set base={here}/recipe.yaml", "is a file, not a model folder"),
    ("run {here}/recipe.yaml --set base=null", "base: must be text, got nothing"),
    # method
    ("run {here}/recipe.yaml --set adapter.method=pisa", "did you mean 'pissa'?"),
    ("run {here}/recipe.yaml --set adapter.rank=33", "rank must be in 1..32 for layer 'model.l"),
    (
        "run {here}/recipe.yaml --set adapter.options={{depth: 1}}",
        "unknown option of method 'pissa'",
    ),
    ("run {here}/recipe.yaml --set adapter.target_modules=[query]", "match no layer"),
    # data
    ("run {here}/recipe.yaml --set data.train={here}/absent.jsonl", "data.train: no such file"),
    ("run {here}/recipe.yaml --set data.train={here}/empty.jsonl", "is empty; give at least one"),
    ("run {here}/recipe.yaml --set data.train={here}/nan.jsonl", "must be text, got float nan"),
    ("run {here}/recipe.yaml --set data.train={here}/null.jsonl", "must be text, got nothing"),
    ("run {here}/recipe.yaml --set data.train={here}/cut.jsonl", "line 1: no valid JSON"),
    ("run {here}/recipe.yaml --set data.train={here}/keys.jsonl", "expected one of: messages"),
    ("run {here}/recipe.yaml --set data.train=.nan", "data.train: must be a file or a list of"),
    ("run {here}/recipe.yaml --set data=null", "data: must be a mapping of keys to values"),
    # tasks
    ("run {here}/recipe.yaml --set tasks.learning=[recall]", "unknown task 'recall'"),
    ("run {here}/recipe.yaml --set tasks.learning=[null]", "must be a task's name or a mapping"),
    # the other verbs
    ("train {here}/recipe.yaml --set adapter.rank=33", "rank must be in 1..32"),
    ("study {here}/wrong_axis.yaml", "(in rank=99)"),
    ("report {here}/absent", "no study folder"),
    ("report {here}/nothing", "holds no run"),
    ("eval {base} --tasks recall", "unknown task 'recall'"),
    ("eval {base} --tasks perplexity:{here}/absent.txt", "no such file: {here}/absent.txt"),
    ("eval {base} --tasks kl", "task 'kl' needs a 'path': write kl:FILE"),
    ("eval {here}/nothing --tasks pocket_recall", "is no model"),
    ("eval {base} --tasks kl:{files}/old.txt --adapter {here}/nothing", "neither a run nor an"),
    ("eval {base} --tasks pocket_recall --learning pocket_recall", "give --report too"),
    (
        "eval {base} --tasks pocket_recall --adapter {run} --report {here}/new "
        "--learning pocket_series",
        "pocket_series cannot be learned: not among the tasks pocket_recall",
    ),
    ("stats {base} --calibration {here}/absent.txt --out {here}/new", "no such file"),
    (
        "stats {base} --samples 0 --out {here}/new",
        "samples: must be 'auto' or a whole number of at least 1",
    ),
    ("init {base} --method lora_nul --out {here}/new", "did you mean 'lora_null_v"),
    ("init {base} --out {here}/new", "needs to know what to keep: give --calibration FILE"),
    ("init {base} --method lora --rank 40 --out {here}/new", "rank must be in 1..32"),
    ("init {base} --method full --out {here}/new", "there is no adapter to start"),
    ("init {base} --method lora --out {files}", "is not empty; give a new folder"),
    ("init {base} --method lora --out {here}/recipe.yaml", "is a file; give a new folder"),
    ("init {base} --method pissa --option niter --out {here}/new", "--option takes a name and a"),
    ("init {base} --rank-pattern q_proj --out {here}/new", "--rank-pattern takes a name and a"),
    ("init {base} --stats {here}/nothing --out {here}/new", "no statistics at"),
    ("export {here}/absent --out {here}/new", "no folder"),
    ("export {here}/nothing --out {here}/new", "is neither a run nor an adapter"),
    ("export {run} --rank half --out {here}/new", "rank must be 'exact', 'requested' or a number"),
    ("export {base} --out {here}/new", "is a whole model, not an adapter"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line[:70] for line, _ in MISTAKES])
def test_a_mistake_is_one_clear_line_and_exit_code_2(
    line: str, message: str, place: dict[str, Path], forgetless: Any
) -> None:
    # Split first: no value holds a space but the mapping of options.
    words = line.replace(": ", ":\u00a0").split(" ")
    arguments = [word.format(**place).replace("\u00a0", " ") for word in words]
    found = forgetless(*arguments)
    assert found.code == 2, found
    assert found.out == ""
    assert message.format(**place) in found.err
    assert "Traceback" not in found.err
    assert found.err.startswith("error: ")
    _, *rest = found.err.splitlines()
    assert all(line.startswith("  - ") for line in rest), found.err
    assert not (place["here"] / "new").exists()


def test_there_are_enough_mistakes() -> None:
    assert len(MISTAKES) >= 30


@pytest.mark.parametrize("loudness", ["--quiet", "--verbose"])
def test_it_is_said_how_much_is_said(
    place: dict[str, Path], capsys: pytest.CaptureFixture[str], loudness: str
) -> None:
    recipe, out = str(place["here"] / "recipe.yaml"), str(place["here"] / f"runs{loudness}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LOUDNESS, "usual")
        with pytest.raises(SystemExit) as ended:
            main(["train", recipe, loudness, "--out", out])
        assert os.environ[LOUDNESS] == loudness.removeprefix("--")  # workers inherit it
    assert ended.value.code == 0
    found = capsys.readouterr()
    assert ("train: " in found.err) == (loudness == "--verbose")
    assert out in found.out


def test_debug_shows_where_it_came_from(place: dict[str, Path]) -> None:
    with pytest.raises(FileNotFoundError):
        main(["run", str(place["here"] / "absent.yaml"), "--debug"])


def test_all_problems_of_a_recipe_at_once(place: dict[str, Path], forgetless: Any) -> None:
    changes = ["adapter.rank=33", "data.train=absent.jsonl", "training.lr=1"]
    options = [word for change in changes for word in ("--set", change)]
    found = forgetless("run", place["here"] / "recipe.yaml", "--check", *options)
    assert found.code == 2
    for part in ("training.lr: unknown key", "rank must be in 1..32", "absent.jsonl"):
        assert part in found.err


def test_a_failure_that_is_no_mistake_is_exit_code_1(
    place: dict[str, Path], forgetless: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from forgetless.studies import stages

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(stages, "train", fail)
    found = forgetless("run", place["here"] / "recipe.yaml", "--out", tmp_path)
    assert (found.code, found.out) == (1, "")
    assert found.err.endswith("\nerror: RuntimeError: the device is gone (--debug shows where)\n")


def test_out_of_memory_comes_with_what_takes_less(
    place: dict[str, Path], forgetless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forgetless.cli.commands import measuring

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(measuring, "measure", fail)
    found = forgetless("eval", place["base"], "--tasks", "pocket_recall")
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith(
        "error: no memory left (CUDA out of memory. Tried to allocate 2.00 GiB): a smaller "
        "--batch-size takes less"
    )


# ---- the main verbs ------------------------------------------------------------------------------


def test_check_loads_no_weights_and_names_the_run(place: dict[str, Path], forgetless: Any) -> None:
    file = place["here"] / "recipe.yaml"
    found = forgetless("run", file, "--check")
    assert found.code == 0
    assert run_id(Recipe.load(file)) in found.out
    found = forgetless("study", place["here"] / "study.yaml", "--check")
    assert (found.code, found.out.split(": ")[1]) == (0, "no problems; 2 runs\n")


def test_run_prints_scores_also_on_the_way_and_its_folder(
    place: dict[str, Path], forgetless: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--study", "done", "--set", "training.steps=2", "--set", "training.measure_at=[0.5]"]
    found = forgetless(
        "run", place["here"] / "recipe.yaml", "--out", place["run"].parent.parent, *options
    )
    assert found.code == 0
    assert "evaluate: 6 measurements (" in found.err  # of 3 tasks at 2 steps
    scores, way = found.out.split("measured on the way")
    assert "sums" in scores
    way, loading = way.split("\na plain PEFT LoRA for the untouched base")
    _, *code, last = loading.splitlines()
    names: dict[str, Any] = {}
    exec(textwrap.dedent("\n".join(code)), names)  # what is printed works
    assert isinstance(names["model"], PeftModel)
    heads, *rows = way.splitlines()
    assert heads.split() == ["metric", "base", "step", "1", "end", "(2)"]
    assert [row.split()[:2] for row in rows] == [["sums", "loss"], ["prose", "loss"], ["kl", "kl"]]
    folder = Path(last)
    points = [row["score"] for row in curve(folder.parent) if row["task"] == "sums"]
    assert rows[0].split()[2:] == [f"{score:.3f}" for score in points]
    assert read_json(folder / "run.json")["training"]["steps"] == 2
    print_run(Run(place["run"]))  # another run of that study, without such steps
    assert "on the way" not in capsys.readouterr().out


def test_train_measures_nothing(place: dict[str, Path], forgetless: Any, tmp_path: Path) -> None:
    found = forgetless("train", place["here"] / "recipe.yaml", "--out", tmp_path)
    assert found.code == 0
    folder = Path(found.out.strip())
    assert folder.parent == tmp_path / "recipe"  # named after the file
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert not (folder / "scores").exists()


def test_a_budget_that_ended_the_training_is_told_at_the_end(
    place: dict[str, Path], forgetless: Any, tmp_path: Path
) -> None:
    old = str(place["files"] / "old.txt")
    budget = {"forgetting": [old], "every": 1, "max_kl": 1e-6, "on_exceed": "rollback"}
    recipe = {**json.loads((place["here"] / "recipe.yaml").read_text()), "probes": budget}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    for verb in ("run", "train"):  # the second finds nothing to do, and says it again
        found = forgetless(verb, file, "--out", tmp_path)
        assert found.code == 0
        end, folder = found.out.splitlines()[-2:]
        event = read_json(Path(folder) / "run.json")["training"]["exceeded"]
        assert end == (
            f"ended by its budget of forgetting: {event['probe']} reached {event['value']:.4g} at "
            f"step {event['step']}, over max_kl 1e-06; went back to step {event['kept_step']}"
        )


def test_the_rates_that_were_tried_are_explained(
    place: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    falling, flat = [4 - 0.1 * step for step in range(20)], [4.0] * 20
    trials = [Trial(1e-3, falling, {"kl": 0.25}), Trial(1e-2, flat), Trial(1e-1, falling[:3])]
    verdicts, rate = judge(trials, 20)
    recipe = Recipe.load(place["here"] / "recipe.yaml", {"training.learning_rate": rate})
    print_rates(RateSearch(recipe, 20, trials, verdicts, Path("trials.json")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Each rate was tried for 20 steps")
    assert [line.split() for line in lines[2:5]] == [
        ["0.001", "2.15", "0", "0.25", "stable", "<-", "taken"],
        ["0.01", "4", "0", "–", "learns", "nothing"],
        ["0.1", "–", "–", "–", "no", "number", "after", "step", "3"],
    ]
    said = " ".join(lines)
    assert "at least 90 % as far" in said
    assert "nats per token" in said
    assert "The highest rate" not in said
    assert "Taken: 0.001, the highest stable rate. Now the whole training" in said


def test_study_ends_with_a_report(place: dict[str, Path], forgetless: Any, tmp_path: Path) -> None:
    found = forgetless("study", place["here"] / "study.yaml", "--out", tmp_path)
    assert found.code == 0
    assert "failed" not in found.err
    page = tmp_path / "study" / "report" / "index.html"
    assert found.out.splitlines()[-1] == f"report: {page}"
    assert page.exists()
    again = forgetless("report", tmp_path / "study")
    assert again.code == 0
    assert again.out.splitlines()[-1] == f"report: {page}"


def test_a_study_with_a_failed_run_ends_with_1_and_the_reason(
    place: dict[str, Path], forgetless: Any, tmp_path: Path
) -> None:
    definition = json.loads((place["here"] / "study.yaml").read_text())
    definition["axes"] = {"training.learning_rate": [1e30, 1e-3]}
    definition["recipe"]["training"]["max_grad_norm"] = 1e30
    file = tmp_path / "bad.yaml"
    file.write_text(json.dumps(definition))
    found = forgetless("study", file, "--out", tmp_path / "runs", "--no-report")
    assert found.code == 1
    assert "failed: " in found.err
    assert "pissa-" in found.err


@pytest.mark.parametrize("several", [False, True])
def test_a_terminal_shows_what_runs_do(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from forgetless.cli import watch

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(watch, "Console", lambda stderr: console)
    with watch.watch(several=several) as listen:
        listen(Event("pissa-1", "pissa", "statistics", "14 layers (0.1 s)"))
        listen(Event("pissa-1", "pissa", "train", step=3, steps=8))
        time.sleep(0.5)  # bars are drawn ten times a second
        listen(Event("lora-1", "lora", "failed", "MemoryError: no room"))
        listen(Event("pissa-1", "pissa", "done", "61 s"))
    shown = screen.getvalue()
    assert "pissa  done: 61 s\n" in shown
    assert "lora  failed: MemoryError: no room\n" in shown
    assert ("pissa  statistics: 14 layers (0.1 s)\n" in shown) == (not several)
    assert ("3/8" in shown) == several


@pytest.mark.parametrize("several", [False, True])
def test_anything_but_a_terminal_gets_lines_on_standard_error(
    several: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from forgetless.cli.watch import watch

    with watch(several=several) as listen:
        listen(Event("pissa-1", "pissa", "statistics", "14 layers (0.1 s)"))
        listen(Event("pissa-1", "pissa", "train", step=3, steps=8))
        listen(Event("pissa-1", "pissa", "done", "61 s"))
    lines = ["pissa  statistics: 14 layers (0.1 s)\n", "pissa  done: 61 s\n"]
    assert capsys.readouterr() == ("", "".join(lines[several:]))


# ---- single stages -------------------------------------------------------------------------------


def test_methods_and_tasks_are_listed(forgetless: Any) -> None:
    from forgetless.methods import METHODS
    from forgetless.tasks import TASKS

    found = forgetless("methods")
    assert found.code == 0
    assert all(name in found.out for name in METHODS)
    found = forgetless("tasks")
    assert found.code == 0
    assert all(name in found.out for name in TASKS)


def test_stats_writes_what_init_reads(
    place: dict[str, Path], forgetless: Any, tmp_path: Path
) -> None:
    text = place["files"] / "old.txt"
    options = ["--calibration", text, "--samples", 8, "--max-length", 32]
    found = forgetless("stats", place["base"], *options, "--out", tmp_path / "stats")
    assert found.code == 0
    statistics = Statistics.load(tmp_path / "stats")
    assert f"{len(statistics)} layers" in found.out
    common = ["init", place["base"], "--rank", 2, "--method", "lora_null_zero"]
    found = forgetless(*common, "--stats", tmp_path / "stats", "--out", tmp_path / "one")
    assert found.code == 0
    found = forgetless(*common, *options, "--out", tmp_path / "two")
    assert found.code == 0
    one, two = (tmp_path / name / "adapter_model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("method", "plain", "reason"),
    [
        ("lora", True, ""),
        ("lora_null_zero", True, ""),
        ("lora_null_v2", False, "keeps A frozen"),
        ("lora_null_v1", False, "does not start from the base itself"),
        ("pissa", False, "does not start from the base itself"),
    ],
)
def test_init_says_who_can_continue_a_start(
    method: str, plain: bool, reason: str, place: dict[str, Path], forgetless: Any, tmp_path: Path
) -> None:
    options = ["--calibration", place["files"] / "old.txt", "--max-length", 32, "--rank", 2]
    found = forgetless("init", place["base"], "--method", method, *options, "--out", tmp_path / "a")
    assert found.code == 0
    assert ("any PEFT-based trainer" in found.out) == plain
    assert reason in found.out
    model = load_model(str(place["base"]))
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        if plain:
            started = PeftModel.from_pretrained(model, tmp_path / "a", is_trainable=True).eval()
            assert all(w.requires_grad for n, w in started.named_parameters() if "lora_" in n)
        else:
            started = load(model, tmp_path / "a", trainable=True).eval()
        assert torch.equal(started(input_ids=tokens).logits, before)


def test_eval_scores_a_base_and_a_run_beside_it(
    place: dict[str, Path], forgetless: Any, tmp_path: Path
) -> None:
    tasks = f"perplexity:{place['files'] / 'old.txt'},kl:{place['files'] / 'test.jsonl'}"
    arguments = ["eval", place["base"], "--tasks", tasks, "--limit", 3]
    found = forgetless(*arguments, "--out", tmp_path / "base.json")
    assert found.code == 0
    base = json.loads((tmp_path / "base.json").read_text())
    assert base["kl_test"]["kl"] == {"value": 0, "stderr": 0, "n": 3}
    assert list(base["perplexity_old"]) == ["loss", "perplexity", "tokens"]
    found = forgetless(*arguments, "--adapter", place["run"], "--out", tmp_path / "run.json")
    assert found.code == 0
    assert json.loads((tmp_path / "run.base.json").read_text()) == base
    scores = json.loads((tmp_path / "run.json").read_text())
    assert scores["kl_test"]["kl"]["value"] > 0
    assert list(scores) == ["perplexity_old", "kl_test"]
    exported = ["--adapter", place["run"] / "adapter", "--out", tmp_path / "plain.json"]
    assert forgetless(*arguments, *exported).code == 0
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert plain["kl_test"]["kl"]["value"] == pytest.approx(
        scores["kl_test"]["kl"]["value"], rel=1e-4
    )
    page = ["--adapter", place["run"], "--report", tmp_path / "page"]
    learned = ["--learning", tasks.partition(",")[0]]
    assert forgetless(*arguments, *page, *learned).code == 0
    rows = results(tmp_path / "page")
    assert {row["task"]: row["kind"] for row in rows} == {
        "perplexity_old": "learning",
        "kl_test": "forgetting",
    }


def test_export_of_a_run_and_of_an_adapter(
    place: dict[str, Path], forgetless: Any, tmp_path: Path
) -> None:
    found = forgetless("export", place["run"], "--out", tmp_path / "exact")
    first, meaning = found.out.splitlines()
    assert (found.code, first) == (0, f"{tmp_path / 'exact'}: rank 4, exact")
    assert "all that was trained" in meaning
    native = place["run"] / "native"
    found = forgetless("export", native, "--rank", 1, "--out", tmp_path / "one")
    assert found.code == 0
    assert "rank 1, relative error 0." in found.out
    assert "its change of the weights is off by" in found.out
    base = AutoModelForCausalLM.from_pretrained(place["base"])
    assert PeftModel.from_pretrained(base, tmp_path / "one").peft_config["default"].r == 1
