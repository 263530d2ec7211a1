"""The second skill to learn: small Python functions, scored by running their tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from forgetless.data.pocket.functions import Function, functions
from forgetless.tasks.base import TaskResult, check_settings, whole_number
from forgetless.tasks.code import Program, code_fingerprint, code_problems, questions, score_code
from forgetless.tasks.questions import Questions

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["PocketFunctions"]

_VERSION = 1
_STOPS = ("\nQ", "\ndef")


@dataclass(frozen=True)
class PocketFunctions:
    """pass@1 on functions of the pocket world, each run with its tests in the sandbox.

    The functions are of the test split, whose sentences no training function has. The value is the
    mean over problems of the share of samples that pass; `extra` has pass@k.

    Attributes:
        name: of the task.
        limit: how many functions.
        seed: which functions, and of the draws.
        samples: programs a problem.
        k: report pass@k for these.
        temperature: 0 for the most probable program.
        top_p: draw from the most probable tokens of this share.
        max_new_tokens: length of a function.
        seconds: a function may take.

    Raises:
        UserError: settings out of range.
    """

    name: str = "pocket_functions"
    limit: int = 200
    seed: int = 0
    samples: int = 1
    k: Sequence[int] = (1,)
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 72
    seconds: float = 3.0

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        problems = [whole_number("limit", self.limit), *code_problems(self)]
        check_settings("pocket_functions", self.name, problems)

    @cached_property
    def _programs(self) -> list[Program]:
        made = functions(self.limit, self.seed, "test")
        return [_program(f"test{self.seed}:{i}", function) for i, function in enumerate(made)]

    def questions(self) -> Questions:
        """The problems, to draw several functions for."""
        return questions(self, self._programs, _STOPS)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the problems, the settings and the version of this task."""
        return code_fingerprint("pocket_functions", _VERSION, self, self._programs)

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> TaskResult:
        """The share of functions of `model` that pass."""
        return score_code(model, tokenizer, self, self.questions(), batch_size)


def _program(number: str, function: Function) -> Program:
    tests = "\n".join(function.tests)
    return Program(number, function.prompt, function.completion, function.head, tests)
