"""Score a model on tasks, and compare two scorings item by item. Importing it loads no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from forgetless import metrics
from forgetless.errors import UserError
from forgetless.tasks import Item, Spec, Task, TaskResult, make_tasks
from forgetless.tasks.base import whole_number

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["Comparison", "Row", "Scores", "compare", "evaluate"]


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


@dataclass(frozen=True)
class Row:
    """One task under the base model and under another.

    Attributes:
        task: its name.
        metric: what the scores are.
        higher_is_better: their direction.
        n: number of items.
        base: score of the base model.
        score: score of the other.
        interval: of the difference.
        paired: whether the interval comes from the same items under both models (bootstrap) or,
            without items, from the two standard errors as if they were independent (wider).
        p_value: of McNemar's exact test that nothing changed; None unless items are right or wrong.
        lost: ids of the items right before and wrong now, in the order of the task.
        gained: ids of the items wrong before and right now.
        kept: ids of the items right both times.
    """

    task: str
    metric: str
    higher_is_better: bool
    n: int
    base: float
    score: float
    interval: metrics.Interval
    paired: bool
    p_value: float | None = None
    lost: tuple[str, ...] = ()
    gained: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """The score less the base's."""
        return self.score - self.base

    @property
    def retention(self) -> float:
        """Share of the base's score that is left; see `metrics.retention`."""
        return metrics.retention(self.score, self.base, self.higher_is_better)

    @property
    def forgetting(self) -> float:
        """The difference with the sign that positive is worse."""
        return metrics.forgetting(self.score, self.base, self.higher_is_better)

    @property
    def is_noise(self) -> bool:
        """Whether no change at all is inside the interval, or the interval is unknown."""
        return 0.0 in self.interval or any(math.isnan(end) for end in self.interval)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is unknown is null."""
        low, high = self.interval
        return {
            "task": self.task,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "n": self.n,
            "base": self.base,
            "score": self.score,
            "difference": self.difference,
            "low": _known(low),
            "high": _known(high),
            "paired": self.paired,
            "retention": _known(self.retention),
            "p_value": self.p_value,
            "lost": list(self.lost),
            "gained": list(self.gained),
            "kept": list(self.kept),
        }


@dataclass(frozen=True)
class Comparison:
    """A row for each task that both models were scored on.

    Attributes:
        rows: in the order of the second scores.
        level: confidence of the rows' intervals.
        unmatched: tasks that only one of the two was scored on, and that are not compared.
    """

    rows: tuple[Row, ...]
    level: float
    unmatched: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, task: str) -> Row:
        for row in self.rows:
            if row.task == task:
                return row
        raise KeyError(task)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [row.to_json() for row in self.rows]
        return {"level": self.level, "rows": rows, "unmatched": list(self.unmatched)}

    def __str__(self) -> str:
        """A table for people."""
        level = f"{self.level:.0%}".replace("%", " %")
        head = ("task", "metric", "base", "score", "difference", level, "left", "lost", "gained")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        if self.unmatched:
            text.append(f"not compared, scored once only: {', '.join(self.unmatched)}")
        return "\n".join(text)


def evaluate(
    model: nn.Module,
    tasks: Spec | Task | Iterable[Spec | Task],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    reference: nn.Module | None = None,
    batch_size: int | None = None,
) -> Scores:
    """Score a model on tasks; the model is left as it was.

    Args:
        model: a causal language model, or a PeftModel of one.
        tasks: names, mappings or tasks (see `forgetless.tasks.make_task`), or one of them.
        tokenizer: None for the one in the folder or on the hub that the model was loaded from.
        reference: the base model, for tasks that measure a distance to it; not needed for a
            PeftModel, whose base is itself with the adapter off.
        batch_size: texts at once, 1 or more; None lets each task choose. It does not change the
            scores.

    Returns:
        The result of each task by its name.

    Raises:
        UserError: everything that is wrong with the tasks, a task that needs a reference where
            there is none, no tokenizer, or a model that is no causal language model.

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
    reader = _tokenizer_of(model) if tokenizer is None else tokenizer
    return Scores(
        task.evaluate(model, reader, reference=reference, batch_size=batch_size) for task in made
    )


