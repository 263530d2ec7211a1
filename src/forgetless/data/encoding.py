"""Texts as token ids: one beginning, one end, and nothing that the text does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Span = tuple[int, int]

# Texts that a continuation is put after, to see it as one; none of them joins with every text.
_BEFORE = ("", "\n", ".", "a", "1")


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, rendered: bool = False
) -> list[list[int]]:
    """Token ids of each text with the tokenizer's own beginning, without an end that it adds.

    A text with that beginning begins once. Texts that were ``rendered`` by the tokenizer's chat
    template have all of their special tokens, and get no others.
    """
    if not texts:
        return []
    if rendered:
        plain = tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return list(plain["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = tokenizer("", verbose=False)["input_ids"]
    begins = bos is not None and added[:1] == [bos]
    ends = eos is not None and added[int(begins) :][-1:] == [eos]
    rows: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    rows = [ids[1:] if begins and ids[:2] == [bos, bos] else ids for ids in rows]
    return [ids[:-1] if ends and ids[-1:] == [eos] else ids for ids in rows]


def ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The ids with the end-of-sequence token behind them, once, where the tokenizer has one."""
    end = [tokenizer.eos_token_id]
    return ids if end == [None] or ids[-1:] == end else ids + end


def continuation(
    tokenizer: PreTrainedTokenizerBase, before: list[int], text: str
) -> tuple[list[int], list[Span]]:
    """Token ids of a text that goes on after others, and where in the text each of them stands.

    Tokenizers in the manner of SentencePiece put a blank in front of every text; here there is
    none, so that all ids together say what all texts together say. Where no way of tokenising does
    that, as with a tokenizer that drops characters, the text is tokenised alone. The places are
    known of fast tokenizers only.
    """

    def said(ids: list[int]) -> str:
        whole: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return whole.casefold()

    known = len(said(before))
    # Later blanks are the tokenizer's own, such as behind special tokens.
    beginning = text[: len(text) - len(text.lstrip()) + 1].casefold()
    alone: tuple[list[int], list[Span]] | None = None
    for front in _BEFORE:
        first: list[int] = tokenizer(front, add_special_tokens=False)["input_ids"] if front else []
        encoded = tokenizer(
            front + text,
            add_special_tokens=False,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,
        )
        ids: list[int] = encoded["input_ids"]
        places = [(a - len(front), b - len(front)) for a, b in encoded.get("offset_mapping", ())]
        found = ids[len(first) :], places[len(first) :]
        alone = alone or found
        if ids[: len(first)] == first and said(before + found[0]).startswith(beginning, known):
            return found
    assert alone is not None
    return alone
