"""What docs/trainers.md shows is taken from the examples, or runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from peft import PeftModel

from forgetless.cli import main
from forgetless.models.load import load_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
EXAMPLES = [file.read_text(encoding="utf-8") for file in (ROOT / "examples").glob("*.py")]


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return found


@pytest.mark.parametrize("block", blocks("python"))
def test_python_is_copied_from_an_example(block: str) -> None:
    assert any(block in example for example in EXAMPLES)


def test_every_block_is_of_a_tested_kind() -> None:
    assert PAGE.count("```") == 2 * sum(len(blocks(kind)) for kind in ("python", "bash", "yaml"))
    assert all(isinstance(yaml.safe_load(block), dict) for block in blocks("yaml"))


@pytest.mark.filterwarnings("ignore:.*saw fewer tokens")
def test_the_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.txt").write_text("The capital of France is Paris. Iron has the symbol Fe.\n" * 4)
    begin, bring = (block.strip().splitlines() for block in blocks("bash"))

    def run(line: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(line.removeprefix("forgetless ").split())
        assert ended.value.code == 0, line
        return capsys.readouterr().out

    assert [run(line) for line in begin] == [
        "start: a plain LoRA that any PEFT-based trainer can continue\n"
    ]
    start = PeftModel.from_pretrained(load_model("pocket"), "start", is_trainable=True)
    for name, weight in start.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02)
    start.save_pretrained("trained")
    measured, exported = map(run, bring)
    assert "pocket_recall" in measured
    assert "small: rank 2, relative error 0." in exported


def test_the_methods_that_a_folder_can_hold_are_named() -> None:
    """Those whose export has their own rank (they start at zero) and that train both factors."""
    row = next(line for line in PAGE.splitlines() if "forgetless init` before" in line)
    table = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in table if line.startswith("| `")]
    fitting = [cell[1].strip("`") for cell in cells if cell[5] == "A, B" and cell[7] == "r"]
    assert re.findall(r"`(\w+)`", row.split("|")[-2]) == fitting


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", PAGE))))
def test_every_link_leads_to_a_file(target: str) -> None:
    assert (ROOT / "docs" / target).is_file()
