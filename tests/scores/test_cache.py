"""The same evaluation is never run twice, and one that was interrupted goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from torch import nn

from forgetless.cli.commands import measuring
from forgetless.cli.commands.measuring import Measurement, measure, write_scores
from forgetless.cli.values import task_specs
from forgetless.models.hashes import base_hash, weights_hash
from forgetless.models.load import load_model, load_tokenizer
from forgetless.scores.cache import ScoreCache, default_folder
from forgetless.studies.run import run
from forgetless.tasks import TaskResult, make_task
from forgetless.tasks.journal import in_batches, resuming
from tests.tiny import recipe_of, save_base

pytest_plugins = ["tests.tiny_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:task .* were cut off")  # after three tokens


@pytest.fixture
def specs(tiny_files: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """One task of each way to ask a model: generate, choose, read a text, compare with the base."""
    rows = [{"question": f"{a}", "choices": ["xz", "yyz"], "answer": a % 2} for a in range(6)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        {"kind": "generate", "path": str(path), "max_new_tokens": 3},
        {"kind": "multiple_choice", "path": str(path), "prompt": "{question}? Answer:"},
        {"kind": "perplexity", "path": str(tiny_files / "test.jsonl"), "limit": 6},
        {"kind": "kl", "path": str(tiny_files / "test.jsonl"), "limit": 6},
    ]


def without_time(result: TaskResult) -> TaskResult:
    return replace(result, seconds=0.0)


class Watched:
    """Counts what a model reads, and ends the process, so to say, in the middle."""

    def __init__(self, model: nn.Module) -> None:
        self.calls = 0
        self.stop_after: int | None = None
        layer: Any = cast(Any, model).model.layers[0]
        layer.register_forward_pre_hook(self._called)

    def _called(self, *_: Any) -> None:
        if self.stop_after is not None and self.calls >= self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1

    def reset(self, stop_after: int | None = None) -> None:
        """Count from 0 again, and stop before the next pass after so many."""
        self.calls, self.stop_after = 0, stop_after


# --------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("batches", [1, 2])
def test_finished_batches_are_not_computed_again(
    number: int, batches: int, specs: list[dict[str, Any]], tiny_base: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    task, watched = make_task(specs[number]), Watched(model)

    def evaluate() -> TaskResult:
        return without_time(task.evaluate(model, tokenizer, reference=model, batch_size=2))

    whole = evaluate()
    tried = task.name == "multiple_choice"  # whether answers may share their question
    passes = watched.calls - tried
    a_batch = passes // 3
    path = tmp_path / "partial.jsonl"
    watched.reset(stop_after=tried + batches * a_batch)
    with pytest.raises(KeyboardInterrupt), resuming(path, "this model"):
        evaluate()
    watched.reset()
    with resuming(path, "this model"):
        assert evaluate() == whole
    assert watched.calls == passes - batches * a_batch
    watched.reset()
    with resuming(path, "this model"):
        assert evaluate() == whole
    assert watched.calls == 0


def asked(kind: str, places: list[int], values: list[Any], texts: int = 1) -> list[Any]:
    """One batch of a pass over so many texts, whose values would be these."""
    found = in_batches(kind, ["text"] * texts, [places], lambda _: values)
    return [found[place] for place in places]


def test_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    with resuming(path, "k"):
        assert asked("a", [0, 1], [1.5, 2.5], texts=3) == [1.5, 2.5]
    path.write_text(path.read_text() + '{"batch": "x", "val')
    computed = []

    def compute(places: Sequence[int]) -> list[float]:
        computed.append(list(places))
        return [3.5 for _ in places]

    with resuming(path, "k"):
        assert in_batches("a", ["text"] * 3, [[0, 1], [2]], compute) == [1.5, 2.5, 3.5]
    assert computed == [[2]]
    with resuming(path, "k"):
        assert asked("a", [2], [0.0], texts=3) == [3.5]
    lines = path.read_text().splitlines()
    assert [json.loads(line).get("values") for line in lines] == [None, [1.5, 2.5], [3.5]]


@pytest.mark.parametrize(
    ("line", "damage"),
    [(0, b"\0\0\0"), (0, b"[]"), (1, b'{"batch": 3}'), (1, b"\xff\xfe"), (1, b"[1]"), (2, b"}")],
)
def test_what_is_damaged_of_a_partial_file_is_measured_again(
    tmp_path: Path, line: int, damage: bytes
) -> None:
    path = tmp_path / "partial.jsonl"
    with resuming(path, "k"):
        for place in (0, 1):
            asked("a", [place], [float(place)], texts=2)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:line], damage, *lines[line + 1 :]]))
    for _ in range(2):
        with resuming(path, "k"):
            found = [asked("a", [place], [float(place)], texts=2) for place in (0, 1)]
        assert found == [[0.0], [1.0]]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_damaged_score_is_measured_again(
    suffix: str, specs: list[dict[str, Any]], tiny_base: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    task, cache = make_task(specs[0]), ScoreCache(tmp_path)

    def found() -> TaskResult:
        return without_time(
            cache.result(task, "m", measure=lambda: task.evaluate(model, tokenizer))
        )

    whole = found()
    cache.paths(task, "m")[0].with_suffix(suffix).write_bytes(b'{"value": ')
    assert found() == whole == found()


def test_another_key_content_order_or_batch_is_another_measurement(tmp_path: Path) -> None:
    path = tmp_path / "partial.jsonl"
    with resuming(path, "k"):
        asked("a", [0], ["first"])
        asked("a", [0], ["second"])  # such as the same texts to another model
    with resuming(path, "k"):
        assert asked("b", [0], ["other"]) == ["other"]
        assert asked("a", [0], ["?"]) == ["second"]
    with resuming(path, "k"):
        assert asked("a", [0, 1], ["wider", "pair"], texts=2) == ["wider", "pair"]
    with resuming(path, "another"):
        assert asked("a", [0], ["new"]) == ["new"]


def test_without_a_file_nothing_is_kept() -> None:
    assert asked("a", [0], ["one"]) == ["one"]
    assert asked("a", [0], ["two"]) == ["two"]


# --------------------------------------------------------------------------------- measured before


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which models the command loads."""
    loaded: list[str] = []
    original: Callable[..., Any] = load_model

    def load(base: str, **settings: Any) -> Any:
        loaded.append(Path(base).name)
        return original(base, **settings)

    monkeypatch.setattr(measuring, "load_model", load)
    return loaded


