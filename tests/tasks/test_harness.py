"""Tasks of the lm-evaluation-harness: its own numbers, from local files, on a model in memory."""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from torch import nn

import forgetless as fl
from forgetless.core.errors import UserError
from forgetless.core.files import read_jsonl
from forgetless.models.load import load_model, load_tokenizer
from forgetless.tasks import Item, TaskResult, continuations, journal, make_task, make_tasks
from forgetless.tasks.harness import index, local
from forgetless.tasks.harness import model as harness_model
from forgetless.tasks.harness.layouts import STANDARD
from forgetless.tasks.harness.model import InMemory
from forgetless.tasks.harness.results import _weighted as weighted
from forgetless.tasks.lm_eval import LMEval
from forgetless.tasks.multiple_choice import MultipleChoice

pytest_plugins = ["tests.tiny_fixtures", "tests.quick_python"]

Rows = list[dict[str, Any]]

COMPARED = ("hellaswag", "arc_challenge", "winogrande", "triviaqa", "nq_open", "webqs", "gsm8k")


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def choices(*texts: str) -> dict[str, list[str]]:
    return {"text": list(texts), "label": list("ABCD"[: len(texts)])}


WINOGRANDE: Rows = [
    {
        "sentence": f"The {a} did not fit into the {b} because the _ was too {how}.",
        "option1": a,
        "option2": b,
        "answer": answer,
    }
    for a, b in [("cup", "box"), ("ball", "bag"), ("dog", "car"), ("hat", "sack")]
    for how, answer in [("big", "1"), ("small", "2")]
]
SCIENCE: Rows = [
    {"question": f"What is {a} and {b}?", "choices": choices(str(a), str(a + b)), "answerKey": "B"}
    for a in (1, 2)
    for b in (3, 4)
]
NATURAL: Rows = [
    {"question": f"who wrote book {i}", "answer": [f"Writer {i}", "Anon"]} for i in range(5)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local files of three standard tasks."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "winogrande" / "winogrande_xl_validation.jsonl", WINOGRANDE)
    write(folder / "arc" / "ARC-Easy_test.jsonl", SCIENCE)
    write(folder / "nq_open.dev.jsonl", NATURAL)
    return folder


@pytest.fixture(scope="module")
def long_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, with room for the harness's prompts and answers."""
    folder = tmp_path_factory.mktemp("long") / "base"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 640}))
    return folder


@pytest.fixture(scope="module")
def short_answers(data: Path) -> str:
    """A task in the harness's own form that generates a few tokens only."""
    file = data / "short_answers.yaml"
    file.write_text(
        "task: short_answers\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {data / 'nq_open.dev.jsonl'}}}}}\n"
        "output_type: generate_until\ndoc_to_text: 'Q: {{question}}'\n"
        "doc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 6}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        "metadata: {version: 7}\n"
    )
    return str(file)


@pytest.fixture
def model(long_base: Path) -> Any:
    return load_model(str(long_base))


@pytest.fixture
def tokenizer(long_base: Path) -> Any:
    return load_tokenizer(str(long_base))


def adapted(model: Any) -> PeftModel:
    """The model with a LoRA that changes its answers."""
    torch.manual_seed(3)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return tuned


# ------------------------------------------------------------------------ the harness's own numbers

DRIVER = """
import json, sys, torch
from functools import partial
from lm_eval import tasks
from lm_eval.tasks import manager
torch.set_num_threads(1)
# The 14 000 other tasks need not be read to find these seven.
tasks.TaskManager = manager.TaskManager = partial(manager.TaskManager, include_defaults=False)
from lm_eval.__main__ import cli_evaluate
for words in json.loads(sys.argv[1]):
    sys.argv = ["lm_eval", "run", *words]
    cli_evaluate()
"""


