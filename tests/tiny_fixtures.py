"""The files of `tests.tiny` as fixtures."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tests.killing import FORKSERVER, PRELOAD
from tests.tiny import recipe_of, save_base, save_files

FORKSERVER.set_forkserver_preload([*PRELOAD, "tests.quick_fork"])


@pytest.fixture(autouse=True, scope="session")
def _cards_from_one_template() -> Iterator[None]:
    """PEFT compiles the template of a model card wherever an adapter is saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jinja2.Template", cache(jinja2.Template))
        yield


@pytest.fixture(autouse=True, scope="session")
def _configs_without_words() -> Iterator[None]:
    """Transformers puts each config that it reads into words, for a log that is not written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.PreTrainedConfig.__repr__", object.__repr__)
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base model with its tokenizer."""
    return save_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, test.jsonl and old.txt."""
    return save_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def tiny_recipe(tiny_base: Path, tiny_files: Path) -> dict[str, Any]:
    """A recipe on these, as YAML would hold it."""
    return recipe_of(tiny_base, tiny_files)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts its background jobs with SIGINT ignored, and that is respected."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
