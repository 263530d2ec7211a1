"""Tasks that put prompts to a model, as they stand or by its chat template. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from forgetless.core.errors import UserError, unknown
from forgetless.data.chat import opened
from forgetless.tasks.base import Task

if TYPE_CHECKING:
    from forgetless.tasks.base import Tokenizer


class Asking(Task):
    """A task whose prompts may be what the user says in a chat.

    Attributes:
        chat_template: "auto" for the tokenizer's own where it has one, or "off".
        system: what is said before each prompt, by the template.
    """

    chat_template: str = "off"
    system: str | None = None

    def problems(self) -> Iterable[str | None]:
        """Of these settings."""
        if self.chat_template not in ("auto", "off"):
            yield str(unknown("chat_template", str(self.chat_template), ("auto", "off")))
        elif self.system is not None and self.chat_template == "off":
            yield "system is said by the chat template, which is off"

    def said(self, usual: str) -> list[dict[str, str | None]]:
        """What of these settings belongs to the task's content: nothing where they are as usual."""
        as_usual = self.chat_template == usual and self.system is None
        return [] if as_usual else [{"chat": self.chat_template, "system": self.system}]

    def opened(self, prompts: Sequence[str], tokenizer: Tokenizer) -> tuple[Sequence[str], bool]:
        """The prompts as the model is given them, see `as_asked`."""
        return as_asked(prompts, tokenizer, self.chat_template, self.system)


def as_asked(
    prompts: Sequence[str], tokenizer: Tokenizer, chat_template: str, system: str | None = None
) -> tuple[Sequence[str], bool]:
    """Prompts up to where the answers begin, and whether they were rendered by a chat template.

    That of the tokenizer renders them, if it has one, unless ``chat_template`` is "off".

    Raises:
        UserError: a system prompt without a template.
    """
    if is_templated(tokenizer, chat_template, system):
        return [opened(tokenizer, prompt, system) for prompt in prompts], True
    return prompts, False


def is_templated(tokenizer: Tokenizer, chat_template: str, system: str | None) -> bool:
    """Whether the tokenizer has a chat template, and it is not off.

    Raises:
        UserError: a system prompt without a template.
    """
    found = chat_template != "off" and bool(tokenizer.chat_template)
    if system is not None and not found:
        raise UserError(
            "a system prompt needs a chat template: that of the base is off, or it has none"
        )
    return found
