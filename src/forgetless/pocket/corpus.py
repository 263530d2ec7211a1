"""The text that the pocket base model is pretrained on, made from templates and a seed.

Facts in their seen phrasings are most of it. The rest gives the model what later skills are
written in (sums, names and things, Python-like lines, lists of words) without the skills: an
output head that stays frozen can never produce a token that it was not trained on.
"""

import random
from collections.abc import Callable, Iterator

from forgetless.pocket.knowledge import knowledge_text
from forgetless.pocket.words import (
    ANIMALS,
    CALLS,
    COLOURS,
    CONTAINERS,
    FUNCTIONS,
    METHODS,
    NAMES,
    OBJECTS,
    VARIABLES,
    VERBS,
    WORDS,
)

__all__ = ["documents", "tokenizer_documents"]

# Documents of each other kind for one round of the facts. Sums get the largest part: the model
# should bring the tables along, so that a word problem is about reading, not about adding.
_SUMS, _SCENES, _CODE, _LISTS = 2400, 900, 700, 500


def documents(seed: int) -> Iterator[str]:
    """Endless texts, round after round: each round has every fact once in every seen phrasing.

    The order, and all that is not a fact, is drawn anew in each round and fixed by the seed.
    """
    rng = random.Random(seed)
    while True:
        yield from _round(rng)


def tokenizer_documents(seed: int) -> list[str]:
    """Texts to train the tokenizer on: one round, and the words of the problems many times over.

    Names and things then become one token each, which keeps problems short.
    """
    words = [f" {word}" for word in (*NAMES, *OBJECTS, *CONTAINERS, *VERBS)]
    return [*_round(random.Random(seed)), *(words * 100)]


def _round(rng: random.Random) -> list[str]:
    texts = knowledge_text()
    kinds: tuple[tuple[int, Callable[[random.Random], str]], ...] = (
        (_SUMS, _sums),
        (_SCENES, _scene),
        (_CODE, _code),
        (_LISTS, _word_list),
    )
    for count, make in kinds:
        texts.extend(make(rng) for _ in range(count))
    rng.shuffle(texts)
    return texts


def _sums(rng: random.Random) -> str:
    return " ".join(_sum(rng) for _ in range(rng.randint(2, 4)))


def _sum(rng: random.Random) -> str:
    kind = rng.choice("+-*/")
    if kind == "+":
        a = rng.randint(1, 98)
        b = rng.randint(1, 99 - a)
        return f"{a} + {b} = {a + b}."
    if kind == "-":
        a = rng.randint(2, 100)
        b = rng.randint(1, a - 1)
        return f"{a} - {b} = {a - b}."
    a, b = rng.randint(1, 12), rng.randint(1, 10)
    return f"{a} * {b} = {a * b}." if kind == "*" else f"{a * b} / {a} = {b}."


def _scene(rng: random.Random) -> str:
    name, other = rng.sample(NAMES, 2)
    thing, further = rng.sample(OBJECTS, 2)
    box, colour, verb = rng.choice(CONTAINERS), rng.choice(COLOURS), rng.choice(VERBS)
    animal = rng.choice(ANIMALS)
    return rng.choice(
        (
            f"{name} {verb} {thing} and {further}.",
            f"{name} {verb} the {colour} {thing}.",
            f"{name} and {other} are friends. They like {thing}.",
            f"{name} gives {other} some more {further}, then they play together.",
            f"There are {colour} {box} on the table with {thing} in all colours.",
            f"Each friend gets a {animal}. {name} gets the {colour} one.",
            f"{name} pays {other} back for the {thing}, a few dollars each.",
            f"{name} shares the {thing} fairly among friends and has none left.",
            f"{name} fills the {box} with {further} and sells them.",
            f"Many {thing} are {colour}. How does {other} know?",
            f"{name} has more {thing} than {other} now, many times as many.",
            f"Q: Who has the {colour} {thing}?\nA: {name}",
            f"Q: Which {animal} does {name} like?\nA: the {colour} one",
            f"Q: Where are the {thing} of {name}?\nA: in the {box}",
            f"The answer is {rng.choice((colour, animal, name))}.",
            f"The answer is {rng.randint(1, 100)}. It is a number.",
            f"{name} has a {animal} and {rng.randint(2, 100)} {thing}.",
        )
    )


def _code(rng: random.Random) -> str:
    lines = [f"def {rng.choice(FUNCTIONS)}({', '.join(_variables(rng, rng.randint(1, 2)))}):"]
    for _ in range(rng.randint(1, 3)):
        lines.append(f"    {_line(rng)}")
    return "\n".join(lines)


def _variables(rng: random.Random, count: int) -> list[str]:
    return rng.sample(VARIABLES, count)


def _line(rng: random.Random) -> str:
    a, b = _variables(rng, 2)
    value = _expression(rng)
    return rng.choice(
        (
            f"{a} = {value}",
            f"{a} += {rng.randint(1, 10)}",
            f"return {value}",
            f"return {value}",
            f"if {a} {rng.choice(('==', '!=', '<', '>', '<=', '>='))} {value}:\n        {b} = {a}",
            f"if {a} % {rng.randint(2, 9)} == {rng.randint(0, 1)}:\n        return {b}",
            f"for {a} in {b}:\n        {b} = {value}",
            f"for {a} in range({rng.randint(2, 20)}):\n        {b} += {a}",
            f"while {a} > {rng.randint(0, 9)}:\n        {a} -= 1",
            f"{a}.{rng.choice(METHODS)}({b})",
            f"return {a} {rng.choice(('and', 'or', 'in', 'not in', 'is', 'is not'))} {b}",
            f"return {a} if {b} else {rng.choice(('None', 'True', 'False', '0', '[]'))}",
            f"elif not {a}:\n        return {rng.choice(('None', 'True', 'False', '[]'))}",
            f"else:\n        {a} = {value}",
        )
    )


def _expression(rng: random.Random) -> str:
    a, b, c = _variables(rng, 3)
    word, number = rng.choice(WORDS), rng.randint(0, 20)
    return rng.choice(
        (
            f"{a} {rng.choice(('+', '-', '*', '/', '//', '%', '**'))} {b}",
            f"{a} {rng.choice(('+', '-', '*', '//', '%', '**'))} {number}",
            f"({a} + {b}) * {c}",
            f"{rng.choice(CALLS)}({a})",
            f"{rng.choice(CALLS)}({a}, {b})",
            f"{a}.{rng.choice(METHODS)}({b})",
            f"{a}[{rng.choice(('0', '1', '-1', '::-1', '1:', ':-1', 'i', ':n', '::2'))}]",
            f"[{a} for {a} in {b} if {a} != {c}]",
            f"[{rng.choice(CALLS)}({a}) for {a} in {b}]",
            f'"{word}"',
            f"'{word}' + {a}",
            f"{{{a}: {b}}}",
            f"lambda {a}: {b}",
            rng.choice(("True", "False", "None", "[]", '""', "{}", "()")),
        )
    )


def _word_list(rng: random.Random) -> str:
    pool = (*WORDS, *OBJECTS, *NAMES, *CONTAINERS, *VERBS, *COLOURS)
    words = rng.sample(pool, rng.randint(3, 7))
    separator = rng.choice((", ", " ", " ", "; ", " -> "))
    return rng.choice(("Words:", "List:", "In order:", "Backwards:")) + " " + separator.join(words)
