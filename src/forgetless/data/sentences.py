"""Text classifiers: the modality whose data is sentences, or pairs of them, with a class."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.core.errors import UserError
from forgetless.data.classes import ClassReader, own_and_new, require_reader, some
from forgetless.data.examples import Examples, require_kind
from forgetless.data.files import bad_rows, require_counts
from forgetless.data.forms import Kind, Record
from forgetless.data.modality import Batch, Modality, Sample, longest_first
from forgetless.data.packing import IGNORED
from forgetless.data.texts import SELF, read_examples
from forgetless.models.heads import head_classes
from forgetless.models.load import load_tokenizer
from forgetless.models.text import positions_of, require_known_tokens

KINDS: frozenset[Kind] = frozenset({"sentence", "text"})

PROBE = 4, 32
"""Rows and tokens of the probe; fewer tokens where the model has fewer positions."""


@dataclass(frozen=True, kw_only=True)
class SentenceReader(ClassReader):
    """The processor of a text classifier: sentences become tokens, classes their numbers.

    Attributes:
        pad: the token of the model's config that fills a batch: a decoder pools at the last token
            that is another one, so that the tokenizer's own would not do.
        type_ids: whether the model tells the two sentences of a pair apart by type.
    """

    load_processor = staticmethod(load_tokenizer)
    pad: int
    type_ids: bool = False

    @classmethod
    def of(cls, processor: PreTrainedTokenizerBase | SentenceReader, config: Any) -> SentenceReader:
        """The reader of a model by its config.

        Raises:
            UserError: the head gives no single class, or batches of the model cannot be padded.
        """
        plain: Any = processor.processor if isinstance(processor, cls) else processor
        problem = getattr(config, "problem_type", None)
        own, new = head_classes(config)
        is_bare = not own and not new
        if (len(own + new) < 2 and not is_bare) or problem not in (
            None,
            "single_label_classification",
        ):
            raise UserError(
                f"the head of this base has {config.num_labels} outputs for {problem or 'a number'}"
                "; only heads that give one of two or more classes are read"
            )
        if config.is_encoder_decoder:
            raise UserError("this base is an encoder-decoder; give a text classifier that is none")
        text = config.get_text_config()
        pad, words = text.pad_token_id, text.vocab_size
        if pad is None or not 0 <= pad < words:
            raise UserError(
                f"the config of this base has the pad_token_id {pad}, by which its head finds the "
                f"last token of a sentence; set it to one of 0..{words - 1} and save the config "
                "again"
            )
        given = "token_type_ids" in plain.model_input_names
        types = given and getattr(config, "type_vocab_size", 0) > 1
        return cls(processor=plain, pad=pad, type_ids=types, **own_and_new(config))

    def labelled(self, examples: Examples) -> Examples:
        """The examples, each with the name of its class.

        Raises:
            UserError: other examples, rows without a label, or classes that the head does not have.
        """
        reader = self.reading(_labels(examples), examples.source)
        found, problems = _sentences(examples), []
        places = examples.places or [f"example {number + 1}" for number in range(len(examples))]
        names = {number: name for name, number in reader.classes.items()}
        records: list[Record] = []
        for place, record in zip(places, found, strict=True):
            label = record["label"]
            number = None if label is None else reader.number(label)
            if label is None:
                problems.append(f"{place}: has no label, a class of the base or its number")
            elif number is None:
                problems.append(
                    f"{place}: the head of this base has no class {label!r}; its "
                    f"{len(names)} classes are {some(names.values())}, or 0 to {len(names) - 1}; "
                    "adapter.head: new trains a new head for others"
                )
            else:
                records.append({**record, "label": names[number]})
        if problems:
            raise bad_rows(examples.source, problems)
        return replace(found, records=records)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides tokens and class numbers, but for the tokenizer's words."""
        content = [type(self.processor).__name__, self.classes, self.pad, self.type_ids]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _labels(examples: Examples) -> list[str | int]:
    """The labels that there are."""
    require_kind(examples, KINDS)
    return [r["label"] for r in _sentences(examples) if r["label"] is not None]


def _sentences(examples: Examples) -> Examples:
    """Raw texts as sentences, with the labels that lie beside them."""
    if examples.kind == "sentence":
        return examples
    labels = examples.labels or [None] * len(examples)
    pairs = zip(examples, labels, strict=True)
    records = [{"sentence": record["text"], "label": label} for record, label in pairs]
    return Examples("sentence", records, examples.source, examples.places)


