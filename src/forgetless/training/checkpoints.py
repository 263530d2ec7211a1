"""Checkpoints that are whole or absent.

`transformers.Trainer` writes a checkpoint in place, file after file, so a killed process leaves a
folder that looks like one. Here a checkpoint counts only once it is *sealed*: when all is on the
disk, a last file with the size and checksum of every other one appears by an atomic rename.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetless.core.errors import UserError
from forgetless.core.files import flush, new_file
from forgetless.core.hashing import checksums, first_damaged

_log = logging.getLogger(__name__)

SEAL = "complete.json"
PREFIX = "checkpoint-"

KEPT_CHECKPOINTS = 2
"""The newest ones; where the last is damaged, there is one before it."""


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def newest(folder: Path) -> Path | None:
    """The sealed checkpoint of the latest step whose files are as they were written, if any is.

    One with a damaged file is named in a warning and removed.
    """
    for checkpoint in sorted(filter(_is_sealed, _all(folder)), key=step_of, reverse=True):
        damaged = first_damaged(checkpoint, _sealed(checkpoint))
        if damaged is None:
            return checkpoint
        _log.warning("%s is damaged; training continues from an older checkpoint", damaged)
        _remove(checkpoint)
    return None


def callback_state(checkpoint: Path, key: str) -> Any:
    """What a callback kept under a key in the trainer's state; None where it kept nothing."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state["stateful_callbacks"].get(key)


def seal(checkpoint: Path, origin: Mapping[str, Any]) -> None:
    """Declare that everything is written.

    The origin is what the training is made of, for `require_origin`.
    """
    files = checksums(checkpoint, lambda file: file.name != SEAL)
    for name in files:
        flush(checkpoint / name)
    content = {"origin": origin, "files": files}
    with new_file(checkpoint / SEAL) as file:
        file.write_text(json.dumps(content, indent=1))


def require_origin(checkpoint: Path, origin: Mapping[str, Any]) -> None:
    """Refuse to continue a checkpoint of another training.

    Raises:
        UserError: names what differs.
    """
    found = json.loads((checkpoint / SEAL).read_text())["origin"]
    wanted = json.loads(json.dumps(origin))
    keys = dict.fromkeys([*wanted, *found])  # a switch that is off has none
    if differing := [key for key in keys if found.get(key) != wanted.get(key)]:
        listed = ", ".join(
            f"{key} {found.get(key)!r} (now {wanted.get(key)!r})" for key in differing
        )
        raise UserError(
            f"{checkpoint} belongs to another training, with {listed}; give another folder, or "
            f"delete {checkpoint.parent} to start anew"
        )


def prune(folder: Path) -> None:
    """Remove all sealed checkpoints but the newest ones."""
    for checkpoint in sorted(filter(_is_sealed, _all(folder)), key=step_of)[:-KEPT_CHECKPOINTS]:
        _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    (checkpoint / SEAL).unlink()  # first, so that a half of it is none
    shutil.rmtree(checkpoint)


def discard_unsealed(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for checkpoint in _all(folder):
        if not _is_sealed(checkpoint):
            shutil.rmtree(checkpoint)


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob(PREFIX + "*") if path.name.split("-")[1].isdigit()]


def _is_sealed(checkpoint: Path) -> bool:
    """Whether all files are there with their sizes; what they hold is for `newest`."""
    files = _sealed(checkpoint)
    return bool(files) and all(
        (file := checkpoint / name).is_file() and file.stat().st_size == int(checksum.split(" ")[0])
        for name, checksum in files.items()
    )


def _sealed(checkpoint: Path) -> dict[str, str]:
    """The checksums of its files; none of what is not sealed."""
    try:
        files: dict[str, str] = json.loads((checkpoint / SEAL).read_text())["files"]
        return {name: str(checksum) for name, checksum in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
