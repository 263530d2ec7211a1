"""The same starts as PEFT's own initialisations, with and without rsLoRA's scaling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn

from forgetless.core.method import Decomposition
from forgetless.methods import decompose

RANK, ALPHA = 4, 6
NAMES = ("wide", "tall")

both_scalings = pytest.mark.parametrize("use_rslora", [False, True])


class Network(nn.Module):
    """Two layers, one with more inputs than outputs and one with fewer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(20, 14)
        self.tall = nn.Linear(14, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.tall(self.wide(x).tanh()))

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).weight.detach().clone() for name in NAMES}


class Start(NamedTuple):
    """What PEFT made of one layer: its factors, and what it left in place of the weight."""

    A: Tensor
    B: Tensor
    base: Tensor
    scaling: float


def configuration(init: str, use_rslora: bool, **more: Any) -> Any:
    return LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        use_rslora=use_rslora,
        target_modules=list(NAMES),
        init_lora_weights=init,
        **more,
    )


def starts(model: nn.Module, config: Any) -> dict[str, Start]:
    adapted = get_peft_model(model, config).base_model.model
    layers = {name: getattr(adapted, name) for name in NAMES}
    return {
        name: Start(
            A=layer.lora_A["default"].weight.detach(),
            B=layer.lora_B["default"].weight.detach(),
            base=layer.base_layer.weight.detach(),
            scaling=layer.scaling["default"],
        )
        for name, layer in layers.items()
    }


def compare(
    theirs: Mapping[str, Start],
    ours: Callable[[str, float], Decomposition],
    tolerance: float = 1e-5,
    signed_terms: bool = True,
) -> None:
    """Ours and theirs agree in A and B up to a sign of each row and column.

    With `signed_terms` the two signs of a term are the same, so that the start agrees too.
    """
    for name, their in theirs.items():
        our = ours(name, their.scaling)
        signs = torch.where((our.A * their.A).sum(1) < 0, -1.0, 1.0)
        close(signs[:, None] * our.A, their.A, tolerance)
        if not signed_terms:
            signs = torch.where((our.B * their.B).sum(0) < 0, -1.0, 1.0)
        close(our.B * signs, their.B, tolerance)
        if signed_terms:
            close(our.start, their.scaling * their.B @ their.A, tolerance)
            close(our.residual, their.base, tolerance)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """The relative Frobenius distance is below the tolerance."""
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@both_scalings
@pytest.mark.parametrize("name", ["pissa", "olora", "mica"])
def test_from_the_weight_alone(name: str, use_rslora: bool) -> None:
    weights = Network().weights
    compare(
        starts(Network(), configuration(name, use_rslora)),
        lambda layer, s: decompose(weights[layer], RANK, name, s),
        tolerance=1e-5,
        signed_terms=name != "mica",  # A is zero there and shows no sign
    )


@both_scalings
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_corda(mode: str, use_rslora: bool) -> None:
    pytest.importorskip(
        "attr", reason="PEFT's CorDA needs the package 'attrs' and does not ask for it"
    )
    from peft.tuners.lora.corda import preprocess_corda

    model = Network()
    weights = model.weights
    config = configuration("corda", use_rslora, corda_config=CordaConfig(corda_method=mode))
    moments = {}

    def run() -> None:
        model(torch.randn(64, 20, generator=torch.Generator().manual_seed(1)))

    for name in NAMES:
        layer = getattr(model, name)
        layer.register_forward_hook(
            lambda _, x, __, name=name: moments.update({name: (x[0] / x[0].max().abs()).double()})
        )
    preprocess_corda(model, config, run_model=run)
    compare(
        starts(model, config),
        lambda layer, s: decompose(
            weights[layer],
            RANK,
            f"corda_{mode}",
            s,
            second_moment=moments[layer].mT @ moments[layer],
        ),
        tolerance=1e-4,
    )


@both_scalings
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_lora_ga(use_rslora: bool) -> None:
    model = Network()
    weights = model.weights
    config = configuration("lora_ga", use_rslora, lora_ga_config=LoraGAConfig())
    gradients = {}

    def train_step() -> None:
        x = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
        model(x).square().mean().backward()
        gradients.update({name: getattr(model, name).weight.grad.clone() for name in NAMES})

    preprocess_loraga(model, config, train_step)
    # Their signs come from a randomised SVD, one for A's row and another for B's column.
    compare(
        starts(model, config),
        lambda layer, s: decompose(weights[layer], RANK, "lora_ga", s, gradient=gradients[layer]),
        tolerance=1e-4,
        signed_terms=False,
    )


@both_scalings
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize(
    ("scale", "theirs"),
    [
        ("peft", "stable"),
        ("weight_svd", "weight_svd"),
        ("gd_scale", "gd_scale"),
        ("unit", "unit"),
    ],
)
def test_lora_ga_in_every_scale_and_direction(
    scale: str, theirs: str, direction: str, use_rslora: bool
) -> None:
    model = Network()
    weights = model.weights
    config = configuration(
        "lora_ga", use_rslora, lora_ga_config=LoraGAConfig(direction=direction, scale=theirs)
    )
    gradients = {}

    def train_step() -> None:
        x = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
        model(x).square().mean().backward()
        gradients.update({name: getattr(model, name).weight.grad.clone() for name in NAMES})

    preprocess_loraga(model, config, train_step)
    compare(
        starts(model, config),
        lambda layer, s: decompose(
            weights[layer],
            RANK,
            "lora_ga",
            s,
            gradient=gradients[layer],
            scale=scale,
            direction=direction,
        ),
        # They estimate ‖W‖₂ by a randomised SVD that is up to 0.1 % too small.
        tolerance=2e-3 if scale == "weight_svd" else 1e-4,
        signed_terms=False,
    )


@both_scalings
def test_randomised_pissa(use_rslora: bool) -> None:
    """Up to what theirs misses, which draws no more columns than it keeps."""
    weights = Network().weights
    torch.manual_seed(0)
    for name, their in starts(Network(), configuration("pissa_niter_32", use_rslora)).items():
        our = decompose(weights[name], RANK, "pissa", their.scaling, niter=32)
        close(our.start, their.scaling * their.B @ their.A, 2e-2)
        best = decompose(weights[name], RANK, "pissa").residual.norm()
        assert our.residual.norm() <= their.base.norm() * (1 + 1e-6)
        assert our.residual.norm() <= 1.001 * best


def test_eva() -> None:
    """The components of PEFT's incremental PCA, from the moment of centred activations."""
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    X = 2 + torch.randn(200, 12, generator=torch.Generator().manual_seed(2)) @ mixing
    pca = IncrementalPCA(n_components=RANK)
    pca.partial_fit(X)
    centred = (X - X.mean(0)).double()
    start = decompose(
        torch.zeros(8, 12), RANK, "eva", task_moment=centred.mT @ centred / len(centred)
    )
    signs = (start.A * pca.components_).sum(1).sign()
    close(signs[:, None] * start.A, pca.components_, 1e-4)
