"""A real image encoder as a base that knows CIFAR-10 under a probed head, and MNIST to learn.

    python benchmarks/real_bases.py dinov2-small --out ENCODER

An encoder without a head knows nothing that could be asked under one. So it is given the head of a
logistic regression of CIFAR-10's ten classes on what such a head reads, and this classifier is the
base. Its position table is that of the encoder, interpolated once to the size of the images.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, AutoModelForImageClassification

from forgetless.core.files import new_file, new_folder
from forgetless.models.heads import features

COUNTS = {"known": 2000, "known-test": 500, "new": 2000, "new-test": 300}
"""Images of each file; "known" are CIFAR-10's, "new" are MNIST's."""


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
"""Not 0 to 9, which would also count the classes of the own head."""


def image_files(data: Path, out: Path, counts: dict[str, int]) -> dict[str, str]:
    """Name -> npz file of images drawn at random, always the same; ``counts`` as `COUNTS`."""
    names = json.loads((data / "cifar10" / "classes.json").read_text())
    files = {}
    for name, count in counts.items():
        file = out / f"{name}.npz"
        files[name] = str(file)
        if file.exists():
            continue
        part = "test" if name.endswith("-test") else "train"
        if name.startswith("known"):
            images, labels = _cifar(data / "cifar10" / f"{part}_jpeg.npz", count)
        else:
            with np.load(data / "mnist" / f"{part}.npz") as found:
                drawn = _drawn(len(found["y"]), count)
                images, labels = found["x"][drawn], found["y"][drawn]
        classes = names if name.startswith("known") else DIGITS
        with new_file(file) as new, new.open("wb") as target:
            np.savez(target, images=images, labels=labels.astype(np.int64), classes=classes)
    return files


def _drawn(among: int, count: int) -> Any:
    return np.random.default_rng(0).permutation(among)[:count]


def _cifar(file: Path, count: int) -> tuple[Any, Any]:
    """Images (count, 32, 32, 3) and labels out of JPEG files that lie in a row."""
    with np.load(file) as found:
        blob, ends, labels = found["blob"].tobytes(), found["lens"].cumsum(), found["y"]
        sizes = found["lens"]
    drawn = _drawn(len(labels), count)
    images = [
        np.asarray(Image.open(io.BytesIO(blob[ends[n] - sizes[n] : ends[n]])).convert("RGB"))
        for n in drawn
    ]
    return np.stack(images), labels[drawn]


def probed(encoder: Path, known: str, side: int, out: Path) -> float:
    """Write the encoder as a classifier of what is known, and return its accuracy on these images.

    Args:
        encoder: a model folder without a head.
        known: an npz file of `image_files`.
        side: pixels of a side to which images are resized.
        out: the folder of the base, left as it is if it is there.
    """
    with np.load(known) as found:
        images, labels, names = found["images"], torch.tensor(found["labels"]), found["classes"]
    processor: Any = AutoImageProcessor.from_pretrained(encoder)
    processor.size = {"shortest_edge": side}
    processor.crop_size = {"height": side, "width": side}
    if out.exists():
        model: Any = AutoModelForImageClassification.from_pretrained(out).eval()
    else:
        classes = dict(enumerate(names.tolist()))
        model = AutoModelForImageClassification.from_pretrained(
            encoder, id2label=classes, label2id={name: n for n, name in classes.items()}
        ).eval()
        _set_side(model, side)
    with torch.no_grad():
        given = [Image.fromarray(image) for image in images]
        parts = [
            processor(images=given[start : start + 50], return_tensors="pt")
            for start in range(0, len(given), 50)
        ]
        read = torch.cat([features(model, part) for part in parts])
    head = model.classifier
    if not out.exists():
        _fit(head, read, labels)
        with new_folder(out) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    with torch.no_grad():
        return float((head(read).argmax(-1) == labels).float().mean())


@torch.no_grad()
def _set_side(model: Any, side: int) -> None:
    """Interpolate the position table to images of another size, as the model itself would."""
    table = model.base_model.embeddings
    patches = (side // model.config.patch_size) ** 2
    tokens = torch.empty(1, 1 + patches, model.config.hidden_size)
    places = table.interpolate_pos_encoding(tokens, side, side)
    table.position_embeddings = torch.nn.Parameter(places.clone())
    model.config.image_size = side


def _fit(head: Any, read: Tensor, labels: Tensor) -> None:
    """A logistic regression on standardised features, which the head undoes."""
    mean, std = read.mean(0), read.std(0) + 1e-6
    weight = torch.zeros(head.weight.shape, requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer: Any = torch.optim.LBFGS([weight, bias], max_iter=200)

    def loss() -> Any:
        optimizer.zero_grad()
        logits = ((read - mean) / std) @ weight.T + bias
        found: Any = cross_entropy(logits, labels) + 0.01 * weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - (weight / std) @ mean)
