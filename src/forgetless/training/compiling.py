"""`torch.compile` in a training: what the machine must have, and nothing left behind."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch
from torch._inductor import config as inductor

from forgetless.training.settings import TrainingSettings

__all__ = ["compile_problems", "compiling"]

_OR_WITHOUT = "or leave it at false"


def compile_problems(settings: TrainingSettings) -> Iterator[str]:
    """What this machine lacks to compile the model, where that is asked for."""
    if settings.compile and (lacking := _lacking()):
        yield f"training.compile: {lacking}"


def _lacking() -> str | None:
    if torch.accelerator.is_available():
        if find_spec("triton") is None:
            return f"needs triton, which is not installed: pip install triton, {_OR_WITHOUT}"
        return None
    names = [name for name in inductor.cpp.cxx if name]
    if not any(map(which, names)):
        return (
            f"needs a C++ compiler, and there is no {' or '.join(names)}; install one (apt install "
            f"g++), name yours in the environment variable CXX, {_OR_WITHOUT}"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        return (
            f"needs the headers of Python, and {headers} has no Python.h; install them (apt "
            f"install python3-dev), {_OR_WITHOUT}"
        )
    return None


@contextmanager
def compiling(on: bool) -> Iterator[None]:
    """Forget what was compiled, at the end.

    Otherwise every training of a study adds to the versions of the same code, and past a limit
    PyTorch runs it uncompiled.
    """
    try:
        yield
    finally:
        if on:
            torch.compiler.reset()
