"""The first skill to learn: arithmetic word problems, scored by their final answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from forgetless.data.pocket.problems import Problem, final_answer, problems
from forgetless.tasks.base import TaskResult, check_settings, fingerprint_of, whole_number
from forgetless.tasks.questions import Questions, score_answers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["PocketProblems"]

_VERSION = 1


@dataclass(frozen=True)
class PocketProblems:
    """Share of word problems whose greedy solution ends in the right number.

    The value is the accuracy, 0..1. The problems are of the test split, which no training problem
    is in; an item's answer is the whole solution, right or wrong by its final number alone.

    Attributes:
        name: of the task.
        limit: how many problems.
        seed: which problems.
        max_new_tokens: length of a solution.

    Raises:
        UserError: settings out of range.
    """

    name: str = "pocket_problems"
    limit: int = 200
    seed: int = 0
    max_new_tokens: int = 48

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        found = [
            whole_number("limit", self.limit),
            whole_number("seed", self.seed, 0),
            whole_number("max_new_tokens", self.max_new_tokens),
        ]
        check_settings("pocket_problems", self.name, found)

    @cached_property
    def _problems(self) -> list[Problem]:
        return problems(self.limit, self.seed, "test")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the problems, their answers and the version of this task."""
        content = [[p.prompt, p.answer] for p in self._problems]
        return fingerprint_of("pocket_problems", _VERSION, content, self.max_new_tokens)

    def questions(self) -> Questions:
        """The problems, to draw several solutions for."""
        return Questions(
            ids=tuple(f"test{self.seed}:{i}" for i in range(len(self._problems))),
            prompts=tuple(problem.prompt for problem in self._problems),
            expected=tuple(problem.answer for problem in self._problems),
            stop="\n",
            max_new_tokens=self.max_new_tokens,
            right=lambda written: [
                [final_answer(text) == problem.answer for text in each]
                for problem, each in zip(self._problems, written, strict=True)
            ],
        )

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> TaskResult:
        """The share of problems that `model` solves."""
        return score_answers(model, tokenizer, self, self.questions(), batch_size)
