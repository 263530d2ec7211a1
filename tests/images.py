"""Folders of images, one a class, and a tiny image classifier that reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

CLASSES = ("bars", "dots", "wedge")

VIT_SIZES: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""Of a ViT and its kin on images of 8 x 8."""

SWIN_SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
}


def save_classifier(folder: Path, classes: Sequence[str] = CLASSES, seed: int = 0) -> Path:
    """A ViT of two layers with random weights on images of 8 x 8, with its processor."""
    torch.manual_seed(seed)
    config = ViTConfig(
        **VIT_SIZES,
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def save_images(folder: Path, counts: Mapping[str, int], seed: int = 0) -> Path:
    """So many images of each class: a colour of the class's own under noise."""
    random = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 90, (10, 12, 3))
            pixels[..., number % 3] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index:02}.png")
    return folder
