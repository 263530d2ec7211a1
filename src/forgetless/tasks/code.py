"""Writing programs that pass tests: what HumanEval, MBPP and the pocket functions share."""

from __future__ import annotations

import ast
import os
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from forgetless.core.errors import UserError
from forgetless.core.metrics import mean_stderr, pass_at_k
from forgetless.data.files import Row, hub_data
from forgetless.tasks.base import Item, TaskResult, whole_number
from forgetless.tasks.journal import in_batches
from forgetless.tasks.questions import Generating
from forgetless.tasks.rows import file_problem, read_records
from forgetless.tasks.sampling import Sampling, sampling_problems
from forgetless.tasks.sandbox import CodeResult, run_code

if TYPE_CHECKING:
    from forgetless.tasks.base import Model, Tokenizer


Case = tuple[str, str, str, tuple[str, ...]]
"""A program, the test of it, the test's helpers, and the names that are the program's."""


@dataclass(frozen=True)
class Program:
    """One problem: what the model reads, and how what it writes is tested.

    Attributes:
        id: the same for every model, unique within the task.
        prompt: what the model reads.
        expected: a right continuation.
        before: source text in front of the continuation.
        test: source text of the tests, as `run_code` takes it.
        names: what the tests take from the program, whatever else has such a name.
        helpers: source text that the tests may use.
        setup: source text behind the continuation.
    """

    id: str
    prompt: str
    expected: str
    before: str
    test: str
    names: tuple[str, ...]
    helpers: str = ""
    setup: str = ""

    def case(self, continuation: str) -> Case:
        """What `run_code` is given."""
        program = f"{self.before}{continuation}\n{self.setup}\n"
        return program, self.test, self.helpers, self.names


def defined_names(source: str) -> tuple[str, ...]:
    """The functions and classes that a source text defines; none where it is not Python."""
    with suppress(SyntaxError, ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what others wrote, such as "\\w" that is not raw
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        return tuple(part.name for part in ast.parse(source).body if isinstance(part, kinds))
    return ()


def judge(
    programs: Sequence[Program], written: Sequence[Sequence[str]], seconds: float
) -> list[list[CodeResult]]:
    """The result of every continuation of every problem; equal ones are run once.

    Raises:
        UserError: this system cannot hold hostile programs.
    """
    cases = [[p.case(text) for text in texts] for p, texts in zip(programs, written, strict=True)]
    different = list(dict.fromkeys(case for each in cases for case in each))

    def run(case: Case) -> CodeResult:
        program, test, helpers, names = case
        return run_code(program, test=test, helpers=helpers, names=names, seconds=seconds)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(different, pool.map(run, different), strict=True))
    return [[results[case] for case in each] for each in cases]


