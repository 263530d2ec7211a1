"""Tasks that run what a model wrote: right numbers, allowed first, the same prompts as lm-eval."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import yaml

from forgetless.core.errors import UserError
from forgetless.core.files import read_jsonl
from forgetless.core.metrics import pass_at_k
from forgetless.models.load import load_model, load_tokenizer
from forgetless.tasks import CodeResult, make_task, make_tasks, run_code
from forgetless.tasks import generation as generation_module
from forgetless.tasks.generation import generate
from forgetless.tasks.humaneval import HumanEval
from forgetless.tasks.mbpp import MBPP
from forgetless.tasks.pocket_functions import PocketFunctions
from forgetless.tasks.questions import Generating
from forgetless.tasks.sampling import Sampling

ROW = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}


def answering(monkeypatch: pytest.MonkeyPatch, answers: Sequence[str]) -> list[dict[str, Any]]:
    """Let every generation give these answers, over and over; what was asked."""
    asked: list[dict[str, Any]] = []
    given = itertools.cycle(answers)

    def written(model: Any, tokenizer: Any, prompts: Sequence[str], **settings: Any) -> list[str]:
        asked.append({"prompts": list(prompts), **settings})
        return [next(given) for _ in prompts]

    monkeypatch.setattr(generation_module, "generate", written)
    return asked


@pytest.fixture
def humaneval(tmp_path: Path) -> Path:
    path = tmp_path / "HumanEval.jsonl"
    path.write_text("".join(json.dumps({**ROW, "task_id": str(i)}) + "\n" for i in range(4)))
    return path


@pytest.fixture
def mbpp(tmp_path: Path) -> Path:
    rows = [
        {
            "task_id": i,
            "text": f"Write a function f{i}.",
            "code": f"def f{i}(x):\r\n    return x + S",
            "test_setup_code": "S = 1",
            "test_list": [f"assert f{i}({x}) == {x + 1}" for x in range(3)],
        }
        for i in (1, 2, 3, 4, 11, 510, 511)
    ]
    path = tmp_path / "data" / "mbpp.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_programs_are_run_and_counted(humaneval: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["    return a + b", "    return a - b", "    import os; os._exit(0)", "    return 3"]
    asked = answering(monkeypatch, answers)
    task = HumanEval(humaneval, allow_code_execution=True)
    result = task.evaluate(None, None)  # type: ignore[arg-type]
    assert result.metric == "pass@1"
    assert [item.score for item in result.items] == [1, 0, 0, 1]
    assert result.value == 0.5
    assert result.right_or_wrong
    assert result.items[1].answer == "    return a - b"
    assert asked[0]["prompts"] == [ROW["prompt"]] * 4
    assert asked[0]["stop"] == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert asked[0]["sampling"] is None


def test_pass_at_k_is_the_mean_over_problems(
    humaneval: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = "    return a + b", "    return 0"
    answering(monkeypatch, [right, wrong, wrong, wrong, wrong, wrong, right, right])
    task = HumanEval(
        humaneval, allow_code_execution=True, limit=2, samples=4, k=(1, 2), temperature=0.8
    )
    result = task.evaluate(None, None)  # type: ignore[arg-type]
    assert result.value == (0.25 + 0.5) / 2
    assert result.extra["pass@2"] == pytest.approx((3 / 6 + 5 / 6) / 2)
    assert result.extra["pass@2_stderr"] > 0


def test_pass_at_k_is_unbiased() -> None:
    for n, c in itertools.product(range(1, 9), range(9)):
        for k in range(1, n + 1):
            if c > n:
                continue
            draws = list(itertools.combinations(range(n), k))
            seen = sum(any(i < c for i in draw) for draw in draws) / len(draws)
            assert pass_at_k(n, c, k) == pytest.approx(seen, abs=1e-12)
    assert 0 < pass_at_k(100_000, 1, 10) < 2e-4
    assert math.isfinite(pass_at_k(100_000, 500, 1000))


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (2, 3, 1), (2, 1, 3), (2, -1, 1), (2, 1, 0)])
def test_counts_that_cannot_be_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="no pass@"):
        pass_at_k(n, c, k)


def test_mbpp_has_three_examples_and_the_test_split(
    mbpp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, ["def f11(x):\n    return x + S", "def f510(x):\n    return x"])
    result = MBPP(data_dir=mbpp.parent.parent, allow_code_execution=True).evaluate(None, None)  # type: ignore[arg-type]
    assert [(item.id, item.score) for item in result.items] == [("11", 1.0), ("510", 0.0)]
    question = "You are an expert Python programmer, and here is your task: Write a function f{}."
    parts = asked[0]["prompts"][0].split("[DONE]\n\n")
    assert [question.format(i) in part for i, part in zip((2, 3, 4, 11), parts, strict=True)] == [
        True
    ] * 4
    assert parts[0].endswith("[BEGIN]\ndef f2(x):\r\n    return x + S\n")
    assert parts[3].endswith("assert f11(2) == 3\n[BEGIN]\n")
    assert asked[0]["stop"] == "[DONE]"


def test_the_prompts_are_those_of_lm_eval(shared_data: Path) -> None:
    rows = read_jsonl(shared_data / "mbpp" / "mbpp.jsonl")
    text = _of_lm_eval("mbpp", "doc_to_text")
    template = jinja2.Template(text, keep_trailing_newline=True)
    shots = [row for row in rows if row["task_id"] in (2, 3, 4)]
    context = "".join(f"{template.render(row)}{row['code']}\n[DONE]\n\n" for row in shots)
    task = MBPP(data_dir=shared_data, allow_code_execution=True)
    prompts = [question.prompt for question in task.questions()]
    expected = [context + template.render(row) for row in rows if 10 < row["task_id"] <= 510]
    assert list(prompts) == expected


def test_the_stops_are_those_of_lm_eval(humaneval: Path, mbpp: Path) -> None:
    several = HumanEval(humaneval, allow_code_execution=True).stop
    one = MBPP(mbpp, allow_code_execution=True).stop
    assert list(several) == _of_lm_eval("humaneval", "generation_kwargs")["until"]
    assert [one] == _of_lm_eval("mbpp", "generation_kwargs")["until"]


def _of_lm_eval(task: str, key: str) -> Any:
    """A setting in lm-eval's own file of a task, whose functions need the network to load."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        pytest.skip("needs lm_eval")
    text = (Path(found.origin).parent / "tasks" / task / f"{task}.yaml").read_text()
    return yaml.safe_load(text.replace("!function", ""))[key]


