"""An adapter that is done: merged into its base, asked beside it, uploaded; and what is left."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from forgetless.adapters.folders import START_FILE, learned_classes, load
from forgetless.adapters.foreign import require_usable
from forgetless.adapters.layer import adapted_layers
from forgetless.cli.commands.exports import export_adapter
from forgetless.cli.commands.folders import (
    Trained,
    adapter_and_base,
    known_base,
    require_new,
)
from forgetless.core.errors import UserError, unknown
from forgetless.core.files import lock, new_folder, remove
from forgetless.data.modality import Processor, load_processor, modality_of
from forgetless.models.load import adapter_off, load_model, load_tuned
from forgetless.studies.folder import RunFolder
from forgetless.tasks.asking import as_asked
from forgetless.tasks.generation import generate

UPLOADED = ("adapter_config.json", "adapter_model.safetensors", "config.json", "README.md")
"""What an adapter's repository holds; nothing else that lies in the folder is uploaded."""


def merge_adapter(
    source: str | Path, out: str | Path, base: str | None = None, dtype: str = "auto"
) -> int:
    """Write a model folder whose weights are W + scaling · B A; how many weights that changes.

    Raises:
        UserError: a whole model, an adapter that is not for the base, or a base whose weights are
            packed, to which nothing can be added exactly; ``out`` is not empty.
    """
    require_new(Path(out))
    trained, name = adapter_and_base(source, base)
    model = load_model(name, dtype=dtype, new_classes=learned_classes(trained.folder))
    if getattr(model, "quantization_method", None) is not None:
        raise UserError(f"the weights of {name} are packed; merge into the base before packing")
    require_usable(trained.folder, model)
    adapted = load(model, trained.folder)
    changed = len(adapted_layers(adapted))
    merged: Any = adapted.merge_and_unload()
    with new_folder(Path(out)) as folder:
        merged.save_pretrained(folder)
        load_processor(name).save_pretrained(folder)
    return changed


@dataclass(frozen=True)
class Pair:
    """A base and what was trained of it, to be asked the same.

    Attributes:
        model: with the adapter on, or tuned in whole.
        base: of a model tuned in whole; None for the model with its adapter off.
        tokenizer: of both.
    """

    model: Any
    base: Any
    tokenizer: Processor

    @classmethod
    def load(cls, source: str | Path, base: str | None = None, dtype: str = "auto") -> Pair:
        """Of a run, an adapter or a tuned model.

        Raises:
            UserError: no language model, or as `merge_adapter`.
        """
        trained = Trained.find(source)
        name = known_base(base or trained.base, source)
        if modality_of(name).own_texts is None:
            raise UserError(f"base {name!r} is a classifier, which gives no answers; see 'eval'")
        model, tokenizer = load_model(name, dtype=dtype), load_processor(name)
        if not trained.is_adapter:
            return cls(load_tuned(trained.folder, model), model, tokenizer)
        require_usable(trained.folder, model)
        return cls(load(model, trained.folder), None, tokenizer)

    def answers(
        self, prompt: str, max_new_tokens: int, template: str = "auto", system: str | None = None
    ) -> tuple[str, str]:
        """The greedy answers of the base and of what was trained.

        Raises:
            UserError: a template other than auto and off, or a system prompt without one.
        """
        if template not in ("auto", "off"):
            raise unknown("template", template, ("auto", "off"))
        prompts, rendered = as_asked([prompt], self.tokenizer, template, system)
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": (), "rendered": rendered}
        with adapter_off(self.model):
            (before,) = generate(self.base or self.model, self.tokenizer, prompts, **how)
        (after,) = generate(self.model, self.tokenizer, prompts, **how)
        return before.strip(), after.strip()


def push_adapter(
    source: str | Path, repository: str, *, private: bool = False, base: str | None = None
) -> str:
    """Upload an adapter, exported where it is none that PEFT loads; the address of what was made.

    Raises:
        UserError: a whole model, or the hub refuses.
    """
    trained, name = adapter_and_base(source, base)
    folder = RunFolder(Path(source)).adapter
    with tempfile.TemporaryDirectory(prefix="forgetless-push-") as place:
        if not folder.is_dir():
            folder = trained.folder
        if (folder / START_FILE).exists():
            folder = export_adapter(source, Path(place) / "adapter", base=name).folder
        api = HfApi()
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            told = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=list(UPLOADED),
                commit_message="Upload a LoRA adapter",
            )
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as problem:
            said = str(problem).strip().splitlines()[0]
            raise UserError(
                f"the hub did not take {folder}: {said}; 'hf auth login' signs in"
            ) from None
    return str(told.commit_url)


# ---- what is left of studies ---------------------------------------------------------------------

_RESTORED = {
    "aftercare": "by the next repair",
    "rates": "by --find-lr",
    "scores": "by the next run",
    "spectra": "by the next start",
    "statistics": "by the next start",
}
"""Part of a study -> what makes it again where it is deleted."""


@dataclass(frozen=True)
class Part:
    """One folder that a study keeps for its next runs.

    Attributes:
        name: such as "spectra".
        study: the study's folder.
        size: in bytes.
    """

    name: str
    study: Path
    size: int

    @property
    def restored(self) -> str:
        """What makes it again where it is deleted."""
        return _RESTORED[self.name]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"part": self.name, "study": str(self.study), "bytes": self.size}


def kept_parts(folder: Path) -> list[Part]:
    """What the studies in a folder, or the study that it is, share among their runs, largest first.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; give one of studies, such as runs")
    studies = [folder] if (folder / "shared").is_dir() else sorted(folder.glob("*/shared/.."))
    parts = [
        Part(name, study, sum(f.stat().st_size for f in place.rglob("*") if f.is_file()))
        for study in (each.resolve() for each in studies)
        for name in _RESTORED
        if (place := study / "shared" / name).is_dir()
    ]
    return sorted(parts, key=lambda part: -part.size)


def delete_parts(parts: Sequence[Part], names: Collection[str]) -> list[Part]:
    """Delete the parts of these names; those that were deleted.

    Raises:
        UserError: an unknown part, or a run of the study is at work.
    """
    for name in names:
        if name not in _RESTORED:
            raise unknown("part", name, _RESTORED)
    chosen = [part for part in parts if part.name in names]
    with ExitStack() as held:
        for file in {f for part in chosen for f in part.study.glob("*/.lock")}:
            if not held.enter_context(lock(file, wait=False)):
                raise UserError(f"the run {file.parent} is at work; nothing was deleted")
        for part in chosen:
            remove(part.study / "shared" / part.name)
    return chosen
