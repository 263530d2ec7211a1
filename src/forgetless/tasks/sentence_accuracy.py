"""Sentences classified under the base's own head, or under the new one."""

from dataclasses import dataclass
from pathlib import Path

from forgetless.data.forms import Kind
from forgetless.tasks.accuracy import HeadAccuracy


@dataclass(frozen=True)
class SentenceAccuracy(HeadAccuracy):
    """The share of sentences, or pairs, of which the model's head finds their class likeliest.

    Attributes:
        path: a file of rows with a sentence and its class, see docs/sentences.md.
        name: of the task.
        limit: the first so many rows only.
        head: own, new or all, of a model with a new head; its classes decide where it is not given.

    Raises:
        UserError: settings out of range, no such file, or rows of another form.
    """

    kind = "sentence_accuracy"
    summary = "sentences classified under the base's own head or the new one"
    kinds = frozenset[Kind]({"sentence", "text"})

    path: str | Path
    name: str = "sentence_accuracy"
    limit: int | None = None
    head: str | None = None


TASK = SentenceAccuracy
