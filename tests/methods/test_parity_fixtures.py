"""The same numbers as the authors' code, from its stored outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from forgetless.methods import decompose

MODES = {"null": "lora_null_v1", "milora": "milora", "pissa": "pissa"}


@pytest.fixture(scope="module")
def outputs(shared_folder: Path) -> dict[str, Tensor]:
    file = shared_folder / "fixtures" / "official_decompositions.safetensors"
    if not file.is_file():
        pytest.skip(f"needs the reference outputs {file}, which are not part of the repository")
    return load_file(file)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def stored(outputs: dict[str, Tensor], case: str, mode: str) -> dict[str, Tensor]:
    prefix = f"{case}.{mode}."
    return {
        key.removeprefix(prefix): value for key, value in outputs.items() if key.startswith(prefix)
    }


def projection(N: Tensor) -> Tensor:
    """Onto the rows of N, which are orthonormal."""
    return N.mT @ N


def spread_of_the_tail(outputs: dict[str, Tensor], case: str) -> float:
    """How far the authors' own line, on this processor, ends from what they stored.

    float32 does not separate the last directions of a second moment: 0 where its decomposition
    rounds as theirs did, and up to a hundredth elsewhere.
    """
    theirs = stored(outputs, case, "null_zero")
    U = torch.linalg.svd(theirs["cov"]).U
    return relative(projection(U[:, -len(theirs["lora_A"]) :].mT), projection(theirs["lora_A"]))


@pytest.mark.parametrize("case", ["a", "b", "c"])
@pytest.mark.parametrize("mode", MODES)
def test_the_factors_match(outputs: dict[str, Tensor], case: str, mode: str) -> None:
    theirs = stored(outputs, case, mode)
    rank = len(theirs["lora_A"])
    ours = decompose(theirs["W"], rank, MODES[mode], second_moment=theirs["cov"])
    spread = spread_of_the_tail(outputs, case) if mode == "null" else 0.0
    assert relative(ours.start, theirs["lora_B"] @ theirs["lora_A"]) < 1e-4 + 2 * spread
    assert relative(ours.residual, theirs["residual"]) < 1e-4 + 2 * spread
    # One term at a time, whatever its sign.
    our_terms = torch.einsum("or,ri->roi", ours.B, ours.A)
    their_terms = torch.einsum("or,ri->roi", theirs["lora_B"], theirs["lora_A"])
    for our_term, their_term in zip(our_terms, their_terms, strict=True):
        assert relative(our_term, their_term) < 1e-3 + 10 * spread


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_null_zero_spans_the_same_space(outputs: dict[str, Tensor], case: str) -> None:
    theirs = stored(outputs, case, "null_zero")
    A = theirs["lora_A"]
    ours = decompose(theirs["W"], len(A), "lora_null_zero", second_moment=theirs["cov"])
    assert relative(projection(ours.A), projection(A)) < 1e-4 + 2 * spread_of_the_tail(
        outputs, case
    )
    assert not ours.B.any()
    assert not theirs["lora_B"].any()
    assert torch.equal(ours.residual, theirs["residual"])


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_float64_leaks_no_more_than_the_authors(outputs: dict[str, Tensor], case: str) -> None:
    """In float64 the tail differs where their float32 cannot separate it, and is the better one."""
    theirs = stored(outputs, case, "null_zero")
    X, A = theirs["X"].double(), theirs["lora_A"]
    C = X.mT @ X / len(X)
    ours = decompose(theirs["W"].double(), len(A), "lora_null_zero", second_moment=C)
    best = torch.linalg.svdvals(X)[-len(A) :].norm()
    torch.testing.assert_close((X @ ours.A.mT).norm(), best)
    assert (X @ ours.A.mT).norm() <= (X @ A.double().mT).norm()


@pytest.mark.parametrize("case", ["a", "b", "c"])
@pytest.mark.parametrize("name", ["corda_kpm", "corda_ipm"])
def test_corda_matches_within_their_inverse(
    outputs: dict[str, Tensor], case: str, name: str
) -> None:
    """They invert in float32 a matrix with a condition number of 700; we solve in float64."""
    theirs = stored(outputs, case, name)
    rank = len(theirs["lora_A"])
    ours = decompose(theirs["W"], rank, name, second_moment=theirs["cov"])
    assert relative(ours.start, theirs["lora_B"] @ theirs["lora_A"]) < 5e-4
    assert relative(ours.residual, theirs["residual"]) < 5e-4
