"""Files: whole or absent whoever writes beside, locks that end with their process, and YAML."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetless.core import files
from forgetless.core.errors import UserError
from forgetless.core.files import (
    _machine,
    folder_name,
    held_by,
    load_yaml,
    lock,
    new_file,
    new_folder,
    not_there,
    parse_yaml,
    read_json,
    read_jsonl,
    remove,
    remove_temporaries,
    temporary_name,
    write_json,
    write_jsonl,
)


@pytest.fixture(params=[True, False])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can exchange two names in one step."""
    if not request.param:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    return bool(request.param)


# ---- writing -------------------------------------------------------------------------------------


def test_json_that_says_something_else_than_what_was_written_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"x": 1.25, "y": ["é", None]}, checked=True)
    assert read_json(file) == {"x": 1.25, "y": ["é", None]}
    text = file.read_text()
    for old, new in (("1.25", "1.75"), ('"x"', '"z"'), ("null", "true")):
        file.write_text(text.replace(old, new))
        with pytest.raises(UserError, match="does not hold what was written"):
            read_json(file)
        assert read_json(file, damaged_as_missing=True) == {}
    file.write_text('{"x": 1.75}')  # of a former version
    assert read_json(file) == {"x": 1.75}


def test_every_bit_of_json_counts(tmp_path: Path) -> None:
    """Also those of the checksum and of its name; but for a bit that leaves the same values."""
    file = tmp_path / "a.json"
    write_json(file, {"x": 1.25, "xxh": "é", "list": [None, True, {"tasks": 3}]}, checked=True)
    content, values = file.read_bytes(), read_json(file)
    for place, bit in product(range(len(content)), range(8)):
        flipped = bytes([content[place] ^ 1 << bit])
        file.write_bytes(content[:place] + flipped + content[place + 1 :])
        try:
            found = read_json(file)
        except UserError:
            continue
        assert found == values


def test_json_is_read_back_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    content = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": "é"}, "e": (1, None)}
    write_json(tmp_path / "new" / "x.json", content)
    assert read_json(tmp_path / "new" / "x.json") == {
        "a": None,
        "b": [1.5, None],
        "c": {"d": "é"},
        "e": [1, None],
    }
    assert read_json(tmp_path / "absent.json") == {}


