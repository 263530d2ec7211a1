"""Calibration text: what the base should keep, as batches of tokens for `collect`.

Importing this module imports no torch, so that a recipe can ask for the fingerprint of its source.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from forgetless.core.errors import UserError, unknown
from forgetless.core.progress import Bar
from forgetless.data.chat import Chat, as_chat
from forgetless.data.encoding import encode, ended
from forgetless.data.examples import Examples, from_rows, require_kind
from forgetless.data.files import require_counts
from forgetless.data.forms import TEXTS
from forgetless.data.sources import Source, read_rows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SELF = "self"
SELF_DRAWN = "self, every sequence by random numbers of its own"
"""What is hashed in its place: another way of drawing gives other texts of the same seed."""
OWN_SEED = 271_828
"""Of the texts that a base writes to be measured on: the same for all seeds of a study, and others
than those that its statistics are collected on."""

POCKET_TEXTS = {
    "pocket:knowledge": "every fact as a sentence, in the phrasings that the base was trained on",
    "pocket:held": "every fact as a question, in a phrasing that the base never saw",
    "pocket:problems": "the word problems for training",
    "pocket:problems:test": "the word problems for testing",
    "pocket:functions": "the small functions for training",
    "pocket:functions:test": "the small functions for testing",
    "pocket:series": "the series of numbers for training",
    "pocket:series:test": "the series of numbers for testing",
}
"""The texts of the pocket world, and what they are."""

POCKET_PICTURES = tuple(
    f"pocket:{domain}" for domain in ("digits", "shapes", "letters", "patterns", "pictures")
)
"""Its images for training, ten classes each and all forty; with ``:test`` those for testing."""

# What the keys and values of sequences sampled together may take; more at a time is faster.
_CACHE_BYTES = 4 * 2**30
_SAMPLED_TOGETHER = range(8, 257)
# Tokens whose probabilities are summed first where one is drawn; about the root of a vocabulary.
_BLOCK = 256
# Rows that are drawn at a time, whose probabilities stay in the processor's cache meanwhile.
_ROWS = 8
# A window needs fewer characters than this a token in nearly every language that has spaces, and
# in most others about one.
_CHARACTERS_PER_TOKEN = 8
_CHARACTERS_WITHOUT_SPACES = 2

_ANSWERS = {
    "prompt": ("completion", "response"),
    "instruction": ("output", "response"),
    "question": ("answer",),
    "query": ("response",),
    "problem": ("solution",),
}
"""What a prompt may be called -> what its answer is called beside it."""

Before = Callable[[range, int, "Tensor"], None]
"""Told the numbers of sequences, the position of the token of each that is read next, and which of
them, (sequences,) of bool, have not ended."""

T = TypeVar("T")


def batches(
    source: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 256,
    max_length: int = 256,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Batches of tokens of the knowledge to keep.

    Raw text, and prompts without answers, are joined end to end, each text closed by the
    end-of-text token, and cut into windows of `max_length` tokens. Prompts with completions, by
    the tokenizer's chat template where it has one, and conversations are one sequence each, cut off
    at `max_length`.

    Args:
        source: "self" for text sampled from the base, "pocket:knowledge" for the facts of the
            pocket world, or what `forgetless.data` reads: .txt, .jsonl, .json, .csv, .parquet or
            a datasets folder, whose rows may also be prompts without an answer.
        model: a causal language model; only "self" runs it.
        tokenizer: the model's.
        samples: how many sequences, drawn at random from a larger source; a smaller one gives
            what it has.
        max_length: tokens of the longest sequence; at most what the model has positions for.
        batch_size: sequences a batch; sequences of similar length go together.
        seed: decides which sequences are drawn, and what "self" says.

    Returns:
        `input_ids` and `attention_mask`, (batch, tokens), on the CPU, padded on the right.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: an empty or unreadable source, a count below 1, a model that is no causal
            language model, or a tokenizer of another model.
    """
    # The fingerprint of a source needs no torch.
    from forgetless.models.text import positions_of, require_known_tokens

    require_counts(samples=samples, max_length=max_length, batch_size=batch_size)
    if model.config.is_encoder_decoder:
        raise UserError(
            f"calibration text is for causal language models, got {type(model).__name__}; give "
            "forgetless.collect batches of your own"
        )
    max_length = min(max_length, positions_of(model) or max_length)
    if source == SELF:
        windows = self_text(model, tokenizer, samples, max_length, seed)
    else:
        draw = random.Random(seed)
        examples = read_examples(source)
        require_kind(examples, TEXTS)
        windows = _windows(examples, tokenizer, samples, max_length, draw)
        require_known_tokens(windows, model)
    return padded(windows, batch_size)


