"""Optimisers other than AdamW: what a step is, what is kept in memory, exact resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from forgetless.recipes.checking import check
from forgetless.recipes.recipe import Recipe
from forgetless.training.lion import Lion
from forgetless.training.loop import train
from forgetless.training.optimizers import OPTIMIZERS
from forgetless.training.settings import TrainingSettings
from forgetless.training.trainer import ExactTrainer
from tests.training.test_loop import DATA, MODELS, TOKENIZER, fit, log, same, settings, weights

pytest_plugins = ["tests.tiny_fixtures"]

HERE = [name for name, kind in OPTIMIZERS.items() if not kind.in_8_bits]


# ---- Lion ----------------------------------------------------------------------------------------


def test_three_steps_of_lion_by_hand() -> None:
    """Numbers small enough to be followed on paper: beta1 = 1/2, beta2 = 3/4."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
    lion = Lion([weight], lr=0.1, betas=(0.5, 0.75), weight_decay=0.5)
    expected = [
        # c = g / 2, w (1 - 0.05) - 0.1 sign(c), m = g / 4
        ([4.0, -8.0, 0.0], [0.85, -1.8, 0.0], [1.0, -2.0, 0.0]),
        # c = (m + g) / 2 = [-0.5, 0, 1]; no entry without a direction moves, but all decay
        ([-2.0, 2.0, 2.0], [0.9075, -1.71, -0.1], [0.25, -1.0, 0.5]),
        # c = (m + g) / 2 = [0.125, -1, 0]
        ([0.0, -1.0, -0.5], [0.762125, -1.5245, -0.095], [0.1875, -1.0, 0.25]),
    ]
    for gradient, moved, momentum in expected:
        weight.grad = torch.tensor(gradient)
        lion.step()
        torch.testing.assert_close(weight.detach(), torch.tensor(moved))
        torch.testing.assert_close(lion.state[weight]["momentum"], torch.tensor(momentum))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"betas": (0.9, 1.0)}, "betas must be in"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ],
)
def test_lion_refuses_numbers_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lion([torch.nn.Parameter(torch.zeros(1))], **changes)


def test_a_weight_without_a_gradient_stays() -> None:
    moved, still = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    lion = Lion([moved, still], lr=0.5, weight_decay=0.5)
    moved.grad = torch.ones(2)
    assert lion.step(lambda: 3) == 3
    assert torch.equal(still, torch.ones(2))
    assert torch.equal(moved, torch.full((2,), 0.25))


# ---- in a training -------------------------------------------------------------------------------


def test_a_recipe_may_name_every_optimizer_and_no_other() -> None:
    named = get_args(TrainingSettings.model_fields["optimizer"].annotation)
    assert named == tuple(OPTIMIZERS)
    with pytest.raises(ValueError, match=r"Input should be 'adamw', 'adamw_8bit', .* or 'sgd'"):
        settings(optimizer="adam")