def test_lines_are_read_back(tmp_path: Path) -> None:
    rows = [{"id": "1", "answer": "two\nlines"}, {"id": "2", "answer": "\u2028"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "x.jsonl") == rows
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"old": 1})

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_json(file, {"new": 2})
    monkeypatch.undo()
    assert read_json(file) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_new_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with new_folder(tmp_path / "made") as folder:
            (folder / "below").mkdir()
            (folder / "below" / "file").write_text(content)
            assert not (tmp_path / "made").exists() or content == "two"
    assert (tmp_path / "made" / "below" / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_else_is_in_a_folder_stays_where_that_is_asked_for(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "checkpoint").mkdir(parents=True)
    for name in ("notes.txt", "checkpoint/weights", "stale.json", "file"):
        (made / name).write_text("old")
    with new_folder(made, keep=lambda name: name != "stale.json") as folder:
        (folder / "file").write_text("new")
    found = {str(f.relative_to(made)): f.read_text() for f in made.rglob("*") if f.is_file()}
    assert found == {"notes.txt": "old", "checkpoint/weights": "old", "file": "new"}


@pytest.mark.usefixtures("exchanges")
def test_whatever_had_the_name_is_replaced(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for before in ("nothing", "folder", "file", "link to a folder", "link to nothing"):
        remove(made)
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        if before == "folder":
            (made / "old").mkdir(parents=True)
        elif before == "file":
            made.write_text("old")
        elif before != "nothing":
            made.symlink_to(tmp_path / before.replace("link to a folder", "elsewhere"))
        with new_folder(made) as folder:
            (folder / "file").write_text(before)
        assert {file.name: file.read_text() for file in made.iterdir()} == {"file": before}
        assert made.is_symlink() == before.startswith("link")
        assert not list(tmp_path.glob(".tmp-*"))


def test_a_written_file_goes_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "x.json").symlink_to(tmp_path / "disk" / "y.json")
    write_json(tmp_path / "x.json", {"a": 1})
    assert read_json(tmp_path / "disk" / "y.json") == {"a": 1}
    assert (tmp_path / "x.json").is_symlink()


def test_a_folder_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    def write_half() -> None:
        with new_folder(tmp_path / "made") as folder:
            (folder / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from forgetless.core.files import new_folder\n"
        "with new_folder(Path(sys.argv[1]) / 'made') as folder:\n"
        "    (folder / 'file').write_text('half'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "made").exists()
    assert len(list(tmp_path.iterdir())) == 1
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writes", ["new_folder(path)", "new_file(path)", "_nested(path)"])
def test_the_next_writer_of_a_name_removes_it(tmp_path: Path, writes: str) -> None:
    code = (
        "import os, sys; from contextlib import contextmanager; from pathlib import Path\n"
        "from forgetless.core.files import new_file, new_folder\n"
        "@contextmanager\n"
        "def _nested(path):\n"
        "    with new_folder(path) as outer, new_folder(outer) as inner:\n"
        "        yield inner\n"
        "path = Path(sys.argv[1]) / 'made'\n"
        f"with {writes} as half:\n"
        "    (half / 'file' if half.is_dir() else half).write_text('half')\n"
        "    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]
    with new_folder(tmp_path / "others"):
        assert [path for path in tmp_path.iterdir() if path.name.endswith("-made")]
    with new_folder(tmp_path / "made"), new_folder(tmp_path / "made"):  # the first is at work
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "others"]


def test_what_another_machine_writes_is_left_alone(tmp_path: Path) -> None:
    gone, machine = 4_190_000, _machine()
    other = f"{(int(machine, 16) + 1) % 2**16:04x}"
    for where in (machine, other):
        (tmp_path / f".tmp-{where}{gone:06x}abcd-x.json").write_text("half")
    write_json(tmp_path / "x.json", {})
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f".tmp-{other}{gone:06x}abcd-x.json", "x.json"]


def test_only_leftovers_of_a_name_are_removed(tmp_path: Path) -> None:
    for name in ("study.yaml", "study.yaml.part", "my-study.yaml", "other"):
        (tmp_path / f".tmp-0123456789abcd-{name}").write_text("half")
    remove_temporaries(tmp_path, "study.yaml")
    left = sorted(path.name.partition("abcd-")[2] for path in tmp_path.iterdir())
    assert left == ["my-study.yaml", "other"]


def test_what_is_just_being_written_is_no_leftover(tmp_path: Path) -> None:
    with new_file(tmp_path / "study.yaml") as half, new_folder(tmp_path / "made") as folder:
        half.write_text("whole")
        remove_temporaries(tmp_path)
        assert folder.is_dir()
    assert (tmp_path / "study.yaml").read_text() == "whole"


# ---- two writers, and a reader beside them -------------------------------------------------------


def _replace(
    path: Path, writer: str, times: int, keep: Callable[[str], bool] = lambda name: False
) -> None:
    for number in range(times):
        with new_folder(path, keep) as folder:
            for name in ("a", "b"):
                (folder / name).write_text(f"{writer} {number}")
        write_json(path.with_name("file.json"), {"by": writer, "long": "x" * 20_000})


@pytest.mark.usefixtures("exchanges")
def test_two_writers_of_one_name_leave_one_whole_folder(tmp_path: Path) -> None:
    names = ["made", "made", "un-made", "un-made"]
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(_replace, tmp_path / n, str(i), 25) for i, n in enumerate(names)]:
            done.result()
    for name in ("made", "un-made"):
        contents = {(tmp_path / name / file).read_text() for file in ("a", "b")}
        assert len(contents) == 1
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "made", "un-made"]


def test_what_two_writers_keep_is_taken_over_whole(tmp_path: Path, exchanges: bool) -> None:
    made = tmp_path / "made"
    (made / "images").mkdir(parents=True)
    for name in map(str, range(20)):
        (made / name).write_text(name)
        (made / "images" / name).write_text(name)
    with ThreadPoolExecutor() as pool:
        arguments = [(made, writer, 25, lambda name: name not in "ab") for writer in "xyz"]
        for done in [pool.submit(_replace, *each) for each in arguments]:
            done.result()
    kept = {file.name: file.read_text() for file in made.iterdir() if file.name.isdigit()}
    assert (made / "a").read_text() == (made / "b").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "made"]
    if exchanges:  # else a writer may come between two renames, when nothing bears the name
        assert kept == {name: name for name in map(str, range(20))}
        assert len(list((made / "images").iterdir())) == 20


