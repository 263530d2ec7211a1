"""Time of a start: one transformer block from given second moments, against the usual ways.

    python benchmarks/init_speed.py [--full] [--only NAME ...] [--device cuda] [--repeats 3]

The block is Llama-2-7B's a quarter as wide, at rank 32; with --full its true size at rank 128, for
which the usual ways take an hour on two cores (leave them out by --only). Every side of ours goes
through `attach`, which also puts the adapter on the block; so do PEFT's. The straightforward
LoRA-Null is the arithmetic alone: for each layer the float32 SVD of its second moment and the SVD
of W N Nᵀ. `leak` is ‖X N‖ over the least possible, largest over the layers. `of products` is what a
start's operations, counted by their leading terms, would take as one float64 matrix product of the
same run, over what the start took.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens
from torch import Tensor, nn

import forgetless
from forgetless.adapters.layer import adapted_layers
from forgetless.core.cache import cached_spectra
from forgetless.core.linalg import svd_slice
from forgetless.statistics.moments import LayerStatistics, Statistics
from timing import interleaved, medians, report

INPUTS = {
    "q_proj": "hidden",
    "k_proj": "hidden",
    "v_proj": "hidden",
    "o_proj": "heads",
    "gate_proj": "normed",
    "up_proj": "normed",
    "down_proj": "gated",
}
"""Layer -> the name of its input."""

BARS = {
    "lora_null_v1": ("lora_null, straightforward", 12.0),
    "corda_kpm": ("corda, peft", 2.0),
    "corda_ipm": ("corda, peft", 2.0),
    "pissa": ("pissa, peft", 1.0),
    "pissa niter=16": ("pissa_niter_16, peft", 1.2),
    "lora": ("lora, peft", 1.0),
    "olora": ("olora, peft", 1.0),
    "mica": ("mica, peft", 1.0),
    "lora_ga": ("lora_ga, peft", 1.0),
    "slice, first and kept": ("svd, float32", None),
    "slice, from the cache": ("svd, float32", 50.0),
}
"""Side -> what it is compared with, and how many times faster it is to be."""


PRODUCT = "product, float64"
"""The side whose speed the counts of operations are held against."""


@dataclass
class Setting:
    """A block's weights and second moments, and the spaces that the sides found.

    Attributes:
        weights: layer -> W.
        moments: input -> second moment, float64.
        gradients: layer -> a gradient of W, which is errors times inputs.
        least: input -> the least leak of any space of that rank.
        spaces: side -> layer -> rows that span its N, (rank, in).
        folder: of the cached spectra.
        copied: the last copy of the block.
    """

    hidden: int
    inner: int
    rank: int
    device: str
    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)
    spaces: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="init-speed-")))
    copied: nn.Module = field(default_factory=nn.Module)

    def __post_init__(self) -> None:
        sizes = {"hidden": self.hidden, "heads": self.hidden, "normed": self.hidden}
        for seed, (name, size) in enumerate({**sizes, "gated": self.inner}.items()):
            self.moments[name], self.least[name] = moment(size, self.rank, seed, self.device)
        generator = torch.Generator().manual_seed(7)
        for layer, name in INPUTS.items():
            out = self.inner if layer in ("gate_proj", "up_proj") else self.hidden
            W = torch.randn(out, len(self.moments[name]), generator=generator)
            self.weights[layer] = (W / W.shape[1] ** 0.5).to(self.device)
            errors = torch.randn(out, len(self.moments[name]), generator=generator).to(self.device)
            self.gradients[layer] = errors @ self.moments[name].float()

    def block(self) -> nn.Module:
        """A block with these weights; nothing that is done to it changes them."""
        block = nn.Module()
        for layer, W in self.weights.items():
            linear = nn.Linear(1, 1, bias=False, device="meta")
            linear.out_features, linear.in_features = W.shape
            linear.weight = nn.Parameter(W, requires_grad=False)
            setattr(block, layer, linear)
        return block

    def copy(self) -> None:
        """Copy the block for a start that subtracts from its weights in place."""
        self.copied = deepcopy(self.block())

    def statistics(self) -> Statistics:
        """The second moments as `collect` gives them."""
        shared = {name: LayerStatistics(C, 10**6) for name, C in self.moments.items()}
        return Statistics({layer: shared[name] for layer, name in INPUTS.items()})

    def leak(self, side: str) -> float | None:
        """‖X N‖ over the least possible, of the worst layer; None where a side left no N."""
        leaks = []
        for layer, rows in self.spaces.get(side, {}).items():
            name, N = INPUTS[layer], torch.linalg.qr(rows.double().mT).Q
            leak = float((N * (self.moments[name] @ N)).sum().sqrt())
            leaks.append(leak / self.least[name])
        return max(leaks, default=None)


def moment(size: int, rank: int, seed: int, device: str) -> tuple[Tensor, float]:
    """A second moment with eigenvalues k^-1.6, and the root of the sum of the smallest `rank`.

    Its eigenvectors are those of the discrete Hartley transform, with random signs and order.
    """
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = torch.arange(1, size + 1, dtype=torch.float64) ** -1.6
    order = torch.randperm(size, generator=generator)
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    angle = 2 * torch.pi / size * (torch.arange(size)[:, None] * order % size).double()
    H = (angle.cos() + angle.sin()).mul_(signs[:, None] / size**0.5).to(device)
    C = (H * eigenvalues.to(device)) @ H.mT
    return (C + C.mT) / 2, float(eigenvalues[-rank:].sum().sqrt())


# ------------------------------------------------------------------------------------- the sides


def straightforward(setting: Setting, rank: int) -> None:
    """LoRA-Null as its definition reads, every layer on its own."""
    for layer, W in setting.weights.items():
        N = torch.linalg.svd(setting.moments[INPUTS[layer]].float()).U[:, -rank:]
        U, S, Vh = torch.linalg.svd(W @ N @ N.mT, full_matrices=False)
        B, A = U[:, :rank] * S[:rank].sqrt(), S[:rank].sqrt()[:, None] * Vh[:rank]
        torch.sub(W, B @ A)
        setting.spaces.setdefault("lora_null, straightforward", {})[layer] = N.mT


def ours(setting: Setting, rank: int, method: str, **options: Any) -> None:
    """A start of ours, by `attach`."""
    model = forgetless.attach(
        setting.block(),
        method,
        rank=rank,
        alpha=rank,
        target_modules=list(INPUTS),
        stats=setting.statistics(),
        task_stats=setting.statistics(),
        gradients=setting.gradients,
        **options,
    )
    if method == "lora_null_v1":
        modules = adapted_layers(model, "default").items()
        setting.spaces[method] = {n: m.lora_anchor["default"].anchor_A for n, m in modules}


def peft(setting: Setting, rank: int, init: bool | str) -> None:
    """A start of PEFT's."""
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(INPUTS),
        init_lora_weights=init,
        corda_config=CordaConfig(corda_method="kpm") if init == "corda" else None,
        lora_ga_config=LoraGAConfig() if init == "lora_ga" else None,
    )
    block = setting.copied if init == "olora" else setting.block()
    if init == "lora_ga":
        for layer, linear in block.named_children():
            linear._peft_loraga_grad = setting.gradients[layer]  # what `preprocess_loraga` leaves
    if init == "corda":
        for layer, linear in block.named_children():
            C = setting.moments[INPUTS[layer]]
            fields = {"covariance_matrix": C, "corda_method": "kpm", "rank": rank}
            for name, value in fields.items():  # what `preprocess_corda` leaves on a layer
                setattr(linear, name, value)
        collect_eigens(block, config, verbose=False)
        crop_corda_eigens(block, config)
    get_peft_model(block, config)


