"""What is learned of conversations without marks in their template, and of their last token."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from forgetless.adapters.attachment import attach
from forgetless.data.batches import TokenRows
from forgetless.data.tokens import tokenize
from tests.data.test_forms import PAIRS, byte_tokenizer, examples, learned
from tests.training.test_loop import tiny_speaker

CHATML = (
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "SmolLM2": "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n' }}{% endif %}" + CHATML,
    "ChatML": "{% for message in messages %}" + CHATML,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_of_two_turns_the_answers_and_their_ends_are_learned(name: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATES[name]
    said = ["Hello?", "Hi, I am here.", "The capital of France?", "Paris, as ever."]
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    (row,) = tokenize(examples({"messages": turns}), tokenizer, max_length=1000)
    assert learned(tokenizer, row) == "Hi, I am here.<|im_end|>Paris, as ever.<|im_end|>"
    pair = examples({"prompt": turns[:3], "completion": turns[3:]})
    (row,) = tokenize(pair, tokenizer, max_length=1000)
    assert learned(tokenizer, row) == "Paris, as ever.<|im_end|>"


def test_an_untrained_end_of_the_answers_is_warned_of() -> None:
    tokenizer = byte_tokenizer()
    rows = TokenRows(tokenize(examples(*PAIRS), tokenizer))
    end = tokenizer.eos_token_id

    def speaker(row: Any = None) -> Any:
        model = tiny_speaker()
        if row is not None:
            with torch.no_grad():
                model.lm_head.weight[end] = row(model.lm_head.weight)
        return model

    def attached_to(model: Any, *targets: str) -> Any:
        return attach(model, "lora", rank=2, target_modules=["q_proj", *targets])

    untrained = {
        "zeros": lambda weight: torch.zeros(32),
        "noise": lambda weight: 0.1 * torch.randn(32) * weight.std(),
        "the mean": lambda weight: weight.mean(0) + 0.01 * torch.randn(32) * weight.std(),
    }
    for row in untrained.values():
        with pytest.warns(UserWarning, match=f"the token {end}, .* may never stop.*lm_head"):
            rows.require_fitting(attached_to(speaker(row)))
    quiet = [attached_to(speaker()), attached_to(speaker(untrained["noise"]), "lm_head")]
    for model in [*quiet, speaker(untrained["zeros"])]:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            rows.require_fitting(model)
