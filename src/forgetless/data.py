"""Training examples: read from a file, brought to one of three kinds, turned into tokens.

A row of a file has one of these forms; keys beyond them (an id, a category) are ignored, and where
several forms fit, the first one counts:

====================================  ==========================================================
``messages``                          a list of ``{"role", "content"}``: roles system, user,
                                      assistant, tool; the assistant's turns are learned
``prompt``, ``completion``            the completion is learned
``prompt``, ``response``              the same
``instruction``, (``input``,)         prompt = instruction, a blank line and the input if there is
``output`` or ``response``            one, and a line end
``question``, ``answer``              prompt = the question and a line end
``query``, ``response``               the same
``problem``, ``solution``             the same
``text``                              every token is learned
====================================  ==========================================================
"""

from __future__ import annotations

import csv
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from forgetless.chat import Chat, Tokens
from forgetless.errors import UserError
from forgetless.packing import IGNORED, Row, packed, wrapped

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "Examples",
    "from_rows",
    "load_examples",
    "read_rows",
    "tokenize",
]

Kind = Literal["prompt_completion", "messages", "text"]
Record = Mapping[str, Any]

POCKET = "pocket:"
POCKET_SKILLS = ("problems", "functions", "series")
POCKET_KNOWLEDGE = "pocket:knowledge"
POCKET_SIZES = {"train": 4000, "test": 500}


@dataclass(frozen=True)
class Examples:
    """Checked training examples of one kind.

    Attributes:
        kind: what every record holds: ``prompt`` and ``completion``, ``messages``, or ``text``.
        records: the examples, in the order of the file.
        source: where they came from, for messages.
        places: of each record in the source (``"line 7"``), for messages; empty for its number.
    """

    kind: Kind
    records: Sequence[Record]
    source: str
    places: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @property
    def where(self) -> list[str]:
        """For each record, the source and the place in it: ``"train.jsonl, line 7"``."""
        places = self.places or [f"example {number + 1}" for number in range(len(self))]
        return [f"{self.source}, {place}" for place in places]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content: the same for the same examples, whatever file held them."""
        digest = hashlib.sha256(self.kind.encode())
        for record in self.records:
            digest.update(b"\n")
            digest.update(json.dumps(record, sort_keys=True, ensure_ascii=True).encode())
        return digest.hexdigest()

    def dataset(self) -> datasets.Dataset:
        """The records as a `datasets.Dataset`, which TRL's trainers take as it is."""
        return _import("datasets").Dataset.from_list([dict(record) for record in self.records])


def load_examples(
    path: str | Path, *, limit: int | None = None, kind: Kind | Literal["auto"] = "auto"
) -> Examples:
    """The training examples of a file, checked row by row.

    Args:
        path: a .jsonl, .json, .csv, .parquet or .txt file (a text file is one document), a folder
            written by ``datasets.save_to_disk``, or a pocket skill: ``pocket:problems``,
            ``pocket:functions``, ``pocket:series``, each also with ``:test``; or
            ``pocket:knowledge``, the facts of the pocket world as raw text.
        limit: read no more than the first rows.
        kind: what the examples have to be; prompts with completions can be read as ``text``, in
            which every token is learned.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file is empty or broken, of another kind, or a row has no form of this
            module; the message names the line or row.
    """
    examples = from_rows(read_rows(path, limit=limit), source=str(path))
    return as_kind(kind, examples)


def as_kind(kind: Kind | Literal["auto"], examples: Examples) -> Examples:
    """The examples as a kind that they can be read as, see `load_examples`."""
    if kind in ("auto", examples.kind):
        return examples
    if (examples.kind, kind) != ("prompt_completion", "text"):
        raise UserError(f"{kind!r} given, but {examples.source} is {examples.kind!r}")
    records = [{"text": record["prompt"] + record["completion"]} for record in examples]
    return Examples("text", records, examples.source)


