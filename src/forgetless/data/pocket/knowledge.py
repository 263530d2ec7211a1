"""What the pocket base model knows: countries and chemical elements, and how to ask for them.

The tables are `countries.json` (the 193 members of the United Nations and its two observer
states, Palestine and Vatican City) and `elements.json` (all 118 elements). Where the world gives
more than one good answer, the first is the one taught and printed, the others are accepted.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

Relation = Literal["capital", "continent", "currency", "language", "symbol", "number", "category"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
"""Four of countries, then three of elements."""


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


def _phrasings(noun: str, said: str, asked: str, held_out: str, article: str = "") -> Phrasings:
    """The phrasings that every relation has, and three of its own: said, asked and held out."""
    seen = (
        f"The {noun} of {{subject}} is{article}",
        said,
        f"{noun.capitalize()} of {{subject}}:",
        f"Q: What is the {noun} of {{subject}}?\nA:",
        f"Q: {asked}?\nA:",
        f"Q: Name the {noun} of {{subject}}.\nA:",
    )
    return Phrasings(seen, f"Q: {held_out} the {noun} of {{subject}}?\nA:")


PHRASINGS: Mapping[Relation, Phrasings] = {
    "capital": _phrasings(
        "capital",
        "In {subject}, the capital city is",
        "Which capital does {subject} have",
        "Which city is",
    ),
    "continent": _phrasings(
        "continent",
        "On a map, {subject} is found in",
        "Which continent is {subject} part of",
        "Which one is",
    ),
    "currency": _phrasings(
        "currency",
        "In {subject}, people pay with the",
        "Which currency does {subject} have",
        "Which one is",
        article=" the",
    ),
    "language": _phrasings(
        "main language",
        "In {subject}, the main language is",
        "Which main language does {subject} have",
        "Which language is",
    ),
    "symbol": _phrasings(
        "symbol",
        "In a formula, {subject} is written",
        "Which symbol does {subject} have",
        "Which letters are",
    ),
    "number": _phrasings(
        "atomic number",
        "In the periodic table, {subject} has number",
        "Which atomic number does {subject} have",
        "Which number is",
    ),
    "category": _phrasings(
        "category",
        "In the periodic table, {subject} is listed as",
        "Which category does {subject} have",
        "Which one is",
    ),
}


@cache
def facts() -> tuple[Fact, ...]:
    """All facts, countries first, in the order of the tables."""
    found = []
    for row in _table("countries.json"):
        subject = f"{row['article']} {row['name']}" if "article" in row else row["name"]
        for relation in RELATIONS[:4]:
            answer, *aliases = row[relation]
            found.append(Fact(subject, relation, answer, tuple(aliases)))
    for row in _table("elements.json"):
        category, *aliases = row["category"]
        found.append(Fact(row["name"], "symbol", row["symbol"]))
        found.append(Fact(row["name"], "number", str(row["number"])))
        found.append(Fact(row["name"], "category", category, tuple(aliases)))
    return tuple(found)


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