def command_line(python: str, folder: Path, limit: int, models: dict[Path, list[str]]) -> None:
    """lm-eval's own command line, once a model, in one process; results go below the paths."""
    common = ["--model", "hf", "--tasks", ",".join(COMPARED), "--include_path", str(folder)]
    common += ["--limit", str(limit), "--batch_size", "8", "--device", "cpu", "--log_samples"]
    calls = [[*common, "--output_path", str(out), *words] for out, words in models.items()]
    done = subprocess.run(
        [python, "-c", DRIVER, json.dumps(calls)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def theirs(out: Path) -> tuple[dict[str, Any], dict[str, Rows]]:
    """What the command line wrote: its results, and its samples by task."""
    (file,) = out.parent.rglob(f"{out.stem}_*.json")
    samples = {
        task: read_jsonl(next(out.parent.rglob(f"samples_{task}_*.jsonl"))) for task in COMPARED
    }
    return json.loads(file.read_text()), samples


def check_equal(scores: fl.Scores, results: dict[str, Any], samples: dict[str, Rows]) -> None:
    """Every metric, standard error, version, number of shots and answer is the same."""
    for task, found in scores.items():
        reported = {k: v for k, v in results["results"][task].items() if "," in k}
        ours = {}
        for key, cell in found.metrics.items():
            metric, _, name = key.partition(",")
            ours[key] = cell["value"]
            ours[f"{metric}_stderr,{name}"] = cell["stderr"]
        assert ours == reported, task
        assert found.settings["version"] == results["versions"][task]
        assert found.settings["num_fewshot"] == results["n-shot"][task]
        assert found.n == results["n-samples"][task]["effective"]
        name = found.metric.partition(",")[2]
        written = {str(s["doc_id"]): s for s in samples[task] if s["filter"] == name}
        for item in found.items:
            sample = written[item.id]
            assert item.score == sample[found.metric.partition(",")[0]]
            if task in ("triviaqa", "nq_open", "gsm8k"):
                assert item.answer == sample["resps"][0][0].strip()


def test_scores_equal_those_of_the_harness_s_own_command_line(
    shared_data: Path, long_base: Path, tmp_path: Path, python: str
) -> None:
    limit, stories = 4, str(shared_data / "stories260K" / "hf")
    (tmp_path / "tasks").mkdir()
    for task in COMPARED:
        local.write(task, shared_data, tmp_path / "tasks")
    tuned = adapted(load_model(stories))
    tuned.save_pretrained(str(tmp_path / "adapter"))
    real, tiny = tmp_path / "real" / "out.json", tmp_path / "tiny" / "out.json"
    command_line(
        python,
        tmp_path / "tasks",
        limit,
        {
            real: ["--model_args", f"pretrained={stories},peft={tmp_path / 'adapter'}"],
            tiny: ["--model_args", f"pretrained={long_base}", "--gen_kwargs", "max_gen_toks=24"],
        },
    )

    def ours(model: nn.Module, **settings: Any) -> fl.Scores:
        tasks = [LMEval(task, limit=limit, data_dir=shared_data, **settings) for task in COMPARED]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fl.evaluate(model, tasks, batch_size=8)

    found = ours(tuned)
    check_equal(found, *theirs(real))
    assert found["hellaswag"].value > 0
    assert len({item.answer for item in found["gsm8k"].items}) > 1
    check_equal(ours(load_model(str(long_base)), max_new_tokens=24), *theirs(tiny))


def test_multiple_choice_of_our_own_has_the_harness_s_numbers(
    data: Path, model: Any, tokenizer: Any
) -> None:
    theirs = LMEval("arc_easy", data_dir=data).evaluate(model, tokenizer)
    own = MultipleChoice(data / "arc" / "ARC-Easy_test.jsonl", answer="answerKey")
    ours = own.evaluate(model, tokenizer)
    assert ours.value == theirs.value
    assert ours.extra["accuracy_total"] == theirs.extra["acc,none"]
    assert [i.answer for i in ours.items] == [i.answer for i in theirs.items]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_nothing(
    batch_size: int, data: Path, short_answers: str, model: Any, tokenizer: Any
) -> None:
    for task in make_tasks([spec("winogrande", data), short_answers]):
        assert without_time(task.evaluate(model, tokenizer, batch_size=batch_size)) == without_time(
            task.evaluate(model, tokenizer)
        )


def spec(task: str, data: Path, **settings: Any) -> dict[str, Any]:
    return {"kind": task, "data_dir": str(data), **settings}


def without_time(result: TaskResult) -> TaskResult:
    return replace(result, seconds=0.0)


# ------------------------------------------------------------------------------ what a result holds


def test_each_document_is_an_item(data: Path, model: Any, tokenizer: Any) -> None:
    found = make_task(spec("winogrande", data, limit=3)).evaluate(model, tokenizer)
    first = found.items[0]
    assert first.prompt == "The cup did not fit into the box because the _ was too big."
    assert first.expected == "cup"
    assert first.answer in ("cup", "box")
    assert first.score == (first.answer == "cup")
    assert (found.metric, found.n, found.higher_is_better) == ("acc,none", 3, True)
    assert found.value == pytest.approx(sum(i.score for i in found.items) / 3)
    assert found.settings["version"] == 1.0
    assert (found.settings["num_fewshot"], found.settings["limit"]) == (0, 3)
    assert list(found.metrics) == ["acc,none"]
    assert found.metrics["acc,none"]["stderr"] == found.stderr


def test_generated_answers_are_shown_as_they_were_written(
    data: Path, model: Any, tokenizer: Any
) -> None:
    found = make_task(spec("nq_open", data)).evaluate(model, tokenizer)
    assert found.metric == "exact_match,remove_whitespace"
    assert found.items[1].prompt == "Q: who wrote book 1?\nA:"
    assert found.items[1].expected == "Writer 1 / Anon"
    assert any(item.answer for item in found.items)


def test_a_group_is_one_task_with_the_documents_of_all(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        {"type": subject, "problem": f"What is {i}?", "solution": f"It is \\boxed{{{i}}}."}
        for subject in STANDARD["hendrycks_math"].members
        for i in range(3)
    ]
    write(tmp_path / "MATH_test.jsonl", rows)
    task = make_task(spec("hendrycks_math", tmp_path, limit=1))
    found = task.evaluate(model, tokenizer)
    assert (found.metric, found.n) == ("exact_match,none", 7)
    assert found.items[1].id == "hendrycks_math_counting_and_prob:0"
    assert found.settings["version"] == 1.0
    write(tmp_path / "MATH_test.jsonl", rows[3:])
    with pytest.raises(UserError, match="no rows of 'Algebra', which is one of its 7 parts"):
        make_task(spec("hendrycks_math", tmp_path))


def test_the_metric_that_counts_may_be_chosen(data: Path, model: Any, tokenizer: Any) -> None:
    length = make_task(spec("arc_easy", data))
    plain = make_task(spec("arc_easy", data, metric="acc,none"))
    assert (length.evaluate(model, tokenizer).metric, plain.evaluate(model, tokenizer).metric) == (
        "acc_norm,none",
        "acc,none",
    )
    assert length.fingerprint != plain.fingerprint
    with pytest.raises(UserError, match=r"unknown metric of task 'arc_easy': 'f1'.*acc_norm,none"):
        make_task(spec("arc_easy", data, metric="f1"))


def test_a_perplexity_over_all_documents_has_no_items(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.Pool", None)  # the resamples need no forks
    write(tmp_path / "lambada_test.jsonl", [{"text": f"one two {word}"} for word in ("a", "bc")])
    accuracy = make_task(spec("lambada_openai", tmp_path)).evaluate(model, tokenizer)
    assert (accuracy.metric, len(accuracy.items)) == ("acc,none", 2)
    found = make_task(spec("lambada_openai", tmp_path, metric="perplexity,none"))
    result = found.evaluate(model, tokenizer)
    assert (result.items, result.n, result.higher_is_better) == ((), 2, False)
    assert result.value == accuracy.extra["perplexity,none"] > 1


def test_items_weigh_as_the_group_averages() -> None:
    items = [Item(f"{task}:{i}", "", "", "", float(score)) for task, i, score in
             [("a", 0, 1), ("a", 1, 0), ("a", 2, 0), ("b", 0, 1)]]  # fmt: skip
    assert weighted(items, None) == items
    assert weighted(items, 2 / 4) == items
    by_task = weighted(items, (1 / 3 + 1) / 2)
    assert [item.weight for item in by_task] == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    assert weighted(items, 0.9) == []


def test_worked_examples_are_shown(data: Path, tmp_path: Path, model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"'arc_easy' shows 2 worked examples.*'train' in its name"):
        make_task(spec("arc_easy", data, num_fewshot=2))
    shutil.copytree(data / "arc", tmp_path / "arc")
    write(tmp_path / "arc" / "ARC-Easy_train.jsonl", SCIENCE)
    none, two = (make_task(spec("arc_easy", tmp_path, num_fewshot=shots)) for shots in (0, 2))
    assert none.fingerprint != two.fingerprint
    assert two.evaluate(model, tokenizer).settings["num_fewshot"] == 2


def test_prompts_that_do_not_fit_are_counted_and_said(
    data: Path, model: Any, tokenizer: Any
) -> None:
    model.config.max_position_embeddings = 40
    with pytest.warns(UserWarning, match="16 requests are longer than the model can read"):
        found = make_task(spec("winogrande", data)).evaluate(model, tokenizer)
    assert found.settings["requests_cut"] == 16
    with pytest.raises(UserError, match="an answer may have 256 tokens, and the model reads 40"):
        make_task(spec("nq_open", data)).evaluate(model, tokenizer)


def test_the_length_of_an_answer_may_be_chosen(data: Path, model: Any, tokenizer: Any) -> None:
    own, short = (make_task(spec("nq_open", data, max_new_tokens=n)) for n in (None, 3))
    assert own.fingerprint != short.fingerprint
    found = short.evaluate(model, tokenizer)
    assert '"max_gen_toks": 3' in found.settings["generation"]
    assert max(len(tokenizer(item.answer)["input_ids"]) for item in found.items) == 3


def test_logits_that_are_nan_are_no_score(
    data: Path, short_answers: str, model: Any, tokenizer: Any
) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    for task in make_tasks([spec("winogrande", data), short_answers]):
        with pytest.raises(UserError, match="the model's logits are nan"):
            task.evaluate(model, tokenizer)


# ------------------------------------------------------------------------------ the model in memory


def test_the_model_and_everything_random_are_left_as_they_were(
    data: Path, short_answers: str, model: Any, tokenizer: Any
) -> None:
    tuned = adapted(model).train()
    tuned.base_model.model.model.layers[0].eval()
    frozen = next(weight for name, weight in tuned.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)

    def state() -> tuple[Any, ...]:
        numbers = np.random.get_state()
        return (
            [module.training for module in tuned.modules()],
            [weight.requires_grad for weight in tuned.parameters()],
            [float(weight.detach().sum()) for weight in tuned.parameters()],
            (torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in numbers]),
            (len(tokenizer), tokenizer.padding_side, tokenizer.pad_token),
            torch.is_grad_enabled(),
            sys.stderr,
        )

    before = state()
    for task in make_tasks([spec("winogrande", data, limit=2), short_answers]):
        task.evaluate(tuned, tokenizer)
    for now, then in zip(state(), before, strict=True):
        assert now == then


def test_the_base_is_scored_by_switching_the_adapter_off(
    data: Path, short_answers: str, model: Any, tokenizer: Any
) -> None:
    tasks = make_tasks([spec("arc_easy", data), short_answers])
    base = fl.evaluate(model, tasks, tokenizer)
    tuned = adapted(model)
    assert [i.answer for i in fl.evaluate(tuned, tasks, tokenizer)["short_answers"].items] != [
        i.answer for i in base["short_answers"].items
    ]
    again = fl.evaluate(tuned, tasks, tokenizer, as_base=True)
    assert [without_time(r) for r in again.values()] == [without_time(r) for r in base.values()]
    with pytest.raises(UserError, match="as_base needs a PeftModel, got LlamaForCausalLM"):
        fl.evaluate(load_model(model.config._name_or_path), tasks, tokenizer, as_base=True)


# -------------------------------------------------------------------------------------- local files


def test_the_fingerprint_is_of_what_is_asked(data: Path, tmp_path: Path) -> None:
    def of(folder: Path, **settings: Any) -> str:
        return make_task(spec("winogrande", folder, **settings)).fingerprint

    moved = tmp_path / "moved"
    write(moved / "winogrande" / "val.jsonl", [row | {"id": 1} for row in WINOGRANDE])
    changed = tmp_path / "changed"
    write(changed / "winogrande" / "val.jsonl", WINOGRANDE[::-1])
    assert of(data) == of(moved) == of(data, limit=100) == of(data, name="w")
    assert len({of(data), of(changed), of(data, limit=3)}) == 3


PREPARED = {"query": "Question: Which is 2?\nAnswer:", "choices": ["one", "two"], "label": 1}


@pytest.mark.parametrize(
    ("task", "file", "row", "expected"),
    [
        (
            "hellaswag",
            "hellaswag_val.jsonl",
            {"query": "Cooking: He", "choices": ["eats", "flies"], "label": 0},
            {"query": "Cooking: He", "choices": ["eats", "flies"], "label": 0},
        ),
        (
            "arc_challenge",
            "arc_challenge_test.jsonl",
            PREPARED,
            {
                "question": "Which is 2?",
                "choices": {"text": ["one", "two"], "label": ["A", "B"]},
                "answerKey": "B",
            },
        ),
        (
            "triviaqa",
            "triviaqa/sub.jsonl",
            {"context": "Question: A fish?\nAnswer:", "answer": "Cod", "aliases": ["cods"]},
            {"question": "A fish?", "answer": {"value": "Cod", "aliases": ["Cod", "cods"]}},
        ),
        (
            "webqs",
            "webquestions/test.json",
            {"qId": "w1", "qText": "where is it?", "answers": ["Here"]},
            {"question": "where is it?", "answers": ["Here"]},
        ),
        (
            "boolq",
            "boolq_validation.jsonl",
            {"question": "is it", "passage": "It is.", "answer": True},
            {"question": "is it", "passage": "It is.", "label": 1},
        ),
        (
            "lambada_openai",
            "lambada.jsonl",
            {"context": "He ate the", "continuation": "cake"},
            {"text": "He ate the cake"},
        ),
    ],
)
def test_forms_that_data_come_in_become_the_harness_s(
    task: str, file: str, row: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path / "data" / file, [row])
    (tmp_path / "out").mkdir()
    local.write(task, tmp_path / "data", tmp_path / "out")
    split = "validation" if "validation" in STANDARD[task].splits else "test"
    split = "test" if "test" in STANDARD[task].splits else split
    (line,) = (tmp_path / "out" / f"{task}.{split}.jsonl").read_text().splitlines()
    assert json.loads(line) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"'winogrande' found no file; looked in .*a folder winogrande/ or files beginning"),
        ({"winogrande_test.jsonl": WINOGRANDE}, "with 'validation' or 'valid' or 'val' or 'dev'"),
        (
            {"winogrande_val.jsonl": WINOGRANDE, "winogrande/dev.jsonl": WINOGRANDE},
            "two files for its split 'validation'.*leave one",
        ),
        (
            {"winogrande_val.jsonl": [{"text": "a"}]},
            "line 1: has the keys text; task 'winogrande' needs sentence, option1, option2, answer",
        ),
        ({"winogrande_val.jsonl": []}, "is empty; give at least one row"),
    ],
)
def test_what_is_wrong_with_local_files_is_said(
    files: dict[str, Rows], message: str, tmp_path: Path
) -> None:
    for name, rows in files.items():
        write(tmp_path / name, rows)
    with pytest.raises(UserError, match=message):
        make_task(spec("winogrande", tmp_path))


