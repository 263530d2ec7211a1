"""What is seen while a command works."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forgetless.studies.stages import Listener


def begin() -> None:
    """What comes between a verb's imports and its work.

    What was imported is no garbage: to look through it takes half a second at each collection, of
    which every `Trainer` asks for some.
    """
    _hush()
    if not gc.get_freeze_count():
        gc.freeze()


def _hush() -> None:
    """Our own bars, and none of transformers or datasets, nor what is said of every model alike."""
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    from transformers.utils import logging

    from forgetless.core.progress import draw, loudness

    draw()
    if loudness() == "verbose":
        return
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def watch(*, several: bool = False) -> AbstractContextManager[Listener]:
    """A listener for runs that shows them on a terminal, as `forgetless.cli.watch.watch` does."""
    from forgetless.cli.watch import watch as shown

    begin()
    return shown(several=several)


def tell_terminal(message: str) -> None:
    """What a command is doing, for those who wait in front of it."""
    if sys.stderr.isatty():
        print(message, file=sys.stderr)
