"""Every damaged file ends in a line that says which one and why; see `tests.fuzzing`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzzing import KINDS, Inputs, say

FOUND_WRONG_ONCE = {
    "base": [12, 44, 68, 84, 292, 572],
    "adapter": [13, 21, 29, 69, 125, 133],
    "stats": [162],
    "scores": [79],
    "sequence": [5274],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_or_named(inputs: Inputs, kind: str) -> None:
    outcomes = [inputs.case(kind, seed) for seed in (*range(5), *FOUND_WRONG_ONCE.get(kind, ()))]
    assert [(each.fault, each.seed, each.said) for each in outcomes if each.fault] == []
    assert any(each.code == 2 for each in outcomes)  # some of them are damaged beyond reading


def test_what_is_whole_is_read(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mutated_yaml", "mutated_json", "mutated_jsonl", "mutated_safetensors"):
        monkeypatch.setattr(f"tests.fuzzing.{name}", lambda draw, content: content)
    monkeypatch.setattr("tests.fuzzing.mutated_bytes", lambda draw, content: content)
    found = {kind: inputs.case(kind, 0) for kind in KINDS}
    assert {kind: each.code for kind, each in found.items() if each.code} == {}
    assert "no problems" in found["recipe"].said


def test_a_damaged_file_is_named(inputs: Inputs, tmp_path: Path) -> None:
    for damaged in ("config.json", "model.safetensors", "tokenizer.json"):
        base = tmp_path / damaged
        for file in inputs.base.iterdir():
            (base / file.name).parent.mkdir(exist_ok=True)
            content = file.read_bytes()
            (base / file.name).write_bytes(content[:40] if file.name == damaged else content)
        tasks = f"perplexity:{inputs.files / 'test.jsonl'}"
        outcome = say(["eval", str(base), "--tasks", tasks, "--limit", "2"], "base", 0)
        assert (outcome.code, outcome.fault) == (2, None)
        assert str(base) in outcome.said
