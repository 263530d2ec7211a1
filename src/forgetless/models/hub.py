"""Models and adapters of the Hugging Face hub, each at one commit throughout a process.

A name is that of a repository, such as ``EleutherAI/pythia-160m``, or one of its branches, tags or
commits: ``EleutherAI/pythia-160m@step1000``.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from forgetless.core.errors import UserError, first_line

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*(/[\w-][\w.-]*)?)(@(?P<revision>[\w-][\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PATIENCE = 10
"""Seconds to wait for the hub, before what is in the local cache is used."""

_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.md", "*.safetensors")
_ELSEWHERE = ["*/*", "consolidated*"]
"""Files of other formats and checkpoints, and a second copy of some models' weights."""


@dataclass(frozen=True)
class HubName:
    """A repository, and which state of it; None is its main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def find(cls, name: str) -> HubName | None:
        """What a name says; None where it is a folder, or can be no name on the hub.

        >>> HubName.find("EleutherAI/pythia-160m@step1000")
        HubName(repository='EleutherAI/pythia-160m', revision='step1000')
        """
        found = None if Path(name).is_dir() else _NAME.fullmatch(name)
        return found and cls(found["repository"], found["revision"])

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


@cache
def go_offline_if_unreachable() -> None:
    """Ask once whether the hub answers; where it does not, only the local cache is read from then.

    The hub's own library tries every file again and again, for half a minute each.
    """
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as problem:  # of whichever library for HTTP the hub's library uses
        warnings.warn(
            f"the Hugging Face hub does not answer ({first_line(problem)}), so that only what is "
            "in the local cache can be had of it",
            stacklevel=3,
        )
        constants.HF_HUB_OFFLINE = True


@cache
def commit_of(hub: HubName) -> str:
    """The commit that a name stands for; asked once, so that all files belong together.

    Where the hub does not answer, it is that of the copy in the local cache.

    Raises:
        UserError: there is no such repository or revision, it may not be read, it holds no model,
            or the hub does not answer and the local cache has no copy.
    """
    go_offline_if_unreachable()
    if hub.revision is not None and _COMMIT.fullmatch(hub.revision):
        return hub.revision
    missing: EntryNotFoundError | None = None
    try:
        for file in ("config.json", "adapter_config.json"):
            try:
                found = hf_hub_download(hub.repository, file, revision=hub.revision)
            except EntryNotFoundError as problem:
                missing = problem
            else:
                return Path(found).parent.name  # the cache has a folder for each commit
    except GatedRepoError as problem:
        raise UserError(
            f"{str(hub)!r} is gated: accept its terms on {constants.ENDPOINT}/{hub.repository}, "
            "and log in by 'hf auth login'"
        ) from problem
    except RevisionNotFoundError as problem:
        raise UserError(
            f"{hub.repository!r} on the Hugging Face hub has no branch, tag or commit "
            f"{hub.revision!r}"
        ) from problem
    except RepositoryNotFoundError as problem:
        raise UserError(
            f"{str(hub)!r} is no folder, and the Hugging Face hub has no model of that name, or "
            "a private one, which 'hf auth login' makes readable"
        ) from problem
    except Exception as problem:  # of whichever library for HTTP the hub's library uses
        raise UserError(f"cannot read {str(hub)!r} on the hub: {first_line(problem)}") from problem
    if isinstance(missing, LocalEntryNotFoundError):
        raise UserError(
            f"{str(hub)!r} is no folder, and no model of that name is in the local Hugging Face "
            "cache (HF_HUB_OFFLINE is set or the hub does not answer, so nothing is downloaded)"
        ) from missing
    raise UserError(
        f"{str(hub)!r} on the Hugging Face hub is no model: it has neither config.json nor "
        "adapter_config.json"
    ) from missing


def snapshot(hub: HubName) -> Path:
    """The folder with the files of a model or an adapter; they are downloaded unless they are here.

    Pickled weights are left out where there are others.

    Raises:
        UserError: as `commit_of`, and where the download fails.
    """
    commit = commit_of(hub)
    try:
        for patterns in (_FILES, (*_FILES, "*.bin")):
            folder = Path(
                snapshot_download(
                    hub.repository,
                    revision=commit,
                    allow_patterns=list(patterns),
                    ignore_patterns=_ELSEWHERE,
                )
            )
            if any(folder.glob("*.safetensors")):
                break
    except Exception as problem:  # of whichever library for HTTP the hub's library uses
        raise UserError(f"cannot download {str(hub)!r}: {first_line(problem)}") from problem
    return folder


def folder_of(name: str | Path) -> Path:
    """Where an adapter or a tuned model lies: its folder here, or that of its copy from the hub.

    What is neither a folder nor a name such as ``owner/name`` is given back as it is.

    Raises:
        UserError: as `snapshot`.
    """
    hub = HubName.find(str(name))
    return snapshot(hub) if hub and "/" in hub.repository else Path(name)