class SentenceRows(torch.utils.data.Dataset[Sample]):
    """Tokens of sentences or pairs, cut off at a length, with the numbers of their classes.

    Args:
        examples: of kind ``sentence``; a class that the head does not have is IGNORED.
        reader: of the base.
        max_length: tokens of the longest; of a pair, the longer sentence is cut first.

    Attributes:
        cut: how many have more.
    """

    several = False

    def __init__(self, examples: Examples, reader: SentenceReader, max_length: int | None) -> None:
        self.reader = reader
        found = self._read(examples, None)
        self.cut = sum(len(ids) > max_length for ids in found["input_ids"]) if max_length else 0
        if self.cut:
            found = self._read(examples, max_length)
        names = ("input_ids", "token_type_ids") if reader.type_ids else ("input_ids",)
        self.columns = {name: [torch.tensor(ids) for ids in found[name]] for name in names}
        numbers = [None if r["label"] is None else reader.number(r["label"]) for r in examples]
        self.labels = torch.tensor([IGNORED if n is None else n for n in numbers])

    def _read(self, examples: Examples, max_length: int | None) -> Any:
        return self.reader.processor(
            [record["sentence"] for record in examples],
            [record["pair"] for record in examples if "pair" in record] or None,
            truncation=max_length is not None,
            max_length=max_length,
            padding=False,
            return_token_type_ids=self.reader.type_ids,
            verbose=False,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        row: Sample = {name: column[index] for name, column in self.columns.items()}
        return {**row, "labels": self.labels[index], "lengths": [len(row["input_ids"])]}

    @property
    def tokens(self) -> int:
        """Tokens of all sentences."""
        return sum(map(len, self.columns["input_ids"]))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens and classes."""
        digest = hashlib.sha256(self.reader.fingerprint.encode())
        for column in self.columns.values():
            digest.update(json.dumps([ids.tolist() for ids in column]).encode())
        digest.update(json.dumps(self.labels.tolist()).encode())
        return digest.hexdigest()

    def join(self, rows: Sequence[Sample]) -> Batch:
        """`input_ids`, `attention_mask` (rows, tokens), padded on the right, and `labels` (rows,).

        A base that tells the sentences of a pair apart has `token_type_ids` as well.
        """

        def padded(columns: list[Tensor], fill: int) -> Tensor:
            return pad_sequence(columns, batch_first=True, padding_value=fill)

        return {
            **{
                name: padded([r[name] for r in rows], self.reader.pad if name == "input_ids" else 0)
                for name in self.columns
            },
            "attention_mask": padded([torch.ones_like(row["input_ids"]) for row in rows], 0),
            "labels": torch.stack([row["labels"] for row in rows]),
        }

    def require_fitting(self, model: Any) -> None:
        """See to it that the model has a position and a word for each token.

        Raises:
            UserError: a sentence is too long, or the tokenizer belongs to another model.
        """
        longest, positions = max(map(len, self.columns["input_ids"])), positions_of(model)
        if positions is not None and longest > positions:
            raise UserError(
                f"the longest example has {longest} tokens, but the model has {positions} "
                f"positions; shorten it, or in a training set max_length to {positions} or less"
            )
        require_known_tokens([[int(ids.max()) for ids in self.columns["input_ids"]]], model)


def _check(examples: Examples, reader: SentenceReader) -> None:
    """Raise which labels are missing or unknown, and that there is but one class."""
    found = {record["label"] for record in reader.labelled(examples)}
    if len(found) < 2:
        raise UserError(
            f"{examples.source}: all {len(examples)} rows have the label {found.pop()!r}, from "
            "which nothing but always to say that is learned; give two classes or more"
        )


def _rows(
    examples: Examples,
    reader: SentenceReader,
    *,
    max_length: int | None = 512,
    pack: bool | Literal["auto"] = "auto",
) -> SentenceRows:
    require_reader(reader, SentenceReader, "a tokenizer", pack)
    reader = reader.reading(_labels(examples), examples.source)
    rows = SentenceRows(reader.labelled(examples), reader, max_length)
    if rows.cut:
        warnings.warn(
            f"{rows.cut} of {len(rows)} sentences have more than {max_length} tokens; their ends "
            "are cut off",
            stacklevel=2,
        )
    return rows


def _batches(
    source: str,
    model: PreTrainedModel,
    reader: SentenceReader,
    *,
    samples: int = 256,
    max_length: int = 256,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Batch]:
    """Sentences to keep, of which the classes may be any or none; `labels` are then IGNORED.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: "self", neither sentences nor raw text, or a count below 1.
    """
    require_counts(samples=samples, max_length=max_length, batch_size=batch_size)
    if source == SELF:
        raise UserError("a text classifier says nothing by itself; give a file of sentences")
    examples = read_examples(source)
    require_kind(examples, KINDS)
    found = _sentences(examples)
    drawn = random.Random(seed).sample(range(len(found)), min(samples, len(found)))
    drawn_ones = replace(found, records=[found.records[index] for index in drawn], places=())
    length = min(max_length, positions_of(model) or max_length)
    reader = SentenceReader.of(reader, model.config).keeping(_labels(examples))
    rows = SentenceRows(drawn_ones, reader, length)
    rows.require_fitting(model)
    parts = longest_first([rows[index] for index in range(len(rows))], batch_size)
    return [rows.join(part) for part in parts]


def _probe(model: PreTrainedModel) -> Batch:
    """Random tokens, (4, 32), always the same for a vocabulary; none of them is padding."""
    rows, tokens = PROBE
    shape = rows, min(tokens, positions_of(model) or tokens)
    text = model.config.get_text_config()
    words, pad = text.vocab_size, text.pad_token_id
    ids = torch.randint(words, shape, generator=torch.Generator().manual_seed(0))
    if pad is not None:
        ids[ids == pad] = (pad + 1) % words
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


MODALITY = Modality(
    kinds=KINDS,
    processor_name="tokenizer",
    processor_type=SentenceReader,
    load_processor=SentenceReader.load,
    check=_check,
    rows=_rows,
    batches=_batches,
    own_texts=None,
    probe=_probe,
    labels=_labels,
    reader=SentenceReader.of,
    loss_task="sentence_accuracy",
    distance_task="class_kl",
)
