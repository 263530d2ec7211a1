"""Causal language models: the modality whose processor is a tokenizer and whose data is text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.data.batches import TokenRows
from forgetless.data.chat import Chat, as_chat
from forgetless.data.examples import Examples, require_kind
from forgetless.data.forms import TEXTS
from forgetless.data.modality import Batch, Modality
from forgetless.data.texts import batches, said, self_text
from forgetless.data.tokens import preference_tokens, tokenize
from forgetless.models.load import load_tokenizer
from forgetless.models.state import unwrapped
from forgetless.models.text import vocabulary_of

if TYPE_CHECKING:
    import datasets


def _check(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise what is no text, or what the tokenizer's chat template has against conversations."""
    if examples.kind == "preference":
        for which in ("chosen", "rejected"):
            _check(examples.answers(which), tokenizer)
        return
    require_kind(examples, TEXTS)
    examples = as_chat(examples, tokenizer)
    if examples.kind == "messages":
        Chat(tokenizer).check([record["messages"] for record in examples], examples.where)


def _rows(
    examples: Examples | datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    pack: bool | Literal["auto"] = "auto",
) -> TokenRows:
    if isinstance(examples, Examples) and examples.kind == "preference":
        examples = preference_tokens(examples, tokenizer, max_length)
    elif isinstance(examples, Examples):
        require_kind(examples, TEXTS)
        examples = tokenize(examples, tokenizer, max_length=max_length, pack=pack)
    return TokenRows(examples)


def _own_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    max_length: int,
    seed: int,
) -> list[str]:
    return said(tokenizer, self_text(model, tokenizer, samples, max_length, seed))


def _probe(model: PreTrainedModel) -> Batch:
    """Random tokens, (4, 32), always the same for a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    words = vocabulary_of(model) or unwrapped(model.get_input_embeddings()).num_embeddings
    tokens = torch.randint(words, (4, 32), generator=generator)
    return {"input_ids": tokens.to(next(model.parameters()).device)}


MODALITY = Modality(
    kinds=TEXTS,
    processor_name="tokenizer",
    processor_type=PreTrainedTokenizerBase,
    load_processor=load_tokenizer,
    check=_check,
    rows=_rows,
    batches=batches,
    own_texts=_own_texts,
    probe=_probe,
    labels=None,
    reader=lambda tokenizer, config: tokenizer,
    loss_task="perplexity",
    distance_task="kl",
)
