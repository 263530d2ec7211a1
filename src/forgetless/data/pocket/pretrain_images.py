"""Makes the shipped image classifier from nothing: draws its pictures, trains it, scores it.

    python -m forgetless.data.pocket.pretrain_images --out DIR

A ViT that knows the twenty classes of the digits and the shapes, with a head for these alone.
"""

import argparse
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from forgetless.data.pocket.images import DOMAINS, SIZE, ImageSplit, pictures

KNOWN: tuple[str, ...] = (*DOMAINS["digits"], *DOMAINS["shapes"])
"""The classes of its head, in order."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights, besides the pictures."""

    hidden_size: int = 96
    num_layers: int = 4
    num_heads: int = 4
    mlp_size: int = 256
    patch_size: int = 4
    per_class: int = 500
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0


def pretrain(out: Path, settings: Settings) -> dict[str, float]:
    """Train the classifier, write its folder and give its scores on the test split."""
    torch.manual_seed(settings.seed)
    model = _new_model(settings)
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    size = len(KNOWN) * settings.per_class
    steps = settings.epochs * math.ceil(size / settings.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, step / 100) * (0.5 + 0.5 * math.cos(math.pi * min(1, step / steps))),
    )
    out.mkdir(parents=True, exist_ok=True)
    with (out / "pretrain.jsonl").open("w", encoding="utf-8") as log:
        for epoch in range(settings.epochs):
            model.train()
            losses = []
            # New pictures every time: the scans of the digits are few.
            pixels, labels = _tensors("train", settings.per_class, epoch * settings.per_class)
            for rows in torch.split(torch.randperm(len(labels)), settings.batch_size):
                logits = model(pixel_values=pixels[rows]).logits
                loss = functional.cross_entropy(logits, labels[rows])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
            line = {"epoch": epoch + 1, "loss": round(float(np.mean(losses)), 4), **score(model)}
            log.write(json.dumps(line) + "\n")
            log.flush()
    scores = score(model, per_class=200)
    _save(out, model, processor, settings, scores)
    return scores


def _new_model(settings: Settings) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=SIZE,
        patch_size=settings.patch_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        intermediate_size=settings.mlp_size,
        id2label=dict(enumerate(KNOWN)),
        label2id={name: index for index, name in enumerate(KNOWN)},
    )
    return ViTForImageClassification(config)


def _tensors(split: ImageSplit, per_class: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Pixels in -1..1, (n, 3, 16, 16), as the processor makes them, and class numbers."""
    drawn = pictures(KNOWN, split, per_class, first)
    pixels = torch.from_numpy(drawn.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, torch.tensor([KNOWN.index(name) for name in drawn.labels])


@torch.no_grad()
def score(model: ViTForImageClassification, per_class: int = 40) -> dict[str, float]:
    """Accuracy on pictures of the test split: of all, of the digits and of the shapes."""
    model.eval()
    pixels, labels = _tensors("test", per_class)
    parts = [model(pixel_values=part).logits.argmax(-1) for part in torch.split(pixels, 256)]
    right = (torch.cat(parts) == labels).float()
    halves = {"digits": right[labels < 10], "shapes": right[labels >= 10]}
    return {
        "accuracy": round(float(right.mean()), 4),
        **{name: round(float(half.mean()), 4) for name, half in halves.items()},
    }


def _save(
    out: Path,
    model: ViTForImageClassification,
    processor: Any,
    settings: Settings,
    scores: dict[str, float],
) -> None:
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # owner-only by default
    processor.save_pretrained(out)
    made_with = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    final = {"settings": asdict(settings), "made_with": made_with, "scores": scores}
    with (out / "pretrain.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(final) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in made_with.items())
    rows = "\n".join(f"| {name} | {value:.1%} |" for name, value in scores.items())
    (out / "README.md").write_text(
        f"""# The pocket image classifier

A ViT of {model.num_parameters():,} parameters ({settings.num_layers} layers, hidden size \
{settings.hidden_size}, pictures of {SIZE} x {SIZE} pixels in patches of {settings.patch_size}) \
that knows ten handwritten digits and ten shapes. It is made to be fine-tuned and to be watched \
while it forgets; it is no use for anything else.

Made by

    python -m forgetless.data.pocket.pretrain_images --out DIR --seed {settings.seed}

on one thread ({versions}), from the pictures of `forgetless.data.pocket.images`: drawings, and \
the digits of the UCI data set "Optical Recognition of Handwritten Digits" (E. Alpaydin and \
C. Kaynak, CC BY 4.0). Apache-2.0. `pretrain.jsonl` is the log of that run.

| accuracy on 200 pictures of each class of the test split | |
|---|---|
{rows}
""",
        encoding="utf-8",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, pretrain on one thread, print the scores."""
    parser = argparse.ArgumentParser(prog="python -m forgetless.data.pocket.pretrain_images")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(json.dumps(pretrain(given.out, Settings(seed=given.seed)), indent=2))


if __name__ == "__main__":
    main()
