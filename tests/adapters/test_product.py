"""The hand-written gradient is the formula's, in every way that a layer is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forgetless.adapters.attachment import attach
from forgetless.adapters.layer import adapted_layers
from forgetless.adapters.product import anchored_product

SCALING = 0.7


def drawn(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Result, x, dA, dB with gradients, and A0, B0 without."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5), (2, 3, 4), (2, 4), (5, 2), (2, 4), (5, 2)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [tensor.requires_grad_(number < 4) for number, tensor in enumerate(tensors)]


def formula(result: Tensor, x: Tensor, dA: Tensor, dB: Tensor, A0: Tensor, B0: Tensor) -> Tensor:
    """The papers' form: (B0 + dB)(A0 + dA) x - B0 A0 x."""
    moved = (x @ (A0 + dA).mT) @ (B0 + dB).mT - (x @ A0.mT) @ B0.mT
    return result + SCALING * moved


def product(*tensors: Tensor) -> Tensor:
    result, x, dA, dB, A0, B0 = tensors
    return anchored_product(result, x, dA, dB, A0, B0, SCALING)


def derivatives(function: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*tensors).pow(3).sum(), tensors[:4])


def test_the_value_and_every_gradient_are_the_formulas() -> None:
    tensors = drawn()
    torch.testing.assert_close(product(*tensors), formula(*tensors))
    for ours, theirs in zip(
        derivatives(product, tensors), derivatives(formula, tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_first_and_second_derivatives_pass_the_numerical_check() -> None:
    *wanted, A0, B0 = drawn()
    assert torch.autograd.gradcheck(lambda *given: product(*given, A0, B0), wanted)
    assert torch.autograd.gradgradcheck(lambda *given: product(*given, A0, B0), wanted)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [2, 3], [1, 3]])
def test_only_what_is_asked_for_gets_a_gradient(wanted: list[int]) -> None:
    tensors, reference = drawn(), drawn()
    for number in range(4):
        tensors[number].requires_grad_(number in wanted)
    torch.autograd.backward(product(*tensors).sum())
    torch.autograd.backward(formula(*reference).sum())
    for number, (ours, theirs) in enumerate(zip(tensors, reference, strict=True)):
        if number in wanted:
            torch.testing.assert_close(ours.grad, theirs.grad)
        else:
            assert ours.grad is None


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 2, 3, 4), (0, 4)])
def test_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    _, _, dA, dB, A0, B0 = drawn()
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    result = torch.zeros(*shape[:-1], 5, dtype=torch.float64)
    added = product(result, x, dA, dB, A0, B0)
    torch.testing.assert_close(added, formula(result, x, dA, dB, A0, B0))
    torch.autograd.backward(added.sum())
    assert x.grad is not None
    assert x.grad.shape == shape


def test_a_model_may_write_into_the_value() -> None:
    """A block of Falcon adds to what its MLP gives, and Gemma 3n scales a projection."""
    tensors = drawn()
    written = product(*tensors)
    written += tensors[0]
    written *= 2
    torch.autograd.backward(written.sum())
    reference = drawn()
    torch.autograd.backward((2 * (formula(*reference) + reference[0])).sum())
    for ours, theirs in zip(tensors, reference, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_without_a_graph_break(backend: str) -> None:
    compiled = torch.compile(product, backend=backend, fullgraph=True)
    for ours, theirs in zip(
        derivatives(compiled, drawn()), derivatives(formula, drawn()), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_16_bit_result_is_widened_by_the_adapter_and_rounded_once() -> None:
    tensors = drawn(torch.float32)
    result = tensors[0].detach().to(torch.bfloat16).requires_grad_()
    added = product(result, *tensors[1:])
    assert added.dtype == torch.float32
    torch.testing.assert_close(added, formula(result.float(), *tensors[1:]))
    torch.autograd.backward(added.sum())
    assert result.grad is not None
    assert result.grad.dtype == torch.bfloat16


def test_autocast_computes_in_its_format_and_leaves_float32_gradients() -> None:
    tensors = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        added = product(tensors[0].bfloat16(), *tensors[1:])
    assert added.dtype == torch.bfloat16
    torch.autograd.backward(added.float().sum())
    reference = drawn(torch.float32)
    torch.autograd.backward(formula(*reference).sum())
    for ours, theirs in zip(tensors[2:4], reference[2:4], strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad, atol=0.1, rtol=0.05)


class Twice(nn.Module):
    """One layer, used twice in one forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(self.layer(x).tanh()))


def test_a_layer_that_is_used_twice_gets_the_sum_of_both_gradients() -> None:
    model = attach(Twice(), "pissa", 2, 3)
    (module,) = adapted_layers(model).values()
    for weight in (module.lora_A["default"].weight, module.lora_B["default"].weight):
        weight.data.normal_(std=0.1)
    anchor = module.lora_anchor["default"]
    x = torch.randn(4, 6)
    torch.autograd.backward(model(x).sum())
    ours = [module.lora_A["default"].weight.grad, module.lora_B["default"].weight.grad]
    dA, dB = (module.lora_A["default"].weight, module.lora_B["default"].weight)
    scaling: float = module.scaling["default"]

    def once(x: Tensor) -> Tensor:
        moved = (x @ (anchor.anchor_A + dA).mT) @ dB.mT + (x @ dA.mT) @ anchor.anchor_B.mT
        return torch.as_tensor(module.base_layer(x) + scaling * moved)

    theirs = torch.autograd.grad(once(once(x).tanh()).sum(), [dA, dB])
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted)


def test_one_dropout_mask_serves_both_terms() -> None:
    """With dA = 0 and dB = -B0 the adapter is -B0 A0 x; a second mask would leave another."""
    model = attach(Twice(), "pissa", 6, 6, dropout=0.5)
    (module,) = adapted_layers(model).values()
    anchor = module.lora_anchor["default"]
    module.lora_A["default"].weight.data.copy_(-anchor.anchor_A)
    module.lora_B["default"].weight.data.zero_()
    module.train()
    x, zero = torch.randn(5, 6), module.base_layer(torch.zeros(1, 6))
    torch.manual_seed(1)
    added = module(x) - module.base_layer(x)
    torch.manual_seed(1)
    dropped = module.lora_dropout["default"](x)
    # All of W is the start here, so the adapter is minus the layer of the dropped input.
    torch.testing.assert_close(added, -(module.base_layer(dropped) - zero), atol=1e-5, rtol=1e-4)


def test_a_compiled_model_gives_the_plain_ones_gradients() -> None:
    def gradients(compiled: bool) -> list[Tensor | None]:
        model: Any = attach(Twice(), "pissa", 2, 3)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        torch.autograd.backward(run(torch.ones(4, 6)).sum())
        return [weight.grad for weight in model.parameters() if weight.requires_grad]

    for ours, theirs in zip(gradients(compiled=True), gradients(compiled=False), strict=True):
        torch.testing.assert_close(ours, theirs)
