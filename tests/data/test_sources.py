"""What a source may be called: columns by other names, data sets of the hub, parts by content."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from forgetless.cli.values import task_specs
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


def test_a_command_line_names_tasks_with_columns_and_parts() -> None:
    path = "new.csv#prompt=q,completion=a"
    specs = task_specs(f"pocket_recall,perplexity:{path},kl:{path},perplexity:{path},held=0.1,piqa")
    assert [spec.get("path") for spec in specs] == [None, path, path, f"{path},held=0.1", None]
    names = ["perplexity_new", "kl_new", "perplexity_new_held"]
    assert [spec["name"] for spec in specs[1:4]] == names


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


# ---- two parts by content ------------------------------------------------------------------------


def texts(source: str) -> list[str]:
    return [json.dumps(row, sort_keys=True) for row in load_examples(source)]


def test_the_same_rows_are_held_out_whatever_their_order_format_and_number(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1 =", "completion": str(i + 1)} for i in range(300)]
    plain = write(tmp_path / "new.jsonl", rows)
    held, rest = texts(f"{plain}#held=0.2"), texts(f"{plain}#rest=0.2")
    assert sorted(held + rest) == sorted(texts(str(plain)))
    assert 0.1 < len(held) / len(rows) < 0.3
    # Twice each, in another order, in another format, by other names, with what is no content.
    twice = [{"q": r["prompt"], "a": r["completion"], "id": str(i)} for i, r in enumerate(rows * 2)]
    random.Random(0).shuffle(twice)
    other = write(tmp_path / "other.csv", twice)
    names = "prompt=q,completion=a"
    assert sorted(texts(f"{other}#{names},held=0.2")) == sorted(held * 2)
    ids = [{**row, "id": i} for i, row in enumerate(rows)]
    assert texts(f"{write(tmp_path / 'ids.jsonl', ids)}#held=0.2") == held
    # Rows that come later leave those that were there where they were; so does a larger share.
    fewer = write(tmp_path / "fewer.jsonl", rows[:150])
    assert texts(f"{fewer}#held=0.2") == [text for text in held if text in texts(str(fewer))]
    assert set(held) < set(texts(f"{plain}#held=0.5"))
    assert texts(f"{plain}#held=0.2")[:3] == [json.dumps(r, sort_keys=True) for r in three(plain)]


def three(path: Path) -> list[Any]:
    return list(load_examples(f"{path}#held=0.2", limit=3))


def test_images_are_held_out_by_their_pixels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    shades = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(40)]
    both = {"image": [*shades, *shades], "label": ["a", "b"] * 40}
    made = datasets.Dataset.from_dict(both).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "folder")
    found = load_examples(f"{tmp_path / 'folder'}#held=0.3")
    numbers = {int(record["image"].rpartition(" ")[2]) for record in found}
    assert {number % 40 for number in numbers} == {n % 40 for n in numbers if n <= 40}
    assert 5 < len(numbers) < 40


def load_rows(source: str) -> int:
    try:
        return len(load_examples(source))
    except UserError:
        return 0


def test_a_share_that_leaves_nothing_or_is_none_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", [{"text": "alone"}])
    part = "rest" if load_rows(f"{path}#held=0.999999") else "held"
    with pytest.raises(UserError, match=f"of its 1 rows, none is in the part {part}=0.999999"):
        load_examples(f"{path}#{part}=0.999999")
    for share in ("0", "1.5", "x"):
        with pytest.raises(UserError, match=f"between 0 and 1, got {share}"):
            load_examples(f"{path}#held={share}")
    with pytest.raises(UserError, match="names a part of itself"):
        validated(DataSettings, {"train": f"{path}#rest=0.1", "validation": 0.1}, "data")


def test_a_task_asks_what_training_did_not_see(tmp_path: Path) -> None:
    path = write(tmp_path / "new.jsonl", ROWS)
    settings = DataSettings(
        train=str(path), columns={"prompt": "q", "completion": "a"}, validation=0.3
    )
    seen = {row["prompt"] for row in load_examples(settings.sources[0][0])}
    own = {"kind": "generate", "path": settings.held_out, "question": "prompt", "name": "sums"}
    asked = make_task({**own, "answer": "completion", "prompt": "{question}"})
    prompts = {item.prompt for item in asked.questions()}  # type: ignore[attr-defined]
    assert prompts | seen == {row["q"] for row in ROWS}
    assert not prompts & seen
