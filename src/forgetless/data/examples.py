"""Training examples of one kind, read from a file and checked."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from forgetless.core.errors import UserError
from forgetless.core.hashing import content_hash
from forgetless.data.files import HUB, POCKET, bad_rows, names_images, optional_package
from forgetless.data.forms import Form, Kind, Record, form_of, names_of, show
from forgetless.data.image_rows import hash_of
from forgetless.data.sources import read_rows

if TYPE_CHECKING:
    import datasets


ChatTemplate = Literal["auto", "off"]


@dataclass(frozen=True)
class Examples:
    """Checked training examples of one kind.

    Attributes:
        kind: what every record holds: ``prompt`` and ``completion``, ``messages``, ``text``,
            ``image`` and ``label``, or ``sentence`` (of a pair, ``pair``) and ``label``; of a
            ``preference`` ``chosen`` and ``rejected``, each a record of the first two kinds.
        records: the examples, in the order of the file.
        source: where they came from, for messages.
        places: of each record in the source (``"line 7"``), for messages; empty for its number.
        labels: what lies beside a ``text`` as its ``label``, or None; a text classifier learns it,
            and a language model does not see it.
        chat_template: whether prompts with completions go through the tokenizer's chat template
            where it has one, or stay as they are; see `forgetless.data.chat.as_chat`.
        system: what is said before each of them then.
    """

    kind: Kind
    records: Sequence[Record]
    source: str
    places: Sequence[str] = ()
    labels: Sequence[Any] = ()
    chat_template: ChatTemplate = "auto"
    system: str | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @property
    def where(self) -> list[str]:
        """For each record, the source and the place in it: ``"train.jsonl, line 7"``."""
        return [f"{self.source}, {place}" for place in self._places]

    @property
    def _places(self) -> Sequence[str]:
        return self.places or [f"example {number + 1}" for number in range(len(self))]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content: the same for the same examples, whatever file held them."""
        digest = hashlib.sha256(self.kind.encode())
        for record in self.records:
            if self.kind == "image" and not record["image"].startswith(POCKET):
                record = {**record, "image": hash_of(record["image"])}
            digest.update(b"\n")
            digest.update(json.dumps(record, sort_keys=True, ensure_ascii=True).encode())
        return digest.hexdigest()

    def answers(self, which: Literal["chosen", "rejected"]) -> Examples:
        """Of preferences, the examples that the chosen or the rejected answers are.

        Raises:
            UserError: some of them are texts and others lists of turns.
        """
        records = [record[which] for record in self.records]
        kinds: set[Kind] = {"messages" if "messages" in r else "prompt_completion" for r in records}
        if len(kinds) > 1:
            raise UserError(f"{self.source}: some {which} answers are texts, others lists of turns")
        return replace(self, kind=kinds.pop(), records=records, labels=())

    def require_whole(self) -> None:
        """See to it that images can be read, as far as their headers and ends tell.

        Raises:
            UserError: the first few that cannot be; or classes that look alike.
        """
        if self.kind != "image":
            return
        from forgetless.data.pictures import require_whole  # loads PIL, for images alone

        problems = []
        for place, record in zip(self._places, self.records, strict=True):
            try:
                require_whole(record["image"])
            except UserError as problem:
                problems.append(f"{place}: {str(problem).removeprefix(record['image']).strip()}")
        if problems:
            raise bad_rows(self.source, problems)
        if found := _confusable([record["label"] for record in self.records], self._places):
            raise bad_rows(self.source, [found])

    def dataset(self) -> datasets.Dataset:
        """The records as a `datasets.Dataset`, which TRL's trainers take as it is.

        They do not know a turn's ``weight``: with one of 0, give them the file itself.
        """
        return optional_package("datasets").Dataset.from_list(
            [dict(record) for record in self.records]
        )


def _confusable(labels: Sequence[str | int], places: Sequence[str]) -> str | None:
    """What is wrong with labels some of which are numbers, or differ by case alone."""
    first: dict[str | int, str] = {}
    for label, place in zip(labels, places, strict=True):
        first.setdefault(label, place)
    by_kind = {type(label): label for label in reversed(list(first))}
    if len(by_kind) > 1:
        name, number = by_kind[str], by_kind[int]
        return f"{first[number]}: the label is a number, {number}, and elsewhere a name, {name!r}"
    alike: dict[str, str | int] = {}
    for label, place in first.items():
        other = alike.setdefault(str(label).casefold(), label)
        if other != label and len(str(label)) > 1:  # letters may be classes
            return f"{place}: the class {label!r} differs by case alone from {other!r}"
    return None


