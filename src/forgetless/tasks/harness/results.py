"""lm-eval's logged samples as items, and its numbers as a result."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from forgetless.core.errors import UserError
from forgetless.core.metrics import mean_stderr
from forgetless.tasks.base import Item, Task, TaskResult

if TYPE_CHECKING:
    from forgetless.tasks.harness.running import Loaded, Outcome

__all__ = ["primary", "result"]

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


def result(task: Task, loaded: Loaded, key: str, outcome: Outcome, seconds: float) -> TaskResult:
    """The result of a task of the harness under the metric `key`.

    Items are kept where the metric is their mean; a perplexity over all documents has none.
    """
    items = _weighted(_items(loaded, key, outcome), outcome.numbers.get(key))
    value, stderr, n = _score(items, key, outcome)
    if outcome.too_long:
        warnings.warn(
            f"task {task.name!r}: {outcome.too_long} requests are longer than the model can read "
            "and were cut on the left, as lm-eval does; worked examples or the question's "
            "beginning are missing in them",
            stacklevel=2,
        )
    return TaskResult(
        task=task.name,
        metric=key,
        value=value,
        stderr=stderr,
        n=n,
        higher_is_better=loaded.metrics[key],
        fingerprint=task.fingerprint,
        seconds=seconds,
        items=tuple(items),
        extra=_others(key, outcome),
        settings=_settings(loaded, outcome),
    )


def _score(items: Sequence[Item], key: str, outcome: Outcome) -> tuple[float, float, int]:
    """lm-eval's own value and standard error; the items' where it has none, as for some groups."""
    n = len(items) or sum(len({s["doc_id"] for s in docs}) for docs in outcome.samples.values())
    if key in outcome.numbers:
        metric, _, name = key.partition(",")
        stderr = outcome.numbers.get(f"{metric}_stderr,{name}", math.nan)
        return outcome.numbers[key], stderr, n
    if not items:
        raise UserError(f"lm-eval gives no {key!r} for this group; name its tasks one by one")
    mean = mean_stderr([i.score for i in items], [i.weight for i in items])
    return mean.value, mean.stderr, n


def _others(key: str, outcome: Outcome) -> dict[str, float]:
    """The metrics that do not count, with their standard errors."""
    metric, _, name = key.partition(",")
    own = {key, f"{metric}_stderr,{name}"}
    return {k: v for k, v in outcome.numbers.items() if k not in own}


def _settings(loaded: Loaded, outcome: Outcome) -> dict[str, Any]:
    """What was asked and how; one number where all tasks of a group agree."""
    from forgetless.tasks.harness.running import harness_version

    def one(values: Mapping[str, Any]) -> Any:
        different = list(dict.fromkeys(values.values()))
        return different[0] if len(different) == 1 else dict(values)

    return {
        "lm_eval": harness_version(),
        "lm_eval_task": loaded.name,
        "version": one(loaded.versions),
        "num_fewshot": one(loaded.shots),
        "limit": loaded.limit,
        "requests_cut": outcome.too_long,
        "generation": one({name: _generation(task) for name, task in loaded.tasks.items()}),
    }


def _generation(task: Any) -> str | None:
    """How answers are generated, as text."""
    generates = task.OUTPUT_TYPE == "generate_until"
    return json.dumps(task.config.generation_kwargs, sort_keys=True) if generates else None


# -------------------------------------------------------------------------------------------- items


def _items(loaded: Loaded, key: str, outcome: Outcome) -> list[Item]:
    """One item a document, where the metric is a mean over documents."""
    if not loaded.is_mean(key):
        return []
    metric, _, name = key.partition(",")
    several = len(loaded.tasks) > 1
    return [
        replace(item, id=f"{task}:{item.id}") if several else item
        for task, samples in outcome.samples.items()
        for item in _task_items(loaded.tasks[task], samples, metric, name)
    ]


def _task_items(
    task: Any, samples: Sequence[Mapping[str, Any]], metric: str, name: str
) -> list[Item]:
    return [
        Item(
            id=str(sample["doc_id"]),
            prompt=_question(task, sample),
            expected=_expected(task, sample),
            answer=_answer(task, sample, metric),
            score=float(sample[metric]),
        )
        for sample in samples
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
    sizes: dict[str, int] = {}
    for item in items:
        task = item.id.partition(":")[0]
        sizes[task] = sizes.get(task, 0) + 1
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
