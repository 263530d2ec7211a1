"""Model cards: the README.md of an exported adapter, with the metadata that model hubs read.

A card says what the adapter is, how it was made, how to load it, and what it learned and forgot.
It holds no folder of the machine that it was written on, and no text of a task's items.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from forgetless.core.files import read_json, write_text
from forgetless.methods import known
from forgetless.models.hub import HubName
from forgetless.models.pocket import POCKETS

if TYPE_CHECKING:
    from forgetless.models.load import Head


CARD_FILE = "README.md"

_MARK = "<!-- Written by forgetless. Without this line it will not be written again. -->"
_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
_PIPELINES = {"CAUSAL_LM": "text-generation"}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as max_lora_rank."""

_HUB_CACHE = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)")


@dataclass(frozen=True)
class Card:
    """What a card says; every part but the first two may be empty.

    Attributes:
        base: as the user named it: "pocket", a hub id or a folder.
        config: the exported adapter's `adapter_config.json`.
        method: how the adapter started, a name of METHODS; None where that is not known.
        error: relative error of the export, 0 where it is exact; None where that is not known.
        tied: an adapted layer, and the module that has the same weight; None where there is none.
        settings: further rows of the table of settings.
        scores: the paragraphs on what was learned and forgotten; none where nothing was measured.
        head: of the base, where it is none that PEFT has a name for.
        new_classes: of the new head of a classifier.
        own_classes: how many the base's own head has, 0 where it has none.
        packing: what the base's weights were packed in, see `forgetless.models.quantised`.
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
    head: Head | None = None
    new_classes: Sequence[str] = ()
    own_classes: int = 0
    packing: str | None = None

    @property
    def text(self) -> str:
        """The whole file."""
        base, task = _base_name(self.base), str(self.config.get("task_type"))
        kind, reader = _CLASSES.get(task, "AutoModel"), "AutoProcessor"
        if task in _CLASSES:
            reader = "AutoTokenizer"
        elif self.head is not None:
            kind, reader = self.head.auto_class.__name__, self.head.processor_class.__name__
        ranks = dict(self.config.get("rank_pattern") or {}).values()
        rank = int(max([self.config["r"], *ranks]))
        metadata = {
            # What is not known is left out, a licence among it.
            **({"base_model": base} if base else {}),
            "base_model_relation": "adapter",
            "library_name": "peft",
            **({"pipeline_tag": _PIPELINES[task]} if task in _PIPELINES else {}),
            "tags": list(
                dict.fromkeys(["lora", "forgetless", (self.method or "lora").replace("_", "-")])
            ),
        }
        layers, error = self.config.get("target_modules"), ""
        revision = self.config.get("revision")
        if self.error is not None:
            error = f"{self.error:.2g} of the update's norm was cut off"
        rows = {
            "base in": self.packing or "",
            "start": f"`{self.method}`" if self.method else "",
            "options": pairs(self.options),
            "layers": layers if isinstance(layers, str) else ", ".join(sorted(layers or ())),
            "rank of the file": str(rank),
            "error of the export": "none, it is exact" if self.error == 0 else error,
            **self.settings,
            "versions": pairs(self.versions, " "),
        }
        cells = [
            [name, " ".join(value.replace("|", "\\|").split())]
            for name, value in rows.items()
            if value
        ]
        return _template().render(
            card=self,
            mark=_MARK,
            metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
            base=base,
            loading=f", revision={_quoted(revision)}" if revision else "",
            revision=revision,
            task=task,
            rank=rank,
            known=known(self.method) if self.method else None,
            kind=kind,
            reader=reader,
            vllm_ranks=_VLLM_RANKS,
            vllm_rank=next((allowed for allowed in _VLLM_RANKS if allowed >= rank), None),
            settings=table(["setting", "value"], cells),
        )


def _quoted(text: str) -> str:
    """A string of JSON that is one of Python and YAML too, so that a name cannot end it.

    JSON's escapes of what is outside the first plane, such as emoji, mean something else in Python.
    """
    return json.dumps(text, ensure_ascii=False)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("forgetless.adapters", ""),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update({"quoted": _quoted, "repr": repr})
    return environment.get_template("card.md.jinja")


def write_export_card(
    folder: str | Path,
    base: str,
    *,
    start: Mapping[str, Any] | None = None,
    error: float | None = None,
    tied: tuple[str, str] | None = None,
    head: Head | None = None,
    new_classes: Sequence[str] = (),
    own_classes: int = 0,
    packing: str | None = None,
) -> None:
    """Write the card of an adapter of which nothing but the export is known.

    `base` is empty where it is not known, `start` as `adapters.layer.Start`, and `own_classes` how
    many the base's own head has.
    """
    known, versions = start or {}, {"python": platform.python_version()}
    for package in ("forgetless", "torch", "transformers", "peft"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    write(
        Path(folder),
        Card(
            base=base,
            config=read_json(Path(folder) / "adapter_config.json"),
            method=known.get("method"),
            options=known.get("options", {}),
            error=error,
            tied=tied,
            settings={"seed": str(known["seed"])} if known else {},
            versions=versions,
            head=head,
            new_classes=new_classes,
            own_classes=own_classes,
            packing=packing,
        ),
    )


def write(folder: Path, card: Card) -> None:
    """Write the card, unless somebody made the file their own."""
    file = folder / CARD_FILE
    if not file.exists() or is_ours(file):
        write_text(file, card.text)


def usage(folder: str | Path, base: str) -> list[str]:
    """The lines of Python by which an adapter's card says how to load it; none without a card.

    They name the folder and the base as they are here, and not as the card has them for others.
    """
    file = Path(folder) / CARD_FILE
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    code = "" if found is None else found[1]
    named = {"this-folder": str(folder)}
    if HubName.find(base) is None:
        named[_base_name(base)] = base
    for name, here in named.items():
        code = code.replace(_quoted(name), _quoted(here))
    return [line for line in code.splitlines() if line and not line.startswith("#")]


def is_ours(file: Path) -> bool:
    """Whether a card was written here, and nobody has made it their own since."""
    return _MARK in file.read_text(encoding="utf-8", errors="replace")


def _base_name(base: str) -> str:
    """A name of the base that says nothing of this machine: its hub id, or its folder's own name.

    >>> _base_name("/home/me/models--meta-llama--Llama-2-7b-hf/snapshots/01c7f7")
    'meta-llama/Llama-2-7b-hf'
    """
    if shipped := [name for name, folder in POCKETS.items() if base == str(folder())]:
        return shipped[0]
    if cached := _HUB_CACHE.search(base):
        return f"{cached['owner']}/{cached['name']}"
    hub = HubName.find(base)
    return hub.repository if hub else file_name(base)


def file_name(path: str) -> str:
    """The last part of a path; what is no path, such as "self" or "pocket:held", stays."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def pairs(values: Mapping[str, Any], between: str = "=") -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
