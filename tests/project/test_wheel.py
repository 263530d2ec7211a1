"""The wheel that users install: nothing is missing in it, and it works without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest_plugins = ["tests.quick_python"]

ROOT = Path(__file__).parents[2]
CODE = """
import sys
sys.path.insert(0, {wheel!r})
import forgetless
assert forgetless.__file__.startswith({wheel!r}), forgetless.__file__
from forgetless.models.load import load_model, load_tokenizer
model, tokenizer = load_model("pocket"), load_tokenizer("pocket")
forgetless.attach(model, "pissa", rank=4)
from forgetless.cli import main
main(["methods"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--no-build-isolation", "-w", str(out), str(ROOT)], check=True)
    return next(out.glob("*.whl"))


def test_every_file_of_the_package_is_in_it(wheel: Path) -> None:
    source = ROOT / "src"
    files = (path for path in (source / "forgetless").rglob("*") if path.is_file())
    known = {str(f.relative_to(source)) for f in files if "__pycache__" not in f.parts}
    with zipfile.ZipFile(wheel) as archive:
        built = {name for name in archive.namelist() if name.startswith("forgetless/")}
    assert built == known


def test_it_runs_without_the_repository(wheel: Path, tmp_path: Path, python: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = CODE.format(wheel=str(tmp_path / "installed"))
    around = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=around, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "lora_null_v2" in done.stdout
