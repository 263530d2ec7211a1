"""Start every layer of a whole large model on one device: seconds of each part, and peak memory.

    python benchmarks/whole_model.py                                            # small, on the CPU
    python benchmarks/whole_model.py --shapes llama-2-7b llama-3.1-8b --device cuda

The weights are random at the shapes of the named model, in bfloat16 on a GPU. All seven kinds of
linear layers get a rank-128 LoRA-Null start from the statistics of 256 x 2048 tokens. Prints a
table and writes benchmarks/results/whole_model.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import forgetless
from timing import report, timed

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
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
GIB = 2**30


def random_model(shapes: str, device: torch.device) -> nn.Module:
    """A Llama of these shapes with random weights, made on the device."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(**SHAPES[shapes], max_position_embeddings=4096, dtype=dtype)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def random_batches(shapes: str, samples: int, length: int, rows: int) -> list[dict[str, Tensor]]:
    """Batches of so many rows of random tokens; on the CPU, as a tokenizer gives them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SHAPES[shapes]["vocab_size"], (samples, length), generator=generator)
    return [{"input_ids": part} for part in torch.split(tokens, rows)]


def measure(shapes: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the statistics and of the start, and what they held beyond the model."""
    device = torch.device(options.device)
    model = random_model(shapes, device)
    batches = random_batches(shapes, options.samples, options.length, options.batch_size)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found: dict[str, Any] = {}

    def collect() -> None:
        found["stats"] = forgetless.collect(model, batches, memory_budget=options.memory_budget)

    def attach() -> None:
        forgetless.attach(
            model, "lora_null_v1", rank=options.rank, alpha=options.rank, stats=found["stats"]
        )

    statistics, start = timed(collect, device), timed(attach, device)
    row: dict[str, Any] = {"shapes": shapes, "statistics s": statistics, "start s": start}
    row["total s"] = statistics + start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    row["model GiB"] = weights / GIB
    row["beyond it GiB"] = None if peak is None else (peak - weights) / GIB
    return row


def main() -> None:
    """Measure the named shapes one after the other."""
    parser = argparse.ArgumentParser(description="Start of a whole large model.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, help="128, for small shapes 16")
    parser.add_argument("--samples", type=int, help="256, for small shapes 16")
    parser.add_argument("--length", type=int, help="2048, for small shapes 256")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--memory-budget", help="for the matrices of one pass, such as 16GiB")
    options = parser.parse_args()
    small = options.shapes == ["small"]
    options.rank = options.rank or (16 if small else 128)
    options.samples = options.samples or (16 if small else 256)
    options.length = options.length or (256 if small else 2048)
    options.memory_budget = options.memory_budget or (None if small else "16GiB")
    rows = [measure(shapes, options) for shapes in options.shapes]
    settings = {name: getattr(options, name) for name in ("rank", "samples", "length")}
    settings["memory budget"] = options.memory_budget
    report("whole_model", "LoRA-Null start of a whole model", settings, rows, options.device)


if __name__ == "__main__":
    main()
