"""Examples as token ids, with a label for every token that is learned."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from forgetless.core.errors import UserError, first_few
from forgetless.data.chat import Chat, as_chat
from forgetless.data.encoding import continuation, encode, ended
from forgetless.data.examples import Examples
from forgetless.data.files import optional_package
from forgetless.data.packing import IGNORED, TokenRow, packed, wrapped

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

    Prompt and completion go through the tokenizer's chat template (`data.chat.as_chat`). Without
    one they are joined as they stand, and the completion ends in the end-of-sequence token. Of
    `messages` the assistant's turns are learned (`data.chat`). What is longer than
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
    examples = as_chat(examples, tokenizer)
    if examples.kind == "text":
        texts = encode(tokenizer, [record["text"] for record in examples])
        documents = [ended(tokenizer, ids) for ids in texts]
        rows = (_cut if pack is False else wrapped)(documents, max_length)
    else:
        if examples.kind == "messages":
            conversations = [record["messages"] for record in examples]
            rows = Chat(tokenizer).tokens(conversations, examples.where)
        else:
            rows = _pairs(examples, tokenizer)
        rows = _truncated(rows, max_length, examples.where)
        rows = packed(rows, max_length) if rows and pack is True else rows
    if not rows:
        raise UserError(
            f"{examples.source}: no example has a token to learn within max_length={max_length}; "
            "raise max_length or shorten the prompts"
        )
    columns = {name: [getattr(row, name) for row in rows] for name in TokenRow._fields}
    return optional_package("datasets").Dataset.from_dict(columns)


def preference_tokens(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int = 512
) -> datasets.Dataset:
    """Rows of two sequences that do not see each other: a prompt with the chosen answer, and with
    the rejected one.

    What is longer than `max_length` tokens loses its end.

    Returns:
        As `tokenize`; of each pair the answers are learned. A pair of which one answer has nothing
        to learn within `max_length` is left out, of which a warning says how many.

    Raises:
        UserError: no pair is left, or the tokenizer's chat template does not fit.
    """
    chosen = _whole(examples.answers("chosen"), tokenizer)
    rejected = _whole(examples.answers("rejected"), tokenizer)
    rows = []
    for pair in zip(chosen, rejected, strict=True):
        ids = [row.input_ids[:max_length] for row in pair]
        labels = [row.labels[1:max_length] for row in pair]  # nothing comes before the first token
        if all(map(_learns, labels)):
            joined = [label for part in labels for label in (IGNORED, *part)]
            rows.append(TokenRow(ids[0] + ids[1], joined, list(map(len, ids))))
    if not rows:
        raise UserError(
            f"{examples.source}: no pair has two answers within max_length={max_length}; raise it "
            "or shorten the prompts"
        )
    if left_out := len(examples) - len(rows):
        warnings.warn(
            f"{left_out} of {len(examples)} pairs do not fit max_length={max_length} with their "
            "prompts alone and are left out",
            stacklevel=2,
        )
    columns = {name: [getattr(row, name) for row in rows] for name in TokenRow._fields}
    return optional_package("datasets").Dataset.from_dict(columns)


def _whole(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """One row an example; of a conversation that a template makes several of, the whole one."""
    examples = as_chat(examples, tokenizer)
    if examples.kind != "messages":
        return _pairs(examples, tokenizer)
    chat = Chat(tokenizer)
    return [
        chat.tokens([record["messages"]], [where])[-1]
        for record, where in zip(examples, examples.where, strict=True)
    ]


def _cut(documents: list[list[int]], max_length: int) -> list[TokenRow]:
    """Each document in rows of at most `max_length` tokens, of which the first is not learned.

    Nothing predicts it, and transformers would count it into the mean loss of a GPT-2.
    """
    blocks = [
        document[start : start + max_length]
        for document in documents
        for start in range(0, len(document), max_length)
    ]
    return [TokenRow(b, [IGNORED, *b[1:]], [len(b)]) for b in blocks if len(b) > 1]


def _pairs(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """Prompt and completion as one sequence that begins with the tokens of the prompt alone.

    Both are tokenised together, as a reader would; where that merges the two across their border,
    the completion is tokenised by itself, since a generating model is given the prompt alone.
    """
    prompts = [record["prompt"] for record in examples]
    completions = [record["completion"] for record in examples]
    together = encode(tokenizer, [p + c for p, c in zip(prompts, completions, strict=True)])
    rows = []
    for prompt, completion, whole in zip(
        encode(tokenizer, prompts), completions, together, strict=True
    ):
        if whole[: len(prompt)] == prompt:
            answer = whole[len(prompt) :]
        else:
            answer, _ = continuation(tokenizer, prompt, completion)
        answer = ended(tokenizer, answer)
        ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        rows.append(TokenRow(ids, labels, [len(ids)]))
    return rows


def _truncated(rows: Sequence[TokenRow], max_length: int, places: Sequence[str]) -> list[TokenRow]:
    """Rows of at most so many tokens; those that have nothing to learn in them are named."""
    learning = [_learns(row.labels[1:max_length]) for row in rows]
    kept = [row for row, learns in zip(rows, learning, strict=True) if learns]
    fitting = f"of {len(rows)} examples do not fit max_length={max_length}"
    if left_out := len(rows) - len(kept):
        said = f"{left_out} {fitting} with their prompts alone and are left out"
        if len(places) == len(rows):  # a conversation may be several rows
            said += ": " + first_few(
                [place for place, learns in zip(places, learning, strict=True) if not learns]
            )
        warnings.warn(said, stacklevel=3)
    if cut_short := sum(_learns(row.labels[max_length:]) for row in kept):
        warnings.warn(
            f"{cut_short} {fitting}; the ends of their answers are cut off and not learned",
            stacklevel=3,
        )
    return [
        TokenRow(ids[:max_length], labels[:max_length], [min(length, max_length)])
        for ids, labels, (length,) in kept
    ]


def _learns(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels)
