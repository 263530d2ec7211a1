"""Nothing is decomposed twice, and what is kept is what was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forgetless.adapters.attachment import attach
from forgetless.core import krylov as subspace
from forgetless.core import linalg
from forgetless.core.cache import cached_spectra, content_key, once, shared_inputs
from forgetless.core.files import write_json
from forgetless.methods import METHODS, decompose
from forgetless.statistics.moments import LayerStatistics, Statistics
from forgetless.studies.folder import RunFolder
from forgetless.studies.stages import Stages

GENERATOR = torch.Generator().manual_seed(0)
W = torch.randn(24, 16, generator=GENERATOR)

SLICES: list[tuple[str, dict[str, Any]]] = [
    ("pissa", {}),
    ("milora", {}),
    ("intermediate", {"position": 0.3}),
    ("intermediate", {"energy": 0.5}),
    ("random_slice", {"seed": 1}),
    ("mica", {}),
]


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """The arguments of every call of a function of `linalg` from now on."""
    calls: list[Any] = []
    function: Callable[..., Any] = getattr(linalg, name)

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(linalg, name, call)
    return calls


@pytest.mark.parametrize("weight", [W, W.mT.contiguous(), W.double(), W.bfloat16()])
@pytest.mark.parametrize(("method", "options"), SLICES)
def test_a_cached_slice_is_the_fresh_one(
    tmp_path: Path, weight: Tensor, method: str, options: dict[str, Any]
) -> None:
    """Bit for bit, so that a run starts alike alone and in a study."""
    fresh = decompose(weight, 3, method, 2.0, **options)
    with cached_spectra(tmp_path):
        first = decompose(weight, 3, method, 2.0, **options)
    with cached_spectra(tmp_path):
        again = decompose(weight, 3, method, 2.0, **options)
    with cached_spectra(whole=True):
        of_all = decompose(weight, 3, method, 2.0, **options)
    for cached in (first, again):
        assert torch.equal(cached.A, fresh.A)
        assert torch.equal(cached.B, fresh.B)
    torch.testing.assert_close(of_all.A, fresh.A)
    torch.testing.assert_close(of_all.B, fresh.B)


def test_a_weight_is_decomposed_once_for_all_methods_ranks_and_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = counted(monkeypatch, "oriented_svd")
    with cached_spectra(whole=True):
        for rank in (1, 2, 8):
            for method, options in SLICES:
                decompose(W.clone(), rank, method, **options)
        assert len(calls) == 1
        decompose(W + 1, 2, "pissa")
        assert len(calls) == 2


def test_a_folder_serves_other_times_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = counted(monkeypatch, "gram_spectrum")
    with cached_spectra(tmp_path / "spectra"):
        first = decompose(W, 3, "milora")
    with cached_spectra(tmp_path / "spectra"):
        again = decompose(W, 3, "milora")
    assert len(calls) == 1
    assert torch.equal(again.A, first.A)
    assert torch.equal(again.B, first.B)
    (file,) = (tmp_path / "spectra").iterdir()
    assert file.suffix == ".safetensors"


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    with cached_spectra(tmp_path):
        first = decompose(W, 3, "milora")
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:100])
        again = decompose(W, 3, "milora")
        assert file.stat().st_size > 100
    assert torch.equal(again.A, first.A)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, "gram_spectrum")
    with cached_spectra(most_bytes=(24 + 16 + 1) * 8):
        for weight in (W, W, W + 1, W + 1, W):
            decompose(weight, 1, "pissa")
    assert len(calls) == 3


def test_a_folder_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was not asked for longest goes first, though it was written last."""
    calls = counted(monkeypatch, "gram_spectrum")
    with cached_spectra(tmp_path):
        decompose(W, 1, "pissa")
        (file,) = tmp_path.iterdir()
    with cached_spectra(tmp_path, 2.5 * file.stat().st_size):
        for weight in (W + 1, W, W + 2):
            decompose(weight, 1, "pissa")
        assert len(list(tmp_path.iterdir())) == 2
        calls.clear()
        decompose(W, 1, "pissa")
        assert not calls
        decompose(W + 1, 1, "pissa")
        assert calls


def test_the_innermost_cache_counts_and_ends_with_its_block(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with cached_spectra(), cached_spectra(tmp_path):
        decompose(W, 1, "pissa")
    assert len(list(tmp_path.iterdir())) == 1
    decompose(W + 1, 1, "pissa")
    assert len(list(tmp_path.iterdir())) == 1


def test_keys_follow_the_content() -> None:
    other = W.clone()
    other[-1, -1] = torch.nextafter(other[-1, -1], torch.tensor(9.0))
    keys = {content_key(M) for M in (W, other, W.mT, W.double(), W[:-1], -W)}
    assert len(keys) == 6
    assert content_key(W.clone()) == content_key(W)
    assert content_key(torch.tensor([[1.0]])) != content_key(torch.tensor([[2.0]]))


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
@pytest.mark.parametrize("lowest", [1e-3, 1e-9, 0.0])
def test_both_sides_from_a_gram_matrix_are_an_svd(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], lowest: float
) -> None:
    monkeypatch.setattr(subspace, "SMALLEST_SIZE", 8)
    U = torch.linalg.qr(torch.randn(shape[0], 30, dtype=torch.float64, generator=GENERATOR)).Q
    V = torch.linalg.qr(torch.randn(shape[1], 30, dtype=torch.float64, generator=GENERATOR)).Q
    S = torch.linspace(1, lowest, 30, dtype=torch.float64)
    S[20:] = lowest
    M = torch.mm(U * S, V.mT)
    triples = linalg.complete_spectrum(M).components(slice(None))
    torch.testing.assert_close(triples.S, S, atol=1e-14, rtol=1e-6)
    torch.testing.assert_close((triples.U * triples.S) @ triples.Vh, M, atol=1e-12, rtol=0)
    for side in (triples.U.mT, triples.Vh):
        eye = torch.eye(30, dtype=torch.float64)
        torch.testing.assert_close(side @ side.mT, eye, atol=1e-7, rtol=0)