def results(found: Measurement) -> list[TaskResult]:
    return [*found.base.values(), *(found.adapted or {}).values()]


def test_a_second_evaluation_loads_no_model(
    specs: list[dict[str, Any]], tiny_base: Path, tmp_path: Path, loads: list[str]
) -> None:
    first = measure(str(tiny_base), specs, cache=tmp_path / "cache")
    assert len(loads) == 1
    second = measure(str(tiny_base), specs, cache=tmp_path / "cache")
    assert len(loads) == 1
    assert results(second) == [replace(r, seconds=round(r.seconds, 3)) for r in results(first)]
    assert second.base["generate"].items
    named = [{**specs[0], "name": "other"}]
    assert measure(str(tiny_base), named, cache=tmp_path / "cache").base["other"].task == "other"


def test_scores_belong_to_the_content_of_base_adapter_and_task(
    specs: list[dict[str, Any]], tiny_base: Path, tiny_files: Path, tmp_path: Path, loads: list[str]
) -> None:
    adapter = run(recipe_of(tiny_base, tiny_files), tmp_path / "runs", evaluate=False).folder

    def again(base: Path = tiny_base, **settings: Any) -> int:
        """How many models one more evaluation loads."""
        before = len(loads)
        measure(str(base), specs[2:], cache=tmp_path / "cache", **settings)
        return len(loads) - before

    assert again(adapter=adapter) == 1
    assert again() == again(adapter=adapter) == again(adapter=adapter / "native") == 0
    assert again(adapter=adapter / "adapter") == 1
    assert again(dtype="float64") == 1
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "README.md").write_text("the same model")
    assert again(copy) == 0
    assert weights_hash(copy) == weights_hash(tiny_base)
    assert again(save_base(tmp_path / "other", seed=9)) == 1
    specs[2]["limit"] = 5
    assert again() == 1


