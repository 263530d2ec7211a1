"""What the keys of a row mean: the forms that `forgetless.data` lists."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from forgetless.core.errors import UserError
from forgetless.data.chat import THOUGHTS, is_learned
from forgetless.data.files import Row
from forgetless.data.image_rows import Picture

Kind = Literal["prompt_completion", "messages", "text", "image", "sentence", "preference"]
Record = Mapping[str, Any]
"""An example: ``prompt`` and ``completion``, ``messages``, ``text``, ``image`` and ``label``, or
``sentence``, of a pair ``pair``, and ``label``; or ``chosen`` and ``rejected``, two
examples."""

TEXTS: frozenset[Kind] = frozenset({"prompt_completion", "messages", "text"})
"""Kinds of examples that are text."""


@dataclass(frozen=True)
class Form:
    """Keys that make a row an example, and how.

    Attributes:
        convert: makes the example of a row and its place.
        lists: whether their values must be lists, which tells it from another form of its keys.
        reads: further keys that a row may have.
    """

    kind: Kind
    keys: tuple[str, ...]
    convert: Callable[[Row, str], Record]
    lists: bool = False
    reads: tuple[str, ...] = ()

    def has_keys(self, row: Row) -> bool:
        return all(key in row for key in self.keys)

    def fits(self, row: Row) -> bool:
        return self.has_keys(row) and not (
            self.lists and any(not isinstance(row[key], list | tuple) for key in self.keys)
        )

    def unread(self, row: Row) -> set[str]:
        """Keys of a row and its turns that are not read and say more than where it comes from."""
        if self.kind in ("text", "image", "sentence"):
            return set()
        known = {*self.keys, *self.reads, *(key for key in _LEARNED if row.get(key))}
        beside = {k for k, v in row.items() if not _is_empty(v) and k not in known}
        beside = {key for key in beside if not _ABOUT.fullmatch(key)}
        lists = (row[key] for key in self.keys if isinstance(row[key], list | tuple))
        turns = [turn for turns in lists for turn in turns if isinstance(turn, Mapping)]
        return beside | {
            k
            for turn in turns
            for k, v in turn.items()
            if not _is_empty(v) and k not in _TURN_KEYS and not _ABOUT.fullmatch(k)
        }

    def __str__(self) -> str:
        beside = " (or img; fine_label or class)" if self.kind == "image" else ""
        return " + ".join(self.keys) + self.lists * " (lists of turns)" + beside


def _pair(prompt: str, completion: str) -> Form:
    """A form whose keys already hold all of the prompt and the completion."""

    def convert(row: Row, where: str) -> Record:
        return {"prompt": _text(row, prompt, where), "completion": _text(row, completion, where)}

    return Form("prompt_completion", (prompt, completion), convert)


def _task(task: str, answer: str) -> Form:
    """A form whose prompt is a task, its optional input, and a line end."""

    def convert(row: Row, where: str) -> Record:
        prompt = _text(row, task, where)
        if row.get("input") not in (None, "") and task == "instruction":
            prompt += "\n\n" + _text(row, "input", where)
        return {"prompt": prompt + "\n", "completion": _text(row, answer, where)}

    reads = ("input",) if task == "instruction" else ()
    return Form("prompt_completion", (task, answer), convert, reads=reads)


def _document(row: Row, where: str) -> Record:
    return {"text": _text(row, "text", where)}


def _image(row: Row, where: str) -> Record:
    assert isinstance(row["image"], Picture)
    return {"image": row["image"], "label": _label(row, where)}


def _sentence(row: Row, where: str) -> Record:
    return {"sentence": _text(row, "sentence", where), "label": _label(row, where)}


def _sentences(row: Row, where: str) -> Record:
    first, second = (_text(row, key, where) for key in ("sentence1", "sentence2"))
    return {"sentence": first, "pair": second, "label": _label(row, where)}


def _label(row: Row, where: str) -> str | int | None:
    """The name of a class, or its number; None of a row without one."""
    if "label" not in row:
        return None
    label = row["label"]
    if type(label) is int:
        return label
    if not isinstance(label, str):
        raise UserError(f"{where}: 'label' must be a class or its number, got {show(label)}")
    return _text(row, "label", where)


_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant"}

_LEARNED = ("weight", "train", "loss")
"""What says of an assistant's turn whether it is learned: OpenAI's, axolotl's, ms-swift's word."""

_CALLS = ("tool_calls", "function_call")
_TURN_KEYS = {"role", "content", "from", "value", "id", "name", *_LEARNED, *THOUGHTS, *_CALLS}
_ABOUT = re.compile(
    r"_*([a-z0-9]+_)*(author|category|created|created_at|data|dataset|date|difficulty|domain"
    r"|generator|hash|id|idx|index|key|lang|language|level|licen[cs]e|line|meta|metadata|model"
    r"|name|number|origin|page|provenance|quality|rank|rating|revision|row|score|sha256|skill"
    r"|source|split|subject|subset|tag|task|text|timestamp|title|token|topic|turn|type|uid"
    r"|updated|url|uuid|version|categories)s?_*"
    r"|(unnamed: [0-9]+|__index_level_[0-9]+__)?",
    re.IGNORECASE,
)
"""Keys that say where a row comes from or what it is like, and that nobody shows or learns; a
``text`` is the whole row as somebody rendered it, and the last are the index that pandas writes."""


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


def _conversation(key: str) -> Form:
    """A form whose key holds all turns, but for a system prompt that may stand beside it."""

    def convert(row: Row, where: str) -> Record:
        return _learnable(_with_system(row, _turns(row, key, where), where), where)

    return Form("messages", (key,), convert, reads=("system",))


def _prompted(row: Row, where: str) -> Record:
    """Prompt and completion as lists of turns: of the prompt, nothing is learned."""
    prompt = [
        {**turn, "weight": 0} if turn["role"] == "assistant" else turn
        for turn in _turns(row, "prompt", where)
    ]
    turns = _with_system(row, prompt, where) + _turns(row, "completion", where)
    return _learnable(turns, where)


def _learnable(turns: Sequence[Record], where: str) -> Record:
    if not any(is_learned(turn) for turn in turns):
        raise UserError(f"{where}: no turn of the assistant, so there is nothing to learn")
    return {"messages": turns}


def _with_system(row: Row, turns: list[Record], where: str) -> list[Record]:
    """The turns after the system prompt of the row's own column, where it has one."""
    if row.get("system") in (None, ""):
        return turns
    system = {"role": "system", "content": _text(row, "system", where)}
    if turns[0] == system:
        return turns
    if turns[0]["role"] == "system":
        raise UserError(f"{where}: 'system' is not what the first turn says; leave one of them out")
    return [system, *turns]


