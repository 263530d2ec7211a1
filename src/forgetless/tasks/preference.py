"""Which of two answers a model finds more probable, over a file of preferences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetless.core.metrics import mean_stderr
from forgetless.data.examples import Examples, load_examples, require_kind
from forgetless.data.tokens import preference_tokens
from forgetless.tasks.asking import Asking
from forgetless.tasks.base import Item, TaskResult, whole_number
from forgetless.tasks.rows import file_problem

if TYPE_CHECKING:
    from forgetless.tasks.base import Model, Tokenizer


@dataclass(frozen=True)
class Preference(Asking):
    """Share of pairs whose chosen answer is the more probable one, by log p of all its tokens.

    The value is 0..1; `extra` has `margin`, the mean of log p(chosen) - log p(rejected) in nats,
    with its standard error as `margin_stderr`. No base is asked: a base has a value of its own.

    Attributes:
        path: a file of rows with ``chosen`` and ``rejected``, as training reads them.
        name: of the task.
        limit: the first so many pairs only.
        max_length: tokens of the longest of the two; what is longer loses its end.
        chat_template: off for prompts and answers as they stand.
        system: what is said before each of them, by the template.

    Raises:
        UserError: settings out of range, or no such file.
    """

    kind = "preference"
    summary = "pairs whose chosen answer is the more probable one (accuracy)"

    path: str | Path
    name: str = "preference"
    limit: int | None = None
    max_length: int = 512
    chat_template: str = "auto"
    system: str | None = None

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        yield file_problem(self.path)
        yield whole_number("limit", self.limit, optional=True)
        yield whole_number("max_length", self.max_length, 2)
        yield from super().problems()

    @cached_property
    def examples(self) -> Examples:
        """The pairs."""
        found = load_examples(self.path, limit=self.limit)
        require_kind(found, {"preference"})
        said: Any = {"chat_template": self.chat_template, "system": self.system}
        return replace(found, **said)

    def content(self) -> Sequence[object]:
        """The pairs and where they are cut."""
        return self.examples.fingerprint, self.max_length, *self.said("auto")

    def measure(
        self, model: Model, tokenizer: Tokenizer, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The share of pairs of which `model` prefers the chosen answer."""
        from forgetless.models.text import positions_of
        from forgetless.tasks.likelihood import losses

        length = min(self.max_length, positions_of(model) or self.max_length)
        table = preference_tokens(self.examples, tokenizer, length)
        rows, labels = [], []
        for ids, learned, (first, _) in zip(
            table["input_ids"], table["labels"], table["lengths"], strict=True
        ):
            rows += [ids[:first], ids[first:]]
            labels += [learned[:first], learned[first:]]
        stride = max(1, length - 1)
        pieces = losses(
            model, rows, labels, max_length=length, stride=stride, batch_size=batch_size
        )
        logps = [-piece.sums["loss"] for piece in pieces]
        margins = [chosen - other for chosen, other in zip(logps[::2], logps[1::2], strict=True)]
        items = [
            Item(
                str(number),
                _shown(tokenizer, ids, learned, answered=False),
                _shown(tokenizer, ids, learned, answered=True),
                f"{margin:+.3g} nats",
                float(margin > 0),
            )
            for number, (ids, learned, margin) in enumerate(
                zip(rows[::2], labels[::2], margins, strict=True)
            )
        ]
        mean = mean_stderr(margins)
        extra = {"margin": mean.value, "margin_stderr": mean.stderr}
        return TaskResult.of_items(
            self, items, metric="accuracy", higher_is_better=True, extra=extra
        )


def _shown(
    tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[int], *, answered: bool
) -> str:
    """The answer of a sequence as text, or what comes before it."""
    part = [token for token, label in zip(ids, labels, strict=True) if (label == token) == answered]
    text: str = tokenizer.decode(part, skip_special_tokens=True)
    return text.strip()


TASK = Preference
