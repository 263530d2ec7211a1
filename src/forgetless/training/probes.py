"""What a training is asked on its way: tasks that are small enough to be scored again and again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.core.errors import UserError
from forgetless.core.tensors import read_tensors, write_tensors
from forgetless.data.examples import Examples
from forgetless.data.modality import Processor
from forgetless.data.texts import read_examples as read_texts
from forgetless.data.texts import spread
from forgetless.models.state import adapter_off, generators_kept
from forgetless.tasks import TASKS, Task, TaskResult, make_task
from forgetless.tasks.kl import KL
from forgetless.tasks.perplexity import Perplexity

LIMIT = 32
"""Texts of a probe that is given as texts alone, evenly spread over what there is."""

CHARACTERS = 1024
"""Longer texts among them are cut into pieces of so many characters."""

RECORDED_BYTES = 1 << 30
"""Most memory for the base's logits where it cannot be asked again."""

Asked = str | Path | Mapping[str, Any] | Task
"""Texts (a file, or one of the pocket world's), a task's name or mapping, or a task."""


class Probes:
    """The tasks of a training's probes, by the names under which they are logged.

    Texts alone stand for the mean token loss on them where something is to be learned, and for
    KL(base || model) on them where it is not to be forgotten.

    Args:
        learning: one or several of `Asked`.
        forgetting: likewise.
        usual: settings of those that have them and do not give their own.

    Raises:
        UserError: no probe at all, or what is wrong with one.
    """

    def __init__(
        self,
        learning: Asked | Iterable[Asked],
        forgetting: Asked | Iterable[Asked],
        usual: Mapping[str, Any] | None = None,
    ) -> None:
        self.learning = _tasks(learning, _HeldLoss, "loss", usual or {})
        self.forgetting = _tasks(forgetting, _HeldKL, "kl", usual or {})
        if not (self.learning or self.forgetting):
            raise UserError(
                "no probe given; name texts or tasks, as in "
                "ForgettingCallback(forgetting='old.txt', learning='held.jsonl')"
            )

    @property
    def need_reference(self) -> bool:
        """Whether any probe is a distance to the base."""
        return any(t.needs_reference for t in (*self.learning.values(), *self.forgetting.values()))

    @property
    def fingerprint(self) -> str:
        """Hash of the forgetting probes, for those are what a budget looks at."""
        content = [f"{name}:{task.fingerprint}" for name, task in self.forgetting.items()]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]

    def measure(
        self, model: nn.Module, processor: Processor, reference: nn.Module | None
    ) -> tuple[dict[str, TaskResult], dict[str, TaskResult]]:
        """The results of the learning and of the forgetting probes; nothing random moves on."""

        def result(task: Task) -> TaskResult:
            base = reference if task.needs_reference else None
            return task.evaluate(model, processor, reference=base)

        with generators_kept():
            learning = {name: result(task) for name, task in self.learning.items()}
            return learning, {name: result(task) for name, task in self.forgetting.items()}

    def of_base(
        self, model: nn.Module, processor: Processor, reference: nn.Module | None
    ) -> dict[str, float]:
        """The base's own score on the forgetting probes that are no distance to it.

        The base is `reference`, or a PeftModel with its adapter off, or the model as it is.
        """
        off = adapter_off(model) if reference is None else nullcontext()
        base = model if reference is None else reference
        with generators_kept(), off:
            return {
                name: task.evaluate(base, processor).value
                for name, task in self.forgetting.items()
                if not task.needs_reference
            }


class _Few:
    """At most `LIMIT` examples of a task's source; of raw texts, pieces of them."""

    path: str | Path
    chat_template: str
    system: str | None

    @cached_property
    def examples(self) -> Examples:
        found = read_texts(self.path)
        records = list(found)
        if found.kind == "text":
            records = [
                {"text": record["text"][start : start + CHARACTERS]}
                for record in records
                for start in range(0, len(record["text"]), CHARACTERS)
            ]
        said: Any = {"chat_template": self.chat_template, "system": self.system}
        return Examples(found.kind, spread(records, LIMIT), str(self.path), **said)


class _HeldLoss(_Few, Perplexity):
    """The token loss on a few of the texts."""


class _HeldKL(_Few, KL):
    """The divergence on a few of the texts."""


def _tasks(
    asked: Asked | Iterable[Asked],
    of_texts: Callable[..., Task],
    name: str,
    usual: Mapping[str, Any],
) -> dict[str, Task]:
    """Tasks by name; texts become a task of the kind `of_texts` with that name."""
    one = isinstance(asked, str | Path | Mapping) or not isinstance(asked, Iterable)
    several: list[Any] = [asked] if one else list(asked)  # type: ignore[arg-type]
    tasks: dict[str, Task] = {}
    for entry in several:
        if isinstance(entry, Path) or (isinstance(entry, str) and entry not in TASKS):
            named = name if name not in tasks else f"{name}_{len(tasks) + 1}"
            entry = of_texts(str(entry), named, **usual)
        task = make_task(entry, usual)
        if task.name in tasks:
            raise UserError(f"two probes are named {task.name!r}; give each a 'name' of its own")
        tasks[task.name] = task
    return tasks


class RecordedBase(nn.Module):
    """A base that answers what it was asked before its weights were trained, and nothing else.

    When the weights themselves are trained there is no adapter to switch off. As long as `model`
    is the base, every batch that passes through is written down, logits and all; afterwards the
    same batches get the same logits, bit for bit.

    Args:
        model: the base, before its first step.

    Raises:
        UserError: the logits need more than 1 GiB, or a batch that was never seen.
    """

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)  # says: on the CPU
        self.kept: dict[str, Tensor] = {}
        self._ask: Any = model.__call__ if model is not None else None  # no submodule of this one

    def forward(self, **given: Any) -> SimpleNamespace:
        """What the base says to a batch: ``.logits``, (rows, tokens, vocabulary) or of classes.

        Everything in the batch that is a tensor tells it from others, in the order given.
        """
        batch = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        digest = hashlib.sha256(repr(tuple(next(iter(batch.values())).shape)).encode())
        for value in batch.values():
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
        key = digest.hexdigest()
        if key in self.kept:
            return SimpleNamespace(logits=self.kept[key])
        if self._ask is None:
            raise UserError(
                "the base's predictions on these texts were not kept; pass reference=, the "
                "untouched base"
            )
        device = self._ask.__self__.device
        there = {name: value.to(device) for name, value in batch.items()}
        logits = self.kept[key] = self._ask(**{**given, **there}).logits.detach().cpu()
        if sum(kept.nbytes for kept in self.kept.values()) > RECORDED_BYTES:
            raise UserError(
                "the base's predictions on the texts of the probes need more than "
                f"{RECORDED_BYTES >> 30} GiB; give fewer or shorter texts, as in "
                "{'kind': 'kl', 'path': ..., 'limit': 16, 'max_length': 64}, or pass reference=, "
                "the untouched base"
            )
        return SimpleNamespace(logits=logits)

    def close(self) -> None:
        """From now on, nothing new is asked: the model is no longer the base."""
        self._ask = None

    def save(self, file: Path) -> None:
        """Write the logits, for a training that is stopped and continued."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors({key: logits.contiguous() for key, logits in self.kept.items()}, file)

    @classmethod
    def load(cls, file: Path) -> RecordedBase:
        """The logits that `save` wrote.

        Raises:
            UserError: there is no such file.
        """
        if not file.is_file():
            raise UserError(
                f"{file} is gone, which has the base's predictions from before the first step; "
                "pass reference=, the untouched base, or start the training anew"
            )
        recorded = cls(None)
        recorded.kept = read_tensors(file)
        return recorded
