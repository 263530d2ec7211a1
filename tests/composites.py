"""Tiny bases whose config is composite, or whose architecture is seldom: what users load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma4Config,
    GitConfig,
    Idefics2Config,
    LlavaConfig,
    MllamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from tests.tiny import tokenizer

VOCAB = len(tokenizer())
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    **SPECIAL,
}
EYES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN_MARKS = {
    name: VOCAB - 1 - i
    for i, name in enumerate(
        ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    )
}


def _gemma3() -> PretrainedConfig:
    marks = {"image_token_index": 99, "boi_token_index": 98, "eoi_token_index": 97}
    text = {**TEXT, "sliding_window": 8}
    return Gemma3Config(text_config=text, vision_config=EYES, mm_tokens_per_image=1, **marks)


def _gemma4() -> PretrainedConfig:
    text = {
        **TEXT,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    }
    eyes = {**EYES, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 8}
    return Gemma4Config(text_config=text, vision_config=eyes, audio_config=None)


def _llava() -> PretrainedConfig:
    eyes = {"model_type": "clip_vision_model", "projection_dim": 16, **EYES}
    text = {"model_type": "llama", **TEXT}
    return LlavaConfig(text_config=text, vision_config=eyes, image_token_index=99)


_QWEN_EYES = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 16,
    "out_hidden_size": 32,
}


def _qwen3_vl() -> PretrainedConfig:
    eyes = {
        **_QWEN_EYES,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    text = {**TEXT, "rope_parameters": _ROTARY}
    return Qwen3VLConfig(text_config=text, vision_config=eyes, **_QWEN_MARKS)


def _qwen2_5_vl() -> PretrainedConfig:
    eyes = {**_QWEN_EYES, "fullatt_block_indexes": [0]}
    text = {**TEXT, "rope_parameters": _ROTARY}
    del text["head_dim"]
    return Qwen2_5_VLConfig(text_config=text, vision_config=eyes, **_QWEN_MARKS)


def _mllama() -> PretrainedConfig:
    eyes = {
        **EYES,
        "num_global_layers": 1,
        "attention_heads": 2,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    return MllamaConfig(text_config=text, vision_config=eyes, image_token_index=99)


def _git() -> PretrainedConfig:
    text = {k: v for k, v in TEXT.items() if k not in ("head_dim", "num_key_value_heads")}
    return GitConfig(vision_config=EYES, **text)


def _idefics2() -> PretrainedConfig:
    perceiver = {
        "hidden_size": 32,
        "resampler_n_latents": 2,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }
    text = {"model_type": "mistral", **TEXT}
    return Idefics2Config(
        text_config=text, vision_config=EYES, perceiver_config=perceiver, image_token_id=99
    )


COMPOSITE: Mapping[str, Any] = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "llava": _llava,
    "qwen3_vl": _qwen3_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "mllama": _mllama,
    "git": _git,
    "idefics2": _idefics2,
}
"""Architectures with a tower for pictures beside the text model, or inside of it."""


def built(config: PretrainedConfig, gain: float = 3.0, seed: int = 0) -> PreTrainedModel:
    """A model that writes text, with the same random weights at every call.

    The matrices are `gain` times larger than at the usual start, so that every layer matters.
    """
    torch.manual_seed(seed)
    writes = type(config) in AutoModelForCausalLM._model_mapping
    auto: Any = AutoModelForCausalLM if writes else AutoModelForImageTextToText
    model: PreTrainedModel = auto.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(gain)
    return model