def padded(windows: Iterable[Sequence[int]], batch_size: int) -> list[dict[str, Tensor]]:
    """Sequences of tokens as batches, see `batches`."""
    import torch

    from forgetless.data.batches import Padding
    from forgetless.data.modality import longest_first

    rows = [
        {"input_ids": ids, "labels": ids, "lengths": [len(ids)]}
        for ids in map(torch.tensor, windows)
    ]
    joined = map(Padding(), longest_first(rows, batch_size))
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in joined]


def said(tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Sequence[int]]) -> list[str]:
    """Sequences of tokens as texts, without special tokens."""
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in sequences]


def fingerprint(source: str) -> str:
    """SHA-256 of what a source holds: the same for the same content, wherever it lies.

    Of "self" it says how it is drawn, since the base and the seed decide the rest.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: an unknown source of the pocket world, or a broken or empty file.
    """
    return SELF_DRAWN if source == SELF else read_examples(source).fingerprint


def read_examples(source: str | Path, limit: int | None = None) -> Examples:
    """The examples of a source other than "self"; a prompt without an answer is raw text.

    Args:
        source: what `forgetless.data.load_examples` reads, "pocket:knowledge", or "pocket:held",
            the facts as questions in a phrasing that the base never saw.
        limit: the first so many examples of a file; so many facts, evenly spread, of the pocket
            world's.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: an unknown source of the pocket world, or a broken or empty file.
    """
    source = str(source)
    if source in ("pocket:knowledge", "pocket:held"):
        from forgetless.data.pocket import knowledge

        held = [] if source == "pocket:knowledge" else knowledge.questions("held_out")
        texts = [question.prompt for question in held] or knowledge.knowledge_text()
        return Examples("text", [{"text": text} for text in spread(texts, limit)], source)
    plain = Source.of(source).name
    known = plain in POCKET_TEXTS or plain.removesuffix(":test") in POCKET_PICTURES
    if source.startswith("pocket:") and not known:
        raise unknown("calibration source", source, (SELF, *POCKET_TEXTS))
    rows = ((place, _as_example(row)) for place, row in read_rows(source, limit=limit))
    return from_rows(rows, source=source)