def from_rows(rows: Iterable[tuple[str, Any]], source: str) -> Examples:
    """Examples from raw rows, each with its place in the source (``"line 7"``)."""
    records: list[Record] = []
    places: list[str] = []
    form: _Form | None = None
    for place, row in rows:
        where = f"{source}, {place}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected an object with keys, got {_show(row)}")
        if form is None:
            form = _form_of(row, where)
        elif not form.fits(row):
            raise UserError(
                f"{where}: has the keys {_names(row)}, but the first row has the form {form}; "
                "all rows of a file need the same form"
            )
        records.append(form.convert(row, where))
        places.append(place)
    if form is None:
        raise UserError(f"{source} is empty; give at least one example")
    return Examples(form.kind, records, source, places)


# ---- forms: what the keys of a row mean ----------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """Keys that make a row an example, and how."""

    kind: Kind
    keys: tuple[str, ...]
    convert: Callable[[Record, str], Record]

    def fits(self, row: Record) -> bool:
        return all(key in row for key in self.keys)

    def __str__(self) -> str:
        return " + ".join(self.keys)


def _pair(prompt: str, completion: str) -> _Form:
    """A form whose keys already hold all of the prompt and the completion."""

    def convert(row: Record, where: str) -> Record:
        return {"prompt": _text(row, prompt, where), "completion": _text(row, completion, where)}

    return _Form("prompt_completion", (prompt, completion), convert)


def _task(task: str, answer: str) -> _Form:
    """A form whose prompt is a task, its optional input, and a line end."""

    def convert(row: Record, where: str) -> Record:
        prompt = _text(row, task, where)
        if row.get("input") not in (None, "") and task == "instruction":
            prompt += "\n\n" + _text(row, "input", where)
        return {"prompt": prompt + "\n", "completion": _text(row, answer, where)}

    return _Form("prompt_completion", (task, answer), convert)


def _document(row: Record, where: str) -> Record:
    return {"text": _text(row, "text", where)}


_ROLES = ("system", "user", "assistant", "tool")


def _conversation(row: Record, where: str) -> Record:
    messages = row["messages"]
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"{where}: 'messages' must be a list of turns, got {_show(messages)}")
    turns = []
    for number, message in enumerate(messages, start=1):
        turn = f"{where}, turn {number}"
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise UserError(
                f"{turn}: must be an object with 'content' and a 'role' of {', '.join(_ROLES)}, "
                f"got {_show(message)}"
            )
        if message.get("tool_calls"):
            raise UserError(
                f"{turn}: 'tool_calls' are not read; write the call into 'content', in the words "
                "that the model should say"
            )
        turns.append({"role": message["role"], "content": _text(message, "content", turn)})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError(f"{where}: no turn of the assistant, so there is nothing to learn")
    return {"messages": turns}


_FORMS = (
    _Form("messages", ("messages",), _conversation),
    _pair("prompt", "completion"),
    _pair("prompt", "response"),
    _task("instruction", "output"),
    _task("instruction", "response"),
    _task("question", "answer"),
    _task("query", "response"),
    _task("problem", "solution"),
    _Form("text", ("text",), _document),
)


def _form_of(row: Record, where: str) -> _Form:
    for form in _FORMS:
        if form.fits(row):
            return form
    allowed = ", ".join(str(form) for form in _FORMS)
    raise UserError(f"{where}: has the keys {_names(row)}; expected one of: {allowed}")


