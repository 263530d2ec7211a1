"""Where the installed lm-evaluation-harness keeps a task, found without loading all 14 000 of them.

Neither torch nor lm_eval is imported: names can be checked before anything heavy is loaded.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from forgetless.core.errors import UserError

_NAMED = re.compile(
    rb"""^["']?(task|group)["']?:[ \t]*["']?([\w.+-]+)["']?[ \t]*(?:#.*)?\r?$""", re.M
)


@dataclass(frozen=True)
class Entry:
    """The file that defines a name.

    Attributes:
        path: a YAML file.
        is_group: whether it lists other tasks.
    """

    path: Path
    is_group: bool


def is_installed() -> bool:
    """Whether the lm-evaluation-harness can be imported."""
    return importlib.util.find_spec("lm_eval") is not None


def tasks_folder() -> Path:
    """The folder of the harness's own task files.

    Raises:
        UserError: it is not installed.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "the lm-evaluation-harness is not installed; its tasks need "
            "pip install 'forgetless[eval]'"
        )
    return Path(found.submodule_search_locations[0]) / "tasks"


@lru_cache(maxsize=256)
def find(name: str) -> Entry | None:
    """The file that defines a task or a group of tasks; None where no file does.

    Folders whose name begins the task's are looked through first; all of them take seconds.

    Raises:
        UserError: the harness is not installed.
    """
    root = tasks_folder()
    likely = [path for path in root.iterdir() if path.is_dir() and name.startswith(path.name)]
    for folder in sorted(likely, key=lambda path: -len(path.name)):
        if name in (entries := _entries(folder)):
            return entries[name]
    return _entries(root).get(name)


@lru_cache(maxsize=64)
def _entries(folder: Path) -> Mapping[str, Entry]:
    """Every name defined in a folder or below; of two files with one name the first counts."""
    entries: dict[str, Entry] = {}
    for path in sorted(folder.rglob("*.yaml")):
        for what, name in _NAMED.findall(path.read_bytes()):
            entries.setdefault(name.decode(), Entry(path, what == b"group"))
    return entries
