"""Standard tasks from local files: found, brought to the harness's fields, and named in YAML.

The harness's own task file is included and only its data are replaced, so the prompts, metrics and
version are its own. No torch, and lm_eval is not imported.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from forgetless.core.errors import UserError
from forgetless.data.sources import read_rows
from forgetless.tasks.harness.index import tasks_folder
from forgetless.tasks.harness.layouts import STANDARD, WORDS, Standard

ENDINGS = (".jsonl", ".json", ".parquet", ".csv")


def looked_for(task: str, data_dir: str | Path) -> str:
    """Where the files of a standard task are looked for, in words."""
    known = STANDARD[task]
    names = ", ".join(f"{folder}/" for folder in known.folders)
    words = " or ".join(map(repr, WORDS[_main(known)]))
    word = f" and {known.word!r}" if known.word else ""
    return (
        f"in {data_dir}: a folder {names} or files beginning with that name, with {words}{word} "
        f"in the file's name; {', '.join(ENDINGS)}"
    )


def find_files(task: str, data_dir: str | Path) -> Mapping[str, Path]:
    """The files of a standard task below a folder, by split.

    A file with no split in its name is that of the split to score, where no other is.

    Raises:
        UserError: the folder does not exist; no file to score; two files for one split.
    """
    known, folder = STANDARD[task], Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"data_dir: no folder {folder}")
    found: dict[str, Path] = {}
    others = []
    for path in _candidates(known, folder):
        split = _split_of(path, known)
        if split is None:
            others.append(path)
        elif split not in known.splits:
            continue
        elif split in found:
            raise UserError(
                f"task {task!r} has two files for its split {split!r}: {found[split]} and {path}; "
                "leave one of them"
            )
        else:
            found[split] = path
    scored = {"test", "validation"} & {*known.splits}
    if not scored & found.keys() and len(others) == 1:
        found[_main(known)] = others[0]
    if not scored & found.keys():
        raise UserError(f"task {task!r} found no file; looked {looked_for(task, folder)}")
    return found


def _main(known: Standard) -> str:
    """The split that the harness scores."""
    return "test" if "test" in known.splits else "validation"


def _candidates(known: Standard, folder: Path) -> Iterator[Path]:
    """Files that may belong to a task: in a folder of its name, or with its name in front."""
    names = tuple(name.lower() for name in known.folders)
    places = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    places = [folder] if folder.name.lower() in names else places
    inside = [
        path for place in places if place.name.lower() in names for path in sorted(place.rglob("*"))
    ]
    beside = [path for path in sorted(folder.iterdir()) if path.stem.lower().startswith(names)]
    for path in dict.fromkeys([*inside, *beside]):
        if path.is_file() and path.suffix.lower() in ENDINGS and known.word in path.stem.lower():
            yield path


def _split_of(path: Path, known: Standard) -> str | None:
    """The split that a file's name tells, as a word of it or, for training, in its beginning.

    It may be one that the task does not have; None where the name tells none.
    """
    words = re.findall("[a-z]+", path.stem.lower())
    for split in (*known.splits, "validation", "test"):
        if any(word in WORDS[split] for word in words):
            return split
    return "train" if any(word.startswith("train") for word in words) else None


# ------------------------------------------------------------------------- what the harness reads


def write(task: str, data_dir: str | Path, folder: Path) -> None:
    """Write the YAML files by which the harness runs a standard task from local files.

    ``folder`` can be given to lm-eval's own command line as ``--include_path``: the tasks in it
    have the harness's names. A group gets a file for each of its tasks.

    Raises:
        UserError: as `find_files`; rows of an unknown form; a group's task without rows.
    """
    known = STANDARD[task]
    read = {split: _rows(task, known, path) for split, path in find_files(task, data_dir).items()}
    for value, (member, file) in (known.members or {"": (task, known.yaml)}).items():
        own = {
            split: [converted for belongs, converted in rows if belongs == value]
            for split, (rows, _) in read.items()
        }
        own = {split: rows for split, rows in own.items() if rows}
        if not {"test", "validation"} & own.keys():
            raise UserError(
                f"task {task!r}: {data_dir} has no rows of {value!r}, which is one of its "
                f"{len(known.members)} parts"
            )
        files = {split: folder / f"{member}.{split}.jsonl" for split in own}
        for split, rows in own.items():
            files[split].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        config: dict[str, Any] = {
            "include": str(tasks_folder() / file),
            "task": member,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(path) for split, path in files.items()},
                "cache_dir": str(folder / "cache"),
            },
            "training_split": "train" if "train" in own else None,
            "validation_split": "validation" if "validation" in own else None,
            "test_split": "test" if "test" in own else None,
        }
        examples = "dev" if "dev" in known.splits else "train"
        if examples not in own:
            config["fewshot_split"] = None
        for split in own:
            config |= read[split][1]
        text = yaml.safe_dump(config, sort_keys=False)
        (folder / f"{member}.yaml").write_text(text, encoding="utf-8")


def _rows(
    task: str, known: Standard, path: Path
) -> tuple[list[tuple[str, dict[str, Any]]], Mapping[str, Any]]:
    """The rows of a file in the harness's fields, each with what it belongs to, and overrides."""
    rows: list[tuple[str, dict[str, Any]]] = []
    layout = None
    for place, row in read_rows(path):
        keys = row.keys() if isinstance(row, Mapping) else ()
        layout = layout or next((x for x in known.layouts if {*x.keys} <= {*keys}), None)
        if layout is None or not {*layout.keys} <= {*keys}:
            forms = " or ".join(", ".join(layout.keys) for layout in known.layouts)
            raise UserError(
                f"{path}, {place}: has the keys {', '.join(keys) or '(none)'}; task {task!r} needs "
                f"{forms}"
            )
        try:
            rows.append((known.belongs(row) if known.belongs else "", layout.convert(row)))
        except (KeyError, TypeError, ValueError) as problem:
            raise UserError(
                f"{path}, {place}: is not a row of {task!r} ({type(problem).__name__}: {problem})"
            ) from None
    if layout is None:
        raise UserError(f"{path} is empty; give at least one row")
    return rows, layout.overrides