def made(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> Any:
    """The optimiser of a training, after its only step."""
    found: list[Any] = []
    create = ExactTrainer.create_optimizer

    def remembering(self: Any, model: Any = None) -> Any:
        found.append(create(self, model))
        return found[-1]

    monkeypatch.setattr(ExactTrainer, "create_optimizer", remembering)
    fit(MODELS["anchored"](), folder, steps=1, schedule="constant", optimizer=name, **changes)
    return found[0]


@pytest.mark.parametrize("name", HERE)
def test_the_state_takes_what_the_estimate_says(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    optimizer = made(name, monkeypatch, tmp_path)
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim
    )
    if name == "adafactor":  # sums of rows and columns, which weigh at these narrow layers only
        assert kept == 4 * sum(sum(weight.shape) for weight in trained)
    else:
        assert kept == OPTIMIZERS[name].state_bytes * sum(weight.numel() for weight in trained)


@pytest.mark.parametrize(
    ("name", "betas", "groups"),
    [("adamw", [0.8, 0.95], {"eps": 1e-6}), ("lion", [0.8, 0.95], {}), ("lion", None, {})],
)
def test_betas_and_eps_reach_the_optimizer(
    name: str,
    betas: list[float] | None,
    groups: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    optimizer = made(name, monkeypatch, tmp_path, betas=betas, loraplus_ratio=8.0, **groups)
    assert {group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups} == {
        1.0,
        8.0,
    }
    for group in optimizer.param_groups:
        assert tuple(group["betas"]) == tuple(betas or (0.9, 0.99))
        assert all(group[key] == value for key, value in groups.items())


RESUMED: dict[str, Any] = {"steps": 7, "checkpoint_every": 2, "weight_decay": 0.1, "log_every": 3}


@pytest.mark.parametrize("name", ["lion", "adafactor"])
def test_a_stopped_training_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    values = {**RESUMED, "optimizer": name, "loraplus_ratio": 4.0}

    def stop(done: int, steps: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    undisturbed = MODELS["anchored"]()
    fit(undisturbed, tmp_path / "a", **values)
    with pytest.raises(KeyboardInterrupt):
        train(
            MODELS["anchored"](),
            TOKENIZER,
            DATA,
            settings(**values),
            tmp_path / "b",
            on_step=stop,
        )
    model = MODELS["anchored"]()
    assert fit(model, tmp_path / "b", **values).resumed_from == 4
    assert same(model, undisturbed)
    assert log(tmp_path / "a") == log(tmp_path / "b")


# ---- weight decay --------------------------------------------------------------------------------


def decayed(kind: str, folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trained weights before and after a step with a decay that outweighs the gradient."""
    model = MODELS[kind]()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)  # away from the start, so that there is something to pull back
    before = weights(model)
    values: dict[str, Any] = {
        "steps": 1,
        "weight_decay": 50.0,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
    }
    fit(model, folder, optimizer=name, schedule="constant", **values)
    needed = [n for n, w in model.named_parameters() if w.requires_grad]
    after = weights(model)
    return {n: before[n] for n in needed}, {n: after[n] for n in needed}


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("kind", ["anchored", "full"])
def test_decay_halves_the_move_of_an_adapter_and_the_weights_of_full(
    kind: str, name: str, tmp_path: Path
) -> None:
    """Rate times decay is 1/2; either optimiser's own step is at most the rate an entry."""
    before, after = decayed(kind, tmp_path, name)
    for key, weight in before.items():
        kept = 0.5 if weight.ndim >= 2 else 1.0
        assert (after[key] - kept * weight).abs().max() <= 1.01e-2, key


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"training.optimizer": "sgd", "training.betas": [0.9, 0.95]},
            "training.betas: the optimizer 'sgd' has none",
        ),
        (
            {"training.optimizer": "lion", "training.eps": 1e-8},
            "training.eps: the optimizer 'lion' has none",
        ),
        (
            {"training.optimizer": "adamw_8bit"},
            "training.optimizer: 'adamw_8bit' needs bitsandbytes, which is not installed: pip",
        ),
    ],
)
def test_what_cannot_run_is_named_before_anything_is_loaded(
    changes: dict[str, Any],
    problem: str,
    tiny_recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("forgetless.training.optimizers.find_spec", lambda name: None)
    (found,) = check(Recipe.parse(tiny_recipe, changes))
    assert found.startswith(problem)


def test_an_old_bitsandbytes_without_a_gpu_is_named(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stub:
        __version__ = "0.49.0"

        class optim:  # noqa: N801
            @staticmethod
            def AdamW8bit(params: Any) -> Any:
                raise RuntimeError("All input tensors need to be on the same GPU")

    monkeypatch.setattr("forgetless.training.optimizers.find_spec", lambda name: name)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", Stub)
    (found,) = check(Recipe.parse(tiny_recipe, {"training.optimizer": "adamw_8bit"}))
    assert "'adamw_8bit' does not run without a GPU in bitsandbytes 0.49.0 (0.50 does)" in found


@pytest.mark.parametrize("betas", [[0.9], [0.9, 1.0], 0.9])
def test_betas_are_two_numbers_below_one(betas: Any, tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"training\.betas"):
        Recipe.parse(tiny_recipe, {"training.betas": betas})
