"""The text that the pocket base model is pretrained on, made from templates and a seed.

Facts in their seen phrasings are most of it. The rest gives the model what later skills are
written in (sums, names and things, Python-like lines, lists of words) without the skills: an
output head that stays frozen can never produce a token that it was not trained on.
"""

import random
from collections.abc import Callable, Iterator

from forgetless.data.pocket.knowledge import knowledge_text
from forgetless.data.pocket.problems import OPERATIONS
from forgetless.data.pocket.words import (
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

# Documents of each other kind for one round of the facts. A base that can add, follow an order and
# find a number in a sentence has only the stories to learn; one that cannot forgets every fact
# before it solves its first problem.
_SUMS, _ORDERS, _READINGS, _SCENES, _CODE, _LISTS = 1500, 1500, 700, 700, 600, 400


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
        (_ORDERS, _order),
        (_READINGS, _reading),
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
        return _equation(a, "+", rng.randint(1, 99 - a))[0]
    if kind == "-":
        a = rng.randint(2, 100)
        return _equation(a, "-", rng.randint(1, a - 1))[0]
    a, b = rng.randint(1, 12), rng.randint(1, 10)
    return _equation(a, "*", b)[0] if kind == "*" else _equation(a * b, "/", a)[0]


def _equation(a: int, operation: str, b: int) -> tuple[str, int]:
    result = OPERATIONS[operation](a, b)
    return f"{a} {operation} {b} = {result}.", result


def _order(rng: random.Random) -> str:
    """Which sums to do, in plain words and without a story, and the sums."""
    while True:
        a, b, c = rng.randint(1, 60), rng.randint(1, 40), rng.randint(1, 100)
        m, n = rng.randint(2, 12), rng.randint(2, 10)
        words, sums = rng.choice(
            (
                (f"Add {a} and {b}", ((a, "+", b),)),
                (f"Take {b} from {c}", ((c, "-", b),)),
                (f"Multiply {m} by {n}", ((m, "*", n),)),
                (f"Divide {m * n} by {m}", ((m * n, "/", m),)),
                (f"Multiply {m} by {n}, add it to {a}", ((m, "*", n), (a, "+", m * n))),
                (f"Multiply {m} by {n}, take it from {c}", ((m, "*", n), (c, "-", m * n))),
                (f"Multiply {m} by {n}, take {b} away", ((m, "*", n), (m * n, "-", b))),
                (f"Multiply {m} by {n}, add it to {n}", ((m, "*", n), (n, "+", m * n))),
                (f"Add {a} and {b}, take {c} away", ((a, "+", b), (a + b, "-", c))),
                (f"Add {a} and {b}, add it to {a}", ((a, "+", b), (a, "+", a + b))),
            )
        )
        equations = [_equation(*parts) for parts in sums]
        if all(0 < result <= 100 for _, result in equations):
            break
    steps = " ".join(text for text, _ in equations)
    return f"{words}: {steps}" if rng.random() < 0.5 else f"Q: {words}.\nA: {steps}"


def _reading(rng: random.Random) -> str:
    """Two numbers in a sentence and a question that one of them answers."""
    name, other = rng.sample(NAMES, 2)
    thing, further = rng.sample(OBJECTS, 2)
    a, b = rng.sample(range(2, 101), 2)
    box = rng.choice(CONTAINERS)
    return rng.choice(
        (
            f"Q: {name} has {a} {thing} and {b} {further}. Count the {thing}.\nA: {a}",
            f"Q: {name} has {a} {thing} and {b} {further}. Count the {further}.\nA: {b}",
            f"Q: {name} has {a} {thing}, {other} has {b}. What does {name} have?\nA: {a} {thing}",
            f"Q: {name} has {a} {thing}, {other} has {b}. What does {other} have?\nA: {b} {thing}",
            f"Q: {name} has {a} {thing}. {other} finds {b}. Who has {a}?\nA: {name}",
            f"{a} {thing} are in the {box}, {b} are not. In the {box}: {a}. Not in the {box}: {b}.",
            f"{name} buys {a} {thing} and {b} {further}. That is {b} {further} and {a} {thing}.",
        )
    )


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
    name, arguments = rng.choice(FUNCTIONS), rng.sample(VARIABLES, rng.randint(1, 2))
    lines = [f"    {_line(rng)}" for _ in range(rng.randint(1, 3))]
    return "\n".join([f"def {name}({', '.join(arguments)}):", *lines])


def _line(rng: random.Random) -> str:
    a, b = rng.sample(VARIABLES, 2)
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
    a, b, c = rng.sample(VARIABLES, 3)
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
