"""What decides a run: hashes of contents and settings, and the run's id made of them."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from forgetless.adapters.settings import IDLE_SWITCHES, AdapterSettings
from forgetless.core.plugins import code_hash, is_named
from forgetless.core.settings import without_idle
from forgetless.data.examples import load_examples, source_hash
from forgetless.data.settings import DATA
from forgetless.data.texts import SELF, fingerprint
from forgetless.methods import find
from forgetless.models.hashes import base_hash
from forgetless.recipes.measuring import probed
from forgetless.recipes.recipe import Recipe
from forgetless.training.forgetting import from_settings
from forgetless.training.penalties import identity_of
from forgetless.training.settings import what_decides_a_training


def base_key(recipe: Recipe, new_classes: Sequence[str] = ()) -> dict[str, Any]:
    """What decides what a recipe's base computes; where it is placed does not."""
    as_loaded = without_idle(recipe.loading, {"quantise": None, "attn_implementation": None})
    as_loaded.pop("device_map")
    return {"base": base_hash(recipe.base, new_classes), **as_loaded}


def base_words(recipe: Recipe, new_classes: Sequence[str] = ()) -> list[str]:
    """The same in words, for `ScoreCache`."""
    key = base_key(recipe, new_classes)
    plain = [key.pop("base"), key.pop("dtype")]
    return plain + [f"{name} {value}" for name, value in key.items()]


_AS_USUAL = {"augment": None, "chat_template": "auto", "system": None}
"""Settings of data that are not in an id where they are these."""


def _data_hash(path: str) -> str:
    return source_hash(path, _fingerprint)


def _fingerprint(path: str) -> str:
    return load_examples(path).fingerprint


def input_keys(recipe: Recipe, *more: str) -> dict[str, dict[str, Any]]:
    """For each need of the run, what decides it: base, layers, text, the seed that drew it.

    The needs are the method's where its start is made, what a repair keeps, and ``more``. What
    earlier tasks add to what is to be kept is not among it.
    """
    needs = {*more, *(find(recipe.adapter.method).needs if recipe.starts_anew else ())}
    needs |= {"second_moment"} if recipe.is_repaired else set()
    settings = recipe.calibration.model_dump(exclude={"memory_budget"})
    # How many texts run together decides nothing; ids have always held the default.
    settings["batch_size"] = type(recipe.calibration).model_fields["batch_size"].default
    settings["samples"] = recipe.calibration.count
    common = {
        **base_key(recipe),
        "target_modules": _adapter_key(recipe.adapter).get("target_modules"),
        "seed": recipe.seed,
        **without_idle(settings, {"skip_first": 0}),
        **({"head": recipe.adapter.head} if recipe.adapter.has_new_head else {}),
    }
    said = recipe.data.model_dump(include={"chat_template", "system"})
    data_as_text: dict[str, Any] = {
        **({"format": "text"} if recipe.data.format == "text" else {}),
        **without_idle(said, _AS_USUAL),
        "data": _data_hash(recipe.data.sources[0][0]),
        "max_length": recipe.data.max_length,
        "limit": recipe.data.limit,
    }
    texts: list[list[Any]] = [
        [data_as_text if source == DATA else source_hash(source, fingerprint), weight]
        for source, weight in recipe.calibration.sources
    ]
    task = {**common, "source": data_as_text}
    kept = {**common, "source": texts[0][0] if len(texts) == 1 else texts}
    if any(source == SELF for source, _ in recipe.calibration.sources):
        kept["samples"] = recipe.calibration.samples
    found = {"second_moment": kept, "task_moment": task, "gradient": {**task, "gradient": True}}
    return {need: found[need] for need in sorted(needs)}


def _adapter_key(settings: AdapterSettings) -> dict[str, Any]:
    """What of an adapter's settings decides the weights."""
    if settings.method == "full":
        return without_idle({"method": "full", "head": settings.head}, IDLE_SWITCHES)
    key = without_idle(settings.model_dump(), IDLE_SWITCHES)
    if not isinstance(settings.target_modules, str):  # layers have no order
        key["target_modules"] = sorted(set(settings.target_modules))
    if is_named(settings.method):
        key["code"] = code_hash(settings.method)
    for pattern in {"rank_pattern", "alpha_pattern"} & key.keys():
        if list(key[pattern]) != sorted(key[pattern]):  # the first that matches a layer counts
            key[pattern] = list(key[pattern].items())
    return key


def run_id(recipe: Recipe) -> str:
    """The method's name and a hash of what decides the trained weights.

    Tasks, names, export settings, the cadence of logs and checkpoints, and probes without a
    budget are left out, so that a new evaluation finds the trained run.
    """
    content: Any = [
        [_data_hash(path), weight, *([buffer] if buffer else [])]
        for (path, weight), buffer in zip(recipe.data.sources, recipe.data.buffers, strict=True)
    ]
    if isinstance(recipe.data.train, str):
        content = content[0][0]
    inputs = input_keys(recipe) if recipe.adapter.method != "full" else {}
    alone = next(iter(inputs.values())) if len(inputs) == 1 and "gradient" not in inputs else None
    decides: dict[str, Any] = {
        **base_key(recipe),
        "seed": recipe.seed,
        "adapter": _adapter_key(recipe.adapter),
        "calibration": alone or inputs or None,
        "data": {
            **without_idle(
                recipe.data.model_dump(exclude={"train", "columns", "validation"}), _AS_USUAL
            ),
            "content": content,
        },
        "training": what_decides_a_training(recipe.training),
    }
    if recipe.sequence is not None and recipe.after is not None:
        # The id of the run before says what decided the weights until then.
        more = {"earlier"} if "second_moment" in inputs else set()
        more |= {"apart"} if recipe.sequence.apart else set()
        decides["sequence"] = recipe.sequence.model_dump(include={"after", "between", *more})
    if recipe.sequence is not None and recipe.sequence.classes:
        decides["classes"] = sorted(recipe.sequence.classes)
    if recipe.is_repaired and recipe.repair is not None:
        decides["repair"] = recipe.repair.model_dump(include={"strength", "task"})
    if recipe.penalties:
        decides["penalties"] = [identity_of(spec) for spec in recipe.penalties]
    if recipe.probes.max_kl is not None or recipe.probes.max_drop is not None:
        probes = from_settings(probed(recipe), recipe.data.said)
        decides |= probes.decides if probes else {}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return f"{find(recipe.adapter.method).name}-{digest[:10]}"
