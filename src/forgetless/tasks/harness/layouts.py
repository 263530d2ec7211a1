"""The standard tasks: their files in the lm-evaluation-harness, and the forms their data come in.

A data set is published with other fields than the harness's data sets on the hub have; a layout
says how its rows become the harness's. Rows that have the harness's own fields stay as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from forgetless.data.files import Row

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
    "dev": ("dev",),
}
"""The words by which the file of a split is known, by the harness's name of the split."""


@dataclass(frozen=True)
class Layout:
    """One form of the rows of a data set.

    Attributes:
        keys: what a row of this form has.
        convert: gives the row that the harness's task reads.
        overrides: settings of the harness's task that differ for this form.
    """

    keys: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Standard:
    """A task of the harness whose data may be local files.

    Attributes:
        summary: one line.
        yaml: its file, or that of its group, below the harness's folder of tasks.
        folders: names that the data set's folder or files go by.
        splits: the harness's name of each. The task is scored on "test" where it has that split
            and a file for it, else "validation".
        layouts: forms of its rows; the first that fits is taken.
        word: what the names of its files must contain, where several data sets share a folder.
        members: of a group: the file of each task by its name, and the rows that belong to it.
        belongs: of a group: the value of a row that `members` maps to its task.
    """

    summary: str
    yaml: str
    folders: tuple[str, ...]
    splits: tuple[str, ...]
    layouts: tuple[Layout, ...]
    word: str = ""
    members: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    belongs: Callable[[Row], str] | None = None


def _as_is(*keys: str) -> Layout:
    return Layout(keys, lambda row: {key: row[key] for key in keys})


# HellaSwag as other tools keep it: the question is already put together and cleaned.
_PREPARED_HELLASWAG = Layout(
    ("query", "choices", "label"),
    lambda row: {"query": row["query"], "choices": row["choices"], "label": int(row["label"])},
    {"process_docs": None},
)


def _choices(row: Row) -> dict[str, list[str]]:
    return {key: [str(value) for value in row["choices"][key]] for key in ("text", "label")}


def _with_choices(question: str) -> Layout:
    """A question with choices and their labels, as ARC has them."""
    return Layout(
        (question, "choices", "answerKey"),
        lambda row: {
            question: row[question],
            "choices": _choices(row),
            "answerKey": row["answerKey"],
        },
    )


_ARC = _with_choices("question")


def _plain_question(text: str) -> str:
    """What is asked, of 'Question: ... Answer:'."""
    return text.removeprefix("Question:").strip().removesuffix("Answer:").strip()


def _lettered(row: Row) -> dict[str, Any]:
    """From a finished prompt, a list of choices and the number of the right one."""
    texts = [str(choice) for choice in row["choices"]]
    letters = list("ABCDEFGH"[: len(texts)])
    return {
        "question": _plain_question(row["query"]),
        "choices": {"text": texts, "label": letters},
        "answerKey": letters[int(row["label"])],
    }


_PREPARED_ARC = Layout(("query", "choices", "label"), _lettered)


def _trivia(row: Row) -> dict[str, Any]:
    """From 'Question: ...? Answer:' with the accepted answers beside it."""
    question = _plain_question(row["context"])
    aliases = [str(alias) for alias in row["aliases"]]
    if row["answer"] not in aliases:
        aliases.insert(0, str(row["answer"]))
    return {"question": question, "answer": {"value": row["answer"], "aliases": aliases}}


_TRIVIA = (
    Layout(
        ("question", "answer"),
        lambda row: {
            "question": row["question"],
            "answer": {key: row["answer"][key] for key in ("value", "aliases")},
        },
    ),
    Layout(("context", "answer", "aliases"), _trivia),
)

_MATH_SUBJECTS = {
    "Algebra": ("hendrycks_math_algebra", "algebra"),
    "Counting & Probability": ("hendrycks_math_counting_and_prob", "counting_and_prob"),
    "Geometry": ("hendrycks_math_geometry", "geometry"),
    "Intermediate Algebra": ("hendrycks_math_intermediate_algebra", "intermediate_algebra"),
    "Number Theory": ("hendrycks_math_num_theory", "num_theory"),
    "Prealgebra": ("hendrycks_math_prealgebra", "prealgebra"),
    "Precalculus": ("hendrycks_math_precalc", "precalc"),
}

# fmt: off
_MMLU_SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge",
    "college_biology", "college_chemistry", "college_computer_science", "college_mathematics",
    "college_medicine", "college_physics", "computer_security", "conceptual_physics",
    "econometrics", "electrical_engineering", "elementary_mathematics", "formal_logic",
    "global_facts", "high_school_biology", "high_school_chemistry",
    "high_school_computer_science", "high_school_european_history", "high_school_geography",
    "high_school_government_and_politics", "high_school_macroeconomics",
    "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history",
    "high_school_world_history", "human_aging", "human_sexuality", "international_law",
    "jurisprudence", "logical_fallacies", "machine_learning", "management", "marketing",
    "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law",
    "professional_medicine", "professional_psychology", "public_relations", "security_studies",
    "sociology", "us_foreign_policy", "virology", "world_religions",
)
# fmt: on

