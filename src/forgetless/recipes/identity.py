"""What decides a run: hashes of contents and settings, and the run's id made of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from forgetless.adapters.settings import IDLE_SWITCHES
from forgetless.core.hashing import files_hash, source_hash
from forgetless.core.settings import without_idle
from forgetless.data.examples import load_examples
from forgetless.data.settings import DATA
from forgetless.data.texts import fingerprint
from forgetless.methods import METHODS
from forgetless.models.load import resolve_base
from forgetless.recipes.recipe import Recipe
from forgetless.training.forgetting import from_settings
from forgetless.training.penalties import identity_of
from forgetless.training.settings import what_decides_a_training

MODEL_FILES = frozenset({".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"})
"""Endings of the files that decide what a model folder computes; its README does not."""


def base_hash(base: str) -> str:
    """What a base's name stands for: the folder's content, or the commit of a model on the hub."""
    resolved = resolve_base(base)
    folder = Path(resolved)
    if folder.is_dir():
        return weights_hash(folder)
    from huggingface_hub import hf_hub_download

    commit = Path(hf_hub_download(resolved, "config.json")).parent.name
    return hashlib.sha256(f"{resolved}@{commit}".encode()).hexdigest()


def weights_hash(folder: str | Path) -> str:
    """SHA-256 of the files in a model's or an adapter's folder that decide what it computes."""
    folder = Path(folder)
    return files_hash((f for f in folder.iterdir() if f.suffix in MODEL_FILES), folder)


def input_keys(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """For each need of the method, what decides it: base, layers, text, the seed that drew it."""
    settings = recipe.calibration
    common = {
        "base": base_hash(recipe.base),
        "dtype": recipe.dtype,
        "target_modules": recipe.adapter.target_modules,
        "seed": recipe.seed,
        **without_idle(settings.model_dump(exclude={"memory_budget"}), {"skip_first": 0}),
    }
    sources = settings.sources(recipe.adapter.method)
    texts = [[_calibration_key(recipe, source), weight] for source, weight in sources]
    keep = texts[0][0] if len(texts) == 1 else texts
    task = {**common, "source": _calibration_key(recipe, DATA)}
    found = {
        "second_moment": {**common, "source": keep},
        "task_moment": task,
        "gradient": {**task, "gradient": True},
    }
    return {need: found[need] for need in sorted(METHODS[recipe.adapter.method].needs)}


def _calibration_key(recipe: Recipe, source: str) -> Any:
    """What decides the text of one source."""
    if source != DATA:
        return source_hash(source, fingerprint)
    path = recipe.data.sources[0][0]
    as_text = {"format": "text"} if recipe.data.format == "text" else {}
    return {
        **as_text,
        "data": source_hash(path, lambda name: load_examples(name).fingerprint),
        "max_length": recipe.data.max_length,
        "limit": recipe.data.limit,
    }


def _what_decides_the_weights(recipe: Recipe) -> dict[str, Any]:
    adapter = without_idle(recipe.adapter.model_dump(), IDLE_SWITCHES)
    if recipe.adapter.method == "full":
        adapter = {"method": "full"}
    data = recipe.data.model_dump(exclude={"train"})
    content = [
        [source_hash(path, lambda name: load_examples(name).fingerprint), weight]
        for path, weight in recipe.data.sources
    ]
    data["content"] = content[0][0] if isinstance(recipe.data.train, str) else content
    inputs = input_keys(recipe) if adapter["method"] != "full" else {}
    alone = inputs.get("second_moment") if len(inputs) == 1 else None
    found = {
        "base": base_hash(recipe.base),
        "dtype": recipe.dtype,
        "seed": recipe.seed,
        "adapter": adapter,
        "calibration": alone or inputs or None,
        "data": data,
        "training": what_decides_a_training(recipe.training),
    }
    if recipe.penalties:
        found["penalties"] = [identity_of(spec) for spec in recipe.penalties]
    if recipe.probes.max_kl is not None or recipe.probes.max_drop is not None:
        probes = from_settings(recipe.probes)
        found |= probes.decides if probes else {}
    return found


def run_id(recipe: Recipe) -> str:
    """The method's name and a hash of what decides the trained weights.

    Tasks, names, export settings, the cadence of logs and checkpoints, and probes without a
    budget are left out, so that a new evaluation finds the trained run.
    """
    content = json.dumps(_what_decides_the_weights(recipe), sort_keys=True)
    return f"{recipe.adapter.method}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"
