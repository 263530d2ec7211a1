"""An answer does not depend on what else is asked, whatever the model makes of padding."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    BloomConfig,
    LlamaForCausalLM,
    MambaConfig,
    PretrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from forgetless.data.losses import own_loss
from forgetless.tasks.generation import generate
from forgetless.tasks.inference import pads_left
from tests.composites import COMPOSITE, SPECIAL, TEXT, VOCAB, built
from tests.families import FAMILIES
from tests.tiny import tokenizer

SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, **SPECIAL}
PROMPTS = ["a", "abc def", "hello there you", " xyzzy 12345 67890 abcdefgh", "abc deg"]


class NoMask(LlamaForCausalLM):
    """As code on the hub may be: it names the mask and looks past it."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **given: Any) -> Any:
        return super().forward(input_ids=input_ids, **given)


def no_mask() -> PreTrainedModel:
    config = LlamaForCausalLM.config_class(**{k: v for k, v in TEXT.items() if k != "head_dim"})
    torch.manual_seed(0)
    model = NoMask(config).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.mul_(4)
    return model


def _of(config: Callable[[], PretrainedConfig]) -> Callable[[], PreTrainedModel]:
    return lambda: built(config())


GRIFFIN = {
    "block_types": ["recurrent", "attention"],
    "head_dim": 8,
    "num_key_value_heads": 1,
    "num_attention_heads": 4,
    "lru_width": 32,
    "attention_window_size": 16,
    "intermediate_size": 48,
}
READS_PADDING = {
    "rwkv": _of(lambda: RwkvConfig(**SMALL)),
    "recurrent_gemma": _of(lambda: RecurrentGemmaConfig(**SMALL, **GRIFFIN)),
    "looks past the mask": no_mask,
}
PASSES_OVER = {
    "mamba": _of(lambda: MambaConfig(**SMALL, state_size=8)),
    "bloom": _of(lambda: BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
    "gemma3": _of(COMPOSITE["gemma3"]),
    "gpt2": FAMILIES["gpt2"].model,
}


@pytest.mark.parametrize("base", [*READS_PADDING, *PASSES_OVER])
def test_answers_are_those_of_one_prompt_alone(base: str) -> None:
    model, words = (READS_PADDING | PASSES_OVER)[base](), tokenizer()
    alone = [generate(model, words, [p], max_new_tokens=8, stop="\x0b")[0] for p in PROMPTS]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        together = generate(model, words, PROMPTS, max_new_tokens=8, stop="\x0b")
    assert together == alone
    assert len(set(alone)) > 2
    warned = [text for w in said if "only prompts of one length" in (text := str(w.message))]
    assert bool(warned) == (base in READS_PADDING)


@pytest.mark.parametrize("base", ["gpt2", "gemma3", "bloom", "mamba"])
def test_prompts_that_are_read_in_parts_are_answered_together(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens than there is room for at first, in rows of which some end before others."""
    model, words = PASSES_OVER[base](), tokenizer()
    prompts = [*PROMPTS, *(text + " hi" for text in PROMPTS)]
    alone = [generate(model, words, [p], max_new_tokens=90, stop=["c", "ab"])[0] for p in prompts]
    monkeypatch.setattr("forgetless.tasks.logits._TOKENS", {"cpu": 64, "gpu": 64})
    read: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, given, named: read.append(len(named["input_ids"])), with_kwargs=True
    )
    assert generate(model, words, prompts, max_new_tokens=90, stop=["c", "ab"]) == alone
    hook.remove()
    assert len(set(alone)) > 2
    after_first = read[read.index(len(prompts)) :]
    assert after_first == sorted(after_first, reverse=True)
    if base == "gpt2":
        assert read[0] < len(prompts)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["rows", "low rank", "whole"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_embeddings_may_be_adapted(settings: dict[str, Any]) -> None:
    adapted = get_peft_model(FAMILIES["llama"].model(), LoraConfig(r=2, **settings))
    assert pads_left(adapted)
    assert own_loss(adapted, several=True, divides=True) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_padding(dtype: torch.dtype) -> None:
    assert pads_left(FAMILIES["llama"].model(dtype))
    assert not pads_left(no_mask().to(dtype))


def test_the_harness_answers_alike() -> None:
    pytest.importorskip("lm_eval")
    from types import SimpleNamespace

    from forgetless.tasks.harness.model import InMemory

    model = READS_PADDING["rwkv"]()
    asked = [
        SimpleNamespace(args=(prompt, {"until": ["\x0b"], "max_gen_toks": 6})) for prompt in PROMPTS
    ]
    assert InMemory(model, tokenizer(), None)._is_plain(asked[0].args[1])
    together = InMemory(model, tokenizer(), None).generate_until(asked)
    alone = [InMemory(model, tokenizer(), None).generate_until([each])[0] for each in asked]
    assert together == alone


def test_settings_of_a_model_s_generation_are_the_harness_s_to_follow() -> None:
    pytest.importorskip("lm_eval")
    from types import SimpleNamespace

    from lm_eval.models.huggingface import HFLM

    from forgetless.tasks.harness.model import InMemory

    model: Any = FAMILIES["llama"].model()
    asked = [SimpleNamespace(args=(p, {"until": ["\x0b"], "max_gen_toks": 12})) for p in PROMPTS]
    plain = InMemory(model, tokenizer(), None).generate_until(asked)
    model.generation_config.repetition_penalty = 3.0
    ours = InMemory(model, tokenizer(), None).generate_until(asked)
    assert ours == HFLM(pretrained=model, tokenizer=tokenizer()).generate_until(asked)
    assert ours != plain