STANDARD: Mapping[str, Standard] = {
    "hellaswag": Standard(
        "which sentence goes on (multiple choice)",
        "hellaswag/hellaswag.yaml",
        ("hellaswag",),
        ("train", "validation"),
        (_as_is("ctx_a", "ctx_b", "activity_label", "endings", "label"), _PREPARED_HELLASWAG),
    ),
    "arc_challenge": Standard(
        "hard science questions (multiple choice)",
        "arc/arc_challenge.yaml",
        ("arc", "arc_challenge", "ai2_arc"),
        ("train", "validation", "test"),
        (_ARC, _PREPARED_ARC),
        word="challenge",
    ),
    "arc_easy": Standard(
        "easy science questions (multiple choice)",
        "arc/arc_easy.yaml",
        ("arc", "arc_easy", "ai2_arc"),
        ("train", "validation", "test"),
        (_ARC, _PREPARED_ARC),
        word="easy",
    ),
    "winogrande": Standard(
        "what a pronoun stands for (two choices)",
        "winogrande/default.yaml",
        ("winogrande",),
        ("train", "validation"),
        (_as_is("sentence", "option1", "option2", "answer"),),
    ),
    "triviaqa": Standard(
        "trivia questions, no text given (exact match)",
        "triviaqa/default.yaml",
        ("triviaqa", "trivia_qa"),
        ("train", "validation"),
        _TRIVIA,
    ),
    "nq_open": Standard(
        "questions to a search engine (exact match)",
        "nq_open/nq_open.yaml",
        ("nq_open", "nq", "natural_questions"),
        ("train", "validation"),
        (_as_is("question", "answer"),),
    ),
    "webqs": Standard(
        "questions about entities (an answer is the most probable text)",
        "webqs/webqs.yaml",
        ("webqs", "webquestions", "web_questions"),
        ("train", "test"),
        (
            _as_is("question", "answers"),
            Layout(
                ("qText", "answers"),
                lambda row: {"question": row["qText"], "answers": list(row["answers"])},
            ),
        ),
    ),
    "gsm8k": Standard(
        "grade-school maths with worked examples (exact match)",
        "gsm8k/gsm8k.yaml",
        ("gsm8k",),
        ("train", "test"),
        (_as_is("question", "answer"),),
    ),
    "hendrycks_math": Standard(
        "MATH: competition problems of seven subjects (equal answers)",
        "hendrycks_math/hendrycks_math.yaml",
        ("math", "hendrycks_math", "competition_math"),
        ("train", "test"),
        (_as_is("problem", "solution"),),
        members={
            subject: (name, f"hendrycks_math/hendrycks_math_{file}.yaml")
            for subject, (name, file) in _MATH_SUBJECTS.items()
        },
        belongs=lambda row: str(row.get("type", row.get("subject", ""))),
    ),
    "mmlu": Standard(
        "exams of 57 subjects (multiple choice)",
        "mmlu/default/_mmlu.yaml",
        ("mmlu",),
        ("test", "dev"),
        (_as_is("question", "choices", "answer"),),
        members={
            subject: (f"mmlu_{subject}", f"mmlu/default/mmlu_{subject}.yaml")
            for subject in _MMLU_SUBJECTS
        },
        belongs=lambda row: str(row.get("subject", "")),
    ),
    "piqa": Standard(
        "everyday physics (two choices)",
        "piqa/piqa.yaml",
        ("piqa",),
        ("train", "validation"),
        (_as_is("goal", "sol1", "sol2", "label"),),
    ),
    "boolq": Standard(
        "yes or no about a text",
        "super_glue/boolq/default.yaml",
        ("boolq",),
        ("train", "validation"),
        (
            _as_is("question", "passage", "label"),
            Layout(
                ("question", "passage", "answer"),
                lambda row: {
                    "question": row["question"],
                    "passage": row["passage"],
                    "label": int(row["answer"]),
                },
            ),
        ),
    ),
    "openbookqa": Standard(
        "elementary science (multiple choice)",
        "openbookqa/openbookqa.yaml",
        ("openbookqa",),
        ("train", "validation", "test"),
        (_with_choices("question_stem"),),
    ),
    "social_iqa": Standard(
        "why people do things (multiple choice)",
        "siqa/siqa.yaml",
        ("siqa", "social_i_qa", "social_iqa"),
        ("train", "validation"),
        (_as_is("context", "question", "answerA", "answerB", "answerC", "label"),),
    ),
    "commonsense_qa": Standard(
        "common knowledge (multiple choice)",
        "commonsense_qa/default.yaml",
        ("commonsense_qa", "commonsenseqa", "csqa"),
        ("train", "validation"),
        (_ARC,),
    ),
    "lambada_openai": Standard(
        "the last word of a story (exact)",
        "lambada/lambada_openai.yaml",
        ("lambada_openai", "lambada"),
        ("test",),
        (
            _as_is("text"),
            Layout(
                ("context", "continuation"),
                lambda row: {"text": f"{row['context']} {row['continuation']}"},
            ),
        ),
    ),
}
