"""How many different answers a model still has, right and wrong ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from forgetless.core.errors import UserError
from forgetless.core.metrics import mean_stderr
from forgetless.tasks.base import Task, TaskResult, whole_number
from forgetless.tasks.code import pass_curve
from forgetless.tasks.questions import Generating
from forgetless.tasks.sampling import Sampling, sampling_problems

if TYPE_CHECKING:
    from forgetless.tasks.base import Model, Tokenizer


@dataclass(frozen=True)
class Diversity(Task):
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

    kind = "diversity"
    summary = "different outputs among several draws on another task"

    task: str | Mapping[str, Any]
    name: str = ""
    samples: int = 10
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"diversity_{self.inner.name}")
        super().__post_init__()

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        yield whole_number("samples", self.samples, 2)
        yield from sampling_problems(self.temperature, self.top_p, self.seed)
        if isinstance(self.temperature, int | float) and self.temperature <= 0:
            yield f"temperature must be above 0, got {self.temperature!r}"

    @cached_property
    def inner(self) -> Generating:
        """The other task."""
        from forgetless.tasks import TASKS, make_task

        task = make_task(self.task)
        if isinstance(task, Generating):
            return task
        known = [name for name, kind in TASKS.items() if issubclass(kind, Generating)]
        raise UserError(
            f"task 'diversity': {task.name!r} does not generate answers; give one of "
            f"{', '.join(known)}"
        )

    def content(self) -> Sequence[object]:
        """The other task and the draws."""
        drawn = [self.samples, self.temperature, self.top_p, self.seed]
        return self.inner.fingerprint, drawn

    def measure(
        self, model: Model, tokenizer: Tokenizer, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The share of different outputs of `model`."""
        drawn = Sampling(self.temperature, self.top_p, self.seed)
        texts = self.inner.answers(model, tokenizer, self.samples, drawn, batch_size)
        written = [[text.strip() for text in each] for each in texts]
        right = self.inner.right(written)
        items, different = [], []
        for item, each, flags in zip(self.inner.questions(), written, right, strict=True):
            judged = dict(zip(each, flags, strict=True))
            shown = "\n".join(
                f"{times} {'+' if judged[text] else '-'} {text}"
                for text, times in Counter(each).most_common()
            )
            items.append(replace(item, answer=shown, score=len(judged) / self.samples))
            different.append(list(judged.values()))
        numbers: dict[str, list[float]] = {
            "unique_right": [sum(flags) for flags in different],
            "unique_wrong": [len(flags) - sum(flags) for flags in different],
            **{f"distinct_{n}": [distinct(each, n) for each in written] for n in (1, 2, 3)},
        }
        extra = {name: mean_stderr(values).value for name, values in numbers.items()}
        ks = [2**i for i in range(self.samples.bit_length())]
        extra |= pass_curve([sum(flags) for flags in right], self.samples, ks)
        return TaskResult.of_items(self, items, metric="unique", extra=extra)


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n: different runs of n words among all such runs of several texts.

    Returns:
        In 0..1; 0 where no text has n words.
    """
    grams = [tuple(w[i : i + n]) for w in map(str.split, texts) for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


TASK = Diversity
