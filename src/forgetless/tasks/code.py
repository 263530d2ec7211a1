"""Writing programs that pass tests: what HumanEval, MBPP and the pocket functions share."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from forgetless.core.errors import UserError
from forgetless.core.metrics import mean_stderr, pass_at_k
from forgetless.tasks.base import Item, Task, TaskResult, fingerprint_of, whole_number
from forgetless.tasks.questions import Questions
from forgetless.tasks.rows import file_problem
from forgetless.tasks.sampling import Sampling, sampling_problems
from forgetless.tasks.sandbox import CodeResult, run_code

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CodeTask",
    "Program",
    "code_fingerprint",
    "code_problems",
    "data_file",
    "downloaded_problems",
    "execution_problem",
    "hub_rows",
    "judge",
    "pass_curve",
    "questions",
    "score_code",
]


@dataclass(frozen=True)
class Program:
    """One problem: what the model reads, and what is run with what it writes.

    Attributes:
        id: the same for every model, unique within the task.
        prompt: what the model reads.
        expected: a right continuation.
        before: source text in front of the continuation.
        after: source text behind it: the tests.
    """

    id: str
    prompt: str
    expected: str
    before: str
    after: str

    def source(self, continuation: str) -> str:
        """The program to run."""
        return f"{self.before}{continuation}\n{self.after}\n"


class CodeTask(Task, Protocol):
    """The settings that every code task has."""

    @property
    def samples(self) -> int:
        """Programs a problem."""

    @property
    def k(self) -> Sequence[int]:
        """For which k to report pass@k."""

    @property
    def temperature(self) -> float:
        """0 for the most probable program."""

    @property
    def top_p(self) -> float:
        """Of `Sampling`."""

    @property
    def seed(self) -> int:
        """Of `Sampling`."""

    @property
    def max_new_tokens(self) -> int:
        """Length of a program."""

    @property
    def seconds(self) -> float:
        """A program may take."""


def code_problems(task: CodeTask) -> list[str | None]:
    """What is wrong with the settings that every code task has."""
    known = isinstance(task.k, Sequence) and all(type(k) is int and k >= 1 for k in task.k)
    found = [
        *sampling_problems(task.temperature, task.top_p, task.seed),
        whole_number("samples", task.samples),
        whole_number("max_new_tokens", task.max_new_tokens),
        None if known else f"k must be a list of whole numbers from 1 on, got {task.k!r}",
        None if 0 < task.seconds <= 3600 else f"seconds must be above 0, got {task.seconds!r}",
    ]
    if not any(found):
        if max(task.k, default=1) > task.samples:
            found.append(f"pass@{max(task.k)} needs as many samples, got samples: {task.samples}")
        if task.samples > 1 and task.temperature == 0:
            found.append(f"{task.samples} samples at temperature 0 are all the same; set it above")
    return found


class DownloadedCodeTask(CodeTask, Protocol):
    """The further settings of a code task whose data are in a file or on the hub."""

    @property
    def path(self) -> str | Path | None:
        """The data; None to look elsewhere."""

    @property
    def limit(self) -> int | None:
        """The first so many problems only."""

    @property
    def allow_code_execution(self) -> bool:
        """Whether what a model writes may be run."""


def downloaded_problems(task: DownloadedCodeTask) -> list[str | None]:
    """What is wrong with the settings of a code task whose data are in a file or on the hub."""
    return [
        execution_problem(task.allow_code_execution),
        whole_number("limit", task.limit, optional=True),
        None if task.path is None else file_problem(task.path),
        *code_problems(task),
    ]


def code_fingerprint(kind: str, version: int, task: CodeTask, programs: Sequence[Program]) -> str:
    """Hash of the problems, of the settings of `task` and of the version of its code."""
    content = [[program.prompt, program.after] for program in programs]
    drawn = [task.samples, list(task.k), task.temperature, task.top_p, task.seed]
    return fingerprint_of(kind, version, content, drawn, task.max_new_tokens)


def execution_problem(allowed: object) -> str | None:
    """Why a downloaded task may not run what a model wrote, or None."""
    if allowed is True:
        return None
    return (
        "runs programs that the model writes, each in a sandbox; allow it with "
        "--allow-code-execution, or 'allow_code_execution: true' in the task's settings"
    )


def judge(
    programs: Sequence[Program], written: Sequence[Sequence[str]], seconds: float
) -> list[list[CodeResult]]:
    """The result of every continuation of every problem; equal programs are run once.

    Raises:
        UserError: this system cannot hold hostile programs.
    """
    sources = [
        [p.source(text) for text in texts] for p, texts in zip(programs, written, strict=True)
    ]
    different = list(dict.fromkeys(source for each in sources for source in each))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda source: run_code(source, seconds=seconds), different))
    results = dict(zip(different, found, strict=True))
    return [[results[source] for source in each] for each in sources]


def questions(task: CodeTask, programs: Sequence[Program], stop: str | Sequence[str]) -> Questions:
    """The problems as questions to draw several answers to."""
    return Questions(
        ids=tuple(program.id for program in programs),
        prompts=tuple(program.prompt for program in programs),
        expected=tuple(program.expected for program in programs),
        stop=stop,
        max_new_tokens=task.max_new_tokens,
        right=lambda written: [
            [result.passed for result in each] for each in judge(programs, written, task.seconds)
        ],
    )


def score_code(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: CodeTask,
    asked: Questions,
    batch_size: int | None,
) -> TaskResult:
    """pass@1 of a model; pass@k and its standard error for every further k in `extra`.

    An item is a problem: the share of its samples that pass, and the first sample.
    """
    started = time.perf_counter()
    drawn = Sampling(task.temperature, task.top_p, task.seed) if task.temperature > 0 else None
    written = asked.answers(model, tokenizer, task.samples, drawn, batch_size)
    right = asked.right(written)
    items = [
        Item(*asked.item(place), texts[0], sum(passed) / len(passed))
        for place, (texts, passed) in enumerate(zip(written, right, strict=True))
    ]
    found = TaskResult.of_items(
        task,
        items,
        metric="pass@1",
        higher_is_better=True,
        seconds=time.perf_counter() - started,
    )
    counts = [sum(passed) for passed in right]
    return replace(found, extra=pass_curve(counts, task.samples, [k for k in task.k if k > 1]))


def pass_curve(correct: Sequence[int], samples: int, ks: Sequence[int]) -> dict[str, float]:
    """Mean pass@k over problems, and its standard error, for each k.

    Args:
        correct: right samples of each problem.
        samples: of each problem.
        ks: 1..samples.
    """
    curve: dict[str, float] = {}
    for k in ks:
        mean = mean_stderr([pass_at_k(samples, c, k) for c in correct])
        curve[f"pass@{k}"] = mean.value
        if mean.n > 1:
            curve[f"pass@{k}_stderr"] = mean.stderr
    return curve


def hub_rows(name: str, split: str, configuration: str | None = None) -> list[Mapping[str, Any]]:
    """The rows of a data set on the hub, or of its copy in the local cache.

    Raises:
        UserError: it cannot be had.
    """
    try:
        import datasets

        return [dict(row) for row in datasets.load_dataset(name, configuration, split=split)]
    except Exception as problem:
        line = str(problem).split("\n", 1)[0]
        raise UserError(
            f"{name} could not be loaded from the hub ({line}); give the task a file: "
            "path, or --data-dir with a folder that holds it"
        ) from problem


def data_file(path: str | Path | None, folder: str | Path | None, name: str) -> Path | None:
    """The file that was given, or `name`.jsonl in or below a folder; None for the hub.

    Raises:
        UserError: the folder has no such file.
    """
    if path is not None:
        return Path(path)
    if folder is None:
        return None
    found = [f for f in sorted(Path(folder).rglob("*.jsonl")) if f.stem.lower() == name.lower()]
    if not found:
        raise UserError(f"data_dir {folder}: no {name}.jsonl in it or below it")
    return found[0]
