"""Rows of a file, each with its place."""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from forgetless.core.errors import UserError, first_few
from forgetless.core.files import not_there
from forgetless.data.image_rows import (
    Picture,
    arrow_rows,
    class_folders,
    columns_of,
    in_turn,
    npz_rows,
    picture_of,
)

Row = Mapping[str, Any]
"""What a line of a file holds, by its keys; most files have one object a row."""


POCKET = "pocket:"
HUB = "hub:"
POCKET_KNOWLEDGE = "pocket:knowledge"
POCKET_SIZES = {"train": 4000, "test": 500}


def require_counts(**counts: int | None) -> None:
    """Raise which of the numbers that were given is below 1; None is no number."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be 1 or more, got {value}")


def raw_rows(
    name: str, *, columns: Mapping[str, str] | None = None, limit: int | None = None
) -> Iterator[tuple[str, Any]]:
    """The rows of a file, a folder, a data set of the hub or of the pocket world, with places.

    `columns` says what is called differently there, by what a row calls it; of other columns
    nothing is read.
    """
    path = Path(name)
    if name.startswith(POCKET):
        rows, path = _read_pocket(name), Path()
    elif name.startswith(HUB):
        rows, path = _read_hub(name), Path()
    elif path.is_dir():
        rows = _read_folder(path)
    else:
        rows = _reader(path)(path)
    if columns:
        rows = _renamed(rows, columns, name)
    return _with_pictures(islice(rows, limit), path)


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[str, Any]]]:
    """What reads files of this type."""
    allowed = (
        f"{', '.join(_READERS)}, a datasets folder, class folders, '{HUB}ID:CONFIG:SPLIT' or "
        f"'{POCKET}problems'"
    )
    if not path.exists():
        raise FileNotFoundError(f"{not_there(path)}; give a file of type {allowed}")
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path}: unknown file type {path.suffix!r}; give {allowed}")
    if not path.is_file():
        raise UserError(f"{path} is a pipe or a device, no file; give a file of type {allowed}")
    return _READERS[path.suffix.lower()]


def _renamed(
    rows: Iterable[tuple[str, Any]], columns: Mapping[str, str], name: str
) -> Iterator[tuple[str, Any]]:
    """The rows with these columns alone, by these names."""
    problems: list[str] = []
    for place, row in rows:
        there = list(row) if isinstance(row, Mapping) else []
        if missing := [column for column in columns.values() if column not in there]:
            known = ", ".join(map(repr, there)) or "none"
            problems.append(f"{place}: has no column {missing[0]!r}; its columns are {known}")
        if not problems:
            yield place, {ours: row[theirs] for ours, theirs in columns.items()}
    if problems:
        raise bad_rows(name, problems)


def names_images(path: str | Path) -> bool:
    """Whether the rows of a file or a datasets folder name images that lie elsewhere."""
    path = Path(path)
    if path.is_dir() and not any((path / name).is_file() for name in _DATASETS_FILES):
        return False
    try:
        first = next(raw_rows(str(path), limit=1), ("", None))[1]
    except (UserError, FileNotFoundError):  # which those tell that read all of it
        return False
    image = first.get("image") if isinstance(first, Mapping) else None
    return isinstance(image, Picture) and image.content is None


_DATASETS_FILES = ("dataset_info.json", "dataset_dict.json")


def _with_pictures(rows: Iterable[tuple[str, Any]], path: Path) -> Iterator[tuple[str, Any]]:
    """The rows; of those with an image and its class, these two as `Picture` and ``label``."""
    problems: list[str] = []
    for place, row in rows:
        columns = columns_of(row) if isinstance(row, Mapping) else None
        if columns is not None:
            image, label = columns
            try:
                row = {"image": picture_of(row[image], path, place), "label": row[label]}
            except UserError as problem:
                problems.append(f"{place}: {problem}")
        if not problems:
            yield place, row
    if problems:
        raise bad_rows(path, problems)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    problems: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                row = _json(line, number, "every line must be one JSON object")
                _require_whole_characters(row, line, f"line {number}")
            except UserError as problem:
                problems.append(str(problem))
            if not problems:
                yield f"line {number}", row
    if problems:
        raise bad_rows(path, problems)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of objects, or one object a line as many files named .json hold."""
    text = "".join(_lines(path))
    if not text.lstrip().startswith("["):
        _refuse_one_object(path, text)
        yield from _read_jsonl(path)
        return
    try:
        rows = _json(text, 1, "it must be one list of objects")
        for number, row in enumerate(rows, start=1):
            _require_whole_characters(row, text, f"row {number}")
    except UserError as problem:
        raise UserError(f"{path}, {problem}") from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _refuse_one_object(path: Path, text: str) -> None:
    """Refuse one object over several lines, each of which is no JSON."""
    try:
        whole = json.loads(text) if text.strip().count("\n") else None
    except (ValueError, RecursionError):
        return
    if isinstance(whole, dict):
        keys = ", ".join(map(repr, whole))
        raise UserError(
            f"{path} holds one object, with the {'key' if len(whole) == 1 else 'keys'} {keys}; a "
            "list of objects is read, or one object a line"
        )