def _text(row: Record, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must be text, got {_show(value)}")
    if not value.strip():
        raise UserError(f"{where}: {key!r} is empty; give it text or leave the row out")
    return value


def _names(row: Record) -> str:
    return ", ".join(sorted(repr(key) for key in row)) or "(none)"


def _show(value: object) -> str:
    if value is None:
        return "nothing (null)"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


# ---- files: rows with their place ----------------------------------------------------------------


def read_rows(path: str | Path, *, limit: int | None = None) -> Iterator[tuple[str, Any]]:
    """The raw rows of a file, one after the other, each with its place such as ``"line 7"``.

    Args:
        path: as in `load_examples`.
        limit: stop after so many rows.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be 1 or more, got {limit}")
    if str(path).startswith(POCKET):
        return islice(_read_pocket(str(path)), limit)
    path = Path(path)
    if path.is_dir():
        return islice(_read_folder(path), limit)
    allowed = f"{', '.join(_READERS)}, a datasets folder or '{POCKET}{POCKET_SKILLS[0]}'"
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}; give a file of type {allowed}")
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path}: unknown file type {path.suffix!r}; give {allowed}")
    return islice(_READERS[path.suffix.lower()](path), limit)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: no valid JSON ({error.msg} at column {error.colno}); "
                    "every line must be one JSON object"
                ) from None


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of objects, or one object a line as many files named .json hold."""
    text = "".join(_lines(path))
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: no valid JSON ({error.msg})") from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(_lines(path, newline=""), restkey="")
    try:
        for number, row in enumerate(rows, start=1):
            if "" in row and isinstance(row[""], list):
                raise UserError(f"{path}, row {number}: has more cells than the header")
            yield f"row {number}", row
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: no valid CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    _import("pyarrow")
    import pyarrow.parquet
    from pyarrow import ArrowInvalid

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row
    except ArrowInvalid as error:
        raise UserError(f"{path} is no valid parquet file ({error})") from None


def _read_text(path: Path) -> Iterator[tuple[str, Any]]:
    text = "".join(_lines(path))
    if text.strip():
        yield "the document", {"text": text}


def _read_folder(path: Path) -> Iterator[tuple[str, Any]]:
    datasets = _import("datasets")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError):
        raise UserError(
            f"folder {path} holds no data set; give one written by datasets.save_to_disk, or a "
            f"file of type {', '.join(_READERS)}"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        splits = list(loaded)
        if "train" not in loaded and len(splits) != 1:
            raise UserError(
                f"folder {path} has the splits {', '.join(splits)} and none is called 'train'; "
                f"give the folder of one, such as {path / splits[0]}"
            )
        loaded = loaded["train" if "train" in loaded else splits[0]]
    for number, row in enumerate(loaded, start=1):
        yield f"row {number}", row


def _read_pocket(name: str) -> Iterator[tuple[str, Any]]:
    from forgetless.pocket.functions import functions
    from forgetless.pocket.knowledge import knowledge_text
    from forgetless.pocket.problems import problems
    from forgetless.pocket.series import series

    if name == POCKET_KNOWLEDGE:
        for number, text in enumerate(knowledge_text(), start=1):
            yield f"row {number}", {"text": text}
        return
    skill, _, split = name.removeprefix(POCKET).partition(":")
    split = split or "train"
    if skill not in POCKET_SKILLS or split not in POCKET_SIZES:
        known = ", ".join(f"'{POCKET}{known}'" for known in POCKET_SKILLS)
        raise UserError(
            f"unknown pocket data {name!r}; give {known}, or one with ':test', or "
            f"'{POCKET_KNOWLEDGE}'"
        )
    split = cast("Literal['train', 'test']", split)
    count = POCKET_SIZES[split]
    made: dict[str, Callable[[], Sequence[Any]]] = {
        "problems": lambda: problems(count, 0, split),
        "functions": lambda: functions(count, 0, split),
        "series": lambda: series(count, 0, split),
    }
    for number, example in enumerate(made[skill](), start=1):
        yield f"row {number}", {"prompt": example.prompt, "completion": example.completion}


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _lines(path: Path, newline: str | None = None) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start} of a block: {error.reason}); "
            "save it as UTF-8"
        ) from None


