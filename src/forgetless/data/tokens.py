"""Examples as token ids, with a label for every token that is learned."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

from forgetless.core.errors import UserError
from forgetless.data.chat import Chat, Tokens
from forgetless.data.examples import Examples
from forgetless.data.files import optional_package
from forgetless.data.packing import IGNORED, Row, packed, wrapped

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


def tokenize(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    pack: bool | Literal["auto"] = "auto",
) -> datasets.Dataset:
    """Token ids and labels of every example; labels are IGNORED where nothing is learned.

    Prompt and completion are joined as they stand and the completion ends in the end-of-sequence
    token; of `messages` the assistant's turns are learned (`data.chat`). What is longer than
    `max_length` loses its end, so the beginning of the answer stays; an example whose prompt alone
    fills `max_length` has nothing to learn and is left out. Warnings count both. Raw text loses
    nothing: it is cut into blocks.

    Args:
        examples: what to turn into tokens.
        tokenizer: of the model that will be trained.
        max_length: tokens of the longest example.
        pack: fill rows of `max_length` tokens with several examples that do not see each other
            (`forgetless.data.packing`). Raw text is packed into full rows, documents ending in the
            end-of-sequence token; examples with an answer are packed whole. ``"auto"`` packs raw
            text only.

    Returns:
        A data set with the columns ``input_ids``, ``labels`` and ``lengths``, the lengths of the
        sequences of each row.

    Raises:
        UserError: nothing is left to learn, a setting does not fit the examples, or the tokenizer's
            chat template does not fit a conversation; the message names its line or row.
    """
    if max_length < 2:
        raise UserError(f"max_length must be 2 or more, got {max_length}")
    if examples.kind == "text":
        documents = _documents(examples, tokenizer)
        packs = pack is not False
        rows = wrapped(documents, max_length) if packs else _cut(documents, max_length)
    else:
        tokens = _pairs if examples.kind == "prompt_completion" else _conversations
        rows = _truncated(tokens(examples, tokenizer), max_length)
        rows = packed(rows, max_length) if rows and pack is True else rows
    if not rows:
        raise UserError(
            f"{examples.source}: no example has a token to learn within max_length={max_length}; "
            "raise max_length or shorten the prompts"
        )
    columns = {name: [getattr(row, name) for row in rows] for name in Row._fields}
    return optional_package("datasets").Dataset.from_dict(columns)


def _documents(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    texts = [record["text"] for record in examples]
    return [ids + _eos(tokenizer) for ids in _encode(tokenizer, texts)]


def _cut(documents: list[list[int]], max_length: int) -> list[Row]:
    """Each document in rows of at most `max_length` tokens, of which the first is not learned.

    Nothing predicts it, and transformers would count it into the mean loss of a GPT-2.
    """
    blocks = [
        document[start : start + max_length]
        for document in documents
        for start in range(0, len(document), max_length)
    ]
    return [Row(b, [IGNORED, *b[1:]], [len(b)]) for b in blocks if len(b) > 1]


def _pairs(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Prompt and completion as one sequence that begins with the tokens of the prompt alone.

    Both are tokenised together, as a reader would; where that merges the two across their border,
    they are tokenised apart, since a generating model is given the prompt alone.
    """
    prompts = [record["prompt"] for record in examples]
    completions = [record["completion"] for record in examples]
    alone = _encode(tokenizer, prompts)
    together = _encode(tokenizer, [p + c for p, c in zip(prompts, completions, strict=True)])
    apart = [whole[: len(p)] != p for p, whole in zip(alone, together, strict=True)]
    again = iter(
        _encode(
            tokenizer, [c for c, merged in zip(completions, apart, strict=True) if merged], False
        )
    )
    rows = []
    for prompt, whole, merged in zip(alone, together, apart, strict=True):
        answer = (next(again) if merged else whole[len(prompt) :]) + _eos(tokenizer)
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    return rows


def _conversations(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    conversations = [record["messages"] for record in examples]
    return Chat(tokenizer).tokens(conversations, examples.where)


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of each text, without an end-of-sequence token that the tokenizer adds itself."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    if not add_special_tokens or eos is None or tokenizer("")["input_ids"][-1:] != [eos]:
        return cast("list[list[int]]", encoded)
    return [ids[:-1] if ids[-1:] == [eos] else ids for ids in encoded]


def _eos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _truncated(rows: Sequence[Tokens], max_length: int) -> list[Row]:
    kept = [(ids, labels) for ids, labels in rows if _learns(labels[1:max_length])]
    fitting = f"of {len(rows)} examples do not fit max_length={max_length}"
    if left_out := len(rows) - len(kept):
        warnings.warn(
            f"{left_out} {fitting} with their prompts alone and are left out", stacklevel=3
        )
    if cut_short := sum(_learns(labels[max_length:]) for _, labels in kept):
        warnings.warn(
            f"{cut_short} {fitting}; the ends of their answers are cut off and not learned",
            stacklevel=3,
        )
    return [
        Row(ids[:max_length], labels[:max_length], [min(len(ids), max_length)])
        for ids, labels in kept
    ]


def _learns(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels)
