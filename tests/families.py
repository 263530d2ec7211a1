"""Tiny models of six families, built from configs: no download, a few thousand weights each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB = 100
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_llama() -> PreTrainedModel:
    """Llama with grouped queries and tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            **SPECIAL,
        )
    )


def tiny_qwen2() -> PreTrainedModel:
    """Qwen2: biases on q, k, v and grouped queries."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            **SPECIAL,
        )
    )


def tiny_gpt2() -> PreTrainedModel:
    """GPT-2: Conv1D layers, whose weights are stored (in, out)."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, **SPECIAL)
    )


def tiny_t5() -> PreTrainedModel:
    """T5: an encoder and a decoder with cross-attention."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=1,
            num_decoder_layers=2,  # whose cross-attentions share what they read
            num_heads=4,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    )


def tiny_bert() -> PreTrainedModel:
    """BERT with a masked-language head."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
        )
    )


def tiny_vit() -> PreTrainedModel:
    """ViT classifier on 8 x 8 images of one channel."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=5,
        )
    )


def token_batch(rows: int = 3, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens; the later rows end in padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - 2 * row :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def language_batch(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Tokens with labels; padding is not a target."""
    batch = token_batch(rows, seed=seed)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def sequence_pair_batch(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A source and a target for an encoder-decoder."""
    target = token_batch(rows, length=7, seed=seed + 1)
    return token_batch(rows, seed=seed) | {
        "labels": target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    }


def image_batch(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 1, 8, 8, generator=generator),
        "labels": torch.randint(0, 5, (rows,), generator=generator),
    }


@dataclass(frozen=True)
class Family:
    """How to build one tiny model and one batch for it."""

    build: Callable[[], PreTrainedModel]
    batch: Callable[..., dict[str, Tensor]]
    gain: float = 4.0

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        """The same random weights at every call, in evaluation mode.

        The matrices are `gain` times larger than at the usual start, so that every layer matters.
        """
        torch.manual_seed(seed)
        model = self.build()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2:
                    weight.mul_(self.gain)
                else:
                    weight.add_(0.05 * torch.randn_like(weight))
        return model.to(dtype).eval()


FAMILIES = {
    "llama": Family(tiny_llama, language_batch),
    "qwen2": Family(tiny_qwen2, language_batch),
    "gpt2": Family(tiny_gpt2, language_batch),
    "t5": Family(tiny_t5, sequence_pair_batch, gain=0.5),
    "bert": Family(tiny_bert, language_batch),
    "vit": Family(tiny_vit, image_batch),
}