def test_once_tells_tensors_apart_and_sees_changes() -> None:
    made: list[str] = []
    one, two = torch.ones(2), torch.ones(2)

    def work(M: Tensor, what: str) -> int:
        return once(M, what, lambda: made.append(what) or len(made))  # type: ignore[func-returns-value]

    assert [work(one, "a"), work(one, "a")] == [1, 2]  # nothing is remembered outside
    with shared_inputs():
        assert [work(one, "a"), work(one, "a"), work(one, "b"), work(one, "a")] == [3, 3, 4, 3]
        assert [work(two, "a"), work(two, "a"), work(one, "a")] == [5, 5, 3]
        one += 1
        assert work(one, "a") == 6


class Block(nn.Module):
    """Three layers with one input and one with another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(16, 8, bias=False))


def shared_statistics() -> Statistics:
    X = torch.randn(2, 40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one, other = (LayerStatistics(x.mT @ x / 40, 40) for x in X)
    return Statistics({"q_proj": one, "k_proj": one, "v_proj": one, "o_proj": other})


@pytest.mark.parametrize("loaded", [False, True])
def test_attach_decomposes_a_shared_input_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loaded: bool
) -> None:
    statistics = shared_statistics()
    if loaded:
        statistics = Statistics.load(statistics.save(tmp_path))
    calls = counted(monkeypatch, "_eigenpairs")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    attach(Block(), "lora_null_v1", rank=2, target_modules=targets, stats=statistics)
    assert len(calls) == 2


def noted(function: Any, sizes: list[int]) -> Any:
    """The same function; the sizes of the matrices that it gets are noted, from a layer's on."""

    def called(M: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.extend([len(M)] if len(M) >= 8 else [])
        return function(M, *args, **kwargs)

    return called


OPTIONS: dict[str, dict[str, Any]] = {"eva": {"whiten": True}, "pissa": {"niter": 2}}


@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if method.options])
def test_an_option_costs_no_more_decompositions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is tried on a small matrix, which must not push out what is shared."""
    method, statistics = METHODS[name], shared_statistics()
    tried: list[int] = []
    for function in ("eigh", "svd", "cholesky_ex"):
        monkeypatch.setattr(torch.linalg, function, noted(getattr(torch.linalg, function), tried))
    counts = []
    for options in ({}, OPTIONS.get(name) or dict([*method.options.items()][:1])):
        tried.clear()
        attach(
            Block(),
            name,
            rank=2,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            stats=statistics,
            task_stats=statistics,
            gradients={n: torch.ones(8, 16) for n in statistics},
            **options,
        )
        counts.append(len(tried))
    assert counts[1] <= counts[0]


def test_sharing_changes_no_number() -> None:
    statistics, block = shared_statistics(), Block()
    first, weight = (block.get_parameter(f"{name}.weight") for name in ("q_proj", "k_proj"))
    moment = statistics["k_proj"].second_moment
    alone = decompose(weight, 2, "corda_kpm", second_moment=moment)
    with shared_inputs():
        decompose(first, 2, "corda_kpm", second_moment=moment)
        beside = decompose(weight, 2, "corda_kpm", second_moment=moment)
    assert torch.equal(alone.A, beside.A)
    assert torch.equal(alone.B, beside.B)


@pytest.mark.parametrize(("runs", "shared"), [(1, False), (3, True)])
def test_the_runs_of_a_study_share_the_spectra(tmp_path: Path, runs: int, shared: bool) -> None:
    """A run on its own keeps none: nobody would use it. They take a tenth of the model at most."""
    entries = [{"run_id": f"pissa-{number}"} for number in range(runs)]
    write_json(tmp_path / "runs.json", {"runs": entries})
    unused: Any = None
    stages = Stages(RunFolder(tmp_path / "pissa-0"), unused, unused)
    model = nn.Linear(600, 10)
    with stages._spectra(model):
        for rank in (1, 1, 2, 3):
            decompose(W, rank, "pissa")
    folder = tmp_path / "shared" / "spectra"
    assert folder.exists() == shared
    if shared:
        sizes = [file.stat().st_size for file in folder.iterdir()]
        assert len(sizes) == 2
        assert sum(sizes) <= 6010 * 4 / 10