def compare(
    base_scores: Mapping[str, TaskResult],
    scores: Mapping[str, TaskResult],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """What changed from the base's scores, task by task and item by item.

    Args:
        base_scores: of the base model.
        scores: of the model that was made from it.
        level: confidence of the intervals, in (0, 1).
        resamples: of the paired bootstrap.
        seed: of the paired bootstrap.

    Raises:
        UserError: no task in common, or scores that must not be compared: the tasks differ in
            content, settings or version, or the texts were cut into different tokens.
    """
    common = [task for task in scores if task in base_scores]
    if not common:
        raise UserError(
            f"no task in common: the base has {', '.join(base_scores) or 'none'}, "
            f"the other {', '.join(scores) or 'none'}"
        )
    if problems := [p for t in common if (p := _mismatch(base_scores[t], scores[t]))]:
        raise UserError("; ".join(problems))
    rows = [_row(base_scores[t], scores[t], level, resamples, seed) for t in common]
    unmatched = [*base_scores, *scores]
    return Comparison(
        rows=tuple(rows),
        level=level,
        unmatched=tuple(task for task in dict.fromkeys(unmatched) if task not in common),
    )


def _tokenizer_of(model: nn.Module) -> PreTrainedTokenizerBase:
    from forgetless.models import load_tokenizer

    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not source:
        raise UserError("the model does not say where it was loaded from: pass tokenizer=")
    return load_tokenizer(source)


def _mismatch(base: TaskResult, score: TaskResult) -> str | None:
    """Why two results of one name must not be compared."""
    if base.fingerprint != score.fingerprint or base.metric != score.metric:
        return (
            f"task {base.task!r} differs between the two: {base.metric} over {base.n} items, "
            f"fingerprint {base.fingerprint}, against {score.metric} over {score.n} items, "
            f"{score.fingerprint}; its texts, limit, settings or version changed: "
            "evaluate both models with the same task"
        )
    if not (base.items and score.items):
        return None
    before, after = ({i.id: i.weight for i in result.items} for result in (base, score))
    if before.keys() != after.keys():
        return f"task {base.task!r}: the items of the two are not the same; evaluate both again"
    if before != after:
        return (
            f"task {base.task!r}: the same texts have different numbers of tokens; "
            "score both models with the same tokenizer"
        )
    return None


def _row(base: TaskResult, score: TaskResult, level: float, resamples: int, seed: int) -> Row:
    stderr = math.hypot(base.stderr, score.stderr)
    row = Row(
        task=score.task,
        metric=score.metric,
        higher_is_better=score.higher_is_better,
        n=score.n,
        base=base.value,
        score=score.value,
        interval=metrics.normal_interval(score.value - base.value, stderr, level),
        paired=False,
    )
    if not (base.items and score.items):
        return row
    after = {item.id: item for item in score.items}
    pairs = [(item, after[item.id]) for item in base.items]
    interval = metrics.paired_bootstrap_interval(
        [old.score for old, _ in pairs],
        [new.score for _, new in pairs],
        [old.weight for old, _ in pairs],
        level=level,
        resamples=resamples,
        seed=seed,
    )
    row = replace(row, interval=interval, paired=True)
    if not (base.right_or_wrong and score.right_or_wrong):
        return row
    lost, gained, kept = (
        tuple(old.id for old, new in pairs if (old.score, new.score) == change)
        for change in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    )
    p_value = metrics.mcnemar(len(lost), len(gained))
    return replace(row, p_value=p_value, lost=lost, gained=gained, kept=kept)


def _cells(row: Row) -> tuple[str, ...]:
    """A row of the table; counts only where items are right or wrong."""
    counted = row.p_value is not None
    return (
        row.task,
        row.metric,
        f"{row.base:.4f}",
        f"{row.score:.4f}",
        f"{row.difference:+.4f}",
        f"{row.interval.low:+.4f} to {row.interval.high:+.4f}",
        "-" if math.isnan(row.retention) else f"{row.retention:.1%}".replace("%", " %"),
        str(len(row.lost)) if counted else "-",
        str(len(row.gained)) if counted else "-",
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