def test_an_interrupted_command_goes_on(
    specs: list[dict[str, Any]], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, watched = tmp_path / "cache", []

    def load(base: str, **settings: Any) -> Any:
        model = load_model(base, **settings)
        watched.append(Watched(model))
        watched[-1].stop_after = 3 if len(watched) == 1 else None
        return model

    monkeypatch.setattr(measuring, "load_model", load)
    with pytest.raises(KeyboardInterrupt):
        measure(str(tiny_base), specs[1:3], batch_size=2, cache=cache)
    assert len(list(cache.glob("*.partial.jsonl"))) == 1
    found = measure(str(tiny_base), specs[1:3], batch_size=2, cache=cache)
    assert watched[1].calls == 4 + 3 - 3
    assert not list(cache.glob("*.partial.jsonl"))
    fresh = measure(str(tiny_base), specs[1:3], batch_size=2, cache=tmp_path / "fresh")
    assert [without_time(r) for r in results(found)] == [without_time(r) for r in results(fresh)]


def test_the_default_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "scores"
    monkeypatch.delenv("FORGETLESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "forgetless" / "scores"


def test_a_default_folder_that_cannot_be_written_stops_nothing(
    tiny_base: Path, tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "file"))
    specs = [{"kind": "perplexity", "path": str(tiny_files / "old.txt")}]
    with pytest.warns(
        UserWarning, match="file is a file, not a folder, so the scores are not kept"
    ):
        found = measure(str(tiny_base), specs)
    kept = measure(str(tiny_base), specs, cache=tmp_path / "cache")
    assert [without_time(r) for r in results(found)] == [without_time(r) for r in results(kept)]


def test_a_run_goes_on_in_the_middle_of_a_task(
    tiny_base: Path, tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forgetless.tasks import likelihood, logits

    recipe = recipe_of(tiny_base, tiny_files)
    whole = run(recipe, tmp_path / "whole").scores
    original, calls, stop_at = likelihood._row_losses, [0], [0]

    def counted(*arguments: Any) -> list[float]:
        calls[0] += 1
        if calls[0] == stop_at[0]:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(likelihood, "_row_losses", counted)
    monkeypatch.setitem(logits._TOKENS, "cpu", 64)
    run(recipe, tmp_path / "counted")
    total, (calls[0], stop_at[0]) = calls[0], (0, calls[0] - 2)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "runs")
    stop_at[0] = 0
    done = run(recipe, tmp_path / "runs")
    assert calls[0] == total + 1  # the pass that was stopped
    assert not list(tmp_path.rglob("*.partial.jsonl"))
    for row, expected in zip(done.scores, whole, strict=True):
        assert row["score"] == pytest.approx(expected["score"], abs=1e-6)


# --------------------------------------------------------------------------------- the file


def test_the_file_of_scores_has_value_error_and_number_of_each_metric(
    specs: list[dict[str, Any]], tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    adapter = run(recipe_of(tiny_base, tiny_files), tmp_path / "runs", evaluate=False).folder
    found = measure(str(tiny_base), specs[1:3], adapter=adapter, cache=tmp_path / "cache")
    write_scores(found, tmp_path / "scores.json")
    for name, scores in (("scores.json", found.adapted), ("scores.base.json", found.base)):
        written = json.loads((tmp_path / name).read_text())
        assert scores is not None
        assert list(written) == ["multiple_choice", "perplexity"]
        assert list(written["perplexity"]) == ["loss", "perplexity", "tokens"]
        assert written["multiple_choice"]["accuracy"] == {
            "value": scores["multiple_choice"].value,
            "stderr": scores["multiple_choice"].stderr,
            "n": 6,
        }
        assert written["perplexity"]["perplexity"]["stderr"] is None


def test_standard_tasks_from_local_files_by_the_command_line(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from forgetless.cli import main

    row = {"sentence": "The _ is here.", "option1": "cat", "option2": "dog", "answer": "1"}
    (tmp_path / "winogrande_val.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    line = ["eval", str(tiny_base), "--tasks", "winogrande", "--data-dir", str(tmp_path)]
    line += ["--limit", "2", "--batch-size", "1", "--cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as ended:
        main([*line, "--out", str(tmp_path / "scores.json")])
    assert ended.value.code == 0
    assert "winogrande" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["winogrande"]["acc,none"]["n"] == 2
    (record,) = (tmp_path / "cache").glob("winogrande-*.json")
    assert json.loads(record.read_text())["settings"]["version"] == 1.0
    assert ScoreCache(tmp_path / "cache").has(
        make_task(task_specs("winogrande", data_dir=str(tmp_path), limit=2)[0]),
        *(base_hash(str(tiny_base)), "auto"),
    )