def one_slice(setting: Setting, rank: int) -> None:
    """A slice of q_proj's spectrum, through the cache in the folder."""
    W = setting.weights["q_proj"]
    with cached_spectra(setting.folder, whole=True):
        svd_slice(W, min(W.shape) // 4, rank)


def sides(setting: Setting) -> dict[str, Callable[[], object]]:
    """Name -> what is timed."""
    rank, W = setting.rank, setting.weights["q_proj"]
    return {
        "lora_null, straightforward": partial(straightforward, setting, rank),
        "lora_null_v1": partial(ours, setting, rank, "lora_null_v1"),
        "corda, peft": partial(peft, setting, rank, "corda"),
        "corda_kpm": partial(ours, setting, rank, "corda_kpm"),
        "corda_ipm": partial(ours, setting, rank, "corda_ipm"),
        "pissa, peft": partial(peft, setting, rank, "pissa"),
        "pissa": partial(ours, setting, rank, "pissa"),
        "pissa_niter_16, peft": partial(peft, setting, rank, "pissa_niter_16"),
        "pissa niter=16": partial(ours, setting, rank, "pissa", niter=16),
        "lora, peft": partial(peft, setting, rank, True),
        "lora": partial(ours, setting, rank, "lora"),
        "olora, peft": partial(peft, setting, rank, "olora"),
        "olora": partial(ours, setting, rank, "olora"),
        "mica, peft": partial(peft, setting, rank, "mica"),
        "mica": partial(ours, setting, rank, "mica"),
        "lora_ga, peft": partial(peft, setting, rank, "lora_ga"),
        "lora_ga": partial(ours, setting, rank, "lora_ga"),
        PRODUCT: partial(product, setting),
        "svd, float32": lambda: torch.linalg.svd(W, full_matrices=False),
        "slice, first and kept": partial(one_slice, setting, rank),
        "slice, from the cache": partial(one_slice, setting, rank),
    }


def operations(setting: Setting) -> dict[str, float]:
    """Additions and multiplications of our starts, by their leading terms.

    A symmetric eigendecomposition counts 9 n³, a Cholesky factor n³ / 3, a triangular solve of w
    columns n² w. LoRA-Null applies an inverse nine times to blocks of w = rank + 4 columns, and
    makes each orthogonal to the eight before it.
    """
    r, w = setting.rank, setting.rank + 4
    inputs = [len(C) for C in setting.moments.values()]
    shapes = [(min(W.shape), max(W.shape)) for W in setting.weights.values()]
    applied = sum(2 * short * long * r for short, long in shapes)
    decomposed = sum(long * short**2 + 9 * short**3 for short, long in shapes)
    return {
        "lora_null_v1": sum(n**3 / 3 + 20 * n**2 * w + 280 * n * w**2 for n in inputs) + applied,
        "pissa": decomposed + applied,
        "pissa niter=16": sum(24 * short * long * w for short, long in shapes) + applied,
        "olora": sum(4 * W.shape[0] * r**2 for W in setting.weights.values()) + applied,
        "mica": decomposed + sum(2 * long * short**2 for short, long in shapes),
    }


def product(setting: Setting) -> None:
    """A float64 matrix product of the hidden size."""
    C = setting.moments["hidden"]
    torch.mm(C, C)


def rows(setting: Setting, seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """One row a side: seconds, how many times faster than its reference, the bar, the leak."""
    table = []
    counted = operations(setting)
    speed = 2 * setting.hidden**3 / seconds[PRODUCT] if PRODUCT in seconds else None
    for name, taken in seconds.items():
        reference, bar = BARS.get(name, (None, None))
        against = seconds.get(reference) if reference else None
        table.append(
            {
                "side": name,
                "seconds": taken,
                "times faster than": reference,
                "times": against / taken if against else None,
                "at least": bar,
                "of products": counted[name] / speed / taken if speed and name in counted else None,
                "leak": setting.leak(name),
            }
        )
    return table


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Time of a start, against the usual ways.")
    parser.add_argument("--full", action="store_true", help="Llama-2-7B's size at rank 128")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2752)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="sides whose names hold one of these"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.full:
        options.hidden, options.inner, options.rank = 4096, 11008, 128
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = Setting(options.hidden, options.inner, options.rank, options.device)
    chosen = {
        name: side
        for name, side in sides(setting).items()
        if name == PRODUCT or any(part in name for part in options.only)
    }
    try:
        seconds = measure(setting, chosen, options)
    finally:
        shutil.rmtree(setting.folder, ignore_errors=True)
    size = {"hidden": options.hidden, "inner": options.inner, "rank": options.rank}
    report(
        "init_speed",
        "Start of one transformer block from given second moments, median seconds",
        {**size, "repeats": options.repeats},
        rows(setting, seconds),
        options.device,
    )


def measure(
    setting: Setting, chosen: Mapping[str, Callable[[], object]], options: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of each side."""
    full = options.full
    return medians(
        interleaved(
            chosen,
            options.repeats,
            warmups=0 if full else 1,
            prepare={
                "slice, first and kept": partial(empty, setting.folder),
                "olora, peft": setting.copy,
            },
            device=options.device,
        )
    )


def empty(folder: Path) -> None:
    """Remove the spectra that were kept."""
    for file in folder.iterdir():
        file.unlink()


if __name__ == "__main__":
    main()
