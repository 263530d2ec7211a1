"""What a recipe says of the training data and of the text to keep."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from forgetless.core.settings import Count, Name, Section
from forgetless.data.sources import Source

DATA = "data"
"""The calibration source that stands for the training data."""

VALIDATION = "validation"
"""The path of a task or a probe that stands for the share of the training data held out."""


SAMPLES = 256
"""Sequences of a calibration text that are read where no other number is given."""


class CalibrationSettings(Section):
    """The text whose knowledge is to be kept; read only when the method needs its statistics.

    ``source`` is one text, or a list of ``{source, weight}``, whose weights are shares of the mean.
    ``data`` is the training data, ``auto`` is ``self``. What a method needs of the new task's text
    is always collected on the training data, with the other settings of this section; of these,
    ``skip_first`` and ``memory_budget`` are those of `forgetless.collect`. ``samples`` is how many
    sequences are read; ``auto`` is as many as it takes of what a base says itself, see
    `forgetless.statistics.own_text`, and `SAMPLES` of every other text.
    """

    source: Any = "auto"
    samples: Any = "auto"
    max_length: Annotated[int, Field(ge=2)] = 256
    batch_size: Count = 8
    skip_first: Annotated[int, Field(ge=0)] = 0
    memory_budget: int | str | None = None

    @field_validator("source")
    @classmethod
    def _source_or_sources(cls, value: Any) -> str | list[dict[str, Any]]:
        if isinstance(value, str) and value:
            return value
        weighted = isinstance(value, list) and all(_is_weighted_source(v, "source") for v in value)
        if value and weighted:
            return value  # type: ignore[no-any-return]
        raise ValueError(
            "must be a file, 'self', 'data', 'auto', or a list of {source: ..., weight: positive "
            "number}"
        )

    @field_validator("samples")
    @classmethod
    def _auto_or_number(cls, value: Any) -> str | int:
        if value == "auto" or (type(value) is int and value >= 1):
            return value  # type: ignore[no-any-return]
        raise ValueError("must be 'auto' or a whole number of at least 1")

    @property
    def sources(self) -> list[tuple[str, float]]:
        """Every source with its weight; none of them is ``auto``."""
        if self.source == "auto":
            return [("self", 1.0)]
        if isinstance(self.source, str):
            return [(self.source, 1.0)]
        return [(part["source"], float(part["weight"])) for part in self.source]

    @property
    def count(self) -> int:
        """Sequences that are read of a text that is there."""
        return SAMPLES if self.samples == "auto" else int(self.samples)


class AugmentSettings(Section):
    """How images are varied while training, and never else; the random numbers of an image depend
    on the seed, the epoch and its place in the data alone.

    ``flip`` mirrors half of them left to right; ``crop`` moves each by up to so many pixels of the
    size that the model reads, with the mean colour of its processor in what becomes free.
    """

    flip: bool = False
    crop: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.flip and not self.crop:
            raise ValueError("give flip: true, a crop of so many pixels, or leave augment out")
        return self


class DataSettings(Section):
    """The training data, and how its examples become tokens.

    ``format`` ``text`` reads prompts with completions as raw text, every token of which is learned.
    ``train`` is one source, or a list of ``{path, weight}`` for replay: the first is the new task,
    of which every example is in every epoch, the others have their exact share of an epoch's rows;
    a ``buffer`` beside the weight is how many of a source's rows are ever seen, drawn by the seed.
    ``columns`` says what the new task's file calls what a row has here, ``{prompt: q, completion:
    a}``; then its other columns are not read. Columns of another source stand behind its path, see
    `forgetless.data.sources`. ``validation`` is the share of its rows, chosen by their content,
    that is held out: tasks and probes read it as the path `VALIDATION`.
    Prompts with completions go through the base's chat template where it has one, after the words
    of ``system`` if there are any; with ``chat_template`` ``off`` they stay as they are.
    ``augment`` is for images.
    """

    train: Any
    columns: dict[str, Name] = {}
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None
    format: Literal["auto", "prompt_completion", "messages", "text"] = "auto"
    max_length: Annotated[int, Field(ge=2)] = 512
    pack: Any = "auto"
    limit: Count | None = None
    augment: AugmentSettings | None = None
    chat_template: Literal["auto", "off"] = "auto"
    system: str | None = None

    @property
    def said(self) -> dict[str, Any]:
        """How prompts are put to the base, as the tasks do it too unless they say otherwise."""
        return {"chat_template": self.chat_template, "system": self.system}

    @property
    def reading(self) -> dict[str, Any]:
        """How a source is read: arguments of `forgetless.data.load_examples`."""
        return {"limit": self.limit, "kind": self.format, **self.said}

    @field_validator("train")
    @classmethod
    def _source_or_sources(cls, value: Any) -> str | list[dict[str, Any]]:
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list) and value and all(map(_is_weighted_source, value)):
            return value
        raise ValueError(
            "must be a file or a list of {path: file, weight: positive number}, the new task "
            "first, where a buffer is a number of rows"
        )

    @property
    def sources(self) -> list[tuple[str, float]]:
        """Every source with its weight, the new task first."""
        given: Any = (
            [{"path": self.train, "weight": 1}] if isinstance(self.train, str) else self.train
        )
        first, *others = ((source["path"], float(source["weight"])) for source in given)
        source = Source.of(first[0])
        source = replace(source, columns={**source.columns, **self.columns})
        if self.validation is not None:
            source = replace(source, share=self.validation)
        return [(str(source), first[1]), *others]

    @property
    def held_out(self) -> str | None:
        """The source of what is held out of the new task's data; None for nothing."""
        source = Source.of(self.sources[0][0])
        return None if self.validation is None else str(replace(source, held=True))

    @model_validator(mode="after")
    def _one_part(self) -> Self:
        first = self.train if isinstance(self.train, str) else self.train[0]["path"]
        if Source.of(first).share is not None and self.validation is not None:
            raise ValueError(f"{first} names a part of itself; leave that or validation out")
        return self

    @property
    def buffers(self) -> list[int | None]:
        """For every source how many rows of it are ever seen; None for all."""
        if isinstance(self.train, str):
            return [None]
        return [source.get("buffer") for source in self.train]

    @field_validator("pack")
    @classmethod
    def _auto_or_bool(cls, value: Any) -> Literal["auto"] | bool:
        if value == "auto" or isinstance(value, bool):
            return value  # type: ignore[no-any-return]
        raise ValueError("must be 'auto', true or false")


def _is_weighted_source(value: Any, name: str = "path") -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() - ({"buffer"} if name == "path" else set()) == {name, "weight"}
        and (value.get("buffer", 1) or 0) > 0
        and isinstance(value.get("buffer", 1), int)
        and isinstance(value[name], str)
        and isinstance(value["weight"], int | float)
        and value["weight"] > 0
    )
