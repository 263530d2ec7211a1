"""Which text belongs to which: the similarities of a sentence encoder, without a head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetless.core.errors import UserError
from forgetless.data.forms import Kind
from forgetless.tasks.accuracy import ClassTask, unit_vectors
from forgetless.tasks.base import Item, TaskResult
from forgetless.tasks.neighbours import votes

if TYPE_CHECKING:
    from torch import Tensor

    from forgetless.tasks.base import Model


@dataclass(frozen=True)
class Retrieval(ClassTask):
    """The share of pairs of which the first text finds its second among those of all pairs.

    The most similar one is found, by the cosine of the means of the encoder's last hidden states
    over the tokens, as sentence encoders are used. An item is a pair.

    Attributes:
        path: a file of rows with sentence1 and sentence2, see docs/sentences.md.
        name: of the task.
        limit: the first so many pairs only, which are then all that is searched.

    Raises:
        UserError: settings out of range, no such file, or rows that are no pairs.
    """

    kind = "retrieval"
    summary = "pairs that find each other by the similarity of mean states, without a head"
    kinds = frozenset[Kind]({"sentence"})

    path: str | Path
    name: str = "retrieval"
    limit: int | None = None

    def measure(
        self, model: Model, processor: Any, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The share that `model` finds."""
        import torch

        from forgetless.models.heads import mean_states

        if not all("pair" in record for record in self.examples):
            raise UserError(f"{self.examples.source}: rows need sentence1 and sentence2")

        def vectors(texts: Iterable[str]) -> Tensor:
            records = [{"sentence": text, "label": None} for text in texts]
            alone = replace(self.examples, records=records)
            return unit_vectors(model, alone, processor, batch_size, mean_states)

        seconds = [str(record["pair"]) for record in self.examples]
        asked, known = vectors(str(r["sentence"]) for r in self.examples), vectors(seconds)
        found = votes(asked, known, torch.arange(len(known)), 1, own=False).tolist()
        items = [
            Item(
                id=str(number),
                prompt=self.shown(place, record),
                expected=self.shown(place, {"text": seconds[number]}),
                answer=self.shown(place, {"text": seconds[answer]}),
                score=float(seconds[answer] == seconds[number]),
            )
            for number, (place, record, answer) in enumerate(
                zip(self.examples.places, self.examples, found, strict=True)
            )
        ]
        return TaskResult.of_items(self, items, metric="accuracy")


TASK = Retrieval
