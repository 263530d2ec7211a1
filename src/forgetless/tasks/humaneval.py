"""HumanEval: finish a function from its head and its documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from forgetless.tasks.base import TaskResult, check_settings
from forgetless.tasks.code import (
    Program,
    code_fingerprint,
    data_file,
    downloaded_problems,
    hub_rows,
    questions,
    score_code,
)
from forgetless.tasks.questions import Questions
from forgetless.tasks.rows import read_records, the_field

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["HumanEval"]

_VERSION = 1
_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_HUB = "openai/openai_humaneval"


@dataclass(frozen=True)
class HumanEval:
    """pass@1 on HumanEval's 164 functions, each run with its tests in the sandbox.

    The model reads the head and the documentation alone (no worked example) and writes until a new
    class, function, comment, condition or print at the left margin: prompt and stops of the
    lm-evaluation-harness's task `humaneval`, version 1. The value is the mean over problems of the
    share of samples that pass; `extra` has pass@k.

    Attributes:
        path: the data as .jsonl; None to look into `data_dir`, or else on the hub.
        data_dir: a folder with HumanEval.jsonl in it or below it.
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

    Reference:
        Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv:2107.03374.
    """

    path: str | Path | None = None
    data_dir: str | Path | None = None
    name: str = "humaneval"
    limit: int | None = None
    samples: int = 1
    k: Sequence[int] = (1,)
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 1024
    seconds: float = 3.0
    allow_code_execution: bool = False

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings("humaneval", self.name, downloaded_problems(self))

    @cached_property
    def _programs(self) -> list[Program]:
        file = data_file(self.path, self.data_dir, "HumanEval")
        rows = (
            [(f"{_HUB}, row {i}", row) for i, row in enumerate(hub_rows(_HUB, "test"))]
            if file is None
            else read_records(file, None)
        )
        return [_program(row, where) for where, row in rows[: self.limit]]

    def questions(self) -> Questions:
        """The problems, to draw several programs for."""
        return questions(self, self._programs, _STOPS)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the problems, the settings and the version of this task."""
        return code_fingerprint("humaneval", _VERSION, self, self._programs)

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> TaskResult:
        """The share of programs of `model` that pass."""
        return score_code(model, tokenizer, self, self.questions(), batch_size)


def _program(row: Mapping[str, Any], where: str) -> Program:
    fields = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    number, prompt, solution, test, entry = (str(the_field(row, name, where)) for name in fields)
    return Program(number, prompt, solution, prompt, f"{test}\ncheck({entry})")
