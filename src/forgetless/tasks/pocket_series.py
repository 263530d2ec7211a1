"""The third skill to learn: series of numbers, scored sum by sum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from forgetless.data.pocket.series import Series, same_sums, series
from forgetless.tasks.base import TaskResult, check_settings, fingerprint_of, whole_number
from forgetless.tasks.questions import Questions, score_answers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["PocketSeries"]

_VERSION = 1


@dataclass(frozen=True)
class PocketSeries:
    """Share of series of numbers that the model's greedy answer steps through rightly.

    The value is the accuracy, 0..1: each of its three sums right. The instructions are of the
    test split, which no training instruction is in.

    Attributes:
        name: of the task.
        limit: how many series, 500 at most.
        seed: which series.
        max_new_tokens: length of an answer.

    Raises:
        UserError: settings out of range.
    """

    name: str = "pocket_series"
    limit: int = 200
    seed: int = 0
    max_new_tokens: int = 48

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        found = [
            whole_number("limit", self.limit),
            "limit must be at most 500" if type(self.limit) is int and self.limit > 500 else None,
            whole_number("seed", self.seed, 0),
            whole_number("max_new_tokens", self.max_new_tokens),
        ]
        check_settings("pocket_series", self.name, found)

    @cached_property
    def _series(self) -> list[Series]:
        return series(self.limit, self.seed, "test")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the instructions, their answers and the version of this task."""
        content = [[one.prompt, one.answer] for one in self._series]
        return fingerprint_of("pocket_series", _VERSION, content, self.max_new_tokens)

    def questions(self) -> Questions:
        """The instructions, to draw several answers for."""
        return Questions(
            ids=tuple(f"test{self.seed}:{i}" for i in range(len(self._series))),
            prompts=tuple(one.prompt for one in self._series),
            expected=tuple(one.answer for one in self._series),
            stop="\n",
            max_new_tokens=self.max_new_tokens,
            right=lambda written: [
                [same_sums(text, one.answer) for text in each]
                for one, each in zip(self._series, written, strict=True)
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
        """The share of series that `model` gets right."""
        return score_answers(model, tokenizer, self, self.questions(), batch_size)
