"""Bars of long work: one at a time, on a terminal, where somebody asked for them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from rich.console import Console

from forgetless.adapters.attachment import attach
from forgetless.core import progress
from forgetless.core.progress import Bar, counted
from forgetless.models.load import load_model, load_tokenizer
from forgetless.statistics.collection import collect
from forgetless.tasks.evaluation import evaluate

pytest_plugins = ["tests.tiny_fixtures"]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a terminal of 100 columns is sent."""
    sent = io.StringIO()
    console = Console(file=sent, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda file: console)
    monkeypatch.setattr(progress, "_console", None)
    yield sent
    progress.clear()


def test_a_bar_shows_how_many_are_done_the_rate_and_what_is_noted(screen: io.StringIO) -> None:
    shown = Bar("training", total=8, unit="steps", done=2, unasked=True)
    for _ in range(5):
        shown.advance(note="loss 0.5")
    shown.end()
    assert "training" in screen.getvalue()
    assert "7/8" in screen.getvalue()
    assert " steps/s" in screen.getvalue()
    assert "loss 0.5" in screen.getvalue()


def test_nothing_is_drawn_unasked(screen: io.StringIO) -> None:
    assert list(counted([1, 2], "work", "items")) == [1, 2]
    assert screen.getvalue() == ""


def test_nothing_is_drawn_on_anything_but_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted([1, 2], "work", "items")) == [1, 2]
    Bar("work", 1, unasked=True).advance()
    assert capsys.readouterr() == ("", "")


def test_work_inside_other_work_draws_nothing(screen: io.StringIO) -> None:
    progress.draw()
    for _ in counted(iter([1]), "outer", "items"):
        assert list(counted([1, 2], "inner", "items")) == [1, 2]
    assert list(counted([1, 2], "later", "items")) == [1, 2]
    assert "outer" in screen.getvalue()
    assert "inner" not in screen.getvalue()
    assert "2/2" in screen.getvalue()


def test_a_bar_is_seen_and_what_is_redirected_stays_there(screen: io.StringIO) -> None:
    """Libraries that print too much are redirected; the work inside is still counted."""
    progress.draw()
    kept = io.StringIO(), io.StringIO()
    with redirect_stdout(kept[0]), redirect_stderr(kept[1]):
        for _ in counted([1, 2], "inside", "items"):
            print("to output")
            print("to error", file=sys.stderr)
    assert [text.getvalue() for text in kept] == ["to output\n" * 2, "to error\n" * 2]
    assert "inside" in screen.getvalue()
    assert "to " not in screen.getvalue()


def test_work_that_fails_or_is_left_takes_its_bar_along(screen: io.StringIO) -> None:
    progress.draw()

    def fail() -> None:
        for _ in counted([1, 2], "failing", "items"):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    Bar("stopped", 5).advance()
    progress.clear()
    assert list(counted([1], "after", "items")) == [1]
    assert "after" in screen.getvalue()


def test_statistics_decompositions_and_evaluations_are_counted(
    tiny_base: Path, tiny_files: Path, screen: io.StringIO
) -> None:
    progress.draw()
    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    ids = tokenizer(["some old text", "and another"], return_tensors="pt", padding=True)
    stats = collect(model, [dict(ids)] * 3)
    adapted = attach(model, "lora_null_v1", rank=2, alpha=2, stats=stats)
    texts = {"kind": "perplexity", "path": str(tiny_files / "test.jsonl")}
    evaluate(adapted, [texts], tokenizer)
    shown = screen.getvalue()
    for work in ("statistics", "decomposing", "evaluation"):
        assert work in shown
    assert "3/3" in shown
    assert "14/14" in shown
    assert "24/24" in shown


# ---- without a terminal --------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error that is no terminal, where work is shown."""
    sent = io.StringIO()
    monkeypatch.setattr(progress, "_console", Console(file=sent))
    return sent


def test_a_plain_line_is_written_every_so_often(
    monkeypatch: pytest.MonkeyPatch, log: io.StringIO
) -> None:
    clock = [0.0]
    monkeypatch.setattr("forgetless.core.progress.time.monotonic", lambda: clock[0])
    for number in counted(range(300), "evaluation", "texts"):
        assert list(counted([1, 2], "inner", "items")) == [1, 2]
        clock[0] = number + 1.0
    left = {
        n: f"{300 - n} s" if n > 200 else f"{(300 - n) / 60:.0f} min" for n in range(30, 300, 30)
    }
    expected = [f"evaluation: {n} of 300 texts, 1.0 texts/s, {left[n]} left" for n in left]
    assert log.getvalue().splitlines() == [*expected, "evaluation: 300 of 300 texts, 1.0 texts/s"]
    assert progress._current is None


def test_a_plain_line_has_what_was_noted_last(
    monkeypatch: pytest.MonkeyPatch, log: io.StringIO
) -> None:
    clock = [0.0]
    monkeypatch.setattr("forgetless.core.progress.time.monotonic", lambda: clock[0])
    shown = Bar("training", 400, "steps", done=100)
    for step in range(60):
        clock[0] += 0.75
        shown.advance()
        if step == 4:
            shown.advance(0, "loss 0.5")
    shown.end()
    (line,) = log.getvalue().splitlines()
    assert line == "training: 140 of 400 steps, 1.3 steps/s, loss 0.5, 3 min left"


def test_no_plain_line_of_short_work_or_unasked(
    monkeypatch: pytest.MonkeyPatch, log: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(counted([1, 2], "work", "items")) == [1, 2]
    assert log.getvalue() == ""
    monkeypatch.setattr(progress, "_A_WHILE", 0.0)
    monkeypatch.setattr(progress, "_console", None)
    Bar("training", total=3, unit="steps", unasked=True).advance(3)
    assert capsys.readouterr() == ("", "")
