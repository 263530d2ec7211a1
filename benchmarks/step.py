"""Time of a training step: the anchored layer against PEFT's plain LoRA, in one process.

    python benchmarks/step.py [--hidden 256 512 1024] [--rank 16] [--repeats 7]

Prints a table and writes benchmarks/step.json. A step is forward, backward and AdamW on one Llama
block (all linear layers adapted) for 512 tokens; the sides take turns and the ratio is that of the
medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import forgetless

TOKENS = (4, 128)


def block(hidden: int) -> nn.Module:
    """One Llama block of that width with a small vocabulary; the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=1,
        num_attention_heads=hidden // 32,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def plain(hidden: int, rank: int) -> nn.Module:
    """PEFT's own LoRA."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(block(hidden), config)
    return model


def anchored(hidden: int, rank: int) -> nn.Module:
    """A start that needs the anchor."""
    model: nn.Module = forgetless.attach(block(hidden), "pissa", rank=rank, alpha=rank)
    return model


def stepper(model: nn.Module) -> Callable[[], float]:
    """A function that does one step and returns its seconds."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(256, TOKENS, generator=torch.Generator().manual_seed(0))

    def step() -> float:
        started = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def compare(hidden: int, rank: int, repeats: int) -> dict[str, float]:
    """Median seconds of either side, and their ratio."""
    sides = {"peft": stepper(plain(hidden, rank)), "anchored": stepper(anchored(hidden, rank))}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, step in sides.items():
            taken = step()
            if repeat:  # the first is a warm-up
                seconds[name].append(taken)
    medians = {name: median(values) for name, values in seconds.items()}
    return {**medians, "ratio": medians["anchored"] / medians["peft"]}


def main() -> None:
    """Measure every width, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Anchored layer against PEFT's LoRA.")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {hidden: compare(hidden, options.rank, options.repeats) for hidden in options.hidden}
    print(f"rank {options.rank}, {TOKENS[0] * TOKENS[1]} tokens, one thread, median seconds a step")
    print(f"{'hidden':>7}{'peft':>10}{'anchored':>10}{'ratio':>8}")
    for hidden, row in rows.items():
        print(f"{hidden:>7}{row['peft']:>10.4f}{row['anchored']:>10.4f}{row['ratio']:>8.3f}")
    content = {
        "rank": options.rank,
        "tokens": TOKENS[0] * TOKENS[1],
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
        "machine": platform.machine(),
        "rows": {str(hidden): row for hidden, row in rows.items()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
