"""What is learned of conversations under templates as they are published, without marks."""

from __future__ import annotations

import pytest

from forgetless.data.tokens import tokenize
from tests.data.test_forms import byte_tokenizer, examples, learned

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
