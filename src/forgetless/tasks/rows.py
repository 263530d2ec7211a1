"""The rows of a user's own file as questions: fields, prompts and answers. No torch."""

import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetless.core.errors import UserError
from forgetless.core.files import not_there
from forgetless.data.files import Row
from forgetless.data.sources import Source, read_rows

QUESTION = "question"
"""How a prompt names the question, whatever its field is called."""


def file_problem(path: object) -> str | None:
    """Why a file of questions cannot be read, as far as that shows without reading it."""
    if not isinstance(path, str | Path) or not str(path):
        return f"path must be a file, got {path!r}"
    return None if Source.of(path).is_here else not_there(path)


def prompt_problem(prompt: object) -> str | None:
    """What is wrong with a prompt's form, or None."""
    if not isinstance(prompt, str) or not prompt:
        return f"prompt must be text such as 'Question: {{question}}\\nAnswer:', got {prompt!r}"
    if re.search("[\ud800-\udfff]", prompt):
        return f"prompt {prompt!r} holds half a character (a lone surrogate)"
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
    except ValueError as problem:
        return f"prompt {prompt!r}: {problem}; write a brace of the text itself twice"
    return None if names else f"prompt {prompt!r} has no field in braces, such as {{question}}"


def read_records(path: str | Path, limit: int | None) -> list[tuple[str, Row]]:
    """The first rows of a file, each with its place such as "line 7".

    Raises:
        UserError: an empty or broken file, or rows that are not objects.
    """
    rows: list[tuple[str, Row]] = []
    for place, row in read_rows(path, limit=limit):
        if not isinstance(row, Mapping):
            raise UserError(f"{path}, {place}: must be an object, got {row!r}")
        rows.append((f"{path}, {place}", row))
    if not rows:
        raise UserError(f"{path} is empty; give at least one row")
    return rows


def the_field(row: Row, name: str, where: str) -> Any:
    """A field of a row.

    Raises:
        UserError: the row has no such field, or nothing in it.
    """
    if row.get(name) is None:
        raise UserError(
            f"{where}: has no {name!r}; its fields are {', '.join(map(repr, row)) or '(none)'}"
        )
    return row[name]


def made_prompt(prompt: str, question: str, row: Row, where: str) -> str:
    """The prompt with the question and the row's other fields put in.

    Raises:
        UserError: it names a field that the row does not have.
    """
    fields = {**row, QUESTION: the_field(row, question, where)}
    try:
        return prompt.format_map(fields)
    except (KeyError, IndexError, AttributeError, ValueError) as problem:
        raise UserError(
            f"{where}: the prompt names {problem}, and the row has {', '.join(map(repr, fields))}"
        ) from None
