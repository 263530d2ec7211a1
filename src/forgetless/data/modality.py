"""What kind of models a base is one of, as far as anything above this room needs to know.

A modality says how raw data becomes what such a model reads. Everything else asks it: nothing above
names a tokenizer. The table is `forgetless.models.load.HEADS`; the modality called `language` there
is `forgetless.data.language.MODALITY`. Another one costs a line in that table, a file here, and a
file and a line for each kind of task that measures its models.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from forgetless.core.errors import UserError
from forgetless.data.examples import ChatTemplate, Examples, load_examples
from forgetless.data.forms import Kind
from forgetless.models.load import HEADS, head_of
from forgetless.models.text import positions_of

Processor: TypeAlias = Any
"""What makes a model's inputs of raw data, and is saved beside a model: of texts a tokenizer."""

Batch = dict[str, Tensor]
"""Arguments of a model's forward."""

Sample = dict[str, Any]
"""One row: `labels`, IGNORED where nothing is learned, `lengths`, the tokens of each sequence in
it, and what the model reads."""


@runtime_checkable
class Rows(Protocol):
    """Encoded examples, from which a training draws."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""

    @property
    def several(self) -> bool:
        """Whether a row holds more than one sequence."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that is read and learned, in order."""

    def join(self, rows: Sequence[Sample]) -> Batch:
        """Rows as one batch, with `labels`, from which the model itself computes the loss."""

    def require_fitting(self, model: Any) -> None:
        """Raise what of the rows the model cannot read; it may be on the meta device."""


@dataclass(frozen=True)
class Modality:
    """How the models of one kind are fed and asked.

    Attributes:
        kinds: of the examples that such a model reads.
        processor_name: what messages call the processor.
        processor_type: its class.
        load_processor: the processor of a base, by its name; ``weights=False`` takes a folder that
            has none.
        check: raises what a processor has against examples of its kinds, before any weight is
            loaded.
        rows: of examples, or of a data set that is encoded already. ``max_length`` and ``pack`` are
            those of a recipe's data.
        batches: of what is to be kept, by a calibration source, the model and its processor;
            ``samples``, ``max_length``, ``batch_size`` and ``seed`` are a recipe's. They have
            no labels.
        own_texts: what the base says when it is asked nothing, as texts: by model, processor,
            samples, max_length and seed. None where a base says nothing.
        probe: inputs that are the same for every model of a config. Step 0 is compared on them.
        labels: the labels of examples that have some. None where a base has no head of classes;
            otherwise its processor is a `forgetless.data.classes.ClassReader`.
        reader: the processor as a model of a config needs it: a classifier's with its classes.
        loss_task: kind of the task that takes the mean loss on held-out examples, as its value or
            as what its `extra` calls "loss".
        distance_task: kind of the task that takes KL(base || model) on them.
    """

    kinds: frozenset[Kind]
    processor_name: str
    processor_type: type
    load_processor: Callable[..., Processor]
    check: Callable[[Examples, Processor], None]
    rows: Callable[..., Rows]
    batches: Callable[..., list[Batch]]
    own_texts: Callable[[PreTrainedModel, Processor, int, int, int], list[str]] | None
    probe: Callable[[PreTrainedModel], Batch]
    labels: Callable[[Examples], Sequence[Any]] | None
    reader: Callable[[Processor, Any], Processor]
    loss_task: str
    distance_task: str


def modality_of(base: str | nn.Module) -> Modality:
    """The modality of a base by its name, or of a model by its class.

    A model with another head than `HEADS` is asked as a language model.

    Raises:
        UserError: as `forgetless.models.load.head_of`.
    """
    name = (head_of(base) or HEADS[0]).modality
    found: Modality = import_module(f"forgetless.data.{name}").MODALITY
    return found


def new_classes(modality: Modality, path: str) -> list[str]:
    """The classes of a classifier's new head for the labels of a file, sorted by name.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a broken file, or one with fewer than two classes.
    """
    assert modality.labels is not None
    found = sorted({str(label) for label in modality.labels(load_examples(path))})
    if len(found) < 2:
        only = f"the class {found[0]!r} alone" if found else "no labels"
        raise UserError(f"{path} has {only}; a new head needs two classes or more")
    return found


def load_processor(base: str, *, weights: bool = True) -> Processor:
    """What reads data for a base: of a language model its tokenizer.

    A folder without any is refused unless `weights` is off.

    Raises:
        UserError: a base that cannot be loaded, or one without a processor.
    """
    return modality_of(base).load_processor(base, weights=weights)


def training_batches(
    path: str,
    model: nn.Module,
    processor: Processor,
    *,
    samples: int = 256,
    max_length: int = 512,
    batch_size: int = 8,
    limit: int | None = None,
    kind: Kind | Literal["auto"] = "auto",
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
    seed: int = 0,
) -> list[Batch]:
    """Batches of training data as training sees it: one sequence a row, labels on what is learned.

    Args:
        path: what `forgetless.data.load_examples` reads.
        model: whose modality decides; it is not run.
        processor: the model's.
        samples: how many sequences, drawn at random from a larger file.
        max_length: tokens of the longest sequence, at most as many as the model reads; raw text is
            cut into pieces of it.
            Of preferences the chosen answers are read.
        batch_size: sequences a batch; sequences of similar length go together.
        limit: read no more than the first rows of the file.
        kind: see `forgetless.data.load_examples`.
        chat_template: likewise.
        system: likewise.
        seed: decides which sequences are drawn.

    Returns:
        What the model reads and `labels`; of texts (batch, tokens), padded on the right.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a broken file, or nothing to learn within `max_length`.
    """
    how: dict[str, Any] = {"kind": kind, "chat_template": chat_template, "system": system}
    examples = load_examples(path, limit=limit, **how)
    if examples.kind == "preference":
        examples = examples.answers("chosen")
    length = min(max_length, positions_of(model) or max_length)
    rows = modality_of(model).rows(examples, processor, max_length=length, pack=False)
    drawn = random.Random(seed).sample(range(len(rows)), min(samples, len(rows)))
    return [rows.join(part) for part in longest_first([rows[index] for index in drawn], batch_size)]


def longest_first(rows: Sequence[Sample], batch_size: int) -> list[list[Sample]]:
    """The rows in parts of similar length, so that memory shows at once."""
    ordered = sorted(rows, key=lambda row: -sum(row["lengths"]))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
