"""The shapes of Llama-2-7B and Llama-3.1-8B, and models of them with random weights.

A `scale` above 1 divides every width, so that a script can be tried on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

GIB = 2**30

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""Model -> the sizes in its config."""

Inputs = dict[str, tuple[int, dict[str, int]]]
"""Input of a block -> its size, and the out of every layer that reads it."""


def sizes_of(model: str, scale: int = 1) -> dict[str, int]:
    """The sizes in a model's config; vocabulary and widths are divided by the scale."""
    return {
        name: size // scale if name.endswith("_size") else size
        for name, size in SHAPES[model].items()
    }


def inputs_of(model: str, scale: int = 1) -> Inputs:
    """What the linear layers of one block read."""
    sizes = sizes_of(model, scale)
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    narrow = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    return {
        "qkv": (hidden, {"q": hidden, "k": narrow, "v": narrow}),
        "o": (hidden, {"o": hidden}),
        "gate/up": (hidden, {"gate": inner, "up": inner}),
        "down": (inner, {"down": hidden}),
    }


def random_model(
    model: str, device: torch.device, *, blocks: int | None = None, scale: int = 1
) -> nn.Module:
    """A Llama of these shapes, made on the device; in bfloat16 on a GPU.

    Args:
        model: a key of `SHAPES`.
        device: where it is made.
        blocks: the first so many, None for all.
        scale: what the widths are divided by.
    """
    sizes = sizes_of(model, scale)
    sizes["num_hidden_layers"] = blocks or sizes["num_hidden_layers"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            made: nn.Module = LlamaForCausalLM(
                LlamaConfig(**sizes, max_position_embeddings=4096, dtype=dtype)
            )
    finally:
        torch.set_default_dtype(torch.float32)
    return made.eval().requires_grad_(False)


def random_batches(
    vocabulary: int, texts: int, length: int, rows: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Texts of random tokens, so many a batch, all of the same length."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (texts, length), generator=generator).to(device)
    return [{"input_ids": part} for part in torch.split(tokens, rows)]
