"""Multiple choice over any file: which of the given answers the model finds most probable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetless.core.errors import UserError
from forgetless.core.metrics import mean_stderr
from forgetless.data.encoding import encode
from forgetless.data.files import Row
from forgetless.tasks.base import Item, Task, TaskResult, whole_number
from forgetless.tasks.rows import file_problem, made_prompt, prompt_problem, read_records, the_field

if TYPE_CHECKING:
    from forgetless.tasks.base import Model, Tokenizer


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class MultipleChoice(Task):
    """Share of questions whose right answer is the model's most probable one.

    Each choice is read after the prompt and a space; the one with the highest log-probability for
    each of its characters is the model's answer (lm-eval's acc_norm). The value is the accuracy,
    0..1; `extra` has "accuracy_total", by the log-probability of the whole choice (lm-eval's acc).

    Attributes:
        path: a .jsonl, .json, .csv or .parquet file, one question a row.
        question: the field with the question.
        choices: the field with the list of choices (or with {"text", "label"}, as ARC has it); or a
            list: of the fields that hold one choice each, or of choices that are the same for all.
        answer: the field with the right one: its position from 0, its letter or label, or itself.
        prompt: what the model reads; {question} and other fields of the row are put in.
        name: of the task.
        limit: the first so many questions only.

    Raises:
        UserError: settings out of range, or no such file.
    """

    kind = "multiple_choice"
    summary = "the most probable of given answers (accuracy)"

    path: str | Path
    question: str = "question"
    choices: str | Sequence[str] = "choices"
    answer: str = "answer"
    prompt: str = "Question: {question}\nAnswer:"
    name: str = "multiple_choice"
    limit: int | None = None

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        listed = isinstance(self.choices, list | tuple) and len(self.choices) > 1
        known = listed or (isinstance(self.choices, str) and self.choices)
        yield file_problem(self.path)
        yield None if known else f"choices must be a field or two and more, got {self.choices!r}"
        yield prompt_problem(self.prompt)
        yield whole_number("limit", self.limit, optional=True)

    @cached_property
    def _asked(self) -> list[tuple[str, tuple[str, ...], int]]:
        """Each prompt with its choices and the position of the right one."""
        asked = []
        for where, row in read_records(self.path, self.limit):
            prompt = made_prompt(self.prompt, self.question, row, where)
            texts, labels = self._choices(row, where)
            if len(texts) < 2:
                raise UserError(f"{where}: has {len(texts)} choices; give two or more")
            answer = the_field(row, self.answer, where)
            asked.append((prompt, texts, _right(answer, texts, labels, where)))
        return asked

    def _choices(self, row: Row, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The choices and their labels; letters where they have none."""
        if isinstance(self.choices, str):
            given = the_field(row, self.choices, where)
        else:
            fields = all(name in row for name in self.choices)
            given = [row[name] for name in self.choices] if fields else list(self.choices)
        labels: Sequence[Any] = _LETTERS
        if isinstance(given, Mapping) and isinstance(given.get("text"), list):
            labels = given.get("label", _LETTERS)
            given = given["text"]
        if not isinstance(given, list):
            raise UserError(f"{where}: {self.choices!r} must be a list of choices, got {given!r}")
        return tuple(map(str, given)), tuple(map(str, labels))[: len(given)]

    def content(self) -> Sequence[object]:
        """The prompts, the choices and the right answers."""
        return (self._asked,)

    def measure(
        self, model: Model, tokenizer: Tokenizer, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The share of questions that `model` answers rightly."""
        asked = [(prompt, choices) for prompt, choices, _ in self._asked]
        scores = choice_scores(model, tokenizer, asked, batch_size)
        items, by_total = [], []
        for number, ((prompt, choices, right), totals) in enumerate(
            zip(self._asked, scores, strict=True)
        ):
            each = [total / max(1, len(text)) for total, text in zip(totals, choices, strict=True)]
            chosen = each.index(max(each))
            score = float(chosen == right)
            items.append(Item(str(number), prompt, choices[right], choices[chosen], score))
            by_total.append(float(totals.index(max(totals)) == right))
        other = mean_stderr(by_total)
        extra = {"accuracy_total": other.value, "accuracy_total_stderr": other.stderr}
        return TaskResult.of_items(self, items, metric="accuracy", extra=extra)


def choice_scores(
    model: Model,
    tokenizer: Tokenizer,
    questions: Sequence[tuple[str, Sequence[str]]],
    batch_size: int | None = None,
) -> list[list[float]]:
    """Log-probability of every choice after its prompt, in nats, for every (prompt, choices).

        log p(choice | prompt) = sum_t log p(x_t | prompt, x_<t)   over the tokens of the choice

    A choice is read after its prompt and a space. Prompts that do not fit into the model with
    their choice lose their beginning.

    Raises:
        UserError: not a causal language model, logits that are nan, or a choice that is longer
            than the model can read.
    """
    # Loads torch, which naming and checking a task does not need.
    from torch import float32

    from forgetless.models.text import positions_of
    from forgetless.tasks.continuations import continuation_logps
    from forgetless.tasks.inference import require_numbers

    prompts = [prompt for prompt, choices in questions for _ in choices]
    texts = [f"{prompt} {choice}" for prompt, choices in questions for choice in choices]
    rows = encode(tokenizer, texts)
    starts = [
        max(1, _shared(prompt, row))
        for prompt, row in zip(encode(tokenizer, prompts), rows, strict=True)
    ]
    counts = [max(0, len(row) - start) for row, start in zip(rows, starts, strict=True)]
    room = positions_of(model) or max(map(len, rows))
    if max(counts) >= room:
        raise UserError(f"a choice is longer than the {room} tokens that the model can read")
    said = [place for place, count in enumerate(counts) if count]
    found = continuation_logps(
        model,
        [rows[place][-room:] for place in said],
        [counts[place] for place in said],
        batch_size=batch_size,
        dtype=float32,
    )
    totals = [0.0] * len(rows)
    for place, (total, _) in zip(said, found, strict=True):
        totals[place] = total
    require_numbers(totals)
    each = iter(totals)
    return [[next(each) for _ in choices] for _, choices in questions]


def _shared(prompt: Sequence[int], row: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    pairs = zip(prompt, row, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(row)))


def _right(answer: Any, texts: Sequence[str], labels: Sequence[str], where: str) -> int:
    """Position of the right choice from what the answer's field holds."""
    if type(answer) is int and 0 <= answer < len(texts):
        return answer
    word = str(answer).strip()
    for known in (labels, texts, [str(i) for i in range(len(texts))]):
        if not isinstance(answer, int) and word in known:
            return list(known).index(word)
    raise UserError(
        f"{where}: the answer {answer!r} is no position 0..{len(texts) - 1}, no label "
        f"({', '.join(labels)}) and none of the choices"
    )


TASK = MultipleChoice
