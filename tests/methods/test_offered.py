"""Methods of other packages: an entry point of theirs, or a `Method` handed over as it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import load, save
from forgetless.core.method import Factors, Method
from forgetless.methods import METHODS, decompose, find
from tests.families import FAMILIES

pytest_plugins = ["tests.quick_python"]

PACKAGE = """
from forgetless import Factors, Method

def ones(W, rank, scaling, *, size=1.0):
    return Factors(A=W.new_full((rank, W.shape[1]), size), B=W.new_full((W.shape[0], rank), 0.1))

ONES = Method("ones", "A and B of ones", "—", ("A", "B"), ones)
LORA = Method("lora", "another", "—", ("A", "B"), ones)
NUMBER = 3
"""
ENTRY_POINTS = """
[forgetless.methods]
ones = their_package:ONES
lora = their_package:LORA
twos = their_package:ONES
number = their_package:NUMBER
missing = their_package:MISSING
"""
SHOW = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import forgetless as fl
    names = list(fl.METHODS)
print(names[-1], fl.METHODS["lora"].paper[:2], fl.METHODS["ones"].options)
for warning in caught:
    if "entry point" in str(warning.message):
        print(warning.message)
"""


def test_an_entry_point_is_found_and_a_wrong_one_is_left_out(tmp_path: Path, python: str) -> None:
    (tmp_path / "their_package.py").write_text(PACKAGE)
    installed = tmp_path / "their_package-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n"
    )
    (installed / "entry_points.txt").write_text(ENTRY_POINTS)
    told = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {SHOW}"
    done = subprocess.run(
        [python, "-c", told.replace("; \n", "\n")],
        capture_output=True,
        text=True,
        check=True,
    )
    first, *warned = done.stdout.splitlines()
    assert first == "ones Hu {'size': 1.0}"
    assert [line.split("'")[3] for line in warned] == ["lora", "twos", "number", "missing"]
    for line, fault in zip(
        warned,
        ("there is a method of this name", "calls itself 'ones'", "it is a int", "AttributeError"),
        strict=True,
    ):
        assert fault in line


def ones(W: torch.Tensor, rank: int, scaling: float, *, size: float = 1.0) -> Factors:
    return Factors(A=W.new_full((rank, W.shape[1]), size), B=W.new_full((W.shape[0], rank), 0.1))


def test_a_method_of_ones_own_is_attached_saved_and_loaded(tmp_path: Path) -> None:
    own = Method("ones", "A and B of ones", "—", ("A", "B"), ones)
    assert find(own) is own
    assert "ones" not in METHODS
    model = attach(FAMILIES["llama"].model(), own, rank=2, target_modules=["q_proj"], size=2.0)
    start = decompose(torch.zeros(4, 3), 2, own, size=2.0)
    assert torch.equal(start.A, torch.full((2, 3), 2.0))
    again = load(FAMILIES["llama"].model(), save(model, tmp_path), trainable=True)
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert again.peft_config["default"].start["method"] == "ones"
