"""Random generators that go on as if nothing had been drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["generators_kept"]


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever is drawn inside, the generators of Python, NumPy and torch go on as before.

    Those of every accelerator that this process sees are meant; their states lie with the CPU.
    """
    python, numpy = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cuda" if accelerator is None else accelerator.type
    devices = range(torch.accelerator.device_count())
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
