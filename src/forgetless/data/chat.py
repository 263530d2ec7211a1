"""Conversations: what the chat template makes of them, and which tokens the assistant says.

A turn of the assistant is learned from where the model would begin to generate to the token that
ends the turn. Both are found by rendering, so any template will do:

====================  =====================================================================
begins                where the template's own generation prompt ends
ends                  after the first special tokens that follow the content, without the
                      line end after them
====================  =====================================================================

Templates with ``{% generation %}`` marks say it themselves, and their marks are taken. A turn of
``weight`` 0 is shown and not learned.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from forgetless.core.errors import UserError, first_few
from forgetless.data.encoding import Span, continuation
from forgetless.data.packing import IGNORED, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from forgetless.data.examples import Examples


T = TypeVar("T")
Message = Mapping[str, Any]
"""A turn: ``role``, ``content``, perhaps thoughts and, where it is not learned, ``weight`` 0."""

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant: {{ message['content'] }}{{ eos_token }}\n"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""What `messages` become where the tokenizer has no chat template::

    You are kind.

    User: Hello
    Assistant: Hi</s>
"""

TODAY = date(2024, 7, 26)
"""What a template is told that asks for today's date (the day that Llama 3.1's assumes), so that
the same examples give the same tokens on every day."""

_CLOCK = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
THOUGHTS = ("reasoning_content", "thinking")
"""What a turn thought before it spoke, in the words of chat templates."""
_SHOWN = ("role", "content", *THOUGHTS)