def test_no_two_writers_of_a_process_have_the_same_temporary_name(tmp_path: Path) -> None:
    assert len({temporary_name(tmp_path / "made") for _ in range(2000)}) == 2000


def test_a_folder_that_is_emptied_while_it_is_listed_is_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No link fails: what was missing in the list bears its name in the folder that came after."""
    made, listed = tmp_path / "made", os.listdir
    made.mkdir()
    for name in "abcd":
        (made / name).write_text(name)

    def emptied(folder: Path) -> list[str]:
        names = sorted(listed(folder))
        if folder == made and emptying:
            emptying.pop()
            with new_folder(made, lambda name: True):
                pass
            return names[:2]
        return names

    emptying = [True]
    monkeypatch.setattr(os, "listdir", emptied)
    with new_folder(made, lambda name: True) as folder:
        (folder / "e").write_text("e")
    assert sorted(listed(made)) == ["a", "b", "c", "d", "e"]


def test_a_reader_beside_two_writing_processes_always_finds_something_whole(
    tmp_path: Path,
) -> None:
    made = tmp_path / "made"
    _replace(made, "first", 1)
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    if not files._exchange(tmp_path / "x", tmp_path / "y"):
        pytest.skip("this file system cannot exchange two names")
    context = multiprocessing.get_context("forkserver")
    writers = [context.Process(target=_replace, args=(made, str(i), 30)) for i in range(2)]
    for writer in writers:
        writer.start()
    looks = 0
    while any(writer.is_alive() for writer in writers) or not looks:
        assert made.is_dir()
        assert len(read_json(tmp_path / "file.json")["long"]) == 20_000
        looks += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0


# ---- names and damage ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"),
    [("my run", "my-run"), ("../up", "up"), ("a/b", "a-b"), ("...", "unnamed"), ("v1.2", "v1.2")],
)
def test_a_name_becomes_one_folder(name: str, folder: str) -> None:
    assert folder_name(name) == folder


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1}}', b"[1]", b"null", b"\0\0\0", b"\xff\xfe{}", b"[" * 100_000]
)
@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_a_damaged_file_is_named_or_as_good_as_none(
    tmp_path: Path, read: Any, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)
    if read is read_jsonl and not content:
        assert read(file) == []
        return
    with pytest.raises(UserError, match=r"run.json is damaged .*: delete it and repeat"):
        read(file)
    assert not read(file, damaged_as_missing=True)
    assert "run.json is damaged" in caplog.text


# ---- locks ---------------------------------------------------------------------------------------


def _hold(path: Path, held: Any) -> None:
    with lock(path):
        held.set()
        time.sleep(60)


def test_a_lock_keeps_others_out_and_dies_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", held))
    holder.start()
    try:
        assert held.wait(120)
        with lock(tmp_path / "lock", wait=False) as free:
            assert not free
    finally:
        holder.kill()
        holder.join()
    with lock(tmp_path / "lock") as free:
        assert free
    with lock(tmp_path / "lock", wait=False) as free:
        assert free


def test_who_waits_is_told_for_whom(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("forkserver")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", held))
    holder.start()
    assert held.wait(120)
    threading.Thread(target=_kill_when, args=[holder, lambda: "waiting" in caplog.text]).start()
    with lock(tmp_path / "lock"):
        (said,) = caplog.messages
        assert f"lock, which process {holder.pid} on {platform.node()} holds since 20" in said
        assert f"process {os.getpid()} on" in held_by(tmp_path / "lock")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    holder.join()


def _kill_when(process: Any, is_time: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_time() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(UserError, match=r"\.lock is a link"), lock(tmp_path / ".lock"):
        pass
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_nothing_here_needs_fcntl() -> None:
    code = "import sys; sys.modules['fcntl'] = None; import forgetless.core.files"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- YAML ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        ("1.e2", 100.0),
        (".5", 0.5),
        ("1_000.5", 1000.5),
        ("-.inf", -math.inf),
        ("3", 3),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("5e", "5e"),
        ("'1e-5'", "1e-5"),
        ("true", True),
        ("null", None),
    ],
)
def test_numbers_are_read_as_people_mean_them(text: str, value: Any) -> None:
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_yaml(value: float) -> None:
    assert parse_yaml(repr(value)) == value


def test_a_key_given_twice_is_an_error() -> None:
    with pytest.raises(UserError, match=r"'steps' is given twice \(again in line 3\)"):
        parse_yaml("steps: 1\nseed: 2\nsteps: 3\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- a\n- b\n", "must hold keys and values"),
        (b"just words", "must hold keys and values"),
        (b"a: [1, 2\n", "not valid YAML: line 2"),
        (b"a: b: c\n", "not valid YAML: line 1"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_files_that_hold_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_yaml(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("? [a, b]\n: 1", "line 1: a key must be text, got a list"),
        ("x:\n  {[1]: 2}", "line 2: a key must be text, got a list"),
        ("{{a: 1}: 2}", "a key must be text, got keys and values"),
        ("null: 1", "got null; write 'null' with quotes"),
        ("a: {~: 1}", "got ~; write '~' with quotes"),
        ("yes: 1", "got yes; write 'yes' with quotes"),
        ("1: 2", "got 1; write '1' with quotes"),
        ("2024-01-01: 2", "got 2024-01-01"),
        ("? \n: 2", "a key must be text, got nothing"),
        ("a:\n\t- b", "line 2: .*indent with spaces"),
        ("a: &x [*x]", "line 1: an alias stands inside of what it names"),
        ("a: &x {b: *x}", "line 1: an alias stands inside of what it names"),
        ("a: *absent", "line 1: found undefined alias"),
        ("<<: 3", "line 1: expected a mapping"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ("a: !!int x", "invalid literal for int"),
        ("a: \0", "special characters are not allowed"),
        ("[" * 5000, "nested too deeply"),
        ("- " * 5000, "nested too deeply"),
        ("a: 1\n---\nb: 2", "another document"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_yaml_that_is_no_plain_data(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_yaml(text)


@pytest.mark.parametrize("level", ["[{0}]", "{{<<: [{0}]}}"])
def test_aliases_that_multiply_are_refused(level: str) -> None:
    lines = ["a0: &a0 {k: v}"]
    for number in range(1, 60):
        nine = ",".join([f"*a{number - 1}"] * 9)
        lines.append(f"a{number}: &a{number} {level.format(nine)}")
    with pytest.raises(UserError, match="more than 1,000,000 characters"):
        parse_yaml("\n".join(lines))


def test_anchors_and_merged_keys_mean_what_they_say() -> None:
    text = """
        base: &base {x: 1, y: 2}
        deep: [{k: &d {<<: *base, x: 3}}]
        last: {<<: *d, x: 4}
        again: *base
    """
    assert parse_yaml(text) == {
        "base": {"x": 1, "y": 2},
        "deep": [{"k": {"x": 3, "y": 2}}],
        "last": {"x": 4, "y": 2},
        "again": {"x": 1, "y": 2},
    }


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.yaml"):
        load_yaml(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_yaml(tmp_path)


def test_where_a_relative_file_was_looked_for_is_said(tmp_path: Path) -> None:
    assert not_there("gone.txt") == f"no such file: gone.txt (looked in {Path.cwd()})"
    assert not_there("a/gone.txt") == f"no such file: a/gone.txt (looked in {Path.cwd() / 'a'})"
    assert not_there(tmp_path / "gone.txt") == f"no such file: {tmp_path / 'gone.txt'}"


def test_a_lock_in_a_place_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file, not a folder"), lock(tmp_path / "file/x"):
        pass


def test_a_lock_that_is_there_needs_no_place_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder that its owner has closed to new files."""
    with lock(tmp_path / "there"):
        pass
    monkeypatch.setattr(os, "access", lambda *_: False)
    with lock(tmp_path / "there") as taken:
        assert taken
    with pytest.raises(UserError, match="may not be written to"), lock(tmp_path / "new"):
        pass
