"""What every penalty is, and the texts that some of them read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from forgetless.data.modality import Processor, modality_of
from forgetless.data.texts import fingerprint
from forgetless.tasks.inference import accepts


@dataclass
class Penalty(Protocol):
    """One term of the loss: a function of the model, which is added to the loss times its weight.

    It sees the model once before the first step, at its start, and then once an optimiser step.
    A penalty is a dataclass, and its fields are the settings of a recipe.

    Attributes:
        weight: of the penalty, positive.
        files: names of the settings that name files or folders. Their content is what a run's id
            has of them, and a card names them without their folders.
    """

    weight: float
    files: ClassVar[Sequence[str]] = ()

    def check(self, method: str) -> None:
        """Raise what is wrong with the files, or with an adapter of this method under the penalty.

        Called before any weight is loaded.
        """

    def prepare(self, model: nn.Module, processor: Processor, seed: int) -> None:
        """Look at the model before its first step."""

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        """The value at this step, a scalar with a graph; not yet times the weight."""
        ...


@dataclass
class HeldTexts(Penalty):
    """What is to be kept, texts or images, as batches of what the model reads.

    Attributes:
        weight: of the penalty.
        source: as in a recipe's calibration: "self", a file, or a text of the pocket world.
        samples: sequences.
        max_length: tokens of the longest.
        batch_size: sequences a step.
    """

    source: str = "self"
    samples: int = 256
    max_length: int = 256
    batch_size: int = 8
    files: ClassVar[Sequence[str]] = ("source",)

    def check(self, method: str) -> None:
        """Read the texts."""
        fingerprint(self.source)

    def prepare(self, model: nn.Module, processor: Processor, seed: int) -> None:
        """Read the texts as this model does."""
        found = modality_of(model).batches(
            self.source,
            model,
            processor,
            samples=self.samples,
            max_length=self.max_length,
            batch_size=self.batch_size,
            seed=seed,
        )
        # They come sorted by length, and a penalty should not be short for a while, then long.
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        device = next(model.parameters()).device
        without_cache = {"use_cache": False} if accepts(model, "use_cache") else {}
        self.options: dict[str, Any] = without_cache
        self.batches = [
            {name: value.to(device) for name, value in found[i].items()} for i in order.tolist()
        ]
