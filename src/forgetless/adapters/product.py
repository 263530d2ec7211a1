"""The anchored product result + scaling [dB, B0] [A0 + dA ; dA] x, with its gradient by hand.

PyTorch's own graph of this formula makes two copies of every token's output and multiplies them by
the scaling, there and back. Here the scaling is folded into the matrix product, the base's output
is where the product is accumulated, and both moves share their two products in either direction.
What is left beside a plain LoRA of the same rank is the second low-rank product: 10 instead of 6
multiply-adds for every token, rank and input or output.
"""

from typing import Any

import torch
from torch import Tensor


def anchored_product(
    result: Tensor, x: Tensor, dA: Tensor, dB: Tensor, A0: Tensor, B0: Tensor, scaling: float
) -> Tensor:
    """The base's output with the move of an anchored adapter added.

    Args:
        result: W x, (..., out).
        x: the layer's input, (..., in).
        dA: move of A, (rank, in).
        dB: move of B, (out, rank).
        A0: frozen start of A, (rank, in); no gradient reaches it.
        B0: frozen start of B, (out, rank); none either.
        scaling: of the adapter.

    Returns:
        (..., out), in the wider dtype of `result` and the product. The product is computed in the
        dtype of the matrices, or in autocast's where that is on.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dA.dtype
    matrices = [M.to(dtype) for M in (x, dA, dB, A0, B0)]
    rows = result.reshape(-1, result.shape[-1])
    added: Tensor = _AnchoredProduct.apply(rows, *matrices, scaling)  # type: ignore[no-untyped-call]
    return added.view(result.shape)  # a view from inside of it could not be written into


class _AnchoredProduct(torch.autograd.Function):
    """The product and its gradient, of rows (tokens, out); all matrices come in one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        dA: Tensor,
        dB: Tensor,
        A0: Tensor,
        B0: Tensor,
        scaling: float,
    ) -> Tensor:
        rank = len(dA)
        rows = x.reshape(-1, x.shape[-1])
        h = rows @ torch.cat([A0, dA]).mT
        h[:, :rank] += h[:, rank:]  # [(A0 + dA) x, dA x], one row a token
        ctx.save_for_backward(x, h[:, :rank], dA, dB, A0, B0)
        ctx.scaling = scaling
        up = torch.cat([dB, B0], dim=1).mT
        if result.dtype == h.dtype:
            return torch.addmm(result, h, up, alpha=scaling)
        return (h @ up).mul_(scaling).add_(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, h, dA, dB, A0, B0 = ctx.saved_tensors
        rank, scaling = len(dA), ctx.scaling
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():  # a second derivative needs to know where h comes from
            h = rows @ (A0 + dA).mT
        (g,) = gradients
        g_rows = g.to(rows.dtype)
        for_result, for_x, for_dA, for_dB = ctx.needs_input_grad[:4]
        grad_x = grad_dA = None
        if for_x or for_dA:
            u = (g_rows @ torch.cat([dB, B0], dim=1)) * scaling
            u[:, rank:] += u[:, :rank]  # [gᵀ dB, gᵀ (dB + B0)], one row a token
            grad_dA = u[:, rank:].mT @ rows if for_dA else None
            grad_x = (u @ torch.cat([A0, dA])).view(x.shape) if for_x else None
        grad_dB = (g_rows.mT @ h) * scaling if for_dB else None
        return g if for_result else None, grad_x, grad_dA, grad_dB, None, None, None