def _require_whole_characters(row: Any, text: str, place: str) -> None:
    """Refuse half a character, which JSON can write (half an emoji) and no tokenizer can read.

    Without an escape in the text from which the row was read there is nothing to look for.
    """

    def look(value: Any, key: str) -> None:
        if isinstance(value, str) and (half := re.search("[\ud800-\udfff]", value)):
            raise UserError(
                f"{place}: {key!r} holds half a character ({half[0]!r}, a lone surrogate); write "
                "the whole character, or take it out"
            )
        if isinstance(value, Mapping | list):
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value, start=1)
            for inner, part in pairs:
                look(part, f"{key}.{inner}" if key else str(inner))

    if re.search(r"\\u[dD][89a-fA-F]", text):
        look(row, "")


def _json(text: str, first_line: int, wanted: str) -> Any:
    """The value of a text that begins at a line of a file."""
    try:
        # With its line end, the decoder would look for what is missing in the line after it.
        return json.loads(text.rstrip("\n"))
    except json.JSONDecodeError as error:
        line, what = first_line + error.lineno - 1, error.msg.rstrip(": ").removesuffix(" at")
        what = f"{what} at column {error.colno}"
    except RecursionError:
        line, what = first_line, "nested too deep"
    except ValueError:
        line, what = first_line, f"a number of more than {sys.get_int_max_str_digits()} digits"
    raise UserError(f"line {line}: no valid JSON ({what}); {wanted}")


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(_lines(path, newline=""), restkey="")
    problems: list[str] = []
    try:
        header = rows.fieldnames or []
        if twice := [name for n, name in enumerate(header) if name and name in header[:n]]:
            raise UserError(f"{path} has two columns {twice[0]!r}; leave one of them out")
        for number, row in enumerate(rows, start=1):
            if "" in row and isinstance(row[""], list):
                problems.append(f"row {number}: has more cells than the header")
            if not problems:
                yield f"row {number}", row
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: no valid CSV ({error})") from None
    if problems:
        raise bad_rows(path, problems)


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    optional_package("pyarrow")
    import pyarrow.parquet
    from pyarrow import ArrowInvalid

    try:
        file = pyarrow.parquet.ParquetFile(path)
        yield from _arrow_rows(file.iter_batches(batch_size=1024), file.schema_arrow)
    except ArrowInvalid as error:
        raise UserError(f"{path} is no valid parquet file ({error})") from None