def spread(values: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of the values, evenly spread over them, in their order."""
    count = len(values) if limit is None else min(limit, len(values))
    return [values[i * len(values) // count] for i in range(count)]


def _as_example(row: Any) -> Any:
    """A row as training data has it: one answer of several, and a bare prompt as text."""
    if not isinstance(row, Mapping) or {"text", "messages", "conversations"} & set(row):
        return row
    for prompt, answers in _ANSWERS.items():
        found = [name for name in answers if name in row]
        if prompt in row and found:
            several = {n: row[n][0] for n in found if isinstance(row[n], list) and row[n]}
            return {**row, **{n: one for n, one in several.items() if isinstance(one, str)}}
    alone = next((prompt for prompt in _ANSWERS if prompt in row), None)
    return row if alone is None else {"text": row[alone]}


def _windows(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    max_length: int,
    draw: random.Random,
) -> list[list[int]]:
    if examples.kind == "text":
        texts = [record["text"] for record in examples]
        windows = _joined(texts, tokenizer, samples, max_length, draw)
    else:
        asked = list(as_chat(examples, tokenizer))
        chosen = draw.sample(asked, min(samples, len(asked)))
        windows = [_sequence(record, tokenizer)[:max_length] for record in chosen]
    windows = [window for window in windows if window]
    if not windows:
        raise UserError(f"{examples.source} holds no text to calibrate on")
    return windows


def _joined(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    max_length: int,
    draw: random.Random,
) -> list[list[int]]:
    """Windows of texts in random order, of which no more than needed are tokenised."""
    sections = [part for text in texts for part in _sections(text, max_length)]
    draw.shuffle(sections)
    stream: list[int] = []
    for text, is_last in sections:
        if len(stream) >= samples * max_length:
            break
        (ids,) = encode(tokenizer, [text])
        stream += ended(tokenizer, ids) if is_last else ids
    starts = range(0, min(len(stream), samples * max_length), max_length)
    return [stream[start : start + max_length] for start in starts]


def _sections(text: str, max_length: int) -> Iterator[tuple[str, bool]]:
    """A long text in parts that end at white space, each with whether it is the text's last.

    A part fills one window or two, so that those drawn are spread over the whole of it. Where
    there is no white space, as in Chinese, Thai or minified code, a part ends at any character.
    """
    length = _CHARACTERS_PER_TOKEN * max_length
    space = re.compile(r"\s")
    start = 0
    while start < len(text):
        stop = start + length
        if len(text) > stop and not space.search(text, start, stop):
            stop = start + _CHARACTERS_WITHOUT_SPACES * max_length
        elif found := space.search(text, stop, stop + length):
            stop = found.end()
        elif len(text) <= stop + length:
            stop = len(text)
        # A vowel or an accent stays with its letter.
        while stop < len(text) and unicodedata.category(text[stop]).startswith("M"):
            stop += 1
        yield text[start:stop], stop >= len(text)
        start = stop


def _sequence(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a prompt with its completion, or of a conversation."""
    if "messages" not in record:
        return encode(tokenizer, [record["prompt"] + record["completion"]])[0]
    chat = Chat(tokenizer)
    text = chat.render(record["messages"])
    ids: list[int] = tokenizer(text, add_special_tokens=not chat.is_own, verbose=False)["input_ids"]
    return ids


def self_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    max_length: int,
    seed: int,
    start: int = 0,
    before: Before | None = None,
) -> list[list[int]]:
    """Sequences sampled from the base itself, at temperature 1 and from the whole vocabulary.

    Each begins with the beginning-of-text token or, where the model has none, with a random token
    of its vocabulary that is not special, and ends with the end-of-text token or at `max_length`,
    or where the model has no more positions. Of a PeftModel the base speaks, adapters off; see
    `as_writer` for its precision. The global random state is left as it was. With its number, from
    `start` on so that more can be written later, the seed decides a sequence, up to the rounding of
    logits, which depends on how many are written together. `before` is called before each forward
    of those.

    Returns:
        `samples` lists of token ids, the same for the same arguments.

    Raises:
        UserError: the model gives NaN or infinite probabilities.
    """
    import torch

    from forgetless.models.cache import can_be_joined
    from forgetless.models.sampling import as_writer
    from forgetless.models.text import positions_of

    max_length = min(max_length, positions_of(model) or max_length)
    firsts = _first_tokens(model, tokenizer, start + samples, random.Random(seed))
    sampled: list[list[int]] = []
    bar = Bar("the base writes", samples * max_length, "tokens")
    with as_writer(model) as base, bar:
        device = next(base.parameters()).device
        read = base(input_ids=torch.tensor([firsts[start : start + 1]], device=device))
        if not read.logits.isfinite().all():
            raise UserError("the base gives NaN or infinity instead of text; check its weights")
        cache = getattr(read, "past_key_values", None)
        writer = _Writer(
            base,
            max_length,
            tokenizer.eos_token_id,
            seed,
            bar,
            cache if can_be_joined(cache) else None,
            before or (lambda *_: None),
        )
        parts = math.ceil(samples / sampled_together(base, max_length))
        ends = [start + samples * part // parts for part in range(parts + 1)]
        for rows in map(range, ends, ends[1:]):
            begin = torch.tensor(firsts[rows.start : rows.stop], device=device)[:, None]
            sampled += writer.write(begin, rows)
    return sampled


def _first_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int, draw: random.Random
) -> list[int]:
    config = model.config.get_text_config()
    bos = tokenizer.bos_token_id
    if bos is None:
        bos = config.bos_token_id
    if bos is not None:
        return [bos] * samples
    special = set(tokenizer.all_special_ids)
    usual = [i for i in range(min(len(tokenizer), config.vocab_size)) if i not in special]
    return draw.choices(usual, k=samples)


