"""Tasks of the lm-evaluation-harness by their own names, on a model in memory.

Importing this module imports neither torch nor lm_eval.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from forgetless.core.errors import UserError, unknown
from forgetless.core.files import not_there
from forgetless.tasks.asking import Asking
from forgetless.tasks.base import TaskResult, whole_number
from forgetless.tasks.harness.index import find, is_installed
from forgetless.tasks.harness.layouts import STANDARD
from forgetless.tasks.harness.own_code import own_code

if TYPE_CHECKING:
    from forgetless.tasks.base import Model, Tokenizer
    from forgetless.tasks.harness.running import Loaded


@dataclass(frozen=True)
class LMEval(Asking):
    """A task, or a group of tasks, of the lm-evaluation-harness (lm-eval).

    The prompts, the worked examples, the metrics and their numbers are lm-eval's own, as its
    command line gives them for the same files. The value is one of the task's metrics under
    lm-eval's key, such as "acc_norm,none"; the others are in the result's `extra`, and the task's
    version, number of worked examples and limit in its `settings`. An item is a document.

    Attributes:
        task: lm-eval's name of it, or a YAML file in lm-eval's form.
        name: of the task; empty for lm-eval's name.
        limit: the first so many documents only, of each task of a group.
        num_fewshot: worked examples in a prompt; None for the task's own number.
        data_dir: a folder with the data in local files, for the tasks of `STANDARD`; None for the
            data set on the hub or its copy in the local cache.
        max_new_tokens: most tokens of a generated answer; None for the task's own number, which is
            mostly 256. A smaller one saves time and is another task.
        metric: the key that counts; None for acc_norm where the task has it, else acc, else
            exact_match with the task's first filter, else the task's first metric.
        chat_template: auto to ask by the tokenizer's own, where it has one, with worked examples as
            turns (lm-eval's apply_chat_template and fewshot_as_multiturn); or off, as published.
        system: what is said first, by the template (lm-eval's system_instruction).
        allow_code_execution: whether a YAML file may run code of its own (`!function`).

    Raises:
        UserError: settings out of range, no such task, code in it that is not allowed, or lm-eval
            is not installed.

    Reference:
        Gao et al., "The Language Model Evaluation Harness", github.com/EleutherAI/
        lm-evaluation-harness.
    """

    kind = "lm_eval"
    summary = "a task of the lm-evaluation-harness, by its name there"

    task: str
    name: str = ""
    limit: int | None = None
    num_fewshot: int | None = None
    data_dir: str | Path | None = None
    max_new_tokens: int | None = None
    metric: str | None = None
    chat_template: str = "off"
    system: str | None = None
    allow_code_execution: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.task, str) or not self.task:
            raise UserError(f"task 'lm_eval': task must be a name of lm-eval, got {self.task!r}")
        if not self.name:
            object.__setattr__(self, "name", Path(self.task).stem if self._is_file else self.task)
        super().__post_init__()

    @property
    def _is_file(self) -> bool:
        return self.task.endswith((".yaml", ".yml"))

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        yield from super().problems()
        yield whole_number("limit", self.limit, optional=True)
        yield whole_number("num_fewshot", self.num_fewshot, 0, optional=True)
        yield whole_number("max_new_tokens", self.max_new_tokens, optional=True)
        if not is_installed():
            yield f"{self.task!r} needs the lm-evaluation-harness: pip install 'forgetless[eval]'"
        elif self._is_file and not Path(self.task).is_file():
            yield not_there(self.task)
        elif self.has_own_code and self.allow_code_execution is not True:
            yield (
                f"{self.task} would run code of its own: {'; '.join(self._own_code)}. Read it, "
                "then allow it with --allow-code-execution, or 'allow_code_execution: true' in the "
                "task's settings"
            )
        elif not self._is_file and not find(self.task):
            yield str(unknown("lm-eval task", self.task, STANDARD))
        if self.data_dir is not None:
            if self.task not in STANDARD:
                yield (
                    f"data_dir is for {', '.join(STANDARD)}; for {self.task!r}, write a task of "
                    "your own over the file (kind multiple_choice, generate or perplexity)"
                )
            elif not Path(self.data_dir).is_dir():
                yield f"data_dir: no folder {self.data_dir}"

    @cached_property
    def _own_code(self) -> list[str]:
        return own_code(Path(self.task)) if self._is_file else []

    @property
    def has_own_code(self) -> bool:
        """Whether to read the task is to run code of a file of the user's."""
        return bool(self._own_code)

    @cached_property
    def _loaded(self) -> Loaded:
        """The task with its data; the metric that counts is one that it has."""
        from forgetless.tasks.harness.running import load

        return load(self)

    def content(self) -> Sequence[object]:
        """The documents, worked examples, settings, version and code of the task, and the metric.

        Raises:
            UserError: the data cannot be had.
        """
        return self._loaded.content(), self._loaded.metric, *self.said("off")

    def measure(
        self, model: Model, tokenizer: Tokenizer, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """lm-eval's score of `model`, which may be a PeftModel; nothing of it is reloaded.

        Raises:
            UserError: not a causal language model, logits that are nan, or answers longer than
                the model can read.
        """
        try:
            return self._loaded.run(model, tokenizer, batch_size)
        except UserError as problem:
            raise UserError(f"task {self.name!r}: {problem}") from None


TASK = LMEval