def test_every_standard_task_is_one_of_the_harness_s() -> None:
    for name, task in STANDARD.items():
        entry = index.find(name)
        assert entry is not None, name
        assert entry.path == index.tasks_folder() / task.yaml
        assert entry.is_group == bool(task.members)
        for member, file in task.members.values():
            assert (index.tasks_folder() / file).is_file(), member


def test_offline_without_files_the_way_out_is_said() -> None:
    with pytest.raises(UserError) as caught:
        make_task("winogrande")
    assert "not in the local cache and cannot be downloaded" in str(caught.value)
    assert "--data-dir" in str(caught.value)
    assert "a folder winogrande/ or files beginning" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_harness_the_way_to_install_it_is_said(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'forgetless\[eval\]'"):
        make_task(spec("winogrande", data))
    with pytest.raises(UserError, match="unknown task 'winograde'; did you mean 'winogrande'"):
        make_task("winograde")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "winogrande", "limit": 0}, "limit must be a whole number of at least 1"),
        ({"task": "winogrande", "num_fewshot": -1}, "num_fewshot must be a whole number of at"),
        ({"task": "winogrande", "data_dir": "/absent"}, "data_dir: no folder /absent"),
        ({"task": "no_such_task_at_all"}, "unknown lm-eval task 'no_such_task_at_all'"),
        (
            {"task": "sciq", "data_dir": "."},
            "data_dir is for hellaswag, .*write a task of your own",
        ),
        ({"task": "absent.yaml"}, "no such file: absent.yaml"),
        ({"task": 3}, "task must be a name of lm-eval, got 3"),
        ({}, "task 'lm_eval' needs a 'task'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task({"kind": "lm_eval", **settings})


def test_a_task_in_the_harness_s_own_form(short_answers: str, model: Any, tokenizer: Any) -> None:
    found = make_task(short_answers).evaluate(model, tokenizer)
    assert (found.task, found.metric, found.n) == ("short_answers", "exact_match,none", 5)
    assert found.settings["version"] == 7


# ------------------------------------------------------------------------------- by a chat template

TURNS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the harness has put to a model."""
    prompts: list[str] = []
    for name in ("generate_until", "loglikelihood"):
        own = getattr(InMemory, name)

        def noted(lm: Any, requests: list[Any], own: Any = own, **more: Any) -> Any:
            prompts.extend(request.args[0] for request in requests)
            return own(lm, requests, **more)

        monkeypatch.setattr(InMemory, name, noted)
    return prompts


def test_by_a_chat_template_answers_are_the_harness_s(
    short_answers: str, data: Path, model: Any, tokenizer: Any, asked: list[str]
) -> None:
    tokenizer.chat_template = TURNS
    named = {"kind": "lm_eval", "task": short_answers, "system": "Be brief."}
    task = make_task({**named, "chat_template": "auto"})
    found = task.evaluate(model, tokenizer)
    assert asked[0] == "<s>[system]Be brief.</s>[user]Q: who wrote book 0</s>[assistant]"
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=load_tokenizer_with(tokenizer)),
        tasks=["short_answers"],
        task_manager=TaskManager(include_path=str(data), include_defaults=False),
        system_instruction="Be brief.",
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )
    written = [sample["resps"][0][0].strip() for sample in theirs["samples"]["short_answers"]]
    assert [item.answer for item in found.items] == written
    assert found.settings["chat_template"] == "auto"
    assert found.settings["system"] == "Be brief."


def load_tokenizer_with(tokenizer: Any) -> Any:
    own = copy.deepcopy(tokenizer)
    own.chat_template = TURNS
    return own


def test_the_beginning_that_a_template_writes_is_the_only_one(
    short_answers: str, model: Any, tokenizer: Any
) -> None:
    """The tokenizer adds one by itself to every other text."""
    begins = load_tokenizer_with(tokenizer)
    bos = ("<s>", begins.bos_token_id)
    begins._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    assert begins("a")["input_ids"].count(begins.bos_token_id) == 1
    seen: list[tuple[int, list[int]]] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        if (ids := kwargs.get("input_ids")) is not None:
            seen.append((ids.shape[1], (ids == begins.bos_token_id).sum(1).tolist()))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    named = {"kind": "lm_eval", "task": short_answers, "chat_template": "auto"}
    make_task(named).evaluate(model, begins)
    hook.remove()
    assert set(max(seen)[1]) == {1}  # of the prompts; steps of an answer are narrower


def test_worked_examples_are_turns_of_the_chat(
    data: Path, tmp_path: Path, model: Any, tokenizer: Any, asked: list[str]
) -> None:
    shutil.copytree(data / "arc", tmp_path / "arc")
    write(tmp_path / "arc" / "ARC-Easy_train.jsonl", SCIENCE)
    by_template = spec("arc_easy", tmp_path, num_fewshot=1, limit=1, chat_template="auto")
    tokenizer.chat_template = TURNS
    make_task(by_template).evaluate(model, tokenizer)
    assert asked[0].count("[user]") == 2
    assert asked[0].count("[assistant]") == 2
    del asked[:]
    plain = {**by_template, "chat_template": "off"}
    for settings in (plain, {key: by_template[key] for key in plain if key != "chat_template"}):
        make_task(settings).evaluate(model, tokenizer)
    assert not any("[user]" in prompt for prompt in asked)
    assert make_task(plain).fingerprint != make_task(by_template).fingerprint


def test_without_a_template_there_is_none_to_ask_by(
    short_answers: str, model: Any, tokenizer: Any, asked: list[str]
) -> None:
    named = {"kind": "lm_eval", "task": short_answers, "chat_template": "auto"}
    make_task(named).evaluate(model, tokenizer)
    assert asked[0] == "Q: who wrote book 0"
    with pytest.raises(UserError, match="a system prompt needs a chat template"):
        make_task({**named, "system": "Be brief."}).evaluate(model, tokenizer)


# ----------------------------------------------------------------------------- never computed twice


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Count the batches that a model reads or writes, and stop it in the middle."""
    calls: list[int] = []
    limit: list[int | None] = [None]

    def watched(
        kind: str, texts: Any, batches: Any, compute: Any, *settings: Any, **how: Any
    ) -> Any:
        if kind == "beginnings":  # whether the model keeps apart what is read together
            return journal.in_batches(kind, texts, batches, compute, *settings)

        def counting(places: Any) -> Any:
            if limit[0] is not None and len(calls) >= limit[0]:
                raise KeyboardInterrupt
            calls.append(1)
            return compute(places)

        return journal.in_batches(kind, texts, batches, counting, *settings, **how)

    for place in (continuations, harness_model):
        monkeypatch.setattr(place, "in_batches", watched)

    def stop_after(batches: int | None) -> list[int]:
        calls.clear()
        limit[0] = batches
        return calls

    return stop_after


@pytest.mark.parametrize(
    ("name", "size", "batches"), [("winogrande", 1, 4), ("short_answers", 2, 3)]
)
def test_an_interrupted_evaluation_goes_on_with_the_same_numbers(
    name: str,
    size: int,
    batches: int,
    data: Path,
    short_answers: str,
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    counted: Callable[[int | None], list[int]],
) -> None:
    from forgetless.tasks.journal import resuming

    task = make_task(short_answers if name == "short_answers" else spec(name, data))
    calls = counted(None)
    whole = task.evaluate(model, tokenizer, batch_size=size)
    assert len(calls) == batches
    path = tmp_path / "partial.jsonl"
    counted(2)
    with pytest.raises(KeyboardInterrupt), resuming(path, "key"):
        task.evaluate(model, tokenizer, batch_size=size)
    with path.open("a") as file:
        file.write('{"batch": "half a li')
    calls = counted(None)
    with resuming(path, "key"):
        again = task.evaluate(model, tokenizer, batch_size=size)
    assert len(calls) == batches - 2
    assert without_time(again) == without_time(whole)
    calls = counted(None)
    with resuming(path, "another model"):
        task.evaluate(model, tokenizer, batch_size=size)
    assert len(calls) == batches


@pytest.mark.parametrize("name", ["winogrande", "short_answers"])
def test_how_far_an_evaluation_is_shows_though_the_harness_is_quiet(
    name: str, data: Path, short_answers: str, model: Any, tokenizer: Any, monkeypatch: Any
) -> None:
    from forgetless.core import progress

    task = make_task(short_answers if name == "short_answers" else spec(name, data))
    monkeypatch.setattr(progress, "_A_WHILE", 0.0)
    for is_terminal in (True, False):
        sent = io.StringIO()
        console = Console(file=sent, force_terminal=is_terminal, width=100, color_system=None)
        monkeypatch.setattr(progress, "_console", console)
        result = task.evaluate(model, tokenizer, batch_size=2)
        asked = result.n * (2 if name == "winogrande" else 1)
        assert "evaluation" in sent.getvalue()
        shown = f"{asked}/{asked}" if is_terminal else f"evaluation: {asked} of {asked} texts"
        assert shown in sent.getvalue()
