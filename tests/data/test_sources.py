"""What a source may be called: columns by other names, data sets of the hub, parts by content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.errors import UserError
from forgetless.core.settings import validated
from forgetless.data.examples import load_examples, source_hash
from forgetless.data.settings import DataSettings
from forgetless.data.sources import Source, read_rows
from forgetless.data.texts import fingerprint, read_examples
from forgetless.tasks import make_task

ROWS = [{"q": f"{i} + 1 =", "a": str(i + 1), "note": "easy"} for i in range(40)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    else:
        datasets = pytest.importorskip("datasets")
        made = datasets.Dataset.from_list(rows)
        made.to_parquet(path) if path.suffix else made.save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["new.jsonl", "new.csv", "new.parquet", "folder"])
def test_columns_of_other_names_are_read_from_every_format(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, ROWS)
    settings = DataSettings(train=str(path), columns={"prompt": "q", "completion": "a"})
    ((source, _),) = settings.sources
    found = load_examples(source, **settings.reading)
    wanted = [{"prompt": row["q"], "completion": row["a"]} for row in ROWS]
    assert list(found) == wanted
    # Read as text to keep, it is the same; what it holds decides what it is, and no name does.
    same = write(tmp_path / "same.jsonl", wanted)
    assert fingerprint(source) == read_examples(same).fingerprint
    assert source_hash(source, fingerprint) == fingerprint(str(same))


def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path / "new.jsonl", [*ROWS[:2], {"q": "3"}, {"question": "4"}])
    with pytest.raises(UserError, match=r"2 bad rows: line 3: has no column 'a'; .* are 'q'"):
        load_examples(f"{path}#prompt=q,completion=a")
    with pytest.raises(UserError, match=r"no column 'query'; its columns are 'q', 'a', 'note'"):
        load_examples(f"{write(path, ROWS[:1])}#prompt=query,completion=a")


def test_columns_are_those_of_the_new_task_alone(tmp_path: Path) -> None:
    columns = {"prompt": "the question, as asked", "completion": "a=b"}
    parts = [{"path": "new.csv", "weight": 3}, {"path": "old.csv#text=body", "weight": 1}]
    settings = DataSettings(train=parts, columns=columns)
    (first, _), (old, share) = settings.sources
    assert Source.of(first) == Source("new.csv", columns=columns)
    assert (old, share) == ("old.csv#text=body", 1.0)
    assert DataSettings(train="new.csv").sources == [("new.csv", 1.0)]


def test_a_task_asks_the_columns_by_these_names(tmp_path: Path) -> None:
    path = write(tmp_path / "asked.csv", ROWS)
    asked = {"kind": "generate", "path": f"{path}#question=q,answer=a", "name": "sums"}
    other = {"kind": "generate", "path": str(path), "question": "q", "answer": "a", "name": "sums"}
    assert make_task(asked).fingerprint == make_task(other).fingerprint
    text = {"kind": "perplexity", "path": f"{path}#prompt=q,completion=a"}
    assert len(make_task(text).examples) == len(ROWS)  # type: ignore[attr-defined]
    (tmp_path / "own.yaml").write_text("kind: generate\npath: asked.csv#question=q,answer=a\n")
    assert make_task(str(tmp_path / "own.yaml")).content() == make_task(asked).content()
    with pytest.raises(UserError, match="no such file"):
        make_task({**asked, "path": f"{path}x#question=q,answer=a"})


def test_images_and_classes_of_other_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    pictures = [Image.new("RGB", (2, 2), (10 * i, 0, 0)) for i in range(4)]
    made = datasets.Dataset.from_dict({"photo": pictures, "kind": ["a", "b", "a", "b"]})
    made = made.cast_column("photo", datasets.Image())
    made.save_to_disk(tmp_path / "folder")
    found = load_examples(f"{tmp_path / 'folder'}#image=photo,label=kind")
    assert [record["label"] for record in found] == ["a", "b", "a", "b"]
    found.require_whole()
    only = load_examples(f"{tmp_path / 'folder'}#b,image=photo,label=kind")
    assert [record["label"] for record in only] == ["b", "b"]


def test_a_data_set_of_the_hub_by_id_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*given: Any, **options: Any) -> Any:
        asked.append((*given, options["split"]))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_examples("hub:openai/gsm8k:main:test[:50]#prompt=q,completion=a")
    assert len(found) == len(ROWS)
    assert [*read_rows("hub:gsm8k", limit=1)] == [("row 1", ROWS[0])]
    assert asked == [("openai/gsm8k", "main", "test[:50]"), ("gsm8k", None, "train")]
    name = "hub:openai/gsm8k::test#text=q"
    assert source_hash(name, fingerprint) == fingerprint(name)
    task = make_task({"kind": "perplexity", "path": name, "limit": 3})
    assert len(task.examples) == 3  # type: ignore[attr-defined]


def test_what_the_hub_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*given: Any, **options: Any) -> Any:
        raise ValueError("Config name is missing.\nPick one of ['main', 'socratic']\nExample: ...")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"gsm8k could not .* Pick one of \['main', 'socratic'\]\)"):
        load_examples("hub:gsm8k")


def test_a_folder_of_files_is_read_as_the_hub_reads_one(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "data.parquet", ROWS)
    assert len([*read_rows(f"hub:{tmp_path}::train[:10]")]) == 10


def test_names_that_have_a_hash_are_names(tmp_path: Path) -> None:
    folder = tmp_path / "c#4"
    folder.mkdir()
    path = write(folder / "new.jsonl", [{"text": "one"}])
    assert len(load_examples(path)) == 1
    assert [*load_examples(f"{path}#text=text")] == [{"text": "one"}]


def test_columns_must_name_columns() -> None:
    with pytest.raises(UserError, match=r"columns\.prompt: must be text, got 1"):
        validated(DataSettings, {"train": "a.csv", "columns": {"prompt": 1}}, "data")
