"""Time and size of writing and reading an adapter, against PEFT at the rank that is exported.

    python benchmarks/export.py [--hidden 1024] [--layers 4] [--rank 16] [--full]

An anchored adapter of rank r is exported as a plain LoRA of rank 2r, so PEFT's side is a LoRA of
rank 2r: its save_pretrained against our export and our lossless save, its from_pretrained against
our load of either. The sides take turns; a load starts from a fresh copy of the base each time.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import forgetless
from timing import interleaved, report

LLAMA_7B = {"hidden": 4096, "intermediate": 11008, "rank": 64}


def base_model(hidden: int, intermediate: int, layers: int) -> nn.Module:
    """A Llama of that shape with a small vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 128, 1),
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def adapters(base: nn.Module, rank: int) -> dict[str, PeftModel]:
    """Ours of that rank and PEFT's of twice the rank; values that are not all zero."""
    ours = forgetless.attach(copy.deepcopy(base), "olora", rank=rank, alpha=rank)
    config = LoraConfig(
        r=2 * rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    models = {"ours": ours, "peft": get_peft_model(copy.deepcopy(base), config)}
    for model in models.values():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data.normal_(std=0.01)
    return models


def measure(base: nn.Module, rank: int, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """One row for each of export, save, and load of either."""
    models = adapters(base, rank)
    plain, native, theirs = folder / "plain", folder / "native", folder / "peft"
    write_peft = partial(models["peft"].save_pretrained, str(theirs))
    rows = [
        row("export", partial(forgetless.export, models["ours"], plain), write_peft, repeats),
        row("save", partial(forgetless.save, models["ours"], native), write_peft, repeats),
    ]
    for name, written in (("load the export", plain), ("load the native form", native)):
        fresh = Fresh(base)
        rows.append(
            row(
                name,
                partial(fresh.load_ours, written),
                partial(fresh.load_peft, theirs),
                repeats,
                fresh.copy,
            )
        )
    for found, (ours, other) in zip(rows, ((plain, theirs), (native, theirs)) * 2, strict=True):
        found["ours MiB"], found["peft MiB"] = size(ours), size(other)
    return rows


class Fresh:
    """A new copy of the base for every load, made outside of the time."""

    def __init__(self, base: nn.Module) -> None:
        self.base = self.model = base

    def copy(self) -> None:
        """Put a fresh copy in the place of the last one."""
        self.model = copy.deepcopy(self.base)

    def load_ours(self, folder: Path) -> object:
        """Put our adapter on it."""
        return forgetless.load(self.model, folder)

    def load_peft(self, folder: Path) -> object:
        """Put PEFT's on it."""
        return PeftModel.from_pretrained(self.model, str(folder))


def row(
    name: str,
    ours: Callable[[], object],
    peft: Callable[[], object],
    repeats: int,
    prepare: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Median seconds of both sides, and the median of the ratios of neighbouring calls."""
    before = None if prepare is None else {"ours": prepare, "peft": prepare}
    times = interleaved({"ours": ours, "peft": peft}, repeats, prepare=before)
    ratios = [a / b for a, b in zip(times["ours"], times["peft"], strict=True)]
    seconds = {f"{side} s": median(values) for side, values in times.items()}
    return {"what": name, **seconds, "ratio": median(ratios)}


def size(folder: Path) -> float:
    """MiB of the files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 2**20


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Writing and reading adapters, against PEFT.")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--full", action="store_true", help="Llama-2-7B's shapes and rank 64")
    options = parser.parse_args()
    if options.full:
        parser.set_defaults(**LLAMA_7B)
        options = parser.parse_args()
    base = base_model(options.hidden, options.intermediate, options.layers)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(base, options.rank, options.repeats, Path(folder))
    settings = {name: getattr(options, name) for name in ("hidden", "layers", "rank", "repeats")}
    report("export", "Writing and reading an adapter, seconds and size", settings, rows)


if __name__ == "__main__":
    main()