def sampled_together(model: PreTrainedModel, max_length: int) -> int:
    """How many sequences are sampled at a time, by the memory of their keys and values."""
    row_bytes = cached_bytes(model) * max_length
    return max(_SAMPLED_TOGETHER[0], min(_CACHE_BYTES // row_bytes, _SAMPLED_TOGETHER[-1]))


def cached_bytes(model: PreTrainedModel) -> int:
    """Bytes that the keys and values of a token take in all layers.

    Of a base without attention what as many numbers as its hidden size would take.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    size = next(model.parameters()).element_size()
    return int(2 * size * config.num_hidden_layers * kept * width)


@dataclass(frozen=True)
class _Writer:
    """Sampling from one base.

    Attributes:
        cache: of a sequence of the base, whose layers show what keys and values look like; None
            where its cache is of another kind, which it then makes itself.
    """

    base: Any
    max_length: int
    eos: int | None
    seed: int
    bar: Bar
    cache: Any
    before: Before

    def write(self, begin: Tensor, numbers: range) -> list[list[int]]:
        """Continuations of `begin` (batch, 1), each cut after its first end-of-text token.

        A sequence draws by random numbers of its own, so no other one changes what it says.
        """
        import numpy as np
        import torch
        from transformers import GenerationConfig

        from forgetless.models.cache import with_room

        if self.max_length <= 1:
            return [[token] for token in begin[:, 0].tolist()]
        drawn = [np.random.default_rng((self.seed, n)).random(self.max_length) for n in numbers]
        levels = torch.tensor(np.array(drawn)).to(begin.device, torch.float64)

        def choose(ids: Tensor, scores: Tensor) -> Tensor:
            """Scores of which the drawn token's is the largest; one token more is counted."""
            self.bar.advance(len(begin))
            token = _drawn(scores, levels[:, ids.shape[1] - 1, None])
            ends = torch.cat([ids[:, 1:], token], 1) == (-1 if self.eos is None else self.eos)
            self.before(numbers, ids.shape[1], ~ends.any(1))
            return scores.zero_().scatter_(1, token, 1.0)

        config = GenerationConfig(
            do_sample=False,
            max_length=self.max_length,
            eos_token_id=self.eos,
            pad_token_id=0 if self.eos is None else self.eos,
        )
        room = {}
        if self.cache is not None:
            room["past_key_values"] = with_room(self.cache, len(begin), self.max_length)
        self.before(numbers, 0, torch.ones_like(begin[:, 0], dtype=torch.bool))
        usual, self.base.generation_config = self.base.generation_config, config
        try:  # its own values would fill in for those unset
            ids = self.base.generate(
                input_ids=begin,
                attention_mask=torch.ones_like(begin),
                generation_config=config,
                logits_processor=[choose],
                **room,
            )
        finally:
            self.base.generation_config = usual
        self.bar.advance(len(begin) * (self.max_length - ids.shape[1] + 1))  # all may have ended
        return [_until(row, self.eos) for row in ids.tolist()]


def _drawn(logits: Tensor, level: Tensor) -> Tensor:
    """The token at which the cumulated probabilities first exceed a level, one a row, (rows, 1).

    Each row of logits, (rows, tokens), has a level in [0, 1), (rows, 1), float64. The logits are
    overwritten.
    """
    import torch

    starts = range(0, len(logits), _ROWS)
    parts = [_drawn_of_few(logits[i : i + _ROWS], level[i : i + _ROWS]) for i in starts]
    return torch.cat(parts)


def _drawn_of_few(logits: Tensor, level: Tensor) -> Tensor:
    """Found among sums of blocks of tokens first and then within one block.

    A cumulated sum over a whole vocabulary takes longer than all else of a draw.
    """
    from torch.nn import functional

    weights = logits.sub_(logits.amax(1, keepdim=True)).exp_()
    size = weights.shape[1]
    blocks = functional.pad(weights, (0, -size % _BLOCK)).reshape(len(weights), -1, _BLOCK)
    block, level = _first_above(blocks.sum(2), level)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
    token, _ = _first_above(inside, level)
    return (block * _BLOCK + token).clamp(max=size - 1)


def _first_above(weights: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulated share of weights first exceeds a level, and the level within that one."""
    reached = weights.double().cumsum(1)
    goal = level * reached[:, -1:]
    place = (reached <= goal).sum(1, keepdim=True).clamp(max=weights.shape[1] - 1)
    own = weights.double().gather(1, place)
    return place, (1 - (reached.gather(1, place) - goal) / own).clamp(0, 1 - 1e-12)


def _until(ids: list[int], eos: int | None) -> list[int]:
    """The ids up to the first `eos` after the first token, which may be the same."""
    return ids[: ids.index(eos, 1) + 1] if eos in ids[1:] else ids
