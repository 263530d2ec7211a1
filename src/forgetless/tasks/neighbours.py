"""How well a classifier's features tell classes apart, whatever its head makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetless.core.errors import UserError
from forgetless.data.examples import Examples
from forgetless.tasks.accuracy import ClassTask, unit_vectors
from forgetless.tasks.base import TaskResult, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    from forgetless.tasks.base import Model


TEMPERATURE = 0.07
"""Of the weights of a vote, as in the papers."""

_SIMILARITIES = 1 << 22
"""At once: 16 MB, whatever the number of examples."""


@dataclass(frozen=True)
class Neighbours(ClassTask):
    """The share of images or sentences whose class their nearest neighbours have.

    The features are what the last layer of the classifier reads, so no head has a say and classes
    that none knows can be asked for; of a text encoder without a head of its own they are the means
    of its last hidden states. Each of the k neighbours with the largest cosine similarity s
    votes for its class with weight exp(s / 0.07). The neighbours are looked for among the examples
    of `train`, or where there is none among all others (leave one out).

    Attributes:
        path: what is asked, as for image_accuracy or sentence_accuracy, of any classes.
        name: of the task.
        limit: the first so many only.
        train: where neighbours are looked for; None for the others of the same examples.
        train_limit: the first so many of these.
        k: how many neighbours vote; of fewer examples all of them.

    Raises:
        UserError: settings out of range, no such file, or examples without classes.

    Reference:
        Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
        arXiv:1805.01978, section 3.4; k and the temperature are those of Caron et al. 2021,
        arXiv:2104.14294.
    """

    kind = "neighbours"
    summary = "classes told apart by the features alone: nearest neighbours, without a head"

    path: str | Path
    name: str = "neighbours"
    limit: int | None = None
    train: str | Path | None = None
    train_limit: int | None = None
    k: int = 20

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        yield from super().problems()
        yield whole_number("k", self.k)
        yield whole_number("train_limit", self.train_limit, optional=True)
        if self.train is None and self.train_limit is not None:
            yield "train_limit is for the examples of train; give train, or limit"

    @cached_property
    def known(self) -> Examples | None:
        """Where neighbours are looked for, if not among the examples themselves."""
        if self.train is None:
            return None
        found = self._read(self.train, self.train_limit)
        if found.kind != self.examples.kind:
            raise UserError(f"task {self.name!r}: path and train hold different kinds of examples")
        return found

    def content(self) -> Sequence[object]:
        """All examples and classes, and how many vote."""
        known = [] if self.known is None else [self.known.fingerprint, *self.known.labels]
        return (*super().content(), self.k, *map(str, known))

    def measure(
        self, model: Model, processor: Any, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The share that is told apart by the features of `model`."""
        import torch

        from forgetless.data.modality import modality_of
        from forgetless.models.heads import features

        labels: Any = modality_of(model).labels
        sets = [each for each in (self.examples, self.known) if each is not None]
        for each in sets:
            if len(labels(each)) != len(each):
                raise UserError(f"{each.source}: some rows have no label, the class to be found")
        classes = sorted({str(label) for each in sets for label in labels(each)})
        found = [unit_vectors(model, each, processor, batch_size, features) for each in sets]
        numbers = [torch.tensor([classes.index(str(x)) for x in labels(each)]) for each in sets]
        answers = votes(found[0], found[-1], numbers[-1], self.k, own=self.known is None)
        rights = [classes[int(number)] for number in numbers[0]]
        items = self.answered(rights, [classes[int(number)] for number in answers])
        return TaskResult.of_items(self, items, metric="accuracy")


def votes(asked: Tensor, known: Tensor, classes: Tensor, k: int, *, own: bool) -> Tensor:
    """The class that the k nearest of `known` vote for, (asked,), some rows at a time.

    Vectors are of unit length, (rows, features). Where both are each other's `own`, the same
    examples, none votes for itself.
    """
    import torch

    k = min(k, len(known) - own)
    if k < 1:
        raise UserError("nearest neighbours need two examples or more")
    classes, found = classes.to(asked.device), []
    size = max(1, _SIMILARITIES // len(known))
    for start in range(0, len(asked), size):
        similar = asked[start : start + size] @ known.T
        if own:
            rows = torch.arange(len(similar), device=similar.device)
            similar[rows, rows + start] = -torch.inf
        best = similar.topk(k)
        weights = ((best.values - 1) / TEMPERATURE).exp()  # at most 1
        counts = weights.new_zeros(len(similar), int(classes.max()) + 1)
        found.append(counts.scatter_add_(1, classes[best.indices], weights).argmax(-1))
    return torch.cat(found).cpu()


TASK = Neighbours