def _turns(row: Row, key: str, where: str) -> list[Record]:
    turns = row[key]
    if not isinstance(turns, list | tuple) or not turns:
        raise UserError(f"{where}: {key!r} must be a list of turns, got {show(turns)}")
    of = "" if key == "messages" else f" of {key!r}"
    return [_turn(turn, f"{where}, turn {n}{of}") for n, turn in enumerate(turns, start=1)]


def _turn(turn: object, where: str) -> Record:
    """A turn as ``role``, ``content`` and, for an assistant's that is not learned, ``weight``."""
    is_sharegpt = isinstance(turn, Mapping) and "from" in turn
    speaker, content = ("from", "value") if is_sharegpt else ("role", "content")
    roles = (*_ROLES, *_SHAREGPT) if is_sharegpt else _ROLES
    if not isinstance(turn, Mapping) or turn.get(speaker) not in roles:
        raise UserError(
            f"{where}: must be an object with {content!r} and a {speaker!r} of {', '.join(roles)}, "
            f"got {show(turn)}"
        )
    for key in _CALLS:
        if turn.get(key):
            raise UserError(
                f"{where}: {key!r} are not read; write the call into {content!r}, in the words "
                "that the model should say"
            )
    role = _SHAREGPT.get(turn[speaker], turn[speaker])
    made = {"role": role, "content": _content(turn, content, where)}
    made |= {key: _text(turn, key, where) for key in THOUGHTS if turn.get(key)}
    if role != "assistant":
        return made
    given = {key: turn[key] for key in _LEARNED if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise UserError(
                f"{where}: {key!r} must be 1, or 0 for a turn that is not learned, "
                f"got {show(value)}"
            )
    return made if all(given.values()) else {**made, "weight": 0}


def _content(turn: Row, key: str, where: str) -> str:
    """The text of a turn, which may be a list of parts, as OpenAI writes it."""
    parts = turn.get(key)
    if not isinstance(parts, list | tuple):
        return _text(turn, key, where)
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise UserError(
                f"{where}: {key!r} has a part of type {kind!r}; only parts of type 'text' are read"
            )
    texts = [_text(part, "text", where) for part in parts]
    return _text({key: "".join(texts)}, key, where)


def _preferred(row: Row, where: str) -> Record:
    """Two answers to one prompt, each as the example that it is with the prompt."""
    return {key: _answered(row, key, where) for key in ("chosen", "rejected")}


def _answered(row: Row, key: str, where: str) -> Record:
    """The prompt with one of the answers: texts, or turns that may begin with the prompt's."""
    answer, prompt = row[key], row.get("prompt")
    if isinstance(answer, Mapping):  # an example already
        return form_of(answer, f"{where}, {key!r}").convert(answer, f"{where}, {key!r}")
    if not isinstance(answer, list | tuple):
        return {"prompt": _text(row, "prompt", where), "completion": _text(row, key, where)}
    turns = _turns(row, key, where)
    if isinstance(prompt, str):
        before: list[Record] = [{"role": "user", "content": prompt}]
    elif prompt is not None:
        before = _turns(row, "prompt", where)
    else:
        other = _turns(row, "rejected" if key == "chosen" else "chosen", where)
        both = takewhile(lambda pair: pair[0] == pair[1], zip(turns, other, strict=False))
        before = [turn for turn, _ in both]
    after = turns[len(before) :] if turns[: len(before)] == before else turns
    shown = [{**t, "weight": 0} if t["role"] == "assistant" else t for t in before]
    return _learnable(_with_system(row, shown + after, where), where)


_FORMS = (
    _conversation("messages"),
    _conversation("conversations"),
    Form("messages", ("prompt", "completion"), _prompted, lists=True, reads=("system",)),
    _pair("prompt", "completion"),
    _pair("prompt", "response"),
    _task("instruction", "output"),
    _task("instruction", "response"),
    _task("question", "answer"),
    _task("query", "response"),
    _task("problem", "solution"),
    Form("text", ("text",), _document),
    Form("image", ("image", "label"), _image),
    Form("sentence", ("sentence", "label"), _sentence),
    Form("sentence", ("sentence1", "sentence2", "label"), _sentences),
    Form("sentence", ("sentence1", "sentence2"), _sentences),
    Form("preference", ("prompt", "chosen", "rejected"), _preferred, reads=("system",)),
    Form("preference", ("chosen", "rejected"), _preferred, reads=("system",)),
)


def form_of(row: Row, where: str) -> Form:
    for form in _FORMS:
        if form.fits(row):
            return form
    allowed = ", ".join(str(form) for form in _FORMS)
    raise UserError(f"{where}: has the keys {names_of(row)}; expected one of: {allowed}")


def _text(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must be text, got {show(value)}")
    if not value.strip():
        raise UserError(f"{where}: {key!r} is empty; give it text or leave the row out")
    return value


def names_of(row: Row) -> str:
    return ", ".join(sorted(repr(key) for key in row)) or "(none)"


def show(value: object) -> str:
    if value is None:
        return "nothing (null)"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
