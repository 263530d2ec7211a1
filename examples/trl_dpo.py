"""TRL's direct preference optimisation; the reference model is the adapter switched off.

Since adapter-off is the base bit for bit, the first loss is log 2, and no second model is loaded.

    python examples/trl_dpo.py --out work/dpo [--steps 30] [--resume]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

import forgetless as fl
from forgetless.data.examples import load_examples
from forgetless.data.texts import batches
from forgetless.models.load import load_model, load_tokenizer


def preferences(source: str) -> Dataset:
    """Worked answers, each preferred to the answer of another problem."""
    rows = list(load_examples(source, limit=128))
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "chosen": row["completion"],
                "rejected": other["completion"],
            }
            for row, other in pairwise(rows)
            if row["completion"] != other["completion"]
        ]
    )


def main(arguments: Sequence[str] | None = None) -> PeftModel:
    """Train, save, export; with --resume go on from the newest checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--data", default="pocket:problems")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    base, tokenizer = load_model(options.base), load_tokenizer(options.base)
    keep = batches("self", base, tokenizer, samples=32, max_length=64)
    model = fl.attach(base, "lora_null_v2", rank=8, alpha=8, stats=fl.collect(base, keep))

    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(options.out / "checkpoints"),
            max_steps=options.steps,
            save_steps=max(1, options.steps // 2),
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            max_length=128,
            logging_steps=1,
            bf16=False,
            report_to="none",
        ),
        train_dataset=preferences(options.data),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=options.resume)

    fl.save(model, options.out / "native")
    print(fl.export(model, options.out / "adapter"))
    return model


if __name__ == "__main__":
    main()
