"""A training loop by hand: attach, step, save, resume, export.

python examples/torch_loop.py --out work/loop [--steps 60] [--resume]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import forgetless as fl
from forgetless.data.batches import Padding, TokenRows
from forgetless.data.examples import load_examples
from forgetless.data.texts import batches
from forgetless.data.tokens import tokenize
from forgetless.models.load import load_model, load_tokenizer


def save_state(model: PeftModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """The adapter as it is, and the optimiser's moments beside it."""
    fl.save(model, folder)
    moments = {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(moments, folder / "optimizer.safetensors")


def load_moments(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Give the optimiser its moments back."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def main(arguments: Sequence[str] | None = None) -> PeftModel:
    """Train, save half-way, export; with --resume go on from half-way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--data", default="pocket:problems")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    half = options.out / "half-way"

    base, tokenizer = load_model(options.base), load_tokenizer(options.base)
    if options.resume:
        model = fl.load(base, half, trainable=True)
    else:
        keep = batches("self", base, tokenizer, samples=32, max_length=64)
        model = fl.attach(base, "lora_null_v2", rank=8, alpha=8, stats=fl.collect(base, keep))
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    if options.resume:
        load_moments(optimizer, half)

    examples = load_examples(options.data, limit=512)
    rows = TokenRows(tokenize(examples, tokenizer, max_length=128))
    pad = Padding()
    model.train()
    for step in range(options.steps // 2 if options.resume else 0, options.steps):
        first = 8 * step % (len(rows) - 8)
        loss = model(**pad([rows[first + i] for i in range(8)])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == options.steps // 2:
            save_state(model, optimizer, half)
    print(f"loss {loss.item():.4g}")
    print(fl.export(model, options.out / "adapter"))
    return model


if __name__ == "__main__":
    main()
