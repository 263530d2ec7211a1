"""How many different answers a model still has, right and wrong ones."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from forgetless.core.errors import UserError
from forgetless.core.metrics import mean_stderr
from forgetless.tasks.base import (
    Item,
    Task,
    TaskResult,
    check_settings,
    fingerprint_of,
    whole_number,
)
from forgetless.tasks.code import pass_curve
from forgetless.tasks.questions import Generating
from forgetless.tasks.sampling import Sampling, sampling_problems

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["Diversity", "distinct"]

_VERSION = 1
_GRAMS = (1, 2, 3)


@dataclass(frozen=True)
class Diversity:
    """Different outputs among several draws for each question of a task.

    The value, "unique", is the share of draws that differ from all before them, 0..1, averaged over
    questions. `extra` has, as means over questions,

    * `unique_right` and `unique_wrong`: different outputs that are right and wrong, in 0..samples;
    * `distinct_1` to `distinct_3`: see `distinct`;
    * `pass@k` for k = 1, 2, 4, ... up to the number of samples: the curve of chances.

    Outputs are compared as strings, white space at their ends aside. An item's answer is one
    different output a line, each with the number of its draws and a sign for right or wrong.

    Attributes:
        task: a task that generates: its name, or a mapping with its settings.
        name: of this task; empty for "diversity_" and the other's name.
        samples: draws a question, 2 or more.
        temperature: above 0.
        top_p: draw from the most probable tokens of this share.
        seed: of the draws.

    Raises:
        UserError: settings out of range, or a task that does not generate.

    Reference:
        Biderman et al. 2024, "LoRA Learns Less and Forgets Less", arXiv:2405.09673 (unique
        strings); Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation
        Models", arXiv:1510.03055 (distinct-n).
    """

    task: str | Mapping[str, Any]
    name: str = ""
    samples: int = 10
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        cold = isinstance(self.temperature, int | float) and self.temperature <= 0
        problems = [
            whole_number("samples", self.samples, 2),
            *sampling_problems(self.temperature, self.top_p, self.seed),
            f"temperature must be above 0, got {self.temperature!r}" if cold else None,
        ]
        if not self.name:
            object.__setattr__(self, "name", f"diversity_{self._inner.name}")
        check_settings("diversity", self.name, problems)

    @cached_property
    def _inner(self) -> Task:
        from forgetless.tasks import TASKS, make_task

        task = make_task(self.task)
        if not isinstance(task, Generating):
            known = [name for name, kind in TASKS.items() if hasattr(kind.make, "questions")]
            raise UserError(
                f"task 'diversity': {task.name!r} does not generate answers; give one of "
                f"{', '.join(known)}"
            )
        return task

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the other task and of the draws."""
        drawn = [self.samples, self.temperature, self.top_p, self.seed]
        return fingerprint_of("diversity", _VERSION, self._inner.fingerprint, drawn)

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> TaskResult:
        """The share of different outputs of `model`."""
        started = time.perf_counter()
        assert isinstance(self._inner, Generating)
        asked = self._inner.questions()
        drawn = Sampling(self.temperature, self.top_p, self.seed)
        written = asked.answers(model, tokenizer, self.samples, drawn, batch_size)
        written = [[text.strip() for text in each] for each in written]
        right = asked.right(written)
        counted = [_counted(texts, flags) for texts, flags in zip(written, right, strict=True)]
        items = [
            Item(*asked.item(place), _shown(each), len(each) / self.samples)
            for place, each in enumerate(counted)
        ]
        found = TaskResult.of_items(
            self,
            items,
            metric="unique",
            higher_is_better=True,
            seconds=time.perf_counter() - started,
        )
        passed = [sum(flags) for flags in right]
        ks = [2**i for i in range(self.samples.bit_length())]
        extra = {**_split(counted), **_grams(written), **pass_curve(passed, self.samples, ks)}
        return replace(found, extra=extra)


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n: different runs of n words among all such runs of several texts.

    Returns:
        In 0..1; 0 where no text has n words.
    """
    grams = [tuple(w[i : i + n]) for w in map(str.split, texts) for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


Counted = Mapping[str, tuple[int, bool]]
"""Each different output with the number of its draws and whether it is right."""


def _counted(texts: Sequence[str], right: Sequence[bool]) -> Counted:
    found: dict[str, tuple[int, bool]] = {}
    for text, flag in zip(texts, right, strict=True):
        found[text] = (found.get(text, (0, flag))[0] + 1, flag)
    return found


def _shown(counted: Counted) -> str:
    ordered = sorted(counted.items(), key=lambda entry: -entry[1][0])
    return "\n".join(f"{times} {'+' if right else '-'} {text}" for text, (times, right) in ordered)


def _split(counted: Sequence[Counted]) -> dict[str, float]:
    def mean(right: bool) -> float:
        return mean_stderr([sum(r is right for _, r in c.values()) for c in counted]).value

    return {"unique_right": mean(True), "unique_wrong": mean(False)}


def _grams(written: Sequence[Sequence[str]]) -> dict[str, float]:
    return {
        f"distinct_{n}": mean_stderr([distinct(texts, n) for texts in written]).value
        for n in _GRAMS
    }
