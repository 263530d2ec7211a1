"""Whether a model can be trained on certain tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from forgetless.core.errors import UserError
from forgetless.models.load import evaluating
from forgetless.training.durations import Rows

__all__ = ["require_fitting", "require_kept_apart"]


def require_fitting(model: Any, rows: Rows) -> None:
    """See to it that the model, with or without weights, has a position and a word for each token.

    Raises:
        UserError: the rows are too long, or of another tokenizer.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and rows.longest > positions:
        raise UserError(
            f"the longest example has {rows.longest} tokens, but the model has {positions} "
            f"positions; set max_length to {positions} or less"
        )
    words, largest = model.get_input_embeddings().num_embeddings, rows.largest_token
    if largest >= words:
        raise UserError(
            f"the data holds the token {largest}, but the model knows {words} tokens; "
            "use the tokenizer of this model"
        )


def require_kept_apart(model: Any, rows: Rows) -> None:
    """See to it that no sequence sees another of its row; asks the model where rows hold several.

    Raises:
        UserError: the model lets them see each other.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if rows.several and not _keeps_apart(base):
        raise UserError(
            f"packed sequences would see each other in {type(base).__name__}, which does not keep "
            "them apart by their position ids; set data.pack to false"
        )


@torch.no_grad()
def _keeps_apart(model: Any) -> bool:
    """Whether a sequence gives the same logits after either of two others in its row.

    Not every forward that takes position ids makes a mask of them, and recurrent layers need more
    than a mask. What the two others do to the logits where they are meant to be seen is the scale.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [4, 3, 2, 1, 1, 2, 3, 4]], device=device)

    def difference(sequence: int) -> float:
        """Between the second halves of the rows, with sequences of so many tokens."""
        places = torch.arange(sequence, device=device).repeat(2, 8 // sequence)
        logits = model(input_ids=tokens, position_ids=places, use_cache=False).logits
        after_one, after_other = logits[:, 4:].float()
        return float((after_one - after_other).norm())

    with evaluating(model):
        return difference(4) <= 1e-3 * difference(8)
