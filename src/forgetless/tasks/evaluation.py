"""Score a model on tasks. Importing it loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Self

from forgetless.core.errors import UserError
from forgetless.tasks import Item, Spec, Task, TaskResult, make_tasks
from forgetless.tasks.base import whole_number

if TYPE_CHECKING:
    from torch import nn

    from forgetless.data.modality import Processor


class Scores(Mapping[str, TaskResult]):
    """The result of each task by its name, in the order of evaluation; never changes."""

    def __init__(self, results: Iterable[TaskResult]) -> None:
        self._results = {result.task: result for result in results}

    def __getitem__(self, task: str) -> TaskResult:
        return self._results[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        shown = ", ".join(f"{r.task}: {r.metric} {r.value:.4g}" for r in self.values())
        return f"Scores({shown})"

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Every number of every task: {task: {metric: {"value", "stderr", "n"}}}."""
        return {task: result.metrics for task, result in self.items()}

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Each task's result without its items, as plain JSON values."""
        return {task: result.to_json() for task, result in self.items()}

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Mapping[str, Any]],
        items: Mapping[str, Sequence[Item]] | None = None,
    ) -> Self:
        """The scores that `to_json` wrote, with the items that were kept, by task."""
        kept = items or {}
        return cls(TaskResult.from_json(data[task], kept.get(task, ())) for task in data)


def evaluate(
    model: nn.Module,
    tasks: Spec | Task | Iterable[Spec | Task],
    processor: Processor | None = None,
    *,
    tokenizer: Processor | None = None,
    reference: nn.Module | None = None,
    batch_size: int | None = None,
    as_base: bool = False,
) -> Scores:
    """Score a model on tasks; the model is left as it was.

    Args:
        model: of the kind that the tasks are for, or a PeftModel of one.
        tasks: names, mappings or tasks (see `forgetless.tasks.make_task`), or one of them.
        processor: what reads data for the model, such as its tokenizer; None for that in the folder
            or on the hub that the model was loaded from.
        tokenizer: the same by its name for language models.
        reference: the base model, for tasks that measure a distance to it; not needed for a
            PeftModel, whose base is itself with the adapter off.
        batch_size: items at once, 1 or more; None lets each task choose. It does not change the
            scores.
        as_base: score the base that a PeftModel stands on, by switching its adapter off.

    Returns:
        The result of each task by its name.

    Raises:
        UserError: everything that is wrong with the tasks, a task that needs a reference where
            there is none, no processor, or a model that is of another kind.

    Example:
        >>> before = fl.evaluate(base, ["pocket_recall"])  # doctest: +SKIP
        >>> print(fl.compare(before, fl.evaluate(tuned, ["pocket_recall"])))  # doctest: +SKIP
    """
    made = make_tasks(tasks)
    if problem := whole_number("batch_size", batch_size, optional=True):
        raise UserError(problem)
    if reference is None and not hasattr(model, "disable_adapter"):
        for task in made:
            if task.needs_reference:
                raise UserError(
                    f"task {task.name!r} measures the distance to the base model: pass "
                    "reference=base, or a PeftModel, whose adapter can be switched off"
                )
    if as_base and not hasattr(model, "disable_adapter"):
        raise UserError(f"as_base needs a PeftModel, got {type(model).__name__}: score it as it is")
    reader = tokenizer if processor is None else processor
    if reader is None:
        reader = _processor_of(model)
    with _adapter_off(model) if as_base else nullcontext():
        return Scores(
            task.evaluate(model, reader, reference=reference, batch_size=batch_size)
            for task in made
        )


def _adapter_off(model: Any) -> AbstractContextManager[None]:
    from forgetless.models.state import adapter_off

    return adapter_off(model)


def _processor_of(model: nn.Module) -> Processor:
    from forgetless.data.modality import modality_of
    from forgetless.models.state import source_of

    modality, source = modality_of(model), source_of(model)
    if not source:
        name = modality.processor_name
        raise UserError(
            f"the model does not say where it was loaded from: pass processor= (its {name})"
        )
    return modality.load_processor(source)