def _import(name: str) -> Any:
    """An optional package, or the line that installs it."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise UserError(
            f"this needs the package {name!r}; install it with: pip install 'forgetless[train]'"
        ) from None


# ---- tokens --------------------------------------------------------------------------------------


def tokenize(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    pack: bool | Literal["auto"] = "auto",
) -> datasets.Dataset:
    """Token ids and labels of every example; labels are IGNORED where nothing is learned.

    Prompt and completion are joined as they stand and the completion ends in the end-of-sequence
    token; of `messages` the assistant's turns are learned (`forgetless.chat`). What is longer than
    `max_length` loses its end, so the beginning of the answer stays; an example whose prompt alone
    fills `max_length` has nothing to learn and is left out. Warnings count both. Raw text loses
    nothing: it is cut into blocks.

    Args:
        examples: what to turn into tokens.
        tokenizer: of the model that will be trained.
        max_length: tokens of the longest example.
        pack: fill rows of `max_length` tokens with several examples that do not see each other
            (`forgetless.packing`). Raw text is packed into full rows, documents ending in the
            end-of-sequence token; examples with an answer are packed whole. ``"auto"`` packs raw
            text only.

    Returns:
        A data set with the columns ``input_ids``, ``labels`` and ``lengths``, the lengths of the
        sequences of each row.

    Raises:
        UserError: nothing is left to learn, a setting does not fit the examples, or the tokenizer's
            chat template does not fit a conversation; the message names its line or row.
    """
    if max_length < 2:
        raise UserError(f"max_length must be 2 or more, got {max_length}")
    if examples.kind == "text":
        documents = _documents(examples, tokenizer)
        packs = pack is not False
        rows = wrapped(documents, max_length) if packs else _cut(documents, max_length)
    else:
        tokens = _pairs if examples.kind == "prompt_completion" else _conversations
        rows = _truncated(tokens(examples, tokenizer), max_length)
        rows = packed(rows, max_length) if rows and pack is True else rows
    if not rows:
        raise UserError(
            f"{examples.source}: no example has a token to learn within max_length={max_length}; "
            "raise max_length or shorten the prompts"
        )
    columns = {name: [getattr(row, name) for row in rows] for name in Row._fields}
    return _import("datasets").Dataset.from_dict(columns)


def _documents(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    texts = [record["text"] for record in examples]
    return [ids + _eos(tokenizer) for ids in _encode(tokenizer, texts)]


def _cut(documents: list[list[int]], max_length: int) -> list[Row]:
    """Each document in rows of at most `max_length` tokens."""
    blocks = [
        document[start : start + max_length]
        for document in documents
        for start in range(0, len(document), max_length)
    ]
    return [Row(block, block.copy(), [len(block)]) for block in blocks if len(block) > 1]


def _pairs(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Prompt and completion as one sequence that begins with the tokens of the prompt alone.

    Both are tokenised together, as a reader would; where that merges the two across their border,
    they are tokenised apart, since a generating model is given the prompt alone.
    """
    prompts = [record["prompt"] for record in examples]
    completions = [record["completion"] for record in examples]
    alone = _encode(tokenizer, prompts)
    together = _encode(tokenizer, [p + c for p, c in zip(prompts, completions, strict=True)])
    apart = [whole[: len(p)] != p for p, whole in zip(alone, together, strict=True)]
    again = iter(
        _encode(
            tokenizer, [c for c, merged in zip(completions, apart, strict=True) if merged], False
        )
    )
    rows = []
    for prompt, whole, merged in zip(alone, together, apart, strict=True):
        answer = (next(again) if merged else whole[len(prompt) :]) + _eos(tokenizer)
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    return rows


def _conversations(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    conversations = [record["messages"] for record in examples]
    return Chat(tokenizer).tokens(conversations, examples.where)


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of each text, without an end-of-sequence token that the tokenizer adds itself."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    if not add_special_tokens or eos is None or tokenizer("")["input_ids"][-1:] != [eos]:
        return cast("list[list[int]]", encoded)
    return [ids[:-1] if ids[-1:] == [eos] else ids for ids in encoded]


def _eos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _truncated(rows: Sequence[Tokens], max_length: int) -> list[Row]:
    kept = [(ids, labels) for ids, labels in rows if _learns(labels[1:max_length])]
    fitting = f"of {len(rows)} examples do not fit max_length={max_length}"
    if left_out := len(rows) - len(kept):
        warnings.warn(
            f"{left_out} {fitting} with their prompts alone and are left out", stacklevel=3
        )
    if cut_short := sum(_learns(labels[max_length:]) for _, labels in kept):
        warnings.warn(
            f"{cut_short} {fitting}; the ends of their answers are cut off and not learned",
            stacklevel=3,
        )
    return [
        Row(ids[:max_length], labels[:max_length], [min(len(ids), max_length)])
        for ids, labels in kept
    ]


def _learns(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels)
