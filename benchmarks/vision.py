"""Time of a training step, of statistics and of decoding for an image classifier.

    python benchmarks/vision.py [--hidden 768] [--layers 4] [--side 224] [--batch 8] [--rank 8]

A ViT of ViT-B/16's width with random weights. `step` is ours (anchored, a new head beside the own
one) over PEFT's plain LoRA of the same rank with a trained head of the same classes, `statistics`
what `collect` takes over a bare forward of the same images, and `decoding` the images a second that
are read from JPEG files of 256 x 256, over those that a step trains on. The sides take turns; a
ratio is the median of the ratios of neighbouring timings, which a busy moment hits alike.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import forgetless
from forgetless.data.images import ImageReader
from forgetless.models.heads import add_head
from timing import interleaved, report

CLASSES = [str(number) for number in range(10)]


def classifier(options: argparse.Namespace) -> Any:
    """The ViT; the same weights at every call."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_attention_heads=max(options.hidden // 64, 1),
        num_hidden_layers=options.layers,
        image_size=options.side,
        patch_size=16,
        num_labels=len(CLASSES),
    )
    return ViTForImageClassification(config).eval()


def theirs(options: argparse.Namespace) -> nn.Module:
    """PEFT's LoRA with the head trained whole."""
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        target_modules=layers,
        modules_to_save=["classifier"],
    )
    model: nn.Module = get_peft_model(classifier(options), config)
    return model


def ours(options: argparse.Namespace) -> nn.Module:
    """A start that needs the anchor and is quick to compute."""
    model = add_head(classifier(options), [f"new {name}" for name in CLASSES])
    adapted: nn.Module = forgetless.attach(model, "olora", options.rank, options.rank)
    return adapted


def stepper(model: nn.Module, pixels: torch.Tensor, first: int) -> Callable[[], None]:
    """A function that does one step on classes from `first` on."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    labels = first + torch.arange(len(pixels)) % len(CLASSES)
    model.train()

    def step() -> None:
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def paired(times: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the repeats of one side's seconds over the other's."""
    return median(a / b for a, b in zip(times[one], times[other], strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, usual in (("hidden", 768), ("layers", 4), ("side", 224), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    shape = options.batch, 3, options.side, options.side
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    steps = {
        "peft": stepper(theirs(options), pixels, 0),
        "ours": stepper(ours(options), pixels, len(CLASSES)),
    }
    base = classifier(options)
    side = {"height": options.side, "width": options.side}
    reader = ImageReader(processor=ViTImageProcessorPil(size=side), classes={})
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number in range(options.batch):
            noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            files.append(str(Path(folder) / f"{number}.jpg"))
            Image.fromarray(noise).resize((256, 256)).save(files[-1])

        def forward() -> None:
            with torch.no_grad():
                base(pixel_values=pixels)

        times = interleaved(
            {
                **steps,
                "forward": forward,
                "collect": lambda: forgetless.collect(base, [{"pixel_values": pixels}]),
                "decode": lambda: [reader.pixels(file) for file in files],
            },
            options.repeats,
        )
    row: dict[str, Any] = {
        "step, s": median(times["ours"]),
        "over PEFT's": paired(times, "ours", "peft"),
        "forward, s": median(times["forward"]),
        "statistics over it": paired(times, "collect", "forward"),
        "decoded images/s": options.batch / median(times["decode"]),
        "over trained images/s": paired(times, "ours", "decode"),
    }
    report("vision", "An image classifier", vars(options), [row])


if __name__ == "__main__":
    main()