def test_real_data_are_found_in_a_folder(shared_data: Path) -> None:
    kinds = [
        {"kind": kind, "data_dir": str(shared_data), "allow_code_execution": True}
        for kind in ("humaneval", "mbpp")
    ]
    found = [task.questions() for task in make_tasks(kinds) if isinstance(task, Generating)]
    assert [len(questions) for questions in found] == [164, 500]


@pytest.mark.parametrize("kind", ["humaneval", "mbpp"])
def test_downloaded_tasks_run_no_code_until_allowed(kind: str, humaneval: Path) -> None:
    with pytest.raises(UserError, match="--allow-code-execution"):
        make_task({"kind": kind, "path": str(humaneval)})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 3}, "3 samples at temperature 0 are all the same"),
        ({"k": [5], "temperature": 1}, "pass@5 needs as many samples"),
        ({"k": "5"}, "k must be a list"),
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"seconds": 0}, "seconds must be above 0"),
        ({"limit": 0}, "limit must be a whole number"),
        ({"path": "nowhere.jsonl"}, "no such file"),
        ({"path": None, "data_dir": "nowhere"}, "no HumanEval.jsonl"),
    ],
)
def test_bad_settings_are_named(humaneval: Path, settings: dict[str, Any], words: str) -> None:
    given = {"kind": "humaneval", "path": str(humaneval), "allow_code_execution": True}
    with pytest.raises(UserError, match=words):
        make_task({**given, **settings})


