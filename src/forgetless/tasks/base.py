"""What every task is and gives back: `Task`, `TaskResult`, `Item`. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

from forgetless.core.errors import UserError
from forgetless.core.metrics import mean_stderr

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    Model: TypeAlias = nn.Module
    Tokenizer: TypeAlias = PreTrainedTokenizerBase

    from forgetless.data.modality import Processor


_NAME = re.compile(r"[\w][\w.-]*")


@dataclass(frozen=True, slots=True)
class Item:
    """One question, prompt or document of a task, under one model.

    Attributes:
        id: the same for every model, unique within the task.
        prompt: what the model was given (long texts: their beginning).
        expected: the right answer; empty where there is none.
        answer: what the model gave; empty where nothing was generated.
        score: 1 or 0 for right or wrong, or the item's own value of the metric; nan before the
            model has answered.
        weight: the item's share in the task's mean, such as its number of tokens.
        picture: a small copy of an image that was not recognised, as a data URI; else empty.
    """

    id: str
    prompt: str
    expected: str
    answer: str = ""
    score: float = math.nan
    weight: float = 1.0
    picture: str = ""

    def to_json(self) -> dict[str, Any]:
        """One line of an items file; weight and picture only where they are not 1 and empty."""
        line = dataclasses.asdict(self)
        if self.weight == 1.0:
            del line["weight"]
        if not self.picture:
            del line["picture"]
        return line

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Self:
        """The item that `to_json` wrote."""
        texts = {key: str(line[key]) for key in ("id", "prompt", "expected", "answer")}
        weight, picture = float(line.get("weight", 1.0)), str(line.get("picture", ""))
        return cls(**texts, score=float(line["score"]), weight=weight, picture=picture)


@dataclass(frozen=True)
class TaskResult:
    """The score of one model on one task.

    Attributes:
        task: the task's name.
        metric: what `value` is: "accuracy" (0..1), "loss" or "kl" (nats per token).
        value: mean over items, weighted by their weights.
        stderr: its standard error over items; nan for a single item.
        n: number of items.
        higher_is_better: the direction of `value`.
        fingerprint: of the task; scores with different ones must not be compared.
        seconds: wall time.
        items: every item, in the task's order; empty when they were not kept.
        extra: further numbers, such as the number of tokens or the perplexity; that of another
            metric may have its standard error beside it, see `metrics`.
        settings: what decided the score besides the model, by name (version, shots, limit, prompt,
            generation), as plain JSON values. Where two fingerprints differ, these say why.
    """

    task: str
    metric: str
    value: float
    stderr: float
    n: int
    higher_is_better: bool
    fingerprint: str
    seconds: float = 0.0
    items: tuple[Item, ...] = ()
    extra: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_items(
        cls,
        task: Task,
        items: Sequence[Item],
        *,
        metric: str,
        higher_is_better: bool = True,
        extra: Mapping[str, float] | None = None,
    ) -> Self:
        """The mean of `items` as the score of `task`.

        Raises:
            UserError: an item has no finite score, as after a training run that diverged.
        """
        broken = [item.id for item in items if not math.isfinite(item.score)]
        if broken:
            raise UserError(
                f"task {task.name!r}: the model's {metric} is not a finite number on "
                f"{len(broken)} of {len(items)} items (first: {broken[0]!r}); its weights or "
                "logits hold nan or infinity: look for a training run that diverged"
            )
        mean = mean_stderr([i.score for i in items], [i.weight for i in items])
        return cls(
            task=task.name,
            metric=metric,
            value=mean.value,
            stderr=mean.stderr,
            n=mean.n,
            higher_is_better=higher_is_better,
            fingerprint=task.fingerprint,
            items=tuple(items),
            extra=extra or {},
            settings=settings_of(task),
        )

    @property
    def right_or_wrong(self) -> bool:
        """Whether items are kept and each is plainly right (1) or wrong (0)."""
        return (
            self.higher_is_better
            and bool(self.items)
            and all(item.score in (0.0, 1.0) for item in self.items)
        )

    @property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Every number by its name: {"value", "stderr", "n"}; an unknown standard error is None.

        The task's own metric comes first, then those of `extra`. The standard error of an extra
        "acc,none" is the extra "acc_stderr,none", lm-eval's way to write it.
        """
        numbers = {self.metric: (self.value, self.stderr)}
        for name, value in self.extra.items():
            base, comma, rest = name.partition(",")
            if not base.endswith("_stderr"):
                numbers[name] = value, self.extra.get(f"{base}_stderr{comma}{rest}", math.nan)
        return {
            name: {"value": value, "stderr": None if math.isnan(stderr) else stderr, "n": self.n}
            for name, (value, stderr) in numbers.items()
        }

    def to_json(self) -> dict[str, Any]:
        """All but the items, as plain JSON values; an unknown standard error is null."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del found["items"]
        return found | {
            "stderr": None if math.isnan(self.stderr) else self.stderr,
            "seconds": round(self.seconds, 3),
            "extra": dict(self.extra),
            "settings": dict(self.settings),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], items: Sequence[Item] = ()) -> Self:
        """The result that `to_json` wrote, with its items if they were kept."""
        return cls(
            task=str(data["task"]),
            metric=str(data["metric"]),
            value=float(data["value"]),
            stderr=math.nan if data["stderr"] is None else float(data["stderr"]),
            n=int(data["n"]),
            higher_is_better=bool(data["higher_is_better"]),
            fingerprint=str(data["fingerprint"]),
            seconds=float(data["seconds"]),
            items=tuple(items),
            extra=dict(data.get("extra", {})),
            settings=dict(data.get("settings", {})),
        )


class Task(ABC):
    """Something that a model can be scored on: a frozen dataclass whose fields are its settings.

    A kind of task says what is wrong with its settings (`problems`), what decides its scores
    besides the model (`content`), and how to score a model (`measure`).

    Attributes:
        kind: what a recipe calls it.
        summary: what it measures, in one line.
        version: of its code; another one is another task.
        needs_reference: whether the score is a distance to another model, the base.
        name: how scores and files call the task.
    """

    kind: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = False
    name: str

    def __post_init__(self) -> None:
        found = [problem for problem in self.problems() if problem is not None]
        if not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            found.append(
                "name must be letters, digits, '_', '-' and '.' (it names files), "
                f"got {self.name!r}"
            )
        if found:
            raise UserError(f"task {self.kind!r}: {'; '.join(found)}")

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every setting with its default; `dataclasses.MISSING` where it must be given."""
        return {setting.name: setting.default for setting in dataclasses.fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def required(cls) -> list[str]:
        """Settings without a default."""
        return [key for key, value in cls.defaults().items() if value is dataclasses.MISSING]

    def problems(self) -> Iterable[str | None]:
        """What is wrong with each setting, or None."""
        return ()

    @property
    def modality(self) -> str:
        """Of the models that the task is for, see `forgetless.models.load.HEADS`."""
        return "language"

    @property
    def has_own_code(self) -> bool:
        """Whether `content` runs code of the user's, so that a check leaves it alone."""
        return False

    @abstractmethod
    def content(self) -> Sequence[object]:
        """What decides the scores besides the model, JSON-ready: questions, answers, settings.

        Raises:
            UserError: the data cannot be read.
        """

    @abstractmethod
    def measure(
        self, model: Model, processor: Processor, reference: Model | None, batch_size: int | None, /
    ) -> TaskResult:
        """The score of `model`; see `evaluate`."""

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of kind, version and content.

        Raises:
            UserError: the data cannot be read.
        """
        content = [self.kind, self.version, *self.content()]
        text = json.dumps(content, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def evaluate(
        self,
        model: Model,
        processor: Processor,
        *,
        reference: Model | None = None,
        batch_size: int | None = None,
    ) -> TaskResult:
        """Score a model, and leave it as it was.

        That is its weights, which modules train, which parameters need gradients and the state of
        every random generator. Padding and `batch_size` change the time and the memory, not the
        score.

        Args:
            model: of the kind that the task is for, or a PeftModel of one.
            processor: what reads data for the model; a tokenizer where the task is of texts.
            reference: the base; None for a PeftModel, whose base is itself with the adapter off.
            batch_size: items at once; None picks as many as suit the model.

        Raises:
            UserError: data that cannot be read, or a model that cannot be scored.
        """
        from forgetless.models.load import head_of

        head = head_of(model)
        if head is not None and head.modality != self.modality:
            raise UserError(f"task {self.name!r} is not for {head.noun}, which this model is")
        started = time.perf_counter()
        found = self.measure(model, processor, reference, batch_size)
        return dataclasses.replace(found, seconds=time.perf_counter() - started)


def settings_of(task: object) -> dict[str, Any]:
    """The settings of a task that is a dataclass, by name; a file by its name without the folder.

    The name of the task itself is left out, and so is what is not a plain JSON value.
    """
    if not dataclasses.is_dataclass(task):
        return {}
    found: dict[str, Any] = {}
    for setting in dataclasses.fields(task):
        value = getattr(task, setting.name)
        if setting.name in ("path", "data_dir"):
            found[setting.name] = None if value is None else Path(value).name
        elif setting.name != "name" and isinstance(value, str | int | float | bool | None):
            found[setting.name] = value
    return found


def whole_number(
    setting: str, value: object, least: int = 1, *, optional: bool = False
) -> str | None:
    """What is wrong with a setting that must be a whole number of at least `least`, or None."""
    if (optional and value is None) or (type(value) is int and value >= least):
        return None
    return f"{setting} must be a whole number of at least {least}, got {value!r}"
