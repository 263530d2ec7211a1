"""What of a model is about text, where pictures and sounds may have parts of their own.

A base may be composite: its config then has a section for the text model, and towers and projectors
that no text passes through stand beside it.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from forgetless.core.errors import UserError

_POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len"),
    *("max_seq_length", "max_sequence_length", "context_length", "seq_length", "n_ctx"),
)
"""What configs call the most tokens that a model can read, the usual word first."""

_OTHER_SENSES = re.compile(
    r"visi|visual|image|img|video|audio|speech|multi_?modal|(^|_)mm_|connector|projector"
    r"|perceiver|resampler|q_?former",
    re.IGNORECASE,
)
_CROSS = re.compile("cross_?att|encoder_att", re.IGNORECASE)


def text_config(model: Any) -> Any:
    """The config of the text model; a model without a section for it gives its own, or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def positions_of(model: Any) -> int | None:
    """Most tokens that the model can read at once, where its config says so."""
    tables = (m for n, m in model.named_modules() if n.endswith("position_embeddings"))
    for table in tables:
        if (padding := getattr(table, "padding_idx", None)) is not None:
            # RoBERTa and its kin count the places of tokens from behind that of the padding.
            return int(table.num_embeddings) - int(padding) - 1
    config = text_config(model)
    found = (getattr(config, name, None) for name in _POSITIONS)
    # XLNet's -1 means that there is no limit.
    return next((n for n in found if type(n) is int and n > 0), None)


def vocabulary_of(model: Any) -> int | None:
    """Tokens that the model tells apart, where its config says so."""
    found = getattr(text_config(model), "vocab_size", None)
    return found if isinstance(found, int) else None


def require_known_tokens(rows: Iterable[Sequence[int]], model: Any) -> None:
    """See to it that the model has an embedding for every token of these rows.

    Raises:
        UserError: it has not; the tokenizer is that of another model.
    """
    embeddings = getattr(model, "get_input_embeddings", None)
    largest = max((max(row, default=-1) for row in rows), default=-1)
    if embeddings is not None and largest >= (known := embeddings().weight.shape[0]):
        raise UserError(
            f"the text has the token {largest}, but the model knows {known} tokens; use the "
            "tokenizer of this model"
        )


def unread_by_text(base: Any, names: Collection[str]) -> list[str]:
    """Of a base that writes or classifies text the modules that only pictures or sounds pass.

    They lie outside of its text model, or are cross-attention to what is not there.
    """
    if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder:
        return []
    if not (base.can_generate() or type(base).__name__.endswith("ForSequenceClassification")):
        return []
    own, text = type(base.config), type(text_config(base))
    parts = {n: type(m.config) for n, m in base.named_modules() if isinstance(m, PreTrainedModel)}
    towers = tuple(f"{name}." for name, kind in parts.items() if kind not in (own, text))
    inside = tuple(f"{name}." for name, kind in parts.items() if kind is text)
    crossing = tuple(
        f"{name}."
        for name, module in base.named_modules()
        if "CrossAttention" in type(module).__name__ or _CROSS.search(name.rpartition(".")[2])
    )

    def is_read(name: str) -> bool:
        if f"{name}.".startswith(crossing):
            return False
        if (own is text and not towers) or "." not in name:  # such as its head
            return True
        within = own is text or f"{name}.".startswith(inside)
        return within and not (f"{name}.".startswith(towers) or _OTHER_SENSES.search(name))

    return [name for name in names if not is_read(name)]


@contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """A forward keeps no keys and values; the setting of each part's config is then as before.

    A composite model's text part asks its own section, not the setting at the top.
    """
    of_parts: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in of_parts if hasattr(config, "use_cache")}
    before = [(config, config.use_cache) for config in configs.values()]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, use_cache in before:
            config.use_cache = use_cache
