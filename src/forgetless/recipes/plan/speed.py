"""How fast this machine multiplies matrices, which no training can beat."""

import time

import torch

SIZE = 1024
"""Rows and columns of the matrices: as large as those of a small model's batch."""

_SECONDS = 0.2


def matmul_speed(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product here and now.

    On the GPU where there is one, else on the CPU with as many threads as torch has.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    square = torch.ones(SIZE, SIZE, dtype=dtype, device=device)

    def seconds(products: int) -> float:
        started = time.perf_counter()
        for _ in range(products):
            found = square @ square
        found[0, 0].item()  # a GPU is waited for
        return time.perf_counter() - started

    once = seconds(1)
    if once > _SECONDS:  # as of bfloat16 on a CPU that has no instructions for it
        return 2 * SIZE**3 / once
    once = min(once, seconds(1), seconds(1))
    products = max(1, min(10_000, int(_SECONDS / once)))
    return 2 * SIZE**3 * products / seconds(products)