_CONTENT = "\ue000"
"""Stands for a turn's content, to see what the template puts around it: no text has it."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer as it speaks with roles.

    Attributes:
        tokenizer: its chat template renders; without one PLAIN_CHAT_TEMPLATE does.
    """

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def is_own(self) -> bool:
        """Whether the tokenizer has a template, which then writes all special tokens itself."""
        return bool(self.tokenizer.chat_template)

    @cached_property
    def template(self) -> str:
        """The template, with `TODAY` for the clock."""
        own = self.tokenizer.get_chat_template() if self.is_own else PLAIN_CHAT_TEMPLATE
        return _CLOCK.sub(lambda call: repr(TODAY.strftime(call["format"])), own)

    def tokens(
        self, conversations: Sequence[Sequence[Message]], places: Sequence[str]
    ) -> list[TokenRow]:
        """Tokens and labels of every conversation, mostly one row each.

        Where a template rewrites earlier turns as a conversation goes on (it drops old thoughts),
        every turn of the assistant is a row of its own, with the history as it was then. Each of
        the conversations has a turn of the assistant to learn; `places` are for messages.

        Raises:
            UserError: the template refuses conversations, or leaves the assistant's text out.
        """
        if _GENERATION_MARK.search(self.template):
            return _of_each(self._marked, conversations, places)
        if not self.tokenizer.is_fast:
            raise UserError("'messages' need a fast tokenizer, which knows the place of each token")
        rendered: list[tuple[str, list[Span]]] = []
        shortened = 0
        found = _of_each(self._rows, conversations, places)
        for messages, rows in zip(conversations, found, strict=True):
            shortened += not _is_whole(messages, rows)
            rendered += rows
        if shortened:
            warnings.warn(
                f"the tokenizer's chat template leaves out parts of {shortened} of "
                f"{len(conversations)} conversations, such as thoughts or a system prompt",
                stacklevel=4,
            )
        return list(self._encoded(rendered))

    def check(self, conversations: Sequence[Sequence[Message]], places: Sequence[str]) -> None:
        """Raise what `tokens` would raise, without making tokens; of `places`, see there."""
        _of_each(self.render, conversations, places)
        if not _GENERATION_MARK.search(self.template):
            self._rows(conversations[0], places[0])

    def render(self, messages: Sequence[Message], place: str = "", opening: bool = False) -> str:
        """The text of a conversation.

        An `opening` ends where the assistant would go on.

        Raises:
            UserError: the template refuses it.
        """
        text: str = self._templated(messages, place, tokenize=False, add_generation_prompt=opening)
        return text

    def _templated(self, messages: Sequence[Message], place: str, **options: Any) -> Any:
        """What the tokenizer makes of the turns by the template."""
        # A dependency of transformers that takes long to load.
        from jinja2 import TemplateError

        said = [{key: turn[key] for key in _SHOWN if key in turn} for turn in messages]
        eos = self.tokenizer.eos_token
        if eos and ("eos_token" in self.template or eos in self.template):
            # Texts that were rendered before end in it, and the template adds one more.
            said = [{**turn, "content": turn["content"].removesuffix(eos)} for turn in said]
        try:
            return self.tokenizer.apply_chat_template(said, chat_template=self.template, **options)
        except TemplateError as error:
            raise UserError(
                f"{place or 'messages'}: the tokenizer's chat template refuses this conversation: "
                f"{error}; change its turns, or give the tokenizer another template"
            ) from None

    def _marked(self, messages: Sequence[Message], place: str) -> TokenRow:
        """Tokens of a conversation whose template marks the assistant's part itself."""
        ids, marked = self._marks(messages, place)
        learned = set(marked)
        spoken = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        for begin, end in pairwise([*spoken, len(messages)]):
            if not is_learned(messages[begin]):
                before = len(self._marks(messages[:begin], place)[1]) if begin else 0
                then, until = self._marks(messages[:end], place)
                if [then[i] for i in until] != [ids[i] for i in marked[: len(until)]]:
                    raise UserError(
                        f"{place}, turn {begin + 1}: the tokenizer's chat template changes what it "
                        "marks of this turn as the conversation goes on, so its 'weight' of 0 "
                        "cannot be kept; give the tokenizer another template"
                    )
                learned -= set(marked[before : len(until)])
        labels = [token if i in learned else IGNORED for i, token in enumerate(ids)]
        return TokenRow(ids, labels, [len(ids)])

    def _marks(self, messages: Sequence[Message], place: str) -> tuple[list[int], list[int]]:
        """Token ids, and the places in them of those that the template marks."""
        encoded = self._templated(
            messages, place, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        marks = encoded["assistant_masks"]
        return encoded["input_ids"], [i for i, mark in enumerate(marks) if mark]

    # ---- where the assistant speaks --------------------------------------------------------------

    def _rows(self, messages: Sequence[Message], place: str) -> list[tuple[str, list[Span]]]:
        """Each text with where in it the assistant speaks."""
        turns = [
            self._turn(messages[:number], place)
            for number, message in enumerate(messages, start=1)
            if is_learned(message)
        ]
        whole = turns[-1][0] if is_learned(messages[-1]) else self.render(messages, place)
        # What was learned of a turn must stay the same when the conversation goes on.
        if all(whole.startswith(text[:end]) for text, (_, end) in turns):
            return [(whole, [span for _, span in turns])]
        return [(text, [span]) for text, span in turns]

    def _turn(self, messages: Sequence[Message], place: str) -> tuple[str, Span]:
        """The text up to and with the last message, the assistant's, and where it is learned."""
        *history, last = messages
        text = self.render(messages, place)
        around = self.render([*history, {**last, "content": _CONTENT}], place)
        head, found, tail = around.rpartition(_CONTENT)
        prompt = self.render(history, place, opening=True) if history else head
        if not text.startswith(prompt):
            # It asks for thoughts, or has a system prompt, which finished answers lack.
            prompt = head.rstrip(" ")
        if not found or not text.startswith(prompt):
            raise UserError(
                f"{place}, turn {len(messages)}: the tokenizer's chat template does not show what "
                "the assistant says; give the tokenizer a template for texts"
            )
        closing = self._closing.match(tail if text.endswith(tail) else "")
        assert closing is not None
        return text, (len(prompt), len(text) - len(closing.string) + closing.end())

    @cached_property
    def _closing(self) -> re.Pattern[str]:
        """What follows the content, up to its first special tokens; without any, all of it."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        either = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        return re.compile(rf"(?s:.*?)(?:{either})+|(?s:.*)" if special else r"(?s:.*)")

    # ---- tokens ----------------------------------------------------------------------------------

    def _encoded(self, rows: Sequence[tuple[str, list[Span]]]) -> Iterator[TokenRow]:
        texts = [text for text, _ in rows]
        encoded = self.tokenizer(
            texts, add_special_tokens=not self.is_own, return_offsets_mapping=True, verbose=False
        )
        each = zip(encoded["input_ids"], encoded["offset_mapping"], rows, strict=True)
        for ids, offsets, (text, spans) in each:
            # A token across the border would never be generated: the model is given the prompt.
            cuts = [begin for begin, _ in spans if any(a < begin < b for a, b in offsets)]
            if cuts:
                ids, offsets = self._apart(text, cuts)
            learned = [any(a < stop and b > begin for begin, stop in spans) for a, b in offsets]
            labels = [i if keep else IGNORED for i, keep in zip(ids, learned, strict=True)]
            yield TokenRow(ids, labels, [len(ids)])

    def _apart(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[Span]]:
        """Tokens and their places, none of them across a cut."""
        ids: list[int] = []
        offsets: list[Span] = []
        for start, stop in pairwise([0, *cuts, len(text)]):
            if start == 0:
                piece = self.tokenizer(
                    text[:stop],
                    add_special_tokens=not self.is_own,
                    return_offsets_mapping=True,
                    verbose=False,
                )
                found = piece["input_ids"], piece["offset_mapping"]
            else:
                found = continuation(self.tokenizer, ids, text[start:stop])
            ids = ids + found[0]
            offsets += [(start + a, start + b) for a, b in found[1]]
        return ids, offsets


def as_chat(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Prompts with completions as conversations of the user's turn and the assistant's.

    So a chat model is trained, measured and calibrated as it will be asked. Examples of another
    kind stay as they are, and so do all where their `chat_template` is "off" or the tokenizer has
    none of its own. The space around a prompt and a completion is the template's to give.

    Raises:
        UserError: a system prompt that no template can say.
    """
    if examples.kind != "prompt_completion":
        return examples
    if examples.chat_template == "off" or not Chat(tokenizer).is_own:
        if examples.system is not None:
            raise UserError(
                "a system prompt needs a chat template: that of the base is off, or it has none"
            )
        return examples
    before = [] if examples.system is None else [{"role": "system", "content": examples.system}]
    records = [
        {
            "messages": [
                *before,
                {"role": "user", "content": record["prompt"].strip()},
                {"role": "assistant", "content": record["completion"].strip()},
            ]
        }
        for record in examples
    ]
    return replace(examples, kind="messages", records=records)


def opened(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> str:
    """A prompt, by the tokenizer's chat template, up to where the assistant answers."""
    turns = [{"role": "user", "content": prompt.strip()}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return Chat(tokenizer).render(turns, opening=True)


def is_learned(message: Message) -> bool:
    """Whether a turn is one of the assistant that is to be learned."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _of_each(
    make: Callable[[Sequence[Message], str], T],
    conversations: Sequence[Sequence[Message]],
    places: Sequence[str],
) -> list[T]:
    """What is made of each conversation, or what is wrong with all of them."""
    made, problems = [], []
    for messages, place in zip(conversations, places, strict=True):
        try:
            made.append(make(messages, place))
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise UserError(first_few(problems))
    return made


def _is_whole(messages: Sequence[Message], rows: Sequence[tuple[str, list[Span]]]) -> bool:
    """Whether the rows have all that was said, but for spaces: the assistant's as learned text."""
    learned = iter("".join(text[a:b].split()) for text, spans in rows for a, b in spans)
    shown = "".join(rows[-1][0].split())
    return all(
        "".join(message[key].split()) in text
        for message in messages
        for text in [next(learned) if is_learned(message) else shown]
        for key in _SHOWN[1:]
        if key in message
    )
