"""MBPP: write a function from a sentence and three tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from forgetless.core.errors import UserError
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

__all__ = ["MBPP"]

_VERSION = 1
_HUB = "google-research-datasets/mbpp"
_STOP = "[DONE]"
_SHOTS = (2, 3, 4)
_TEST = range(11, 511)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MBPP:
    """pass@1 on MBPP's 500 test problems, each run with its tests in the sandbox.

    The model reads three worked examples (problems 2, 3 and 4), then a problem with its three
    tests, and writes until "[DONE]": prompt and stop of the lm-evaluation-harness's task `mbpp`,
    version 1. A problem's own set-up, which that task leaves out, is run before its tests. The
    value is the mean over problems of the share of samples that pass; `extra` has pass@k.

    Attributes:
        path: the data as .jsonl, with the problems 2, 3 and 4 in it; None to look into `data_dir`,
            or else on the hub.
        data_dir: a folder with mbpp.jsonl in it or below it.
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
        Austin et al. 2021, "Program Synthesis with Large Language Models", arXiv:2108.07732.
    """

    path: str | Path | None = None
    data_dir: str | Path | None = None
    name: str = "mbpp"
    limit: int | None = None
    samples: int = 1
    k: Sequence[int] = (1,)
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    seconds: float = 3.0
    allow_code_execution: bool = False

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings("mbpp", self.name, downloaded_problems(self))

    @cached_property
    def _programs(self) -> list[Program]:
        rows = {int(the_field(row, "task_id", where)): (where, row) for where, row in self._rows()}
        missing = [number for number in _SHOTS if number not in rows]
        if missing:
            raise UserError(
                f"task 'mbpp': problems {_SHOTS} are its worked examples, and the data lack "
                f"{missing}; give the file with all of MBPP"
            )
        shots = "".join(
            f"{_question(row, where)}{the_field(row, 'code', where)}\n{_STOP}\n\n"
            for where, row in (rows[number] for number in _SHOTS)
        )
        tested = [rows[number] for number in sorted(rows) if number in _TEST]
        return [_program(row, where, shots) for where, row in tested[: self.limit]]

    def _rows(self) -> list[tuple[str, Row]]:
        file = data_file(self.path, self.data_dir, "mbpp")
        if file is not None:
            return read_records(file, None)
        return [
            (f"{_HUB}, {split} {i}", row)
            for split in ("prompt", "test")
            for i, row in enumerate(hub_rows(_HUB, split, "full"))
        ]

    def questions(self) -> Questions:
        """The problems, to draw several programs for."""
        return questions(self, self._programs, _STOP)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the problems, the settings and the version of this task."""
        return code_fingerprint("mbpp", _VERSION, self, self._programs)

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


def _question(row: Row, where: str) -> str:
    tests = "\n".join(the_field(row, "test_list", where)[:3])
    return (
        f"You are an expert Python programmer, and here is your task: "
        f"{the_field(row, 'text', where)} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _program(row: Row, where: str, shots: str) -> Program:
    after = "\n".join([row.get("test_setup_code") or "", *the_field(row, "test_list", where)])
    prompt = shots + _question(row, where)
    return Program(str(row["task_id"]), prompt, str(the_field(row, "code", where)), "", after)
