"""Generation in batches, greedy or drawn: what every task that reads an answer shares."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from forgetless.core.errors import UserError
from forgetless.data.encoding import encode
from forgetless.models.cache import can_be_joined, joined
from forgetless.models.state import base_of, evaluating
from forgetless.models.text import positions_of, require_known_tokens
from forgetless.tasks.inference import (
    Ids,
    accepts,
    by_length,
    device_of,
    pad,
    padding_of,
    pads_left,
    require_causal,
    require_numbers,
    rows_with_cache,
)
from forgetless.tasks.journal import in_batches
from forgetless.tasks.logits import tokens_at_once
from forgetless.tasks.sampling import Sampling

# Steps between two looks for a longer stop, each of which decodes all that was written.
_LOOK = 8


class Written(str):
    """What a model wrote.

    Attributes:
        is_cut: whether it was still writing when it had all of its tokens.
    """

    __slots__ = ("is_cut",)
    is_cut: bool

    def __new__(cls, text: str, is_cut: bool = False) -> Written:
        made = super().__new__(cls, text)
        made.is_cut = is_cut
        return made


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] = "\n",
    batch_size: int | None = None,
    sampling: Sampling | None = None,
    rendered: bool = False,
) -> list[Written]:
    """The most probable continuation of each prompt, token by token, in the order of the prompts.

    A continuation ends before `stop`, at the model's or tokenizer's end of text, or after
    `max_new_tokens`. Prompts of similar length share a batch, padded on the left, or only those of
    one length where the model does not pass over padding; rows that have ended leave it, so a batch
    costs what its unfinished rows cost. Sampling settings that a model carries with it are not
    used.

    Args:
        model: a causal language model, or a PeftModel of one.
        tokenizer: of the model.
        prompts: given as they are, with the tokenizer's own beginning of text.
        max_new_tokens: 1 or more.
        stop: a text, usually the newline, or several of which the first that comes ends it.
        batch_size: prompts at once; None for as many as `rows_with_cache` says, 32 to 256.
        sampling: draw each token instead of taking the most probable one.
        rendered: the prompts were rendered by the tokenizer's chat template, see `encode`.

    Raises:
        UserError: not a causal language model; a prompt that does not fit with its answer; or
            logits that are nan.
    """
    require_causal(model)
    rows = encode(tokenizer, prompts, rendered=rendered)
    require_known_tokens(rows, model)
    _check_room(model, rows, max_new_tokens)
    ends = _end_ids(model, tokenizer)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    decoder = Decoder(model, tokenizer, max_new_tokens, stops)
    longest = max(map(len, rows), default=0) + max_new_tokens

    def continuations(places: Sequence[int]) -> list[tuple[str, bool]]:
        choose = _best if sampling is None else sampling.chooser(places, max_new_tokens)
        found = decoder.continuations([rows[i] for i in places], choose)
        full = [len(ids) == max_new_tokens and ids[-1] not in ends for ids in found]
        # A token with the stop in it may hold the end of the answer, an end of text does not.
        found = [ids[:-1] if ids[-1] in ends else ids for ids in found]
        asked = [list(rows[i]) for i in places]
        wholes = [[*prompt, *answer] for prompt, answer in zip(asked, found, strict=True)]
        # A text alone loses its first blank where the tokenizer puts one in front of every text.
        said = tokenizer.batch_decode(asked + wholes + found, skip_special_tokens=True)
        n = len(asked)
        texts = [
            whole[len(prompt) :] if whole.startswith(prompt) else alone
            for prompt, whole, alone in zip(said[:n], said[n : 2 * n], said[2 * n :], strict=True)
        ]
        return [
            (before := _until(text, stops), is_full and before == text)
            for text, is_full in zip(texts, full, strict=True)
        ]

    drawn = [] if sampling is None else [[sampling.temperature, sampling.top_p, sampling.seed]]
    with evaluating(model):
        size = batch_size or rows_with_cache(model, longest)
        lengths = {len(row) for row in rows}
        alike = len(lengths) > 1 and size > 1 and not pads_left(model)
        if alike:
            warnings.warn(
                f"{type(base_of(model)).__name__} does not pass over padding in front of a prompt, "
                "so only prompts of one length are answered together",
                stacklevel=2,
            )
        batches = by_length(rows, size, alike=alike)
        how = (max_new_tokens, stop, *drawn)
        found = in_batches("written", rows, batches, continuations, *how, divisible=True)
    return [Written(*each) for each in found]


Choose = Callable[[Tensor, Tensor, int], Tensor]
"""The next token of each row from logits (rows, tokens), the rows' numbers and the step."""


def _best(logits: Tensor, rows: Tensor, step: int) -> Tensor:
    """The most probable token."""
    return logits.argmax(-1)


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)]


