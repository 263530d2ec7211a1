"""lm-eval's logged samples as items, and its numbers as a result."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from forgetless.core.errors import UserError
from forgetless.core.metrics import mean_stderr
from forgetless.tasks.base import Item, TaskResult

if TYPE_CHECKING:
    from forgetless.tasks.harness.running import Loaded


_PREFERRED = ("acc_norm", "acc", "exact_match")

# Two means over the same documents, summed in another order.
_SAME = 1e-9


def primary(keys: Mapping[str, bool]) -> str:
    """The metric key that counts: of acc_norm, acc and exact_match the first there is.

    Raises:
        UserError: the tasks of a group have no metric in common.
    """
    for wanted in _PREFERRED:
        for key in keys:
            if key.partition(",")[0] == wanted:
                return key
    if not keys:
        raise UserError("the tasks of this group have no metric in common; name one of its tasks")
    return next(iter(keys))


def result(
    loaded: Loaded,
    numbers: Mapping[str, float],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, Any],
) -> TaskResult:
    """The result of a task of the harness.

    Items are kept where the metric is their mean; a perplexity over all documents has none.
    `numbers` are lm-eval's, "acc,none", "acc_stderr,none" and the like; `samples` are those of each
    task.

    Raises:
        UserError: neither lm-eval nor the items give a score.
    """
    key = loaded.metric
    metric, _, name = key.partition(",")
    items = _weighted(_items(loaded.tasks, metric, name, samples), numbers.get(key))
    error = f"{metric}_stderr,{name}"
    # lm-eval's own value and standard error; the items' where it has none, as for some groups.
    if key in numbers:
        value, stderr = numbers[key], numbers.get(error, math.nan)
    elif items:
        value, stderr, _ = mean_stderr([i.score for i in items], [i.weight for i in items])
    else:
        raise UserError(f"lm-eval gives no {key!r} for this group; name its tasks one by one")
    return TaskResult(
        task=loaded.task.name,
        metric=key,
        value=value,
        stderr=stderr,
        n=len(items) or sum(len({s["doc_id"] for s in docs}) for docs in samples.values()),
        higher_is_better=loaded.metrics[key],
        fingerprint=loaded.task.fingerprint,
        items=tuple(items),
        extra={k: v for k, v in numbers.items() if k not in (key, error)},
        settings=settings,
    )


# -------------------------------------------------------------------------------------------- items


def _items(
    tasks: Mapping[str, Any],
    metric: str,
    name: str,
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Item]:
    """One item a document and filter `name`, where the metric is a plain mean over documents."""
    functions = [task.aggregation().get(metric) for task in tasks.values()]
    if any(getattr(function, "__name__", "") != "mean" for function in functions):
        return []
    return [
        Item(
            id=f"{task}:{sample['doc_id']}" if len(tasks) > 1 else str(sample["doc_id"]),
            prompt=_question(tasks[task], sample),
            expected=_expected(tasks[task], sample),
            answer=_answer(tasks[task], sample, metric),
            score=float(sample[metric]),
        )
        for task, logged in samples.items()
        for sample in logged
        if sample["filter"] == name and metric in sample
    ]


def _weighted(items: list[Item], value: float | None) -> list[Item]:
    """Items whose weighted mean is the group's value.

    Most groups average over all documents. Where lm-eval averages over the tasks, each document
    counts for its share in its task. No items where neither gives the value.
    """
    if value is None or not items:
        return items
    if math.isclose(sum(i.score for i in items) / len(items), value, abs_tol=_SAME):
        return items
    sizes = Counter(item.id.partition(":")[0] for item in items)
    share = len(items) / len(sizes)
    shared = [replace(i, weight=share / sizes[i.id.partition(":")[0]]) for i in items]
    mean = sum(i.score * i.weight for i in shared) / sum(i.weight for i in shared)
    return shared if math.isclose(mean, value, abs_tol=_SAME) else []


def _question(task: Any, sample: Mapping[str, Any]) -> str:
    """What is asked, without the worked examples before it."""
    text = task.doc_to_text(sample["doc"])
    if isinstance(text, str):
        return text
    # The choices are beginnings of a text whose rest is what is scored, as in WinoGrande.
    choices = task.doc_to_choice(sample["doc"])
    return f"{_shared_beginning(choices)}_ {sample['target']}"


def _shared_beginning(texts: Sequence[str]) -> str:
    """The whole words that all texts begin with, and the space after them."""
    columns = zip(*texts, strict=False)
    same = itertools.takewhile(lambda characters: len(set(characters)) == 1, columns)
    shared = texts[0][: sum(1 for _ in same)]
    return shared[: shared.rfind(" ") + 1]


def _expected(task: Any, sample: Mapping[str, Any]) -> str:
    """The right answer in words; several accepted ones with slashes between."""
    target, choices = sample["target"], _choices(task, sample)
    if choices and task.multiple_input:
        # Here the number of the right choice is where the question is elsewhere.
        return choices[int(task.doc_to_text(sample["doc"]))]
    several = list(target) if isinstance(target, list | tuple) else [target]
    words = [
        choices[t] if choices and isinstance(t, int) and t < len(choices) else t for t in several
    ]
    return " / ".join(str(word) for word in words)


def _choices(task: Any, sample: Mapping[str, Any]) -> list[str]:
    if task.OUTPUT_TYPE != "multiple_choice":
        return []
    choices = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
    shared = len(_shared_beginning(choices)) if task.multiple_input else 0
    return [choice[shared:] for choice in choices]


def _answer(task: Any, sample: Mapping[str, Any], metric: str) -> str:
    """The text that the model wrote, or the choice that it finds most probable."""
    if task.OUTPUT_TYPE == "generate_until":
        return str(sample["resps"][0][0]).strip()
    choices = _choices(task, sample)
    if not choices:
        return ""
    answers = [response[0] for response in sample["resps"][: len(choices)]]
    if metric == "exact_match":
        greedy = [
            choice for choice, (_, is_greedy) in zip(choices, answers, strict=True) if is_greedy
        ]
        return greedy[0] if greedy else ""
    by_length = metric == "acc_norm"
    scores = [
        value / max(1, len(choice)) if by_length else value
        for choice, (value, _) in zip(choices, answers, strict=True)
    ]
    return choices[scores.index(max(scores))]
