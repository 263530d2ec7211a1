"""Memory that ran out: how much was asked for, and which settings need less; knows no torch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from forgetless.core.errors import UserError

_MEASURING = (
    "'forgetless train' does all but measuring, and 'forgetless eval BASE --adapter RUN "
    "--batch-size 1' then measures with less"
)
TAKES_LESS = {
    "statistics": "set calibration.memory_budget, such as 4GiB, or lower calibration.batch_size",
    "train": "lower training.batch_size and raise training.gradient_accumulation by as much, set "
    "training.gradient_checkpointing: true or training.precision: bf16, or lower data.max_length",
    **dict.fromkeys(("base scores", "step 0", "evaluate"), _MEASURING),
}
"""What to change where memory runs out, by stage."""

_NO_ROOM = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


def out_of_memory(error: BaseException) -> str | None:
    """What an error says of memory that ran out, of whatever device; None of any other error."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    if known or (isinstance(error, RuntimeError) and _NO_ROOM.search(str(error))):
        # CUDA adds many sentences to what was asked for and what there is.
        sentences = str(error).partition("\n")[0].split(". ")[:3]
        return ". ".join(sentences).rstrip(".") or type(error).__name__
    return None


@contextmanager
def naming_what_takes_less(stage: str) -> Iterator[None]:
    """Where memory runs out in a stage, say which settings need less of it.

    Raises:
        UserError: memory ran out, of whatever device.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = out_of_memory(error)
        if reason is None:
            raise
        ways = [TAKES_LESS[stage]] if stage in TAKES_LESS else []
        ways.append("'forgetless plan' says beforehand what a run takes, and with --memory fits it")
        raise UserError(f"no memory left for {stage!r} ({reason}): {'; '.join(ways)}") from error
