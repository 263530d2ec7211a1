"""TRL's supervised fine-tuning from a start that forgets less.

python examples/trl_sft.py --out work/sft [--steps 60] [--resume]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from trl import SFTConfig, SFTTrainer

import forgetless as fl
from forgetless.data.examples import load_examples
from forgetless.data.texts import batches
from forgetless.models.load import load_model, load_tokenizer


def main(arguments: Sequence[str] | None = None) -> PeftModel:
    """Train, save, export; with --resume go on from the newest checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--data", default="pocket:problems")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    base, tokenizer = load_model(options.base), load_tokenizer(options.base)
    keep = batches("self", base, tokenizer, samples=32, max_length=64)
    model = fl.attach(base, "lora_null_v2", rank=8, alpha=8, stats=fl.collect(base, keep))

    trainer = SFTTrainer(
        model=model,  # it already has its adapter: give TRL no peft_config
        args=SFTConfig(
            output_dir=str(options.out / "checkpoints"),
            max_steps=options.steps,
            save_steps=max(1, options.steps // 2),
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            max_length=128,
            logging_steps=5,
            bf16=False,
            report_to="none",
        ),
        train_dataset=load_examples(options.data, limit=512).dataset(),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=options.resume)

    fl.save(model, options.out / "native")
    print(fl.export(model, options.out / "adapter"))
    return model


if __name__ == "__main__":
    main()