class CodeTask(Generating):
    """A task whose answers are programs, each run with tests in the sandbox.

    Attributes:
        samples: programs a problem.
        k: report pass@k for these.
        temperature: 0 for the most probable program.
        top_p: draw from the most probable tokens of this share.
        seed: of the draws.
        seconds: a program may take.
    """

    samples: int
    k: Sequence[int]
    temperature: float
    top_p: float
    seed: int
    seconds: float

    @abstractmethod
    def programs(self) -> Sequence[Program]:
        """The problems."""

    def problems(self) -> Iterable[str | None]:
        """Of the settings that every code task has."""
        known = isinstance(self.k, Sequence) and all(type(k) is int and k >= 1 for k in self.k)
        found = [
            *sampling_problems(self.temperature, self.top_p, self.seed),
            whole_number("samples", self.samples),
            whole_number("max_new_tokens", self.max_new_tokens),
            None if known else f"k must be a list of whole numbers from 1 on, got {self.k!r}",
            None if 0 < self.seconds <= 3600 else f"seconds must be above 0, got {self.seconds!r}",
        ]
        if not any(found):
            if (most := max(self.k, default=1)) > self.samples:
                found.append(f"pass@{most} needs as many samples, got samples: {self.samples}")
            if self.samples > 1 and self.temperature == 0:
                found.append(
                    f"{self.samples} samples at temperature 0 are all the same; set it above"
                )
        return found

    def content(self) -> Sequence[object]:
        """The problems, and how programs are drawn."""
        asked = [[program.prompt, program.test] for program in self.programs()]
        drawn = [self.samples, list(self.k), self.temperature, self.top_p, self.seed]
        return asked, drawn, self.max_new_tokens

    def questions(self) -> Sequence[Item]:
        """The problems, each with a right continuation."""
        return [Item(program.id, program.prompt, program.expected) for program in self.programs()]

    def right(self, written: Sequence[Sequence[str]]) -> list[list[bool]]:
        """Whether a program passes its tests."""
        programs, seconds = self.programs(), self.seconds

        def passed(_: Sequence[int]) -> list[list[bool]]:
            judged = judge(programs, written, seconds)
            return [[result.passed for result in each] for each in judged]

        # All in one batch: whichever process judges it has the machine's cores to itself.
        asked = [
            list(map(program.case, texts)) for program, texts in zip(programs, written, strict=True)
        ]
        return in_batches("verdicts", asked, [range(len(programs))], passed, seconds)

    def measure(
        self, model: Model, tokenizer: Tokenizer, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """pass@1 of a model; pass@k and its standard error for every further k in `extra`.

        An item is a problem: the share of its samples that pass, and the first sample.
        """
        drawn = Sampling(self.temperature, self.top_p, self.seed) if self.temperature > 0 else None
        written = self.answers(model, tokenizer, self.samples, drawn, batch_size)
        right = self.right(written)
        items = [
            replace(item, answer=texts[0], score=sum(passed) / len(passed))
            for item, texts, passed in zip(self.questions(), written, right, strict=True)
        ]
        further = [k for k in self.k if k > 1]
        curve = pass_curve([sum(passed) for passed in right], self.samples, further)
        extra = curve | self.unfinished(written)
        return TaskResult.of_items(self, items, metric="pass@1", extra=extra)


@dataclass(frozen=True)
class DownloadedCodeTask(CodeTask):
    """A code task whose data are in a file or on the hub.

    Attributes:
        path: the data as .jsonl; None to look into `data_dir`, or else on the hub.
        data_dir: a folder with the data's file in it or below it.
        name: of the task.
        limit: the first so many problems only.
        samples: programs a problem.
        k: report pass@k for these.
        temperature: 0 for the most probable program.
        top_p: draw from the most probable tokens of this share.
        seed: of the draws.
        max_new_tokens: length of a program.
        seconds: a program may take.
        allow_code_execution: must be true, as the model's programs are run.

    Raises:
        UserError: settings out of range, not allowed, or data that cannot be had.
    """

    version = 2  # before, a program lost its first blank and shared an interpreter with its tests

    path: str | Path | None = None
    data_dir: str | Path | None = None
    name: str = ""
    limit: int | None = None
    samples: int = 1
    k: Sequence[int] = (1,)
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 1024
    seconds: float = 3.0
    allow_code_execution: bool = False

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        if self.allow_code_execution is not True:
            yield (
                "runs programs that the model writes, each in a sandbox; allow it with "
                "--allow-code-execution, or 'allow_code_execution: true' in the task's settings"
            )
        yield whole_number("limit", self.limit, optional=True)
        yield None if self.path is None else file_problem(self.path)
        yield from super().problems()

    @abstractmethod
    def read(self) -> list[Program]:
        """All problems, from their file or the hub."""

    @cached_property
    def _programs(self) -> list[Program]:
        return self.read()[: self.limit]

    def programs(self) -> Sequence[Program]:
        """The problems, read once."""
        return self._programs

    def rows(
        self, file: str, hub: str, splits: Sequence[str], configuration: str | None = None
    ) -> list[tuple[str, Row]]:
        """The rows of the data, each with its place.

        They are in a file of `data_dir`, whose name here is without ".jsonl", or on the hub.

        Raises:
            UserError: the folder has no such file, or the hub cannot be reached.
        """
        path = self.path
        if path is None and self.data_dir is not None:
            files = sorted(Path(self.data_dir).rglob("*.jsonl"))
            path = next((f for f in files if f.stem.lower() == file.lower()), None)
            if path is None:
                raise UserError(f"data_dir {self.data_dir}: no {file}.jsonl in it or below it")
        if path is not None:
            return read_records(path, None)
        hint = "give the task a file: path, or --data-dir with a folder that holds it"
        return [
            (f"{hub}, {split} {i}", dict(row))
            for split in splits
            for i, row in enumerate(hub_data(hub, configuration, split, hint))
        ]


def pass_curve(correct: Sequence[int], samples: int, ks: Sequence[int]) -> dict[str, float]:
    """Mean pass@k over problems, and its standard error, for each k.

    `correct` are the right ones of each problem's samples; ks are in 1..samples.
    """
    curve: dict[str, float] = {}
    for k in ks:
        mean = mean_stderr([pass_at_k(samples, c, k) for c in correct])
        curve[f"pass@{k}"] = mean.value
        if mean.n > 1:
            curve[f"pass@{k}_stderr"] = mean.stderr
    return curve
