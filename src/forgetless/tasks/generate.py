"""Questions over any file: generate an answer, and compare it with the accepted ones."""

import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from forgetless.core.errors import UserError, unknown
from forgetless.data.files import Row
from forgetless.tasks.base import Item, whole_number
from forgetless.tasks.questions import Generating
from forgetless.tasks.rows import file_problem, made_prompt, prompt_problem, read_records, the_field

_ARTICLES = frozenset({"a", "an", "the"})
_MATCHES = ("exact", "contains")

# Thai and Lao, Burmese, Khmer, Japanese and Chinese.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"


@dataclass(frozen=True)
class ExactMatch(Generating):
    """Share of questions whose greedy answer is one of the accepted ones, or contains one.

    The value is the accuracy, 0..1; an item has the whole text that the model wrote.

    Attributes:
        path: a .jsonl, .json, .csv or .parquet file, one question a row.
        question: the field with the question.
        answer: the field with the right answer, or with a list of accepted ones.
        aliases: a field with a list of further accepted ones; None where there is none.
        prompt: what the model reads; {question} and other fields of the row are put in.
        pattern: a regular expression; what it finds first in the text (its group, if it has one) is
            the answer. Accepted answers in which it is found are cut by it too.
        match: "exact" where the answer must be an accepted one, or "contains" where one must stand
            in it, as words of its own.
        normalise: compare without case, articles, and punctuation around words.
        stop: the text that ends an answer.
        max_new_tokens: length of an answer.
        chat_template: auto for the tokenizer's own, where it has one: the prompt is then what the
            user says; or off.
        system: what is said before each prompt, by the template.
        name: of the task.
        limit: the first so many questions only.

    Raises:
        UserError: settings out of range, or no such file.
    """

    kind = "generate"
    summary = "generated answers compared with accepted ones (accuracy)"

    path: str | Path
    question: str = "question"
    answer: str = "answer"
    aliases: str | None = None
    prompt: str = "Question: {question}\nAnswer:"
    pattern: str | None = None
    match: str = "exact"
    normalise: bool = True
    stop: str = "\n"
    max_new_tokens: int = 32
    name: str = "generate"
    limit: int | None = None
    chat_template: str = "auto"
    system: str | None = None

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        yield from super().problems()
        yield file_problem(self.path)
        yield prompt_problem(self.prompt)
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except (re.error, TypeError) as problem:
                yield f"pattern {self.pattern!r} is no regular expression: {problem}"
        if self.match not in _MATCHES:
            yield str(unknown("match", str(self.match), _MATCHES))
        if not (isinstance(self.stop, str) and self.stop):
            yield f"stop must be the text that ends an answer, got {self.stop!r}"
        yield whole_number("max_new_tokens", self.max_new_tokens)
        yield whole_number("limit", self.limit, optional=True)

    @cached_property
    def _asked(self) -> list[tuple[str, tuple[str, ...]]]:
        """Each prompt with its accepted answers."""
        return [
            (made_prompt(self.prompt, self.question, row, where), self._accepted(row, where))
            for where, row in read_records(self.path, self.limit)
        ]

    def _accepted(self, row: Row, where: str) -> tuple[str, ...]:
        answers = _words(the_field(row, self.answer, where))
        if self.aliases is not None:
            answers += _words(row.get(self.aliases) or [])
        if not answers:
            raise UserError(f"{where}: {self.answer!r} holds no answer")
        return tuple(dict.fromkeys(self._found(answer, whole=True) for answer in answers))

    def _found(self, text: str, *, whole: bool = False) -> str:
        """What the pattern finds in a text; where that is nothing, all of it if `whole`."""
        if self.pattern is None:
            return text.strip()
        match = re.search(self.pattern, text)
        if match is None:
            return text.strip() if whole else ""
        return (match[1] if match.re.groups else match[0]).strip()

    def content(self) -> Sequence[object]:
        """The prompts, the accepted answers, and how answers are read."""
        asked = [[prompt, *accepted] for prompt, accepted in self._asked]
        how = [self.pattern, self.normalise, self.stop, self.max_new_tokens]
        how += [] if self.match == "exact" else [self.match]
        return asked, how, *self.said("auto")

    def questions(self) -> Sequence[Item]:
        """The questions, each with its accepted answers."""
        numbered = enumerate(self._asked)
        return [Item(str(i), prompt, " / ".join(accepted)) for i, (prompt, accepted) in numbered]

    def right(self, written: Sequence[Sequence[str]]) -> list[list[bool]]:
        """Whether an answer is an accepted one."""
        return [
            [self._is_right(self._found(text), accepted) for text in each]
            for (_, accepted), each in zip(self._asked, written, strict=True)
        ]

    def _is_right(self, answer: str, accepted: Iterable[str]) -> bool:
        if self.normalise:
            answer, accepted = normalised(answer), [normalised(other) for other in accepted]
        if self.match == "contains":
            return any(_contains(answer, other) for other in accepted)
        return answer in accepted


def normalised(text: str) -> str:
    """A text without case, articles, and punctuation around its words.

    Punctuation inside words and numbers stays, so that 3.5 is not 35; commas between digits go.

    >>> normalised("The  U.K., of course!")
    'u.k of course'
    >>> normalised("$1,000.50")
    '1000.50'
    """
    plain = re.sub(r"(?<=\d),(?=\d)", "", unicodedata.normalize("NFKC", text).casefold())
    words = [_bare(word) for word in plain.split()]
    kept = [word for word in words if word and word not in _ARTICLES]
    return " ".join(kept or [word for word in words if word])


def _contains(text: str, part: str) -> bool:
    """Whether a part stands in a text, and not within a word or a number of it.

    Scripts that have no spaces have no such words: there it may stand anywhere.
    """
    if not part:
        return text == part
    apart = rf"(?<![^\W{_SPACELESS}])(?<!\d[.,]){re.escape(part)}(?![^\W{_SPACELESS}])(?![.,]\d)"
    return re.search(rf"(?<![-−]){apart}" if part[0].isdigit() else apart, text) is not None


def _bare(word: str) -> str:
    """A word without the punctuation around it, but with the sign of a number."""
    bare = word.strip(string.punctuation + "“”‘’«»…")
    negative = bare[:1].isdigit() and re.match(r"\W*[-−]", word) is not None
    return f"-{bare}" if negative else bare


def _words(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]


TASK = ExactMatch
