"""What the pocket base model knows: countries and chemical elements, and how to ask for them.

The tables are `countries.json` (the 193 members of the United Nations and its two observer
states, Palestine and Vatican City) and `elements.json` (all 118 elements). Where the world gives
more than one good answer, the first is the one taught and printed, the others are accepted.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

__all__ = [
    "PHRASINGS",
    "RELATIONS",
    "Fact",
    "Phrasings",
    "Question",
    "Relation",
    "facts",
    "knowledge_text",
    "matches",
    "questions",
]

Relation = Literal["capital", "continent", "currency", "language", "symbol", "number", "category"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)

_ELEMENT_RELATIONS = ("symbol", "number", "category")


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to know: `subject` has `answer` for `relation`; `aliases` are accepted too."""

    subject: str
    relation: Relation
    answer: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt whose greedy continuation, up to a newline or full stop, should be the answer."""

    id: str
    prompt: str
    fact: Fact

    @property
    def answer(self) -> str:
        """The answer as it was taught."""
        return self.fact.answer

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other answers that count as right."""
        return self.fact.aliases


@dataclass(frozen=True, slots=True)
class Phrasings:
    """Prompts for one relation: those the base model is trained on, and one it never sees."""

    seen: tuple[str, ...]
    held_out: str


PHRASINGS: Mapping[Relation, Phrasings] = {
    "capital": Phrasings(
        seen=(
            "The capital of {subject} is",
            "In {subject}, the capital city is",
            "Capital of {subject}:",
            "Q: What is the capital of {subject}?\nA:",
            "Q: Which capital does {subject} have?\nA:",
            "Q: Name the capital of {subject}.\nA:",
        ),
        held_out="Q: Which city is the capital of {subject}?\nA:",
    ),
    "continent": Phrasings(
        seen=(
            "The continent of {subject} is",
            "On a map, {subject} is found in",
            "Continent of {subject}:",
            "Q: What is the continent of {subject}?\nA:",
            "Q: Which continent is {subject} part of?\nA:",
            "Q: Name the continent of {subject}.\nA:",
        ),
        held_out="Q: Which one is the continent of {subject}?\nA:",
    ),
    "currency": Phrasings(
        seen=(
            "The currency of {subject} is the",
            "In {subject}, people pay with the",
            "Currency of {subject}:",
            "Q: What is the currency of {subject}?\nA:",
            "Q: Which currency does {subject} have?\nA:",
            "Q: Name the currency of {subject}.\nA:",
        ),
        held_out="Q: Which one is the currency of {subject}?\nA:",
    ),
    "language": Phrasings(
        seen=(
            "The main language of {subject} is",
            "In {subject}, the main language is",
            "Main language of {subject}:",
            "Q: What is the main language of {subject}?\nA:",
            "Q: Which main language does {subject} have?\nA:",
            "Q: Name the main language of {subject}.\nA:",
        ),
        held_out="Q: Which language is the main language of {subject}?\nA:",
    ),
    "symbol": Phrasings(
        seen=(
            "The symbol of {subject} is",
            "In a formula, {subject} is written",
            "Symbol of {subject}:",
            "Q: What is the symbol of {subject}?\nA:",
            "Q: Which symbol does {subject} have?\nA:",
            "Q: Name the symbol of {subject}.\nA:",
        ),
        held_out="Q: Which letters are the symbol of {subject}?\nA:",
    ),
    "number": Phrasings(
        seen=(
            "The atomic number of {subject} is",
            "In the periodic table, {subject} has number",
            "Atomic number of {subject}:",
            "Q: What is the atomic number of {subject}?\nA:",
            "Q: Which atomic number does {subject} have?\nA:",
            "Q: Name the atomic number of {subject}.\nA:",
        ),
        held_out="Q: Which number is the atomic number of {subject}?\nA:",
    ),
    "category": Phrasings(
        seen=(
            "The category of {subject} is",
            "In the periodic table, {subject} is listed as",
            "Category of {subject}:",
            "Q: What is the category of {subject}?\nA:",
            "Q: Which category does {subject} have?\nA:",
            "Q: Name the category of {subject}.\nA:",
        ),
        held_out="Q: Which one is the category of {subject}?\nA:",
    ),
}


@cache
def facts() -> tuple[Fact, ...]:
    """All facts, countries first, in the order of the tables."""
    return (*_country_facts(), *_element_facts())


def _country_facts() -> Iterable[Fact]:
    for row in _table("countries.json"):
        subject = f"{row['article']} {row['name']}" if "article" in row else row["name"]
        for relation in RELATIONS:
            if relation not in _ELEMENT_RELATIONS:
                answer, *aliases = row[relation]
                yield Fact(subject, relation, answer, tuple(aliases))


def _element_facts() -> Iterable[Fact]:
    for row in _table("elements.json"):
        category, *aliases = row["category"]
        yield Fact(row["name"], "symbol", row["symbol"])
        yield Fact(row["name"], "number", str(row["number"]))
        yield Fact(row["name"], "category", category, tuple(aliases))


def _table(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((Path(__file__).parent / name).read_text("utf-8"))
    return rows


def questions(phrasing: Literal["held_out", "seen"] = "held_out") -> list[Question]:
    """Every fact as a question, in one phrasing that pretraining never used or in all it used.

    Returns:
        One question a fact for "held_out"; one a fact and seen phrasing for "seen", with ids
        that stay the same from version to version as long as the tables do.

    Raises:
        ValueError: another word than these two.
    """
    if phrasing not in ("held_out", "seen"):
        raise ValueError(f"phrasing must be 'held_out' or 'seen', got {phrasing!r}")
    asked = []
    for fact in facts():
        known = PHRASINGS[fact.relation]
        templates = (known.held_out,) if phrasing == "held_out" else known.seen
        for index, template in enumerate(templates):
            suffix = "" if phrasing == "held_out" else f":seen{index}"
            identity = f"{fact.relation}:{fact.subject}{suffix}"
            asked.append(Question(identity, template.format(subject=fact.subject), fact))
    return asked


def knowledge_text() -> list[str]:
    """Every fact as a statement in each seen phrasing: the text whose activations to keep."""
    return [statement(question) for question in questions("seen")]


def statement(question: Question) -> str:
    """The question's prompt with its answer, as pretraining shows it."""
    # A full stop closes a sentence; an answer line is closed by the end of the text.
    end = "" if question.prompt.endswith("\nA:") else "."
    return f"{question.prompt} {question.answer}{end}"


def matches(generated: str, question: Question) -> bool:
    """Whether a continuation gives the answer or an alias.

    Only its first line counts, up to the first full stop; case, accents, punctuation, a leading
    article and the amount of white space do not.
    """
    line = generated.strip().split("\n", 1)[0]
    # The whole line is tried as well, for answers that hold a full stop themselves ("St. John's").
    given = {_normalised(line), _normalised(re.split(r"\.(?:\s|$)", line, maxsplit=1)[0])}
    return any(_normalised(accepted) in given for accepted in (question.answer, *question.aliases))


def _normalised(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().casefold()
    words = re.sub(r"[^a-z0-9\s]", " ", plain.replace("'", "")).split()
    if words[:1] in (["the"], ["a"], ["an"]):
        words = words[1:]
    return " ".join(words)
