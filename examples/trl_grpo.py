"""TRL's group relative policy optimisation: the reward is a number near the right one.

python examples/trl_grpo.py --out work/grpo [--steps 10] [--resume]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer

import forgetless as fl
from forgetless.data.pocket.problems import problems
from forgetless.data.texts import batches
from forgetless.models.load import load_model, load_tokenizer


def near(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where a completion ends in the right number, less the further off it is, 0 for none."""
    rewards = []
    for completion, wanted in zip(completions, answer, strict=True):
        numbers = re.findall(r"\d+", completion)
        rewards.append(1 / (1 + abs(int(numbers[-1]) - int(wanted))) if numbers else 0.0)
    return rewards


def main(arguments: Sequence[str] | None = None) -> PeftModel:
    """Train, save, export; with --resume go on from the newest checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    base, tokenizer = load_model(options.base), load_tokenizer(options.base)
    keep = batches("self", base, tokenizer, samples=32, max_length=64)
    model = fl.attach(base, "lora_null_v2", rank=8, alpha=8, stats=fl.collect(base, keep))

    rows = [{"prompt": p.prompt, "answer": p.answer} for p in problems(128, seed=0)]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=near,
        args=GRPOConfig(
            output_dir=str(options.out / "checkpoints"),
            max_steps=options.steps,
            save_steps=max(1, options.steps // 2),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=32,
            learning_rate=3e-4,
            beta=0.04,  # KL to the base, which is the adapter switched off
            logging_steps=1,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=options.resume)

    fl.save(model, options.out / "native")
    print(fl.export(model, options.out / "adapter"))
    return model


if __name__ == "__main__":
    main()