class Decoder:
    """Decoding of one batch after the other by the same model, with the same ends."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, steps: int, stops: Sequence[str]
    ) -> None:
        self.model, self.tokenizer, self.steps = model, tokenizer, steps
        # One character is in one token, and so is a special token; more may be spread over tokens.
        inside = [_ids_with(text, tokenizer, len(tokenizer)) for text in stops if len(text) == 1]
        special = tokenizer.get_added_vocab()
        alone = {special[text] for text in stops if text in special}
        self.ends = _end_ids(model, tokenizer).union(alone, *inside)
        self.stops = [text for text in stops if len(text) > 1]
        self.joins = True  # until the model has another kind of cache
        self.fill = padding_of(model, tokenizer)
        self.device = device_of(model)
        self.end_ids = torch.tensor(sorted(self.ends), device=self.device, dtype=torch.long)

    def continuations(self, rows: Sequence[Ids], choose: Choose = _best) -> list[list[int]]:
        """New tokens of each row, up to and with the one that ends it."""
        state = self._read(rows)
        output = torch.full((len(rows), self.steps), self.fill, device=self.device)
        alive = torch.arange(len(rows), device=self.device)
        running = torch.ones_like(alive, dtype=torch.bool)
        for step in range(self.steps):
            token = choose(state.next_logits(), alive, step)
            output[alive, step] = token
            running &= ~torch.isin(token, self.end_ids)
            if self.stops and step % _LOOK == _LOOK - 1:
                texts = self.tokenizer.batch_decode(output[alive, : step + 1].tolist())
                found = [any(stop in text for stop in self.stops) for text in texts]
                running &= ~torch.tensor(found, device=self.device)
            left = int(running.sum())
            if left == 0 or step + 1 == self.steps:
                break
            # Taking rows out copies the cache, so it waits until a quarter of them have ended.
            if left <= 0.75 * len(running):
                keep = running.nonzero().squeeze(1)
                alive, token, running = alive[keep], token[keep], running[keep]
                state.keep_rows(keep)
            state.append(token)
        return [
            ids[: next((i + 1 for i, token in enumerate(ids) if token in self.ends), len(ids))]
            for ids in output.tolist()
        ]

    def _read(self, rows: Sequence[Ids]) -> _State:
        """The rows before their first new token, read part by part where that can be joined."""
        size = max(1, tokens_at_once(self.model) // max(map(len, rows)))
        parts = [rows[i : i + size] for i in range(0, len(rows), size)] if self.joins else [rows]
        states = []
        for part in parts:
            states.append(_State(self.model, pad(part, self.fill, self.device, left=True)))
            states[-1].next_logits()
            if not can_be_joined(states[-1].cache):
                self.joins = False
                return states[-1] if len(part) == len(rows) else self._read(rows)
        return _joined(states, self.fill)


class _State:
    """One batch on its way: all tokens so far, those not yet seen by the model, and its cache."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self.model = model
        self.ids, self.mask = batch["input_ids"], batch["attention_mask"]
        self.logits: Tensor | None = None
        self.cache: Any = None
        self.cached = accepts(model, "past_key_values")
        self.positions = accepts(model, "position_ids")
        self.options: dict[str, Any] = {"use_cache": True} if self.cached else {}
        if accepts(model, "logits_to_keep"):
            self.options["logits_to_keep"] = 1

    def next_logits(self) -> Tensor:
        """Of the next token of each row, (rows, tokens)."""
        if self.logits is not None:
            return self.logits
        seen = 0 if self.cache is None else self.length - 1
        inputs: dict[str, Any] = {"input_ids": self.ids[:, seen:], "attention_mask": self.mask}
        if self.positions:
            inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, seen:]
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        output = self.model(**inputs, **self.options)
        self.cache = getattr(output, "past_key_values", None) if self.cached else None
        if self.cached and self.cache is None:  # it keeps its state to itself: read all again
            self.cached, self.options["use_cache"] = False, False
        # A copy, or all logits of a model that makes them would be held.
        self.logits = output.logits[:, -1].clone()
        require_numbers(self.logits)
        return self.logits

    @property
    def length(self) -> int:
        """Tokens of each row so far, padding included."""
        return self.ids.shape[1]

    def append(self, token: Tensor) -> None:
        """Put one more token, (rows,), at the end of each row."""
        self.ids = torch.cat([self.ids, token[:, None]], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(token)[:, None]], 1)
        self.logits = None

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        if self.cache is not None:
            self.cache.reorder_cache(rows)


def _joined(states: Sequence[_State], fill: int) -> _State:
    """The rows of several states in one, padded on the left to the longest."""
    first, longest = states[0], max(state.length for state in states)

    def cat(parts: Sequence[Tensor], value: int) -> Tensor:
        wide = [functional.pad(part, (longest - part.shape[1], 0), value=value) for part in parts]
        return torch.cat(wide)

    first.logits = torch.cat([state.next_logits() for state in states])
    first.ids = cat([state.ids for state in states], fill)
    first.mask = cat([state.mask for state in states], 0)
    first.cache = joined([state.cache for state in states])
    return first


def _end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a text for the tokenizer or for the model's own generation."""
    ends = {tokenizer.eos_token_id}
    settings = getattr(model, "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    ends.update(own if isinstance(own, list) else [own])
    return ends - {None}


@lru_cache(maxsize=8)
def _ids_with(character: str, tokenizer: PreTrainedTokenizerBase, size: int) -> frozenset[int]:
    """Every token of the first `size` whose text holds the character."""
    texts = tokenizer.batch_decode([[token] for token in range(size)])
    return frozenset(token for token, text in enumerate(texts) if character in text)


def _check_room(model: nn.Module, rows: Sequence[Ids], new: int) -> None:
    """Refuse prompts that leave no room for their answer, and empty ones."""
    room = positions_of(model)
    longest = max((len(row) for row in rows), default=0)
    if room is not None and longest + new > room:
        raise UserError(
            f"a prompt of {longest} tokens with up to {new} new ones does not fit into the "
            f"model's {room} positions; shorten the prompts"
        )
    if any(len(row) == 0 for row in rows):
        raise UserError("a prompt is empty and the tokenizer adds no beginning; nothing to go on")
