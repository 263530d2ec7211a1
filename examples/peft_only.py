"""A start for tools that know only PEFT, and an adapter from elsewhere brought in.

`lora_null_zero` starts from the base itself (B = 0), so `forgetless init` writes it as a plain
LoRA. The second half of this script knows nothing of Forgetless: it could be any trainer that
continues a LoRA. What comes out is a LoRA for the original base, with no step in between. It is
measured like one of our own, and exported at half its rank with the error of that.

    python examples/peft_only.py --out work/peft [--steps 60]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless as fl
from forgetless.adapters.settings import AdapterSettings
from forgetless.cli.commands.starts import init
from forgetless.data.examples import load_examples
from forgetless.data.settings import CalibrationSettings
from forgetless.models.load import load_model, load_tokenizer, resolve_base


def train_with_peft_alone(base: str, start: Path, out: Path, texts: list[str], steps: int) -> None:
    """What another tool does with the folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapted = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    optimizer = torch.optim.AdamW([w for w in adapted.parameters() if w.requires_grad], lr=1e-3)
    for step in range(steps):
        batch = tokenizer(texts[step % len(texts)], return_tensors="pt")
        ids = batch["input_ids"]
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(str(out))


def main(arguments: Sequence[str] | None = None) -> PeftModel:
    """Write the start, let PEFT alone train it, bring it back and measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)

    settings = AdapterSettings(method="lora_null_zero", rank=8, alpha=8)
    text = CalibrationSettings(source="self", samples=32, max_length=64)
    start = init(options.base, settings, options.out / "start", source=text, dtype="auto", seed=0)
    assert start.obstacle is None

    rows = load_examples("pocket:problems", limit=64)
    texts = [row["prompt"] + row["completion"] for row in rows]
    base = resolve_base(options.base)
    trained = options.out / "trained"
    train_with_peft_alone(base, Path(start.folder), trained, texts, options.steps)

    # What any trainer made: a folder that PEFT wrote.
    model = fl.load(load_model(options.base), trained)
    tokenizer = load_tokenizer(options.base)
    with model.disable_adapter():
        before = fl.evaluate(model, {"kind": "pocket_recall", "limit": 40}, tokenizer)
    print(fl.compare(before, fl.evaluate(model, {"kind": "pocket_recall", "limit": 40}, tokenizer)))
    print(fl.export(model, options.out / "small", rank=4))
    return model


if __name__ == "__main__":
    main()
