"""Facts, phrasings and questions of the pocket world, and the text it is pretrained on."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice

import pytest

from forgetless.data.pocket.corpus import documents, tokenizer_documents
from forgetless.data.pocket.knowledge import (
    PHRASINGS,
    RELATIONS,
    Fact,
    Question,
    facts,
    knowledge_text,
    matches,
    questions,
)

# More than one round of the facts.
CORPUS = list(islice(documents(seed=0), 15_000))


def about(relation: str, subject: str) -> Question:
    return next(q for q in questions() if q.id == f"{relation}:{subject}")


def test_every_relation_has_four_seen_phrasings_and_one_held_out() -> None:
    assert set(PHRASINGS) == set(RELATIONS)
    for phrasings in PHRASINGS.values():
        assert len(set(phrasings.seen)) == len(phrasings.seen) >= 4
        assert phrasings.held_out not in phrasings.seen
        assert all("{subject}" in text for text in (*phrasings.seen, phrasings.held_out))


def test_held_out_questions_are_one_a_fact_with_ids_of_their_own() -> None:
    asked = questions("held_out")
    assert [question.fact for question in asked] == list(facts())
    assert len({question.id for question in asked}) == len(facts()) == 195 * 4 + 118 * 3
    peru = about("capital", "Peru")
    assert peru.prompt == "Q: Which city is the capital of Peru?\nA:"
    assert (peru.answer, peru.aliases) == ("Lima", ())
    assert about("capital", "the Gambia").prompt.startswith("Q: Which city is the capital of the G")


def test_seen_questions_have_ids_of_their_own() -> None:
    asked = questions("seen")
    assert len(asked) == sum(len(PHRASINGS[fact.relation].seen) for fact in facts())
    assert len({question.id for question in asked}) == len(asked)


def test_an_unknown_phrasing_is_refused() -> None:
    with pytest.raises(ValueError, match="'held_out' or 'seen', got 'heldout'"):
        questions("heldout")  # type: ignore[arg-type]


def test_held_out_prompts_never_occur_in_pretraining_but_their_words_do() -> None:
    text = "\n".join(CORPUS)
    held_out = [question.prompt for question in questions("held_out")]
    assert not any(prompt.removesuffix("\nA:") in text for prompt in held_out)
    words = {word.strip("?.:,").lower() for prompt in held_out for word in prompt.split()}
    assert words <= {word.strip("?.:,").lower() for word in text.split()}


def test_the_corpus_holds_every_statement_and_no_other_facts() -> None:
    statements = knowledge_text()
    assert "The capital of Peru is Lima." in statements
    assert "Q: What is the atomic number of iron?\nA: 26" in statements
    assert set(statements) <= set(CORPUS)
    assert len(statements) == len(questions("seen"))


def test_the_corpus_is_fixed_by_its_seed() -> None:
    assert list(islice(documents(seed=0), 15_000)) == CORPUS
    assert list(islice(documents(seed=1), 15_000)) != CORPUS
    assert tokenizer_documents(seed=0) == tokenizer_documents(seed=0)


def test_the_corpus_has_no_word_problem() -> None:
    assert not any("How many" in text and "The answer" in text for text in CORPUS)


@pytest.mark.parametrize(
    "generated",
    [
        " Bogotá",
        " Bogota",
        " bogotá.",
        " the Bogotá",
        " Bogotá\nQ: What is",
        " Bogotá. The capital of Peru is Lima.",
        "Bogotá ",
    ],
)
def test_matches_is_exact_but_for_case_accents_punctuation_and_article(generated: str) -> None:
    assert matches(generated, about("capital", "Colombia"))


@pytest.mark.parametrize("generated", ["", " ", "\nBogotá", "Bogot", "Bogotá City", "Bog otá", "."])
def test_matches_refuses_anything_else(generated: str) -> None:
    # A leading new line is white space that a model may well start with.
    expected = generated == "\nBogotá"
    assert matches(generated, about("capital", "Colombia")) is expected


def test_matches_accepts_aliases() -> None:
    bolivia = about("capital", "Bolivia")
    assert matches(" Sucre", bolivia)
    assert matches(" La Paz.", bolivia)
    saint = Question("q", "Q", Fact("Grenada", "capital", "Saint George's", ("St. George's",)))
    assert matches(" St. George's", saint)
    assert matches(" Saint Georges", saint)
    assert not matches(" St", saint)


def test_every_answer_matches_its_own_question() -> None:
    for question in questions():
        for answer in (question.answer, *question.aliases):
            assert matches(f" {answer}", question), question
            assert matches(f" {answer}.", question), question


def test_numbers_and_symbols_are_not_confused() -> None:
    assert not matches(" 2", about("number", "iron"))
    assert not matches(" 260", about("number", "iron"))
    assert not matches(" F", about("symbol", "iron"))


def test_the_pocket_package_imports_no_torch() -> None:
    code = (
        "import sys, forgetless.data.pocket, forgetless.data.pocket.knowledge, "
        "forgetless.data.pocket.problems, "
        "forgetless.data.pocket.corpus; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