def _read_arrow(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of an arrow file, or of a stream of batches as `datasets` writes them."""
    pyarrow = optional_package("pyarrow")
    try:
        try:
            file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        except pyarrow.ArrowInvalid:
            file = batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        yield from _arrow_rows(batches, file.schema)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is no valid arrow file ({error})") from None


def _arrow_rows(batches: Iterable[Any], schema: Any) -> Iterator[tuple[str, Any]]:
    """Rows with their numbers; of images with a class these two alone."""
    if columns_of(schema.names):
        return arrow_rows(batches, schema)
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _read_text(path: Path) -> Iterator[tuple[str, Any]]:
    text = "".join(_lines(path))
    if text.strip():
        yield "the document", {"text": text}


def _read_folder(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a datasets folder; or the images of class folders, one of each in turn."""
    if classes := class_folders(path):
        yield from in_turn(path, classes)
        return
    datasets = optional_package("datasets")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError):
        raise UserError(
            f"folder {path} holds no data set; give one written by datasets.save_to_disk, one with "
            f"a folder of images for each class, or a file of type {', '.join(_READERS)}"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        splits = list(loaded)
        if "train" not in loaded and len(splits) != 1:
            raise UserError(
                f"folder {path} has the splits {', '.join(splits)} and none is called 'train'; "
                f"give the folder of one, such as {path / splits[0]}"
            )
        loaded = loaded["train" if "train" in loaded else splits[0]]
    yield from _rows_of(loaded)


def _rows_of(loaded: Any) -> Iterator[tuple[str, Any]]:
    """The rows of a `datasets.Dataset`, whose images are not decoded."""
    batches = loaded.with_format("arrow").iter(batch_size=1024)
    return _arrow_rows(batches, loaded.features.arrow_schema)


def _read_hub(name: str) -> Iterator[tuple[str, Any]]:
    """The rows of ``hub:ID``, ``hub:ID:CONFIG`` or ``hub:ID:CONFIG:SPLIT``; ID, or ID@REVISION."""
    repository, _, rest = name.removeprefix(HUB).partition(":")
    configuration, _, split = rest.partition(":")
    hint = f"write '{HUB}ID:CONFIG:SPLIT', or give a file"
    return _rows_of(hub_data(repository, configuration or None, split or "train", hint))


def hub_data(repository: str, configuration: str | None, split: str, hint: str) -> Any:
    """A data set on the hub, or its copy in the local cache, as a `datasets.Dataset`.

    Raises:
        UserError: it cannot be had; ``hint`` says what to do.
    """
    from forgetless.models.hub import go_offline_if_unreachable  # imports huggingface_hub: slow

    datasets = optional_package("datasets")
    go_offline_if_unreachable()
    name, _, revision = repository.partition("@")
    try:
        return datasets.load_dataset(name, configuration, split=split, revision=revision or None)
    except Exception as problem:
        # What there is to choose from stands in the second line.
        line = " ".join(str(problem).split("\n")[:2]).rstrip(".")
        raise UserError(
            f"{repository} could not be loaded from the hub, configuration "
            f"{configuration or '(none)'}, split {split!r} ({line}); {hint}"
        ) from problem


def _read_pocket(name: str) -> Iterator[tuple[str, Any]]:
    from forgetless.data.pocket.functions import functions
    from forgetless.data.pocket.images import CLASSES, DOMAINS
    from forgetless.data.pocket.knowledge import knowledge_text
    from forgetless.data.pocket.problems import problems
    from forgetless.data.pocket.series import series

    if name == POCKET_KNOWLEDGE:
        for number, text in enumerate(knowledge_text(), start=1):
            yield f"row {number}", {"text": text}
        return
    domain, _, split = name.removeprefix(POCKET).partition(":")
    drawn = {**DOMAINS, "pictures": CLASSES}
    if domain in drawn and (split or "train") in POCKET_SIZES:
        split = split or "train"
        for number in range(POCKET_SIZES[split] // 10):
            for label in drawn[domain]:
                picture = f"{POCKET}{label}/{split}/{number}"
                yield picture, {"image": Picture(picture), "label": label}
        return
    make: dict[str, Any] = {"problems": problems, "functions": functions, "series": series}
    skill, _, split = name.removeprefix(POCKET).partition(":")
    split = split or "train"
    if skill not in make or split not in POCKET_SIZES:
        known = ", ".join(f"'{POCKET}{known}'" for known in (*make, *drawn))
        raise UserError(
            f"unknown pocket data {name!r}; give {known}, or one with ':test', or "
            f"'{POCKET_KNOWLEDGE}'"
        )
    for number, example in enumerate(make[skill](POCKET_SIZES[split], 0, split), start=1):
        yield f"row {number}", {"prompt": example.prompt, "completion": example.completion}


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".npz": npz_rows,
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


def bad_rows(source: str | Path, problems: Sequence[str]) -> UserError:
    """The error for all rows that cannot be read: each problem begins with its row's place."""
    if len(problems) == 1:
        return UserError(f"{source}, {problems[0]}")
    return UserError(f"{source}: {len(problems):,} bad rows: {first_few(problems)}")


def optional_package(name: str) -> Any:
    """An optional package, or the line that installs it."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise UserError(
            f"this needs the package {name!r}; install it with: pip install 'forgetless[train]'"
        ) from None
