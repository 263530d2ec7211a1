"""Model cards: the README.md of an exported adapter, with the metadata that model hubs read.

A card says what the adapter is, how it was made, how to load it, and what it learned and forgot.
It holds no folder of the machine that it was written on, and no text of a task's items.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from forgetless.core.files import read_json, write_text
from forgetless.methods import METHODS
from forgetless.models.pocket import base_path

__all__ = ["Card", "file_name", "pairs", "table", "write", "write_export_card"]


CARD_FILE = "README.md"


_MARK = "<!-- Written by forgetless. Without this line it will not be written again. -->"


_CONFIG = "adapter_config.json"


_PACKAGES = ("torch", "transformers", "peft")


_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}


_NOT_MEASURED = "Not measured. `forgetless eval BASE --adapter FOLDER --tasks ...` does."
_PIPELINES = {"CAUSAL_LM": "text-generation"}


# What vLLM accepts as max_lora_rank.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


_HUB_CACHE = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)")


_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Card:
    """What a card says; every part but the first two may be empty.

    Attributes:
        base: as the user named it: "pocket", a hub id or a folder.
        config: the exported adapter's `adapter_config.json`.
        method: how the adapter started, a name of METHODS; None where that is not known.
        options: of the method.
        error: relative error of the export, 0 where it is exact; None where that is not known.
        tied: an adapted layer, and the module that has the same weight; None where there is none.
        settings: further rows of the table of settings.
        scores: the paragraphs on what was learned and forgotten; none where nothing was measured.
        versions: of the packages it was made with.
    """

    base: str
    config: Mapping[str, Any]
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    error: float | None = None
    tied: tuple[str, str] | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    scores: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole file."""
        metadata = yaml.safe_dump(_metadata(self), sort_keys=False, allow_unicode=True)
        parts = [
            f"---\n{metadata}---\n\n{_MARK}",
            *_introduction(self),
            "## What it learned and what it forgot",
            *(self.scores or [_NOT_MEASURED]),
            *_loading(self),
            *_making(self),
            *_caveats(self),
        ]
        return "\n\n".join(parts) + "\n"


def write_export_card(
    folder: str | Path,
    base: str,
    *,
    start: Mapping[str, Any] | None = None,
    error: float | None = None,
    tied: tuple[str, str] | None = None,
) -> None:
    """Write the card of an adapter of which nothing but the export is known.

    Args:
        folder: of the exported adapter.
        base: name of the base; empty where it is not known.
        start: how the adapter started, see `adapters.layer.Start`.
        error: relative error of the export.
        tied: see `Card`.
    """
    known = start or {}
    write(
        Path(folder),
        Card(
            base=base,
            config=read_json(Path(folder) / _CONFIG),
            method=known.get("method"),
            options=known.get("options", {}),
            error=error,
            tied=tied,
            settings={"seed": str(known["seed"])} if known else {},
            versions=_versions(),
        ),
    )


def write(folder: Path, card: Card) -> None:
    """Write the card, unless somebody made the file their own."""
    file = folder / CARD_FILE
    if not file.exists() or is_ours(file):
        write_text(file, card.text)


def is_ours(file: Path) -> bool:
    """Whether a card was written here, and nobody has made it their own since."""
    return _MARK in file.read_text(encoding="utf-8", errors="replace")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("forgetless", *_PACKAGES):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _metadata(card: Card) -> dict[str, Any]:
    """The block that model hubs read; what is not known is left out, a licence among it."""
    base, task = _base_name(card.base), str(card.config.get("task_type"))
    found: dict[str, Any] = {"base_model": base} if base else {}
    found |= {"base_model_relation": "adapter", "library_name": "peft"}
    if task in _PIPELINES:
        found["pipeline_tag"] = _PIPELINES[task]
    method = card.method.replace("_", "-") if card.method else "lora"
    found["tags"] = list(dict.fromkeys(["lora", "forgetless", method]))
    return found


def _base_name(base: str) -> str:
    """A name of the base that says nothing of this machine: its hub id, or its folder's own name.

    >>> _base_name("/home/me/models--meta-llama--Llama-2-7b-hf/snapshots/01c7f7")
    'meta-llama/Llama-2-7b-hf'
    """
    if base == str(base_path()):
        return "pocket"
    if cached := _HUB_CACHE.search(base):
        return f"{cached['owner']}/{cached['name']}"
    if _HUB_ID.fullmatch(base) and not Path(base).exists():
        return base
    return file_name(base)


def _is_on_the_hub(base: str) -> bool:
    return "/" in _base_name(base)