def test_mbpp_says_which_examples_are_missing(mbpp: Path) -> None:
    rows = mbpp.read_text().splitlines(keepends=True)
    mbpp.write_text("".join(rows[4:]))
    with pytest.raises(UserError, match=r"lack \[2, 3, 4\]"):
        make_task({"kind": "mbpp", "path": str(mbpp), "allow_code_execution": True})


def test_data_that_cannot_be_had_are_asked_for() -> None:
    with pytest.raises(UserError, match="give the task a file"):
        make_task({"kind": "humaneval", "allow_code_execution": True})


def test_settings_change_the_fingerprint(humaneval: Path) -> None:
    def made(**settings: Any) -> str:
        return HumanEval(humaneval, allow_code_execution=True, **settings).fingerprint

    different: list[dict[str, Any]] = [
        {},
        {"limit": 2},
        {"temperature": 0.5},
        {"temperature": 0.5, "samples": 2},
        {"seed": 1},
        {"max_new_tokens": 9},
    ]
    assert len({made(**settings) for settings in different}) == len(different)


def test_equal_programs_run_once(humaneval: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def counted(source: str, **settings: Any) -> CodeResult:
        runs.append(source)
        return run_code(source, **settings)

    monkeypatch.setattr("forgetless.tasks.code.run_code", counted)
    answering(monkeypatch, ["    return a + b"])
    task = HumanEval(humaneval, allow_code_execution=True, samples=5, temperature=1.0)
    assert task.evaluate(None, None).value == 1.0  # type: ignore[arg-type]
    assert len(runs) == 1


def test_the_pocket_base_writes_no_functions_yet() -> None:
    base, tokenizer = load_model("pocket"), load_tokenizer("pocket")
    result = PocketFunctions(limit=6).evaluate(base, tokenizer)
    assert result.n == 6
    assert result.value <= 0.2


# ------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def pocket() -> tuple[Any, Any]:
    return load_model("pocket"), load_tokenizer("pocket")


PROMPTS = ["Words:", "Q: Who has the red cups?\nA:", "def", "The capital of France is", "In order:"]


def test_draws_do_not_depend_on_the_batch(pocket: tuple[Any, Any]) -> None:
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    draws = [
        generate(
            *pocket, prompts, max_new_tokens=12, batch_size=size, sampling=Sampling(1.0, 0.9, 7)
        )
        for size in (1, 4, 15)
    ]
    assert draws[0] == draws[1] == draws[2]
    assert len(set(draws[0][:3])) > 1


def test_draws_follow_the_seed(pocket: tuple[Any, Any]) -> None:
    first, again, other = (
        generate(*pocket, PROMPTS, max_new_tokens=8, sampling=Sampling(seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_low_temperature_or_a_small_share_is_greedy(pocket: tuple[Any, Any]) -> None:
    greedy = generate(*pocket, PROMPTS, max_new_tokens=8)
    assert generate(*pocket, PROMPTS, max_new_tokens=8, sampling=Sampling(1e-3)) == greedy
    assert generate(*pocket, PROMPTS, max_new_tokens=8, sampling=Sampling(1.0, 1e-9)) == greedy


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    logits = torch.tensor([[0.5, 2.0, -1.0, 1.0]]).repeat(4000, 1)
    rows = torch.arange(4000)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        drawn = Sampling(temperature, top_p, 3).chooser(range(4000), 1)(logits, rows, 0)
        expected = (logits[0] / temperature).softmax(-1)
        if top_p < 1:
            expected[[0, 2]] = 0.0  # the two most probable reach 0.83
        expected /= expected.sum()
        seen = torch.bincount(drawn, minlength=4) / 4000
        assert torch.allclose(seen, expected, atol=0.025)
        assert (seen[expected == 0] == 0).all()


def test_an_answer_ends_before_the_first_of_several_stops(pocket: tuple[Any, Any]) -> None:
    prompts = ["def find(a):\n   "]
    whole = generate(*pocket, prompts, max_new_tokens=40, stop="\x00")[0]
    middle = whole[5:8]
    cut = generate(*pocket, prompts, max_new_tokens=40, stop=("nowhere", middle))[0]
    assert cut == whole[: whole.index(middle)]
