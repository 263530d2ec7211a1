"""The folders that a command reads and writes: what was trained, and a new place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from forgetless.adapters.folders import CONFIG_FILE, classes_for, recorded_base
from forgetless.core.errors import UserError
from forgetless.core.files import read_json, require_place
from forgetless.models.hub import folder_of
from forgetless.models.load import load_model, resolve_base
from forgetless.recipes.recipe import Recipe
from forgetless.studies.folder import RunFolder


def require_new(path: Path) -> None:
    """Raise ``UserError`` where a folder would replace something, or cannot be written."""
    if path.is_file():
        raise UserError(f"{path} is a file; give a new folder")
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{path} is not empty; give a new folder")
    require_place(path)


def require_file(path: Path) -> None:
    """Raise ``UserError`` where no file can be written; one that is there is replaced."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file")
    require_place(path)


@dataclass(frozen=True)
class Trained:
    """Trained weights: an adapter's folder or a whole model's, and the base where it is known.

    `loading` is how a run's base was loaded, in arguments of `load_model`.
    """

    folder: Path
    base: str | None
    is_adapter: bool
    loading: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, path: str | Path) -> Trained:
        """What lies at ``path``: a run's folder, an adapter's or a model's.

        It may be the name of an adapter or a model on the Hugging Face hub.
        """
        path = folder_of(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no folder {path}; give a run or an adapter")
        run = RunFolder(path)
        if run.recipe.exists():
            recipe = Recipe.load(run.recipe)
            for folder, is_adapter in ((run.native, True), (run.model, False)):
                if folder.exists():
                    return cls(folder, recipe.base, is_adapter, recipe.loading)
            raise UserError(f"the run {path} has no trained weights yet; finish it first")
        config = read_json(path / CONFIG_FILE)
        if config:
            return cls(path, recorded_base(config), True)
        if (path / "config.json").exists():
            return cls(path, None, False)
        raise UserError(
            f"{path} is neither a run nor an adapter: it has no recipe.yaml and no {CONFIG_FILE}"
        )


def load_base(
    name: str, trained: Path | None, dtype: str = "auto", **loading: Any
) -> PreTrainedModel:
    """The base, with the new head that was trained on it, if any, as it was at its start."""
    classes = () if trained is None else classes_for(trained, name)
    return load_model(name, dtype=dtype, new_classes=classes, **loading)


def known_base(base: str | None, trained: Trained, source: str | Path) -> str:
    """The base that was asked for, or the recorded one; ``UserError`` where that is not here."""
    if base is not None:
        return base
    if trained.base is None:
        raise UserError(f"{source} does not say which base it is for; give --base")
    try:
        resolve_base(trained.base, weights=False)
    except UserError as problem:
        raise UserError(
            f"{problem}. {source} names its base so, as from the folder of its training; give "
            "--base where it lies elsewhere"
        ) from problem
    return trained.base


def adapter_and_base(source: str | Path, base: str | None) -> tuple[Trained, str]:
    """An adapter and the name of its base, which ``base`` names where it is not recorded."""
    trained = Trained.find(source)
    if not trained.is_adapter:
        raise UserError(f"{source} is a whole model, not an adapter; use it as it is")
    return trained, known_base(base, trained, source)
