"""Time and memory of a training step: the anchored layer against PEFT's plain LoRA of that rank.

    python benchmarks/step.py [--hidden 256 1024] [--rank 8 32 64] [--repeats 15] [--device cuda]

A step is forward, backward and AdamW on one Llama block, or on `--layers` of them, with all linear
layers adapted. The sides take turns in one process; a ratio is the median of the ratios of
neighbouring steps, which a busy moment hits alike. `plain` is a start that needs no anchor, and so
PEFT's own layer. `floor` is what the multiply-adds of the second low-rank product alone would make
of the ratio.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import forgetless
from timing import interleaved, medians, report

HIDDEN = (256, 512, 1024, 2048, 4096)
BARS = {"anchored": {256: 1.25, 1024: 1.10}, "plain": {256: 1.03}}
"""Side -> smallest hidden size -> what the ratio may be, at rank <= hidden / 32."""


def blocks(hidden: int, layers: int, device: str, dtype: torch.dtype) -> nn.Module:
    """Llama blocks of that width with a small vocabulary; the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 128, 1),
    )
    with torch.device(device):
        model: nn.Module = LlamaForCausalLM(config).to(dtype)
    return model


def peft_lora(base: nn.Module, rank: int) -> nn.Module:
    """PEFT's own LoRA."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(base, config)
    return model


def anchored(base: nn.Module, rank: int) -> nn.Module:
    """A start that needs the anchor, and is quick to compute."""
    model: nn.Module = forgetless.attach(base, "olora", rank=rank, alpha=rank)
    return model


def plain(base: nn.Module, rank: int) -> nn.Module:
    """A start that needs none."""
    model: nn.Module = forgetless.attach(base, "lora", rank=rank, alpha=rank)
    return model


SIDES: Mapping[str, Callable[[nn.Module, int], nn.Module]] = {
    "peft": peft_lora,
    "anchored": anchored,
    "plain": plain,
}


def stepper(model: nn.Module, tokens: torch.Tensor, autocast: bool) -> Callable[[], None]:
    """A function that does one step."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    device = tokens.device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def paired(times: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Median over the repeats of one side's seconds over the other's."""
    return median(a / b for a, b in zip(times[one], times[other], strict=True))


def floor(hidden: int, rank: int, layers: int, length: int) -> float:
    """Multiply-adds of a step with an anchor over those of PEFT's LoRA; attention included.

    For each token, weight W (out, in) costs 2 out in there and back; a plain LoRA 3 rank
    (out + in), an anchored one 5.
    """
    inner = 11 * hidden // 4
    shapes = [(hidden, hidden)] * 4 + [(hidden, inner)] * 3
    base = layers * (2 * sum(a * b for a, b in shapes) + 6 * length * hidden) + 3 * 256 * hidden
    low_rank = layers * rank * sum(a + b for a, b in shapes)
    return (base + 5 * low_rank) / (base + 3 * low_rank)


def kept_bytes(model: nn.Module, step: Callable[[], None], device: str) -> int:
    """Bytes that training holds: the model, its trained state, and what a step adds to them."""
    weights = (*model.parameters(), *model.buffers())
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)  # of the other sides too
        torch.cuda.reset_peak_memory_stats(device)
        step()
        added = torch.cuda.max_memory_allocated(device) - before
        # A weight itself and AdamW's two moments; its gradient is a part of what the step adds.
        return added + sum(w.nbytes * (3 if w.requires_grad else 1) for w in weights)
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    for weight in weights:
        copies = 4 if weight.requires_grad else 1  # itself, its gradient, AdamW's two moments
        saved[weight.untyped_storage().data_ptr()] = copies * weight.untyped_storage().nbytes()
    return sum(saved.values())


def compare(hidden: int, rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: seconds of each side, the ratios, the floor and the memory."""
    tokens = torch.randint(256, (options.batch, options.length)).to(options.device)
    dtype = getattr(torch, options.dtype)
    models = {
        side: make(blocks(hidden, options.layers, options.device, dtype), rank)
        for side, make in SIDES.items()
    }
    steps = {side: stepper(model, tokens, options.autocast) for side, model in models.items()}
    times = interleaved(steps, options.repeats, warmups=2, device=options.device)
    memory = {
        side: kept_bytes(models[side], steps[side], options.device) for side in ("peft", "anchored")
    }
    row: dict[str, Any] = {"hidden": hidden, "rank": rank, "hidden/rank": hidden // rank}
    row |= {f"{side} s": seconds for side, seconds in medians(times).items()}
    row |= {f"{side} min s": min(seconds) for side, seconds in times.items()}
    row |= {side: paired(times, side, "peft") for side in ("anchored", "plain")}
    row["floor"] = floor(hidden, rank, options.layers, options.length)
    row["memory"] = memory["anchored"] / memory["peft"]
    return row


def misses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows at rank <= hidden / 32 whose ratio is above its bar."""
    return [
        f"{side} {row[side]:.3f} at hidden {row['hidden']}, rank {row['rank']} (bar {bar})"
        for row in rows
        for side, bars in BARS.items()
        if row["rank"] * 32 <= row["hidden"]
        and row[side] > (bar := bars[max(size for size in bars if size <= row["hidden"])])
    ]


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Anchored layer against PEFT's LoRA.")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--full", action="store_true", help="hidden sizes up to 4096")
    parser.add_argument("--layers", type=int, default=1, help="blocks of the model")
    parser.add_argument("--rank", type=int, nargs="+", help="by default 8, hidden/32, hidden/16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the base's weights")
    parser.add_argument("--autocast", action="store_true", help="compute in bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure every width and rank, print the table, write the JSON, name what misses its bar."""
    options = options_of()
    torch.set_num_threads(options.threads)
    rows = []
    for hidden in HIDDEN if options.full else options.hidden:
        for rank in options.rank or sorted({8, hidden // 32, hidden // 16}):
            rows.append(compare(hidden, rank, options))
            gc.collect()
    settings = {
        "layers": options.layers,
        "tokens": options.batch * options.length,
        "dtype": options.dtype,
        "autocast": options.autocast,
        "repeats": options.repeats,
    }
    report(
        "step", "Training step, seconds and ratios to PEFT's LoRA", settings, rows, options.device
    )
    for miss in misses(rows):
        print(f"above its bar: {miss}")
    assert all(math.isfinite(row["anchored"]) for row in rows)


if __name__ == "__main__":
    main()