def load_examples(
    path: str | Path,
    *,
    limit: int | None = None,
    kind: Kind | Literal["auto"] = "auto",
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
) -> Examples:
    """The training examples of a file, checked row by row.

    Args:
        path: a .jsonl, .json, .csv, .parquet, .arrow or .txt file (a text file is one document),
            an .npz file of images, a folder written by ``datasets.save_to_disk``, a folder with a
            folder of images for each class, or a pocket skill: ``pocket:problems``,
            ``pocket:functions``, ``pocket:series``, each also with ``:test``; ``pocket:knowledge``,
            the facts of the pocket world as raw text; or images of it: ``pocket:digits``,
            ``pocket:shapes``, ``pocket:letters``, ``pocket:patterns``, ``pocket:pictures`` (all of
            these), each also with ``:test``; or ``hub:ID:CONFIG:SPLIT``, a data set of the
            Hugging Face hub. What may stand behind it is in `forgetless.data.sources`.
        limit: read no more than the first rows.
        kind: what the examples have to be; prompts with completions can be read as ``text``, in
            which every token is learned.
        chat_template: see `Examples`.
        system: likewise.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file is empty or broken, of another kind, or a row has no form of
            `forgetless.data`; the message names the first few lines or rows and how many more there
            are.
    """
    examples = from_rows(read_rows(path, limit=limit), source=str(path))
    return replace(as_kind(kind, examples), chat_template=chat_template, system=system)


def source_hash(source: str, fingerprint: Callable[[str], str]) -> str:
    """The content of a file or folder; of what else a source may be called, its fingerprint.

    Of rows that name the files of images it is the fingerprint too, since the images decide.
    """
    if source.startswith((POCKET, HUB)):
        return _fingerprint_once(source, fingerprint)
    if Path(source).exists() and not names_images(source):
        return content_hash(source)
    return fingerprint(source)


@cache
def _fingerprint_once(source: str, fingerprint: Callable[[str], str]) -> str:
    """The fingerprint of data of the hub or the pocket world, which takes long to read."""
    return fingerprint(source)


def as_kind(kind: Kind | Literal["auto"], examples: Examples) -> Examples:
    """The examples as a kind that they can be read as, see `load_examples`."""
    if kind in ("auto", examples.kind):
        return examples
    if (examples.kind, kind) != ("prompt_completion", "text"):
        raise UserError(f"{kind!r} given, but {examples.source} is {examples.kind!r}")
    records = [{"text": record["prompt"] + record["completion"]} for record in examples]
    return Examples("text", records, examples.source)


def require_kind(examples: Examples, kinds: Collection[Kind]) -> None:
    """See to it that examples are of a kind that is read.

    Raises:
        UserError: they are of another.
    """
    if examples.kind not in kinds:
        raise UserError(
            f"{examples.source} holds examples of kind {examples.kind!r}, and here those of kind "
            f"{' or '.join(map(repr, sorted(kinds)))} are read"
        )


def from_rows(rows: Iterable[tuple[str, Any]], source: str) -> Examples:
    """Examples from raw rows, each with its place in the source (``"line 7"``)."""
    records: list[Record] = []
    places: list[str] = []
    labels: list[Any] = []
    problems: list[str] = []
    unread: Counter[str] = Counter()
    form: Form | None = None
    for place, row in rows:
        if form is None and isinstance(row, Mapping):
            form = form_of(row, f"{source}, {place}")
        try:
            records.append(_record(row, form, place))
            places.append(place)
            labels.append(row.get("label"))
            unread.update(form.unread(row) if form else ())
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise bad_rows(source, problems)
    if form is None:
        raise UserError(f"{source} is empty; give at least one example")
    if unread:
        shown = ", ".join(f"{key!r} of {count:,} rows" for key, count in sorted(unread.items()))
        warnings.warn(
            f"{source}: {shown} not read, though other tools may show or learn by it: the model "
            f"sees {form} alone; write into these what it should see, or take the key out",
            stacklevel=2,
        )
    beside = labels if form.kind == "text" else ()
    return Examples(form.kind, records, source, places, beside)


def _record(row: Any, form: Form | None, where: str) -> Record:
    """A raw row in the form that the first object of its file has."""
    if form is None or not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object with keys, got {show(row)}")
    if not form.has_keys(row):
        raise UserError(
            f"{where}: has the keys {names_of(row)}, but the first row has the form {form}; "
            "all rows of a file need the same form"
        )
    return form.convert(row, where)