def file_name(path: str) -> str:
    """The last part of a path; what is no path, such as "self" or "pocket:held", stays."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _introduction(card: Card) -> list[str]:
    base = _base_name(card.base) or "its base model"
    rank = _rank(card.config)
    said = f"A LoRA adapter of rank {rank} for **{base}**, whose weights stay as they are."
    if card.method is not None:
        said += (
            f" It was made with forgetless, from the start `{card.method}`{_about(card.method)}."
        )
    return [f"# Adapter for {base}", said]


def _about(method: str) -> str:
    known = METHODS.get(method)
    return "" if known is None else f": {known.summary} ({known.paper})"


def _rank(config: Mapping[str, Any]) -> int:
    return int(max([config["r"], *dict(config.get("rank_pattern") or {}).values()]))


def _loading(card: Card) -> list[str]:
    parts = ["## How to use it", f"```python\n{_peft_code(card)}```"]
    if card.config.get("task_type") != "CAUSAL_LM":
        return parts
    rank = next((r for r in _VLLM_RANKS if r >= _rank(card.config)), None)
    if card.config.get("use_dora"):
        return [*parts, "vLLM does not serve DoRA adapters; merge it into the base for that."]
    if rank is None:
        return [*parts, f"vLLM serves ranks up to {_VLLM_RANKS[-1]}; merge it into the base."]
    return [*parts, "With vLLM:", f"```python\n{_vllm_code(card, rank)}```"]


def _peft_code(card: Card) -> str:
    base = _base_name(card.base) or "BASE"
    if base == "pocket":
        return (
            "from forgetless.models.load import load_model, load_tokenizer\n"
            "from peft import PeftModel\n\n"
            'base, tokenizer = load_model("pocket"), load_tokenizer("pocket")\n'
            'model = PeftModel.from_pretrained(base, "this-folder")\n'
        )
    kind = _CLASSES.get(str(card.config.get("task_type")), "AutoModel")
    reader = "AutoTokenizer" if kind in _CLASSES.values() else "AutoProcessor"
    name = reader.removeprefix("Auto").lower()
    return (
        "from peft import PeftModel\n"
        f"from transformers import {kind}, {reader}\n\n"
        f'base = {kind}.from_pretrained("{base}")\n'
        f'{name} = {reader}.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(base, "this-folder")\n'
    )


def _vllm_code(card: Card, rank: int) -> str:
    base = _base_name(card.base) or "BASE"
    is_pocket = base == "pocket"
    return (
        f"{'from forgetless.models.pocket import base_path' if is_pocket else ''}\n"
        "from vllm import LLM, SamplingParams\n"
        "from vllm.lora.request import LoRARequest\n\n"
        f"base = {'str(base_path())' if is_pocket else repr(base)}\n"
        f"model = LLM(base, enable_lora=True, max_lora_rank={rank})\n"
        'adapter = LoRARequest("adapter", 1, "this-folder")\n'
        'model.generate(["..."], SamplingParams(temperature=0), lora_request=adapter)\n'
    ).lstrip()


def _making(card: Card) -> list[str]:
    config = card.config
    rows = {
        "start": f"`{card.method}`" if card.method else "",
        "options": pairs(card.options),
        "layers": _layers(config.get("target_modules")),
        "rank of the file": str(_rank(config)),
        "error of the export": _error(card.error),
        **card.settings,
        "versions": pairs(card.versions, " "),
    }
    cells = [[name, _cell(value)] for name, value in rows.items() if value]
    return ["## How it was made", table(["setting", "value"], cells)]


def _error(error: float | None) -> str:
    if error is None:
        return ""
    return "none, it is exact" if error == 0 else f"{error:.2g} of the update's norm was cut off"


def _layers(targets: Any) -> str:
    if targets is None or isinstance(targets, str):
        return str(targets or "")
    return ", ".join(sorted(map(str, targets)))


def pairs(values: Mapping[str, Any], between: str = "=") -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())


def _caveats(card: Card) -> list[str]:
    said = []
    if card.scores:
        said += [
            "These are the scores of one training with one seed; the intervals are over the items "
            "of a task, not over trainings.",
            "Nothing is known of abilities that are not in the table.",
        ]
    else:
        said.append("Nothing is known yet of what this adapter learned or forgot.")
    if card.tied:
        said.append(
            f"`{card.tied[0]}` shares its weight with `{card.tied[1]}`: beside the base the "
            "adapter changes the first alone, merged into the base it would change both. Load the "
            "base with `tie_word_embeddings=False` and copied weights before merging."
        )
    if not _is_on_the_hub(card.base):
        said.append(
            f"`{_base_name(card.base) or 'The base'}` is the name of a local model: before "
            "publishing, set `base_model` above to where others find it."
        )
    said.append("The licence of the base holds for its use with this adapter.")
    return ["## What to keep in mind", "\n".join(f"- {line}" for line in said)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
