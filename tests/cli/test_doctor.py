"""What is missing is named with the way to get it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from forgetless.cli import doctor, main


def asked(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    return int(ended.value.code or 0)


def test_a_whole_installation_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == []
    assert {"torch", "transformers", "peft"} <= set(found["packages"])
    assert found["optional"]["train"] == []
    assert "cpu" in found["devices"][-1]
    assert found["sandbox"]
    assert asked() == 0
    assert "optional part" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"peft": None}, "peft is missing"),
        ({"transformers": "4.40.0"}, "transformers is 4.40.0, wanted >=5.23"),
    ],
)
def test_what_is_missing_or_old_is_named(
    versions: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = doctor._installed
    monkeypatch.setattr(
        doctor, "_installed", lambda r: versions[r.name] if r.name in versions else real(r)
    )
    assert asked("--json") == 1
    assert said in json.loads(capsys.readouterr().out)["missing"]


def test_an_optional_part_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda r: None if r.name == "lm-eval" else real(r))
    monkeypatch.setenv("COLUMNS", "200")
    assert asked() == 0
    assert "lm-eval is missing; pip install 'forgetless[eval]'" in capsys.readouterr().out
