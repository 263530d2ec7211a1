"""Scores that were measured once: kept by the content of the model and of the task. No torch.

    <folder>/<task>-<key>.json             the score
    <folder>/<task>-<key>.jsonl            its items
    <folder>/<task>-<key>.partial.jsonl    what an interrupted evaluation has finished

A model or a task that changes has another key, so nothing here is ever out of date.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetless.core.errors import UserError
from forgetless.core.files import lock, remove, remove_temporaries
from forgetless.scores.files import read_score, write_score
from forgetless.tasks.base import Item, Task, TaskResult
from forgetless.tasks.journal import resuming, sharing

if TYPE_CHECKING:
    from forgetless.core.processes import Processes


_log = logging.getLogger(__name__)


def digest(*parts: str) -> str:
    """16 hex digits of the SHA-256 of several words."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def default_folder() -> Path:
    """Where scores of single evaluations are kept: $FORGETLESS_CACHE, or the user's cache."""
    own = os.environ.get("FORGETLESS_CACHE")
    if own:
        return Path(own) / "scores"
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "forgetless" / "scores"


class ScoreCache:
    """A folder of scores, which several processes may use at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def paths(self, task: Task, *model: str) -> tuple[Path, Path]:
        """The files of a score and of its items, whether they exist or not.

        The model is what decides its answers: content hashes and the number format.
        """
        score = self.folder / f"{task.name}-{digest(*model, task.fingerprint)}.json"
        return score, score.with_suffix(".jsonl")

    def has(self, task: Task, *model: str) -> bool:
        """Whether the score is here."""
        return self.paths(task, *model)[0].exists()

    def result(
        self,
        task: Task,
        *model: str,
        measure: Callable[[], TaskResult],
        processes: Processes | None = None,
    ) -> TaskResult:
        """The score and items of a model on a task, measured now if nobody has.

        An evaluation that was interrupted goes on with the batch that it had reached. Of several
        processes that want the same score one measures, and the others wait for it. The model is as
        for `paths`.
        """
        score, items = self.paths(task, *model)
        partial = score.with_suffix(".partial.jsonl")

        def known() -> tuple[dict[str, Any], list[dict[str, Any]]]:
            found = _intact(score, items)
            if not found[0]:
                remove_temporaries(score.parent, score.stem)
            return found

        def keep() -> tuple[dict[str, Any], list[dict[str, Any]]]:
            write_score(score, items, found.to_json(), [item.to_json() for item in found.items])
            return read_score(score, items)

        is_first = processes is None or processes.is_first
        with lock(score.with_suffix(".lock")) if is_first else nullcontext():
            content, lines = known() if processes is None else processes.first(known)
            if not content:
                with sharing(processes), resuming(partial, score.stem):
                    found = measure()
                content, lines = keep() if processes is None else processes.first(keep)
            if is_first:
                remove(partial)
        kept = [Item.from_json(line) for line in lines]
        # The task may go by another name than when it was measured.
        return replace(TaskResult.from_json(content, kept), task=task.name)


def _intact(score: Path, items: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What both files hold, nothing if either is damaged: that is measured again."""
    try:
        return read_score(score, items)
    except UserError as damage:
        _log.warning("%s", damage)
        return {}, []
