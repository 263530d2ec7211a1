"""Hashes of what decides what a model or an adapter computes, wherever it lies."""

import hashlib
import json
from collections.abc import Sequence, Set
from pathlib import Path

from forgetless.core.hashing import content_hash, files_hash
from forgetless.models.gguf import is_gguf
from forgetless.models.hub import HubName, commit_of
from forgetless.models.load import resolve_base
from forgetless.models.trust import is_trusted

MODEL_FILES = frozenset({".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"})
"""Endings of the files that decide what a model folder computes; its README does not."""


def base_hash(base: str, new_classes: Sequence[str] = ()) -> str:
    """What a base's name stands for: the content of a folder or file, or the commit on the hub.

    With the classes of a new head, if it has one.
    """
    resolved = resolve_base(base)
    if is_gguf(base):  # the config of its folder names the version of what unpacked it
        found = content_hash(Path(base).expanduser())
    elif hub := HubName.find(resolved):
        found = hashlib.sha256(f"{hub.repository}@{commit_of(hub)}".encode()).hexdigest()
    else:
        found = weights_hash(resolved, {".py"} if is_trusted(base) else set())
    more = json.dumps([found, *new_classes])
    return hashlib.sha256(more.encode()).hexdigest() if new_classes else found


def weights_hash(folder: str | Path, more: Set[str] = frozenset()) -> str:
    """SHA-256 of the files in a model's or an adapter's folder that decide what it computes.

    Files with `more` endings count too.
    """
    folder, endings = Path(folder), MODEL_FILES | more
    return files_hash((f for f in folder.iterdir() if f.suffix in endings), folder)
